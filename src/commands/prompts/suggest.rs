//! `bsap prompts suggest`: chooses prompts from your own texts by judged queries.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::balance::normalise::Normaliser;
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::models::{configured_generation, load_encoders};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::query_files::{read_queries, read_text_file};
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ChosenPrompts, ConfigurationResolver, ConfigurationSpec, Corpus,
    FALSE_HIT_MEASURE, LoadedGeneration, MeasuredDifference, PromptPool, PromptSuggestion,
    classify_difference,
};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Shipped sets whose texts may be taken: general captions, in the language of the model.
const BUILTIN_SETS: [&str; 2] = ["photographs", "ecommerce-en"];

/// `bsap prompts suggest`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Texts of your own domain as prompts are what wins most: the queries that people type (--log), the words \
that describe your images (--attribute). The pool is ordered so that every beginning covers it as well as \
it can; beginnings of several sizes are tried with several formulas and weights on one half of the judged \
queries, and the choice is measured on the other half, beside plain CLIP, what is served, a random subset \
and the whole pool. Changes nothing but the file. docs/evaluation.md has more.")]
pub struct PromptsSuggestArgs {
    /// Judged queries, as for `bsap evaluate`
    #[arg(long, value_name = "FILE")]
    pub queries: PathBuf,
    /// Texts that people typed: JSON lines or CSV with `text`
    #[arg(long, value_name = "FILE")]
    pub query_log: Vec<PathBuf>,
    /// Attribute of the images whose values are taken, for example title or category
    #[arg(long = "attribute", value_name = "NAME")]
    pub attributes: Vec<String>,
    /// File with a text a line
    #[arg(long, value_name = "FILE")]
    pub pool: Vec<PathBuf>,
    /// Take the shipped general captions too
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
    /// Where the set is written
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Chooses prompts for the stored catalogue, and writes them.
pub async fn suggest_set(
    args: &PromptsSuggestArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let judged_queries = read_queries(&args.queries, "--queries")?;
    let (store, state) = open_catalogue(&config).await?;
    let encoders = load_encoders(&config)?;
    state.live.ensure_compatible(&configured_generation(&config, &*encoders))?;
    let embed = |record| EmbeddedPromptSet::from_record(record, &*encoders).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let progress = progress_bar("read", 0)?;
    let on_read = progress_callback(&progress);
    let rows =
        LoadedGeneration::load(&store, "live", &state.live, encoders.clone(), &token, &on_read)
            .await?;
    progress.finish_and_clear();
    let world = Corpus::from_generations(vec![rows]);
    evaluate::check_enough_judged(&judged_queries, &world).map_err(CommandError::usage)?;

    let mut pool = PromptPool::without_judged_queries(&judged_queries);
    for path in &args.query_log {
        let log = read_queries(path, "--log")?;
        pool.add_texts(log.iter().map(|asked| asked.text.as_str()));
    }
    for path in &args.pool {
        pool.add_texts(read_text_file(path, "--pool")?.lines());
    }
    for name in &args.attributes {
        let values = world.images.iter().filter_map(|picture| picture.attributes.get(name));
        let before = pool.texts.len();
        pool.add_texts(values.map(String::as_str));
        if pool.texts.len() == before {
            print_line!("Note: no image has an attribute {name:?} with a text that is new.");
        }
    }
    if args.include_builtin {
        for name in BUILTIN_SETS {
            pool.add_texts(PromptSet::load(name)?.texts.iter().map(String::as_str));
        }
    }
    if pool.texts.len() < 2 {
        return Err(CommandError::usage(
            "the pool has fewer than 2 texts that are no judged queries; give --log, --attribute, --pool or --shipped",
        ));
    }
    print_line!(
        "{} texts in the pool; {} stand among the judged queries and {} are beyond the largest set",
        pool.texts.len(),
        pool.excluded_as_judged,
        pool.excluded_as_full
    );
    let set = PromptSet {
        name: args.name.clone(),
        version: args.set_version,
        language: args.language.clone(),
        notes: String::new(),
        texts: pool.texts,
    };
    let top_k = config.prompts.top_k;
    let suggestion = tokio::task::block_in_place(|| {
        let pool = set.embed(&*encoders, top_k)?;
        let mut resolver =
            ConfigurationResolver::new(&world, Some(&state), state.serving.clone(), sets, top_k);
        let live =
            resolver.resolve(&ConfigurationSpec::from_base(BaseConfiguration::Live, "live"))?;
        let bar = progress_bar("ranked", judged_queries.len() as u64)?;
        let catalogue = store.url().to_string();
        let found = evaluate::suggest_prompts(
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
        anyhow::Ok(found?)
    })?;
    print_suggestion(args, &suggestion)
}

fn print_suggestion(args: &PromptsSuggestArgs, suggestion: &PromptSuggestion) -> CommandResult {
    print_line!("{}\n", evaluate::render_terminal(&suggestion.test_report));
    let tried = suggestion.selection_report.non_baseline().count();
    let queries = suggestion.selection_report.queries.judged;
    let Some(chosen) = &suggestion.chosen else {
        print_line!(
            "Of {tried} ways none was better than plain CLIP on the {queries} queries for choosing: serve with weight 0."
        );
        return Ok(());
    };
    let figures = suggestion.test_report.configurations.iter().find(|o| o.name == "suggested");
    let column = figures
        .and_then(|outcome| suggestion.test_report.measure_comparison(outcome, FALSE_HIT_MEASURE));
    let gain = column.map_or(String::new(), |c| {
        format!(
            " On the other {} queries its false first hits differ from plain CLIP's by {:+.3} ({:+.3} to {:+.3}).",
            suggestion.test_report.queries.judged, c.gain.mean, c.gain.low, c.gain.high
        )
    });
    let notes = format!(
        "Chosen by bsap prompts suggest out of {tried} ways on {queries} queries, for {}.{gain}\n",
        describe_choice(chosen)
    );
    let set = PromptSet { name: args.name.clone(), notes, ..chosen.prompt_set.prompt_set.clone() };
    write_set(&args.out, &toml::to_string_pretty(&set)?)?;
    print_line!(
        "{} of the texts are in {}, for {}. The row live is what is served now.",
        set.texts.len(),
        args.out.display(),
        describe_choice(chosen)
    );
    let better = |name: &String| {
        let column =
            figures.and_then(|outcome| suggestion.test_report.measure_comparison(outcome, name));
        column
            .is_some_and(|column| classify_difference(name, &column) == MeasuredDifference::Better)
    };
    if !suggestion.test_report.measures.iter().any(better) {
        print_line!(
            "On the half that nothing was chosen on, no measure is measurably better than plain CLIP's: have more queries judged before you switch."
        );
    }
    Ok(())
}

/// How the prompts are to be used.
fn describe_choice(chosen: &ChosenPrompts) -> String {
    let ChosenPrompts { normaliser, weight, lambda, .. } = chosen;
    let strength = match normaliser {
        Normaliser::Nnn => format!(" and λ {lambda}"),
        _ => String::new(),
    };
    format!("normaliser {} with weight {weight}{strength}", normaliser.name())
}

fn write_set(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("--out: {}", path.display()))
}

fn parse_set_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if text.is_empty() || !text.chars().all(legal) {
        return Err(format!("{text:?} has characters other than letters, digits, - and _"));
    }
    Ok(text.to_owned())
}
