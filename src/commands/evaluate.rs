//! `bsap evaluate`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use chrono::Utc;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use tokio_util::sync::CancellationToken;

use super::cli::evaluate::{EvaluateArgs, EvaluateRankingsArgs};
use super::drawn::{self, SyntheticCatalogue};
use super::thumbnails::ThumbnailSource;
use super::{CommandError, CommandResult, progress_bar, progress_callback, setup};
use crate::balance::calibration::Calibration;
use crate::balance::normalise::Normaliser;
use crate::catalogue::{CatalogueState, ServingConfig, StateChange, StateStore};
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ConfigurationResolver, ConfigurationSpec, Corpus, CorrectionCost,
    Evaluation, EvaluationPlan, EvaluationReport, JudgedQuery, LoadedGeneration,
    MAX_CONFIGURATIONS, RankingConfiguration, ThresholdTargets, trec,
};
use crate::prompts::EmbeddedPromptSet;
use crate::serve::feedback;
use crate::store::Store;

/// Largest file of queries, and most bytes of stored feedback that are read: it is held in memory.
const MAX_INPUT_BYTES: u64 = 256 << 20;

/// Evaluates on the stored table.
pub async fn run_on_table(
    args: &EvaluateArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let given_queries = queries_from_arguments(args)?;
    let (store, state) = setup::open_catalogue(&config).await?;
    let (source, judged_queries, notes) = match given_queries {
        Some((source, judged_queries)) => (source, judged_queries, Vec::new()),
        None => queries_from_feedback(&store).await?,
    };
    let encoders = setup::load_encoders(&config)?;
    state.live.ensure_compatible(&setup::configured_generation(&config, &*encoders))?;
    let specs = configuration_specs(args, Some(&state))?;
    let embed = |record| EmbeddedPromptSet::from_record(record, &*encoders).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;

    let mut tables = Vec::new();
    let progress = progress_bar("read", 0)?;
    let on_read = progress_callback(&progress);
    tables.push(
        LoadedGeneration::load(&store, "live", &state.live, encoders, &token, &on_read).await?,
    );
    if let Some(standby) = state.standby.as_ref().filter(|_| needs_standby(&specs, &state)) {
        let standby_encoders = setup::load_standby_model(&config, standby)?;
        let generation = &standby.generation;
        tables.push(
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
    progress.finish_and_clear();
    let world = Corpus::from_generations(tables);
    let mut resolver = ConfigurationResolver::new(
        &world,
        Some(&state),
        state.serving.clone(),
        sets,
        config.prompts.top_k,
    );
    let plan = build_plan(args, store.url().to_string(), source, judged_queries, notes);
    let configurations = resolve_configurations(args, &specs, &mut resolver)?;
    let evaluated = tokio::task::block_in_place(|| {
        evaluate_with_progress(&mut resolver, &configurations, plan, &token)
    })?;
    write_outputs(args, &evaluated, &world, &configurations)?;
    write_html_report(args, &evaluated.report, &world, ThumbnailSource::Fetched(&config), &token)
        .await?;
    if let Some(name) = &args.calibrate {
        let index = configuration_index(&configurations, name)?;
        let calibration = build_calibration(&evaluated, &mut resolver, &configurations, index)?;
        if args.store {
            let configuration = &configurations[index];
            store_calibration(&store, &state, &specs[index], configuration, calibration).await?;
        } else {
            say!("{}", serde_json::to_string_pretty(&calibration)?);
        }
    }
    Ok(())
}

/// Evaluates on pictures that are drawn now.
pub async fn run_on_synthetic_catalogue(
    args: &EvaluateArgs,
    token: CancellationToken,
) -> CommandResult {
    if args.store {
        return Err(CommandError::usage(
            "--store: a drawn catalogue has no state; evaluate the stored one",
        ));
    }
    let specs = configuration_specs(args, None)?;
    let catalogue = tokio::task::block_in_place(|| drawn::draw_catalogue(args))?;
    let (name, source) = catalogue.report_names();
    let plan = build_plan(
        args,
        name,
        source,
        catalogue.judged_queries(),
        SyntheticCatalogue::report_notes(),
    );
    let world = catalogue.to_evaluation_catalogue();
    let mut resolver = ConfigurationResolver::new(
        &world,
        None,
        catalogue.serving_config(),
        catalogue.prompt_sets().to_vec(),
        drawn::NNN_TOP_K,
    );
    let configurations = resolve_configurations(args, &specs, &mut resolver)?;
    let evaluated = tokio::task::block_in_place(|| {
        evaluate_with_progress(&mut resolver, &configurations, plan, &token)
    })?;
    write_outputs(args, &evaluated, &world, &configurations)?;
    write_html_report(
        args,
        &evaluated.report,
        &world,
        ThumbnailSource::Synthetic(catalogue.scenes()),
        &token,
    )
    .await?;
    if let Some(name) = &args.calibrate {
        let index = configuration_index(&configurations, name)?;
        let calibration = build_calibration(&evaluated, &mut resolver, &configurations, index)?;
        say!("{}", serde_json::to_string_pretty(&calibration)?);
    }
    Ok(())
}

/// Measures rankings of any program.
pub fn evaluate_rankings(args: &EvaluateRankingsArgs) -> CommandResult {
    let name = |path: &Path| path.display().to_string();
    let qrels = trec::parse_qrels(&read_text_file(&args.qrels, "--qrels")?, &name(&args.qrels));
    let qrels = qrels.map_err(CommandError::usage)?;
    let mut runs = Vec::new();
    for path in &args.runs {
        let run = trec::parse_run(&read_text_file(path, "--run")?, &name(path))
            .map_err(CommandError::usage)?;
        runs.push((name(path), run));
    }
    let measured = trec::measure_runs(&runs, &qrels, &args.k);
    if args.json {
        let names = args.k.measure_names();
        say!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({"measures": names, "runs": measured})
            )?
        );
        return Ok(());
    }
    say!("{}", evaluate::render_runs_terminal(&args.k.measure_names(), &measured));
    Ok(())
}

