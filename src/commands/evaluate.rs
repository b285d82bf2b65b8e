//! `bsap evaluate`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use chrono::Utc;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use tokio_util::sync::CancellationToken;

use super::cli::evaluate::{EvaluateArgs, RankingsArgs};
use super::drawn::{self, DrawnCatalogue};
use super::thumbnails::Source;
use super::{Done, Failure, bar, parts, steps};
use crate::balance::calibration::Calibration;
use crate::balance::normalise::Normaliser;
use crate::catalogue::{CatalogueState, Change, Serving, StateStore};
use crate::config::Config;
use crate::evaluate::{
    self, Asked, Base, Configuration, CostModel, Evaluated, MAX_CONFIGURATIONS, Plan, Report,
    Resolver, Rows, Spec, Wanted, World, trec,
};
use crate::prompts::EmbeddedSet;
use crate::serve::feedback;
use crate::store::Store;

/// Largest file of queries, and most bytes of stored feedback that are read: it is held in memory.
const MAX_BYTES: u64 = 256 << 20;

/// Evaluates on the stored table.
pub async fn run(args: &EvaluateArgs, config: Config, token: CancellationToken) -> Done {
    let given = given(args)?;
    let (store, state) = parts::catalogue(&config).await?;
    let (source, asked, notes) = match given {
        Some((source, asked)) => (source, asked, Vec::new()),
        None => feedback(&store).await?,
    };
    let towers = parts::towers(&config)?;
    state.live.expect(&parts::generation(&config, &*towers))?;
    let specs = specs(args, Some(&state))?;
    let embed = |record| EmbeddedSet::from_record(record, &*towers).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;

    let mut tables = Vec::new();
    let progress = bar("read", 0)?;
    let on_read = steps(&progress);
    tables.push(Rows::read(&store, "live", &state.live, towers, &token, &on_read).await?);
    if let Some(beside) = state.beside.as_ref().filter(|_| needs_beside(&specs, &state)) {
        let other = parts::beside_model(&config, beside)?;
        let generation = &beside.generation;
        tables.push(Rows::read(&store, "beside", generation, other, &token, &on_read).await?);
    }
    progress.finish_and_clear();
    let world = World::of(tables);
    let mut resolver =
        Resolver::new(&world, Some(&state), state.serving.clone(), sets, config.prompts.top_k);
    let plan = plan(args, store.url().to_string(), source, asked, notes);
    let configurations = resolve(args, &specs, &mut resolver)?;
    let evaluated =
        tokio::task::block_in_place(|| rank(&mut resolver, &configurations, plan, &token))?;
    shown(args, &evaluated, &world, &configurations)?;
    page(args, &evaluated.report, &world, Source::Fetched(&config), &token).await?;
    if let Some(name) = &args.calibrate {
        let place = place(&configurations, name)?;
        let calibration = calibration(&evaluated, &mut resolver, &configurations, place)?;
        if args.store {
            let configuration = &configurations[place];
            store_calibration(&store, &state, &specs[place], configuration, calibration).await?;
        } else {
            say!("{}", serde_json::to_string_pretty(&calibration)?);
        }
    }
    Ok(())
}

/// Evaluates on pictures that are drawn now.
pub async fn run_drawn(args: &EvaluateArgs, token: CancellationToken) -> Done {
    if args.store {
        return Err(Failure::usage(
            "--store: a drawn catalogue has no state; evaluate the stored one",
        ));
    }
    let specs = specs(args, None)?;
    let catalogue = tokio::task::block_in_place(|| drawn::draw(args))?;
    let (name, source) = catalogue.names();
    let plan = plan(args, name, source, catalogue.asked(), DrawnCatalogue::notes());
    let world = catalogue.world();
    let mut resolver =
        Resolver::new(&world, None, catalogue.serving(), catalogue.sets().to_vec(), drawn::TOP_K);
    let configurations = resolve(args, &specs, &mut resolver)?;
    let evaluated =
        tokio::task::block_in_place(|| rank(&mut resolver, &configurations, plan, &token))?;
    shown(args, &evaluated, &world, &configurations)?;
    page(args, &evaluated.report, &world, Source::Drawn(catalogue.scenes()), &token).await?;
    if let Some(name) = &args.calibrate {
        let place = place(&configurations, name)?;
        let calibration = calibration(&evaluated, &mut resolver, &configurations, place)?;
        say!("{}", serde_json::to_string_pretty(&calibration)?);
    }
    Ok(())
}

