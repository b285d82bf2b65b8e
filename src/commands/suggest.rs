//! `bsap prompts suggest`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::cli::evaluate::PromptsSuggestArgs;
use super::evaluate::{read_queries, read_text_file};
use super::{CommandError, CommandResult, progress_bar, progress_callback, setup};
use crate::balance::normalise::Normaliser;
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ChosenPrompts, ConfigurationResolver, ConfigurationSpec, Corpus,
    FALSE_HIT_MEASURE, LoadedGeneration, MeasuredDifference, PromptPool, PromptSuggestion,
    classify_difference,
};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Shipped sets whose texts may be taken: general captions, in the language of the model.
const BUILTIN_SETS: [&str; 2] = ["photographs", "ecommerce-en"];

/// Chooses prompts for the stored catalogue, and writes them.
pub async fn run(
    args: &PromptsSuggestArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let judged_queries = read_queries(&args.queries, "--queries")?;
    let (store, state) = setup::open_catalogue(&config).await?;
    let encoders = setup::load_encoders(&config)?;
    state.live.ensure_compatible(&setup::configured_generation(&config, &*encoders))?;
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
            say!("Note: no image has an attribute {name:?} with a text that is new.");
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
    say!(
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
    say!("{}\n", evaluate::render_terminal(&suggestion.test_report));
    let tried = suggestion.selection_report.non_baseline().count();
    let queries = suggestion.selection_report.queries.judged;
    let Some(chosen) = &suggestion.chosen else {
        say!(
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
    say!(
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
        say!(
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