/// A file's text.
pub(crate) fn read_text_file(path: &Path, option: &str) -> Result<String, CommandError> {
    let problem = || format!("{option}: {}", path.display());
    let size = std::fs::metadata(path).with_context(problem).map_err(CommandError::Usage)?.len();
    if size > MAX_INPUT_BYTES {
        return Err(CommandError::usage(format!(
            "{}: has {size} bytes, more than {MAX_INPUT_BYTES}; take a sample",
            problem()
        )));
    }
    std::fs::read_to_string(path).with_context(problem).map_err(CommandError::Usage)
}

/// The queries of a file: CSV by its name, else JSON lines.
pub(crate) fn read_queries(path: &Path, option: &str) -> Result<Vec<JudgedQuery>, CommandError> {
    let text = read_text_file(path, option)?;
    let name = path.display().to_string();
    let csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let read = if csv { evaluate::queries_from_csv } else { evaluate::queries_from_json_lines };
    read(&text, &name).map_err(CommandError::usage)
}

/// The queries of the file that was given; none where the stored feedback is asked for.
fn queries_from_arguments(
    args: &EvaluateArgs,
) -> Result<Option<(String, Vec<JudgedQuery>)>, CommandError> {
    let (path, option) = match (&args.queries, &args.query_log) {
        (Some(path), _) => (path, "--queries"),
        (None, Some(path)) => (path, "--log"),
        (None, None) => return Ok(None),
    };
    let mut judged_queries = read_queries(path, option)?;
    if option == "--log" {
        for query in &mut judged_queries {
            query.judgements = evaluate::Judgements::Unjudged;
        }
    }
    Ok(Some((path.display().to_string(), judged_queries)))
}

/// Stored feedback, in the order of its objects' names, which are their times.
async fn queries_from_feedback(
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
        let got =
            folder.object_store().get(&object.location).await.map_err(|e| folder.wrap_error(e))?;
        let bytes = got.bytes().await.map_err(|e| folder.wrap_error(e))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
        text.push('\n');
    }
    let (judged_queries, unusable) = evaluate::queries_from_feedback(text.lines());
    if judged_queries.is_empty() {
        bail!("{}: holds no feedback yet; POST /v1/feedback stores it", folder.url());
    }
    let mut notes = vec![
        "Feedback knows only images that were shown: rankings are looked at without all others, and a query counts where something right was said of it.".to_owned(),
    ];
    if unusable > 0 {
        notes.push(format!("{unusable} lines of the feedback could not be used."));
    }
    Ok((folder.url().to_string(), judged_queries, notes))
}

