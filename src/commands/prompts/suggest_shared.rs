//! What `bsap prompts suggest` needs with and without judged queries: its arguments, the catalogue, logs of
//! queries, and the candidate that it sets.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::balance::normalise::Normaliser;
use crate::catalogue::CatalogueState;
use crate::clip::Encoders;
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::models::{configured_generation, load_configured_model};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::prompt_statistics::store_statistics;
use crate::commands::shared::query_files::read_text_file;
use crate::config::Config;
use crate::evaluate::{Corpus, LoadedGeneration, PromptPool};
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::rollout::{self, CandidateSpec};
use crate::store::Store;

/// Shipped sets for `--include-builtin`: general captions in English.
const BUILTIN_SETS: [&str; 2] = ["photographs", "ecommerce-en"];
/// Who changes the catalogue, for its history.
const COMMAND: &str = "bsap prompts suggest";

/// `bsap prompts suggest`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The most effective prompts are texts of your own domain: the queries that people type (--query-log), and \
the words that describe your images (--attribute). The pool of texts is ordered so that its first N texts \
cover it as well as possible for every N.

Without judged queries, a part of the queries is held out, the fit of the chosen texts to it is measured, and \
a weight is proposed; what such prompts gained on real data is printed with its uncertainty. From the log of \
last week to a candidate:

  bsap prompts suggest --query-log last-week.log --name recent --out recent.toml --candidate recent

With judged queries (--queries), several N are tried with several normalisers and weights on one \
half of them, and the choice is measured on the other half, together with plain CLIP, the live \
configuration, a random subset and the whole pool.

Without --candidate only the file is written. docs/evaluation.md has more.")]
pub struct PromptsSuggestArgs {
    /// Judged queries, as for `bsap evaluate`; without them, texts are chosen by coverage alone, and a
    /// weight is proposed by fit and concentration
    #[arg(long, value_name = "FILE")]
    pub queries: Option<PathBuf>,
    /// Queries that people typed: the JSON log of query workers (with log.query_text), JSON lines with
    /// `text`, or CSV with a column `text`
    #[arg(long, value_name = "FILE")]
    pub query_log: Vec<PathBuf>,
    /// Leave out queries that occur less often in --query-log, for example those of single users
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub min_count: u64,
    /// Number of prompts, if there are no judged queries
    #[arg(long, default_value_t = 512, value_name = "N", conflicts_with = "queries", value_parser = clap::value_parser!(u16).range(2..=4_096))]
    pub texts: u16,
    /// Attribute of the images whose values are added to the pool, for example title or category
    #[arg(long = "attribute", value_name = "NAME")]
    pub attributes: Vec<String>,
    /// File with one text per line
    #[arg(long, value_name = "FILE")]
    pub pool: Vec<PathBuf>,
    /// Add the shipped general captions to the pool
    #[arg(long)]
    pub include_builtin: bool,
    /// Name of the set
    #[arg(long, default_value = "suggested", value_parser = parse_set_name)]
    pub name: String,
    /// Version of the set
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub set_version: u32,
    /// Language of the texts
    #[arg(long, default_value = "en", value_name = "TAG")]
    pub language: String,
    /// File that the set is written to
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Add the set to the catalogue, compute its statistics for every stored row, and make it the candidate
    /// of this name
    #[arg(long, value_name = "NAME")]
    pub candidate: Option<String>,
}

impl PromptsSuggestArgs {
    /// Returns an error if nothing is given that prompts could be chosen by.
    pub fn validate(&self) -> Result<(), CommandError> {
        if self.queries.is_none() && self.query_log.is_empty() && self.attributes.is_empty() {
            return Err(CommandError::usage(
                "without judged queries (--queries), give --query-log or --attribute: the texts that prompts are chosen from, and that their fit is measured on",
            ));
        }
        Ok(())
    }