/// Measures rankings of any program.
pub fn rankings(args: &RankingsArgs) -> Done {
    let name = |path: &Path| path.display().to_string();
    let qrels = trec::qrels(&read(&args.qrels, "--qrels")?, &name(&args.qrels));
    let qrels = qrels.map_err(Failure::usage)?;
    let mut runs = Vec::new();
    for path in &args.runs {
        let run = trec::run(&read(path, "--run")?, &name(path)).map_err(Failure::usage)?;
        runs.push((name(path), run));
    }
    let measured = trec::measure(&runs, &qrels, &args.k);
    if args.json {
        let names = args.k.names();
        say!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({"measures": names, "runs": measured})
            )?
        );
        return Ok(());
    }
    say!("{}", evaluate::terminal_runs(&args.k.names(), &measured));
    Ok(())
}

/// A file's text.
pub(crate) fn read(path: &Path, option: &str) -> Result<String, Failure> {
    let problem = || format!("{option}: {}", path.display());
    let size = std::fs::metadata(path).with_context(problem).map_err(Failure::Usage)?.len();
    if size > MAX_BYTES {
        return Err(Failure::usage(format!(
            "{}: has {size} bytes, more than {MAX_BYTES}; take a sample",
            problem()
        )));
    }
    std::fs::read_to_string(path).with_context(problem).map_err(Failure::Usage)
}

/// The queries of a file: CSV by its name, else JSON lines.
pub(crate) fn queries_of(path: &Path, option: &str) -> Result<Vec<Asked>, Failure> {
    let text = read(path, option)?;
    let name = path.display().to_string();
    let csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let read = if csv { evaluate::from_csv } else { evaluate::from_json_lines };
    read(&text, &name).map_err(Failure::usage)
}

/// The queries of the file that was given; none where the stored feedback is asked for.
fn given(args: &EvaluateArgs) -> Result<Option<(String, Vec<Asked>)>, Failure> {
    let (path, option) = match (&args.queries, &args.log) {
        (Some(path), _) => (path, "--queries"),
        (None, Some(path)) => (path, "--log"),
        (None, None) => return Ok(None),
    };
    let mut asked = queries_of(path, option)?;
    if option == "--log" {
        for asked in &mut asked {
            asked.truth = evaluate::Truth::Unknown;
        }
    }
    Ok(Some((path.display().to_string(), asked)))
}

/// Stored feedback, in the order of its objects' names, which are their times.
async fn feedback(store: &Store) -> anyhow::Result<(String, Vec<Asked>, Vec<String>)> {
    let folder = store.child(feedback::FOLDER);
    let listed = folder.objects().list(None).try_collect::<Vec<_>>().await;
    let mut objects = listed.map_err(|e| folder.error(e))?;
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    objects.retain(|object| object.location.extension() == Some("jsonl"));
    let bytes: u64 = objects.iter().map(|object| object.size).sum();
    if bytes > MAX_BYTES {
        bail!(
            "{}: holds {bytes} bytes, more than {MAX_BYTES}; move old objects away",
            folder.url()
        );
    }
    let mut text = String::new();
    for object in &objects {
        let got = folder.objects().get(&object.location).await.map_err(|e| folder.error(e))?;
        let bytes = got.bytes().await.map_err(|e| folder.error(e))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
        text.push('\n');
    }
    let (asked, unusable) = evaluate::from_feedback(text.lines());
    if asked.is_empty() {
        bail!("{}: holds no feedback yet; POST /v1/feedback stores it", folder.url());
    }
    let mut notes = vec![
        "Feedback knows only images that were shown: rankings are looked at without all others, and a query counts where something right was said of it.".to_owned(),
    ];
    if unusable > 0 {
        notes.push(format!("{unusable} lines of the feedback could not be used."));
    }
    Ok((folder.url().to_string(), asked, notes))
}