/// What is compared: raw first unless it was given, then what was asked for, or what is served and
/// what may be; last, plain CLIP of the generation that is calibrated, where that is another one.
fn configuration_specs(
    args: &EvaluateArgs,
    state: Option<&CatalogueState>,
) -> Result<Vec<ConfigurationSpec>, CommandError> {
    let mut specs = args.configurations.clone();
    if specs.is_empty() {
        specs.push(ConfigurationSpec::from_base(BaseConfiguration::Live, "live"));
        if let Some(candidate) = state.and_then(|state| state.candidate.as_ref()) {
            specs.push(ConfigurationSpec::from_base(BaseConfiguration::Candidate, &candidate.name));
        }
    }
    if !specs.iter().any(ConfigurationSpec::is_raw) {
        specs.insert(0, ConfigurationSpec::plain_clip());
    }
    if let (Some(calibrated), Some(state)) = (&args.calibrate, state) {
        let plain = evaluate::plain_clip_counterpart(&specs, calibrated, state);
        specs.extend(plain);
    }
    if specs.len() > MAX_CONFIGURATIONS {
        return Err(CommandError::usage(format!(
            "--configuration: {} of them, more than {MAX_CONFIGURATIONS}",
            specs.len()
        )));
    }
    Ok(specs)
}

fn needs_standby(specs: &[ConfigurationSpec], state: &CatalogueState) -> bool {
    specs.iter().any(|spec| spec.reads_standby(state))
}

fn resolve_configurations(
    args: &EvaluateArgs,
    specs: &[ConfigurationSpec],
    resolver: &mut ConfigurationResolver,
) -> Result<Vec<RankingConfiguration>, CommandError> {
    let mut configurations: Vec<RankingConfiguration> = Vec::new();
    for spec in specs {
        let configuration = resolver.resolve(spec).map_err(CommandError::usage)?;
        if configurations.iter().any(|known| known.name == configuration.name) {
            return Err(CommandError::usage(format!(
                "--configuration: {:?} stands twice; give one a name=",
                configuration.name
            )));
        }
        configurations.push(configuration);
    }
    configuration_index(&configurations, &args.baseline)?;
    Ok(configurations)
}

fn configuration_index(
    configurations: &[RankingConfiguration],
    name: &str,
) -> Result<usize, CommandError> {
    configurations.iter().position(|known| known.name == name).ok_or_else(|| {
        let names: Vec<&str> = configurations.iter().map(|known| known.name.as_str()).collect();
        CommandError::usage(format!("{name:?} is none of the configurations: {}", names.join(", ")))
    })
}

fn build_plan(
    args: &EvaluateArgs,
    catalogue: String,
    source: String,
    judged_queries: Vec<JudgedQuery>,
    notes: Vec<String>,
) -> EvaluationPlan {
    let cost = args.minutes_per_false_hit.zip(args.queries_per_day);
    EvaluationPlan {
        catalogue,
        query_source: source,
        queries: judged_queries,
        baseline: args.baseline.clone(),
        cutoffs: args.k.clone(),
        targets: ThresholdTargets {
            target_false_hit_rate: args.target_false_hit_rate,
            max_lost_hits: args.max_lost_hits,
        },
        cost: cost.map(|(minutes_per_false_hit, queries_per_day)| CorrectionCost {
            minutes_per_false_hit,
            queries_per_day,
            hourly_cost: args.hourly_cost,
        }),
        notes,
    }
}

fn evaluate_with_progress(
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    plan: EvaluationPlan,
    token: &CancellationToken,
) -> anyhow::Result<Evaluation> {
    let bar = progress_bar("ranked", plan.ranked_text_count() as u64)?;
    let evaluated = evaluate::evaluate(resolver, configurations, plan, token, &|n| bar.inc(n));
    bar.finish_and_clear();
    Ok(evaluated?)
}

/// Writes a file that an option asked for.
pub(crate) fn write_file(path: &Path, text: &str, option: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{option}: {}", path.display()))
}

/// Prints a report, and writes it as JSON where it was asked for: to a file, or instead.
pub(crate) fn print_report(args: &EvaluateArgs, terminal: &str, json: &str) -> anyhow::Result<()> {
    match &args.json {
        Some(path) if path.as_os_str() == "-" => say!("{json}"),
        Some(path) => {
            say!("{terminal}");
            write_file(path, json, "--json")?;
        }
        None => say!("{terminal}"),
    }
    Ok(())
}

/// Prints and writes what was asked for.
fn write_outputs(
    args: &EvaluateArgs,
    evaluated: &Evaluation,
    world: &Corpus,
    configurations: &[RankingConfiguration],
) -> CommandResult {
    let found = &evaluated.report;
    print_report(args, &evaluate::render_terminal(found), &serde_json::to_string_pretty(found)?)?;
    if let Some(folder) = &args.runs {
        std::fs::create_dir_all(folder).with_context(|| format!("--runs: {}", folder.display()))?;
        for (number, configuration) in configurations.iter().enumerate() {
            let file = folder.join(format!("{}.run", to_file_name(&configuration.name)));
            let run =
                trec::format_run(&evaluated.rankings, evaluated.image_grades.len(), world, number);
            write_file(&file, &run, "--runs")?;
        }
        let qrels = trec::format_qrels(&evaluated.image_grades, world);
        write_file(&folder.join("qrels.txt"), &qrels, "--runs")?;
    }
    Ok(())
}

