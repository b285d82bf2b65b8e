//! `bsap evaluate` on the stored table.

use anyhow::bail;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use tokio_util::sync::CancellationToken;

use super::arguments::EvaluateArgs;
use super::calibration::{build_calibration, store_calibration};
use super::output::{write_html_report, write_outputs};
use super::plan::{
    build_evaluation_plan, configuration_index, configuration_specs, evaluate_with_progress,
    resolve_configurations,
};
use crate::catalogue::CatalogueState;
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::evaluation::embed_prompt_sets;
use crate::commands::shared::evaluation::thumbnails::ThumbnailSource;
use crate::commands::shared::models::{
    configured_generation, load_configured_model, load_standby_model,
};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::query_files::{MAX_INPUT_BYTES, read_judged_queries};
use crate::config::Config;
use crate::diagnosis::redact::redact;
use crate::evaluate::{
    self, ConfigurationResolver, ConfigurationSpec, Corpus, JudgedQuery, LoadedGeneration,
};
use crate::serve::feedback;
use crate::store::Store;

/// Evaluates on the stored table, and calibrates if `--calibrate` is given.
pub async fn evaluate_on_table(
    args: &EvaluateArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let given_queries = queries_from_arguments(args)?;
    let (store, state) = open_catalogue(&config).await?;
    let (source, judged_queries, notes) = match given_queries {
        Some((source, judged_queries)) => (source, judged_queries, Vec::new()),
        None => read_feedback_queries(&store).await?,
    };
    let encoders = load_configured_model(&config)?;
    state.live.ensure_compatible(&configured_generation(&config, &*encoders))?;
    let specs = configuration_specs(args, Some(&state))?;
    let sets = embed_prompt_sets(&state, &*encoders)?;

    let mut generations = Vec::new();
    let bar = progress_bar("read", 0)?;
    let on_read = progress_callback(&bar);
    generations.push(
        LoadedGeneration::load(&store, "live", &state.live, encoders, &token, &on_read).await?,
    );
    if let Some(standby) = state.standby.as_ref().filter(|_| needs_standby(&specs, &state)) {
        let standby_encoders = load_standby_model(&config, standby)?;
        let generation = &standby.generation;
        generations.push(
            LoadedGeneration::load(
                &store,
                "standby",
                generation,
                standby_encoders,
                &token,
                &on_read,
            )
            .await?,
        );
    }
    bar.finish_and_clear();
    let corpus = Corpus::from_generations(generations);
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        Some(&state),
        state.serving.clone(),
        sets,
        config.prompts.statistics_settings(),
    );
    let plan = build_evaluation_plan(
        args,
        redact(store.url().as_str()).into_owned(),
        source,
        judged_queries,
        notes,
    );
    let configurations = resolve_configurations(args, &specs, &mut resolver)?;
    let evaluated = tokio::task::block_in_place(|| {
        evaluate_with_progress(&mut resolver, &configurations, plan, &token)
    })?;
    write_outputs(args, &evaluated, &corpus, &configurations)?;
    write_html_report(args, &evaluated.report, &corpus, ThumbnailSource::Fetched(&config), &token)
        .await?;
    if let Some(name) = &args.calibrate {
        let index = configuration_index(&configurations, name)?;
        let calibration = build_calibration(&evaluated, &mut resolver, &configurations, index)?;
        if args.store {
            let configuration = &configurations[index];
            store_calibration(&store, &state, &specs[index], configuration, calibration).await?;
        } else {
            print_line!("{}", serde_json::to_string_pretty(&calibration)?);
        }
    }
    Ok(())
}

/// Whether one of the configurations ranks the standby generation.
fn needs_standby(specs: &[ConfigurationSpec], state: &CatalogueState) -> bool {
    specs.iter().any(|spec| spec.reads_standby(state))
}

/// Returns the queries of the given file, with its name; `None` if the stored feedback is to be used.
fn queries_from_arguments(
    args: &EvaluateArgs,
) -> Result<Option<(String, Vec<JudgedQuery>)>, CommandError> {
    let (path, option) = match (&args.queries, &args.query_log) {
        (Some(path), _) => (path, "--queries"),
        (None, Some(path)) => (path, "--query-log"),
        (None, None) => return Ok(None),
    };
    let mut judged_queries = read_judged_queries(path, option)?;
    if option == "--query-log" {
        for query in &mut judged_queries {
            query.judgements = evaluate::Judgements::Unjudged;
        }
    }
    Ok(Some((path.display().to_string(), judged_queries)))
}

/// Returns the stored feedback as judged queries, with its address and notes for the report. Objects
/// are read in the order of their names, which are times.
async fn read_feedback_queries(
    store: &Store,
) -> anyhow::Result<(String, Vec<JudgedQuery>, Vec<String>)> {
    let folder = store.subfolder(feedback::FEEDBACK_FOLDER);
    let listed = folder.object_store().list(None).try_collect::<Vec<_>>().await;
    let mut objects = listed.map_err(|e| folder.wrap_error(e))?;
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    objects.retain(|object| object.location.extension() == Some("jsonl"));
    let bytes: u64 = objects.iter().map(|object| object.size).sum();
    if bytes > MAX_INPUT_BYTES {
        bail!(
            "{}: holds {bytes} bytes, more than {MAX_INPUT_BYTES}; move old objects away",
            folder.url()
        );
    }
    let mut text = String::new();
    for object in &objects {
        let object_content =
            folder.object_store().get(&object.location).await.map_err(|e| folder.wrap_error(e))?;
        let bytes = object_content.bytes().await.map_err(|e| folder.wrap_error(e))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
        text.push('\n');
    }
    let (judged_queries, unusable_lines) = evaluate::queries_from_feedback(text.lines());
    if judged_queries.is_empty() {
        bail!("{}: has no feedback yet; POST /v1/feedback stores it", folder.url());
    }
    let mut notes = vec![
        "Feedback judges only images that were shown: all others are removed from the rankings, and a query counts only if an image was judged right for it.".to_owned(),
    ];
    if unusable_lines > 0 {
        notes.push(format!("{unusable_lines} lines of the feedback could not be used."));
    }
    Ok((redact(folder.url().as_str()).into_owned(), judged_queries, notes))
}