/// What is compared: raw first unless it was given, then what was asked for, or what is served and
/// what may be; last, plain CLIP of the generation that is calibrated, where that is another one.
fn specs(args: &EvaluateArgs, state: Option<&CatalogueState>) -> Result<Vec<Spec>, Failure> {
    let mut specs = args.configurations.clone();
    if specs.is_empty() {
        specs.push(Spec::of(Base::Live, "live"));
        if let Some(candidate) = state.and_then(|state| state.candidate.as_ref()) {
            specs.push(Spec::of(Base::Candidate, &candidate.name));
        }
    }
    if !specs.iter().any(Spec::is_raw) {
        specs.insert(0, Spec::raw());
    }
    if let (Some(calibrated), Some(state)) = (&args.calibrate, state) {
        let plain = evaluate::plain_for(&specs, calibrated, state);
        specs.extend(plain);
    }
    if specs.len() > MAX_CONFIGURATIONS {
        return Err(Failure::usage(format!(
            "--configuration: {} of them, more than {MAX_CONFIGURATIONS}",
            specs.len()
        )));
    }
    Ok(specs)
}

fn needs_beside(specs: &[Spec], state: &CatalogueState) -> bool {
    specs.iter().any(|spec| spec.reads_beside(state))
}

fn resolve(
    args: &EvaluateArgs,
    specs: &[Spec],
    resolver: &mut Resolver,
) -> Result<Vec<Configuration>, Failure> {
    let mut configurations: Vec<Configuration> = Vec::new();
    for spec in specs {
        let configuration = resolver.resolve(spec).map_err(Failure::usage)?;
        if configurations.iter().any(|known| known.name == configuration.name) {
            return Err(Failure::usage(format!(
                "--configuration: {:?} stands twice; give one a name=",
                configuration.name
            )));
        }
        configurations.push(configuration);
    }
    place(&configurations, &args.baseline)?;
    Ok(configurations)
}

fn place(configurations: &[Configuration], name: &str) -> Result<usize, Failure> {
    configurations.iter().position(|known| known.name == name).ok_or_else(|| {
        let names: Vec<&str> = configurations.iter().map(|known| known.name.as_str()).collect();
        Failure::usage(format!("{name:?} is none of the configurations: {}", names.join(", ")))
    })
}

fn plan(
    args: &EvaluateArgs,
    catalogue: String,
    source: String,
    asked: Vec<Asked>,
    notes: Vec<String>,
) -> Plan {
    let cost = args.minutes_per_false_hit.zip(args.queries_per_day);
    Plan {
        catalogue,
        source,
        asked,
        baseline: args.baseline.clone(),
        cutoffs: args.k.clone(),
        wanted: Wanted { false_hits: args.false_hits, lost: args.max_loss },
        cost: cost.map(|(minutes_per_false_hit, queries_per_day)| CostModel {
            minutes_per_false_hit,
            queries_per_day,
            wage: args.wage,
        }),
        notes,
    }
}

fn rank(
    resolver: &mut Resolver,
    configurations: &[Configuration],
    plan: Plan,
    token: &CancellationToken,
) -> anyhow::Result<Evaluated> {
    let bar = bar("ranked", plan.texts() as u64)?;
    let evaluated = evaluate::evaluate(resolver, configurations, plan, token, &|n| bar.inc(n));
    bar.finish_and_clear();
    Ok(evaluated?)
}

/// Writes a file that an option asked for.
pub(crate) fn write(path: &Path, text: &str, option: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{option}: {}", path.display()))
}

/// Prints a report, and writes it as JSON where it was asked for: to a file, or instead.
pub(crate) fn told(args: &EvaluateArgs, terminal: &str, json: &str) -> anyhow::Result<()> {
    match &args.json {
        Some(path) if path.as_os_str() == "-" => say!("{json}"),
        Some(path) => {
            say!("{terminal}");
            write(path, json, "--json")?;
        }
        None => say!("{terminal}"),
    }
    Ok(())
}