/// Writes the HTML file, where it was asked for.
async fn write_html_report(
    args: &EvaluateArgs,
    report: &EvaluationReport,
    world: &Corpus,
    source: ThumbnailSource<'_>,
    token: &CancellationToken,
) -> CommandResult {
    let Some(path) = &args.report else { return Ok(()) };
    let source = if args.no_thumbnails { ThumbnailSource::None } else { source };
    let (pictures, missing) = source.load_thumbnails(report, world, token).await?;
    let html = evaluate::render_html(report, &pictures);
    write_file(path, &html, "--report")?;
    // Standard output may be the JSON report.
    remark!("written: {}", path.display());
    if missing > 0 {
        remark!(
            "{missing} pictures could not be fetched and are left out; fetch.file_roots and fetch.store_options say what may be fetched"
        );
    }
    Ok(())
}

/// A configuration's name as the name of a file.
fn to_file_name(name: &str) -> String {
    let legal = |c: char| if c.is_alphanumeric() || "-_.=".contains(c) { c } else { '_' };
    name.chars().map(legal).take(100).collect()
}

/// The thresholds of a configuration, as the state keeps them.
fn build_calibration(
    evaluated: &Evaluation,
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    index: usize,
) -> Result<Calibration, CommandError> {
    let report = &evaluated.report;
    let outcome = &report.configurations[index];
    let found = outcome.thresholds.as_ref().ok_or_else(|| {
        CommandError::usage(format!(
            "--calibrate: {} judged queries are too few; there must be some in both halves",
            report.queries.judged
        ))
    })?;
    let baseline = evaluated.drift_baseline(resolver, configurations, index);
    if baseline.is_none() {
        remark!(
            "--calibrate: what is usual cannot be told from these queries, so that query workers have nothing to compare with (balance.watch); calibrate with --queries"
        );
    }
    Ok(Calibration {
        min_score: found.min_score,
        no_match: found.no_match,
        measured_at: Utc::now(),
        evaluation_fingerprint: report.fingerprint.clone(),
        baseline,
    })
}

/// Writes a calibration with the configuration that it was measured for in the state `measured`, in one
/// revision.
async fn store_calibration(
    store: &Store,
    measured_state: &CatalogueState,
    spec: &ConfigurationSpec,
    configuration: &RankingConfiguration,
    calibration: Calibration,
) -> CommandResult {
    if !spec.is_unmodified_base() {
        return Err(CommandError::usage(
            "--store: thresholds hold for one configuration; only live and candidate are stored: calibrate one of these as it is",
        ));
    }
    let by = setup::actor("bsap evaluate --calibrate");
    let state = StateStore::new(store)
        .update(&by, |mut next| {
            let evaluation = calibration.evaluation_fingerprint.clone();
            // Another model's scores may go by the same name of a prompt set, and the same constants.
            let generation = |state: &CatalogueState| match (spec.base, &state.candidate) {
                (Some(BaseConfiguration::Candidate), Some(candidate)) => {
                    candidate.generation.clone()
                }
                _ => state.live.id.clone(),
            };
            let same_generation = generation(&next) == generation(measured_state);
            let serving: &mut ServingConfig = match (spec.base, &mut next.candidate) {
                (Some(BaseConfiguration::Candidate), Some(candidate)) => {
                    candidate.evaluation_fingerprint = Some(evaluation.clone());
                    &mut candidate.serving
                }
                (Some(BaseConfiguration::Candidate), None) => {
                    bail!("--store: the candidate is gone")
                }
                _ => &mut next.serving,
            };
            let balance = &configuration.balance;
            let raw = balance.normaliser == Normaliser::Raw;
            let key = configuration.prompt_set.as_ref().map(|set| &set.statistics_key);
            let same = same_generation
                && serving.normaliser == balance.normaliser
                && key.is_none_or(|key| *key == serving.prompt_set)
                && (raw || (serving.weight, serving.lambda) == (balance.weight, balance.lambda))
                && serving.scale.is_none_or(|scale| scale == balance.scale);
            if !same {
                bail!(
                    "--store: the configuration was changed while it was measured; measure again"
                );
            }
            serving.calibration = Some(calibration.clone());
            // Scores keep the meaning that the thresholds were measured at.
            serving.scale = Some(balance.scale);
            next.change = StateChange::Calibrated { evaluation_fingerprint: evaluation };
            Ok(Some(next))
        })
        .await?;
    remark!("stored as revision {} of the catalogue's state", state.revision);
    Ok(())
}