    /// Returns the set of these texts that the arguments describe, without notes.
    pub fn prompt_set(&self, texts: Vec<String>) -> PromptSet {
        PromptSet {
            name: self.name.clone(),
            version: self.set_version,
            language: self.language.clone(),
            notes: String::new(),
            texts,
        }
    }

    /// Adds the texts of `--pool`.
    pub fn add_files(&self, pool: &mut PromptPool) -> Result<(), CommandError> {
        for path in &self.pool {
            pool.add_texts(read_text_file(path, "--pool")?.lines());
        }
        Ok(())
    }

    /// Adds the shipped captions, with `--include-builtin`.
    pub fn add_builtin_sets(&self, pool: &mut PromptPool) -> Result<(), CommandError> {
        if self.include_builtin {
            for name in BUILTIN_SETS {
                let set = PromptSet::load_builtin_or_file(name)?;
                pool.add_texts(set.texts.iter().map(String::as_str));
            }
        }
        Ok(())
    }
}

/// The catalogue with its model and all of its images.
pub struct LoadedCatalogue {
    pub store: Store,
    pub state: CatalogueState,
    pub encoders: Arc<dyn Encoders>,
    pub corpus: Corpus,
}

/// How scores are balanced with the chosen prompts.
pub struct ChosenBalance {
    pub normaliser: Normaliser,
    pub weight: f32,
    pub lambda: f32,
    /// Fingerprint of the evaluation that supports it, if there is one.
    pub evaluation_fingerprint: Option<String>,
}

/// Loads the live generation of the catalogue.
pub async fn load_corpus(
    config: &Config,
    token: &CancellationToken,
) -> anyhow::Result<LoadedCatalogue> {
    let (store, state) = open_catalogue(config).await?;
    let encoders = load_configured_model(config)?;
    state.live.ensure_compatible(&configured_generation(config, &*encoders))?;
    let bar = progress_bar("read", 0)?;
    let on_read = progress_callback(&bar);
    let rows =
        LoadedGeneration::load(&store, "live", &state.live, encoders.clone(), token, &on_read)
            .await?;
    bar.finish_and_clear();
    let corpus = Corpus::from_generations(vec![rows]);
    Ok(LoadedCatalogue { store, state, encoders, corpus })
}

/// Adds a set to the catalogue, computes its statistics for every stored row, and makes it the candidate.
pub async fn make_candidate(
    config: &Config,
    catalogue: &LoadedCatalogue,
    set: EmbeddedPromptSet,
    name: &str,
    balance: ChosenBalance,
    token: &CancellationToken,
) -> CommandResult {
    let LoadedCatalogue { store, state, .. } = catalogue;
    let key = set.statistics_key.to_string();
    if !store_statistics(config, store, state, &state.live, set, COMMAND, token).await? {
        return Err(anyhow::anyhow!("interrupted; no candidate was set").into());
    }
    let ChosenBalance { normaliser, weight, lambda, evaluation_fingerprint } = balance;
    let spec = CandidateSpec {
        name: name.to_owned(),
        prompt_set: Some(key.clone()),
        normaliser: Some(normaliser),
        weight: Some(weight),
        lambda: Some(lambda),
        evaluation_fingerprint,
        ..CandidateSpec::default()
    };
    let state = rollout::set_candidate(store, &spec, &actor(COMMAND)).await?;
    print_line!(
        "{name} is the candidate (revision {} of the state): {} at weight {weight}, λ {lambda}, {key}.\n`bsap candidate show` prints what blocks its promotion and how it fits the traffic; `bsap candidate set {name} --shadow 0.05` compares it with the live answers; `bsap promote` makes it live.",
        state.revision,
        normaliser.name()
    );
    Ok(())
}

/// Writes the file of a set.
pub fn write_set(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("--out: {}", path.display()))
}

/// Checks that `text` can be the name of a set.
fn parse_set_name(text: &str) -> Result<String, String> {
    let is_legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if text.is_empty() || !text.chars().all(is_legal) {
        return Err(format!("{text:?} has characters other than letters, digits, - and _"));
    }
    Ok(text.to_owned())
}
