//! `bsap prompts suggest`: chooses prompts from the texts of a domain by judged queries.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::balance::normalise::Normaliser;
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::models::{configured_generation, load_configured_model};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::query_files::{read_judged_queries, read_text_file};
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ChosenPrompts, ConfigurationResolver, ConfigurationSpec, Corpus,
    FALSE_HIT_MEASURE, LoadedGeneration, MeasuredDifference, PromptPool, PromptSuggestion,
    classify_difference,
};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Shipped sets for `--include-builtin`: general captions in English.
const BUILTIN_SETS: [&str; 2] = ["photographs", "ecommerce-en"];

/// `bsap prompts suggest`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The most effective prompts are texts of your own domain: the queries that people type (--query-log), and \
the words that describe your images (--attribute). The pool of texts is ordered so that its first N texts \
cover it as well as possible for every N; several N are tried with several normalisers and weights on one \
half of the judged queries, and the choice is measured on the other half, together with plain CLIP, the live \
configuration, a random subset and the whole pool. Only the file is written. docs/evaluation.md has more.")]
pub struct PromptsSuggestArgs {
    /// Judged queries, as for `bsap evaluate`
    #[arg(long, value_name = "FILE")]
    pub queries: PathBuf,
    /// Queries that people typed: JSON lines or CSV with `text`
    #[arg(long, value_name = "FILE")]
    pub query_log: Vec<PathBuf>,
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
}

/// Chooses prompts for the stored catalogue, and writes them.
pub async fn suggest_set(
    args: &PromptsSuggestArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let judged_queries = read_judged_queries(&args.queries, "--queries")?;
    let (store, state) = open_catalogue(&config).await?;
    let encoders = load_configured_model(&config)?;
    state.live.ensure_compatible(&configured_generation(&config, &*encoders))?;
    let embed = |record| EmbeddedPromptSet::from_record(record, &*encoders).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let bar = progress_bar("read", 0)?;
    let on_read = progress_callback(&bar);
    let rows =
        LoadedGeneration::load(&store, "live", &state.live, encoders.clone(), &token, &on_read)
            .await?;
    bar.finish_and_clear();
    let corpus = Corpus::from_generations(vec![rows]);
    evaluate::check_both_halves_judged(&judged_queries, &corpus).map_err(CommandError::usage)?;

    let mut pool = PromptPool::without_judged_queries(&judged_queries);
    for path in &args.query_log {
        let logged_queries = read_judged_queries(path, "--query-log")?;
        pool.add_texts(logged_queries.iter().map(|query| query.text.as_str()));
    }
    for path in &args.pool {
        pool.add_texts(read_text_file(path, "--pool")?.lines());
    }
    for name in &args.attributes {
        let values = corpus.images.iter().filter_map(|image| image.attributes.get(name));
        let previous_count = pool.texts.len();
        pool.add_texts(values.map(String::as_str));
        if pool.texts.len() == previous_count {
            print_line!("Note: no image has an attribute {name:?} with a new text.");
        }
    }
    if args.include_builtin {
        for name in BUILTIN_SETS {
            pool.add_texts(PromptSet::load_builtin_or_file(name)?.texts.iter().map(String::as_str));
        }
    }
    if pool.texts.len() < 2 {
        return Err(CommandError::usage(
            "the pool has fewer than 2 texts that are no judged queries; give --query-log, --attribute, --pool or --include-builtin",
        ));
    }
    print_line!(
        "{} texts in the pool; {} are left out as judged queries, and {} as beyond the largest set",
        pool.texts.len(),
        pool.excluded_judged_count,
        pool.excluded_overflow_count
    );
    let set = PromptSet {
        name: args.name.clone(),
        version: args.set_version,
        language: args.language.clone(),
        notes: String::new(),
        texts: pool.texts,
    };
    let settings = config.prompts.statistics_settings();
    let suggestion = tokio::task::block_in_place(|| {
        let pool = set.embed(&*encoders, settings)?;
        let mut resolver = ConfigurationResolver::new(
            &corpus,
            Some(&state),
            state.serving.clone(),
            sets,
            settings,
        );
        let live =
            resolver.resolve(&ConfigurationSpec::from_base(BaseConfiguration::Live, "live"))?;
        let bar = progress_bar("ranked", judged_queries.len() as u64)?;
        let catalogue = store.url().to_string();
        let suggestion = evaluate::suggest_prompts(
            &mut resolver,
            &pool,
            &live,
            &judged_queries,
            &catalogue,
            &token,
            &|n| {
                bar.inc(n);
            },
        );
        bar.finish_and_clear();
        anyhow::Ok(suggestion?)
    })?;
    print_suggestion(args, &suggestion)
}

/// Prints the evaluation of the choice, and writes the chosen set.
fn print_suggestion(args: &PromptsSuggestArgs, suggestion: &PromptSuggestion) -> CommandResult {
    print_line!("{}\n", evaluate::render_terminal(&suggestion.test_report));
    let tried_count = suggestion.selection_report.non_baseline_results().count();
    let queries = suggestion.selection_report.queries.judged;
    let Some(chosen) = &suggestion.chosen_prompts else {
        print_line!(
            "None of {tried_count} combinations was better than plain CLIP on the {queries} queries for choosing: serve with weight 0."
        );
        return Ok(());
    };
    let outcome = suggestion.test_report.configurations.iter().find(|o| o.name == "suggested");
    let false_hits = outcome
        .and_then(|outcome| suggestion.test_report.measure_comparison(outcome, FALSE_HIT_MEASURE));
    let gain = false_hits.map_or(String::new(), |c| {
        format!(
            " On the other {} queries its rate of false first hits differs from that of plain CLIP by {:+.3} ({:+.3} to {:+.3}).",
            suggestion.test_report.queries.judged, c.gain.mean, c.gain.low, c.gain.high
        )
    });
    let notes = format!(
        "Chosen by bsap prompts suggest out of {tried_count} combinations on {queries} queries, for {}.{gain}\n",
        describe_choice(chosen)
    );
    let set = PromptSet { name: args.name.clone(), notes, ..chosen.prompt_set.prompt_set.clone() };
    write_set(&args.out, &toml::to_string_pretty(&set)?)?;
    print_line!(
        "{} of the texts are in {}, for {}. The row live is the configuration that is served now.",
        set.texts.len(),
        args.out.display(),
        describe_choice(chosen)
    );
    let is_better = |name: &String| {
        let comparison =
            outcome.and_then(|outcome| suggestion.test_report.measure_comparison(outcome, name));
        comparison.is_some_and(|comparison| {
            classify_difference(name, &comparison) == MeasuredDifference::Better
        })
    };
    if !suggestion.test_report.measures.iter().any(is_better) {
        print_line!(
            "On the half of the queries that was not used for choosing, no measure is measurably better than that of plain CLIP: have more queries judged before you switch."
        );
    }
    Ok(())
}

/// Describes the configuration for which the prompts were chosen.
fn describe_choice(chosen: &ChosenPrompts) -> String {
    let ChosenPrompts { normaliser, weight, lambda, .. } = chosen;
    let lambda = match normaliser {
        Normaliser::Nnn => format!(" and λ {lambda}"),
        _ => String::new(),
    };
    format!("normaliser {} with weight {weight}{lambda}", normaliser.name())
}

fn write_set(path: &Path, text: &str) -> anyhow::Result<()> {
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
