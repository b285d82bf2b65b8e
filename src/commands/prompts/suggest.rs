//! `bsap prompts suggest` with judged queries: chooses prompts, normaliser and weight by them.

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::suggest_shared::{
    ChosenBalance, LoadedCatalogue, PromptsSuggestArgs, load_corpus, make_candidate, write_set,
};
use crate::balance::normalise::Normaliser;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::progress_bar;
use crate::commands::shared::query_files::{read_judged_queries, read_query_logs};
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ChosenPrompts, ConfigurationResolver, ConfigurationSpec,
    FALSE_HIT_MEASURE, MeasuredDifference, PromptPool, PromptSuggestion, classify_difference,
};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Chooses prompts for the stored catalogue, and writes them.
pub async fn suggest_set(
    args: &PromptsSuggestArgs,
    queries: &Path,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let judged_queries = read_judged_queries(queries, "--queries")?;
    let logged = read_query_logs(&args.query_log)?;
    let loaded = load_corpus(&config, &token).await?;
    let LoadedCatalogue { store, state, encoders, corpus } = &loaded;
    let embed = |record| EmbeddedPromptSet::from_record(record, &**encoders).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    evaluate::check_both_halves_judged(&judged_queries, corpus).map_err(CommandError::usage)?;

    let mut pool = PromptPool::without_judged_queries(&judged_queries);
    let logged = logged.into_texts(args.min_count);
    pool.add_texts(logged.iter().map(String::as_str));
    args.add_files(&mut pool)?;
    for name in &args.attributes {
        let values = corpus.images.iter().filter_map(|image| image.attributes.get(name));
        let previous_count = pool.texts.len();
        pool.add_texts(values.map(String::as_str));
        if pool.texts.len() == previous_count {
            print_line!("Note: no image has an attribute {name:?} with a new text.");
        }
    }
    args.add_builtin_sets(&mut pool)?;
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
    let set = args.prompt_set(pool.texts);
    let settings = config.prompts.statistics_settings();
    let suggestion = tokio::task::block_in_place(|| {
        let pool = set.embed(&**encoders, settings)?;
        let mut resolver =
            ConfigurationResolver::new(corpus, Some(state), state.serving.clone(), sets, settings);
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
    print_suggestion(args, &suggestion)?;
    let Some((candidate, chosen)) = args.candidate.as_ref().zip(suggestion.chosen_prompts) else {
        return Ok(());
    };
    let ChosenPrompts { prompt_set, normaliser, weight, lambda } = chosen;
    let evaluation_fingerprint = Some(suggestion.test_report.fingerprint);
    let balance = ChosenBalance { normaliser, weight, lambda, evaluation_fingerprint };
    // The set of the file, which has another name than the subset that was tried.
    let all: Vec<usize> = (0..prompt_set.prompt_set.texts.len()).collect();
    let set = prompt_set.subset(&args.name, &all);
    make_candidate(&config, &loaded, set, candidate, balance, &token).await
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