/// Prints and writes what was asked for.
fn shown(
    args: &EvaluateArgs,
    evaluated: &Evaluated,
    world: &World,
    configurations: &[Configuration],
) -> Done {
    let found = &evaluated.report;
    told(args, &evaluate::terminal(found), &serde_json::to_string_pretty(found)?)?;
    if let Some(folder) = &args.runs {
        std::fs::create_dir_all(folder).with_context(|| format!("--runs: {}", folder.display()))?;
        for (number, configuration) in configurations.iter().enumerate() {
            let file = folder.join(format!("{}.run", file_name(&configuration.name)));
            let run = trec::write_run(&evaluated.ranked, evaluated.right.len(), world, number);
            write(&file, &run, "--runs")?;
        }
        let qrels = trec::write_qrels(&evaluated.right, world);
        write(&folder.join("qrels.txt"), &qrels, "--runs")?;
    }
    Ok(())
}

/// Writes the HTML file, where it was asked for.
async fn page(
    args: &EvaluateArgs,
    report: &Report,
    world: &World,
    source: Source<'_>,
    token: &CancellationToken,
) -> Done {
    let Some(path) = &args.report else { return Ok(()) };
    let source = if args.no_thumbnails { Source::None } else { source };
    let (pictures, missing) = source.of(report, world, token).await?;
    let html = evaluate::html(report, &pictures);
    write(path, &html, "--report")?;
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
fn file_name(name: &str) -> String {
    let legal = |c: char| if c.is_alphanumeric() || "-_.=".contains(c) { c } else { '_' };
    name.chars().map(legal).take(100).collect()
}

/// The thresholds of a configuration, as the state keeps them.
fn calibration(
    evaluated: &Evaluated,
    resolver: &mut Resolver,
    configurations: &[Configuration],
    place: usize,
) -> Result<Calibration, Failure> {
    let report = &evaluated.report;
    let outcome = &report.configurations[place];
    let found = outcome.thresholds.as_ref().ok_or_else(|| {
        Failure::usage(format!(
            "--calibrate: {} judged queries are too few; there must be some in both halves",
            report.queries.judged
        ))
    })?;
    let usual = evaluated.usual(resolver, configurations, place);
    if usual.is_none() {
        remark!(
            "--calibrate: what is usual cannot be told from these queries, so that query workers have nothing to compare with (balance.watch); calibrate with --queries"
        );
    }
    Ok(Calibration {
        min_score: found.min_score,
        no_match: found.no_match,
        at: Utc::now(),
        evaluation: report.fingerprint.clone(),
        usual,
    })
}

/// Writes a calibration with the configuration that it was measured for in the state `measured`, in one
/// revision.
async fn store_calibration(
    store: &Store,
    measured: &CatalogueState,
    spec: &Spec,
    configuration: &Configuration,
    calibration: Calibration,
) -> Done {
    if !spec.as_it_is() {
        return Err(Failure::usage(
            "--store: thresholds hold for one configuration; only live and candidate are stored: calibrate one of these as it is",
        ));
    }
    let by = parts::actor("bsap evaluate --calibrate");
    let state = StateStore::new(store)
        .change(&by, |mut next| {
            let evaluation = calibration.evaluation.clone();
            // Another model's scores may go by the same name of a prompt set, and the same constants.
            let generation = |state: &CatalogueState| match (spec.base, &state.candidate) {
                (Some(Base::Candidate), Some(candidate)) => candidate.generation.clone(),
                _ => state.live.id.clone(),
            };
            let same_generation = generation(&next) == generation(measured);
            let serving: &mut Serving = match (spec.base, &mut next.candidate) {
                (Some(Base::Candidate), Some(candidate)) => {
                    candidate.evaluation = Some(evaluation.clone());
                    &mut candidate.serving
                }
                (Some(Base::Candidate), None) => bail!("--store: the candidate is gone"),
                _ => &mut next.serving,
            };
            let balance = &configuration.balance;
            let raw = balance.normaliser == Normaliser::Raw;
            let key = configuration.set.as_ref().map(|set| &set.key);
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
            next.change = Change::Calibrated { evaluation };
            Ok(Some(next))
        })
        .await?;
    remark!("stored as revision {} of the catalogue's state", state.revision);
    Ok(())
}
