//! `bsap demo` itself: broker, storage, workers and page in one process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::MultiProgress;
use tokio_util::sync::CancellationToken;

use super::arguments::DemoArgs;
use super::folder::{check_writable, prepare_folder};
use super::score::{render_right_counts, render_score};
use crate::balance::normalise::Normaliser;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::in_process::system::{LocalSystem, SystemPlan, shorten_waits};
use crate::commands::shared::models::load_configured_model;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::progress_bar;
use crate::commands::shared::result_table::render_side_by_side;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::demo::shop::DemoShop;
use crate::demo::truth::DrawnTruth;
use crate::demo::{DEMO_MODEL_FOLDER, DEMO_STATISTICS, EXAMPLE_QUERIES};
use crate::ingest::Progress;
use crate::search::{Engine, Query};
use crate::serve::http::{self, RightAnswers, SearchResponse, Substitute};
use crate::serve::result_judge::ResultJudge as _;

/// The same seed gives the same pictures at every run.
const CATALOGUE_SEED: u64 = 20;

/// Workers that share the topic, as they would on several machines.
const WORKER_COUNT: usize = 2;

const PARTITION_COUNT: i32 = 4;

/// Time between two changes of the catalogue.
const CHANGE_INTERVAL: Duration = Duration::from_secs(3);

/// The demo fails if no further image becomes searchable for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// The demo checks whether its folder can be written if no further image becomes searchable for this long.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// Runs the demo until it is stopped by a signal, or with `--once` until the examples are printed.
pub fn run(args: &DemoArgs) -> CommandResult {
    let _lock = prepare_folder(&args.dir)?;
    let config = demo_config(args).map_err(CommandError::Usage)?;
    run_with_logging(config, |config, token| async {
        let result = run_demo(args, config, token).await;
        result.map_err(|error| error.explain_full_disk(&args.dir, ""))
    })
}

/// Returns the configuration of the demo; everything that is not set here has its default.
fn demo_config(args: &DemoArgs) -> anyhow::Result<Config> {
    let dir = args.dir.canonicalize().with_context(|| format!("--dir: {}", args.dir.display()))?;
    let mut config = Config { attributes: DemoShop::attribute_types(), ..Config::default() };
    config.model.checkpoint = dir.join(DEMO_MODEL_FOLDER).display().to_string();
    config.prompts.sets = vec!["demo".into(), "photographs".into()];
    config.prompts.top_k = DEMO_STATISTICS.top_k;
    config.prompts.temperature = DEMO_STATISTICS.temperature;
    // Chosen on the validation split of synthetic catalogues (docs/balancing.md); a catalogue of
    // photographs needs a choice of its own.
    config.search.normaliser = Normaliser::Nnn;
    config.table.url = dir.join("catalogue").display().to_string();
    config.fetch.file_roots = vec![dir.join("pictures")];
    shorten_waits(&mut config);
    config.http.listen.set_port(if args.once { 0 } else { args.port });
    config.http.example_queries = EXAMPLE_QUERIES.map(String::from).to_vec();
    config.log.file = dir.join("bsap.log");
    Ok(config)
}

/// Returns what the demo has in place of real parts, for the terminal and the page.
fn describe_substitutes(config: &Config) -> Vec<Substitute> {
    let substitute = |component: &str, how_to_replace: &str| Substitute {
        component: component.into(),
        how_to_replace: how_to_replace.into(),
    };
    vec![
        substitute(
            "Kafka is librdkafka's mock cluster in this process; it keeps nothing",
            "kafka.brokers",
        ),
        substitute(
            &format!("Object storage is the folder {}", config.table.url),
            "table.url = \"s3://bucket/prefix\"",
        ),
        substitute(
            "The catalogue is drawn by the program and changes every few seconds",
            "bsap publish",
        ),
        substitute(
            "CLIP is a small model that knows only such drawings",
            "model.checkpoint, prompts.sets",
        ),
    ]
}

async fn run_demo(args: &DemoArgs, mut config: Config, token: CancellationToken) -> CommandResult {
    // A port in use is reported before anything is drawn.
    let listener = http::bind_listener(&config.http).await.map_err(CommandError::usage)?;
    let url = listener.url()?;
    let encoders = load_configured_model(&config)?;
    let notice = encoders.card().notice.clone();
    print_line!("bsap demo: {} drawn pictures, everything in this process", args.images);
    let substitutes = describe_substitutes(&config);
    for substitute in &substitutes {
        print_line!(
            "  {}\n    for the real one set {}",
            substitute.component,
            substitute.how_to_replace
        );
    }
    if let Some(notice) = &notice {
        print_line!("\nNOTE: {notice}\n");
    }

    let truth = Arc::new(DrawnTruth::default());
    let plan = SystemPlan {
        partitions: PARTITION_COUNT,
        workers: WORKER_COUNT,
        maintains_table: false,
        substitutes,
        judge: Some(truth.clone()),
    };
    let mut system =
        LocalSystem::start(plan, &mut config, encoders, Progress::default(), listener, &token)
            .await?;
    let (engine, progress) = (system.engine.clone(), system.progress.clone());
    if !args.once {
        print_line!("\nThe page is at {url} and the log in {}\n", config.log.file.display());
    }

    let (topic, group) = (&config.source.topic, config.source.group_id());
    let publisher = system.broker.new_publisher(&config.kafka, topic, &group)?;
    let mut shop =
        DemoShop::new(&config.fetch.file_roots[0], publisher, CATALOGUE_SEED, args.style);
    let work = async {
        publish_and_wait_until_searchable(args, &mut shop, &progress, &engine, &token).await?;
        if token.is_cancelled() {
            Ok(())
        } else if args.once {
            let snapshot = engine.snapshots().newest();
            let is_searchable = |id: &str| snapshot.metadata(id).is_some();
            verify_all_searchable(
                shop.scenes().keys().map(String::as_str),
                snapshot.len(),
                is_searchable,
            )?;
            print_example_searches(engine.clone(), truth.clone()).await?;
            print_line!("\nAll {} images are there.\n", shop.scenes().len());
            print_score(engine, truth).await
        } else {
            print_score(engine, truth).await?;
            print_line!(
                "\nAdding, changing and deleting a picture every {} s. Ctrl-C ends.\n",
                CHANGE_INTERVAL.as_secs()
            );
            let print_change = |change: crate::demo::shop::ShopChange| {
                print_line!(
                    "{} {}  {:8} {}",
                    chrono::Local::now().format("%H:%M:%S"),
                    change.image_id,
                    change.action,
                    change.title
                );
            };
            Ok(shop.publish_changes(CHANGE_INTERVAL, &token, print_change).await?)
        }
    };
    // Whatever ends first ends the demo; all other parts drain.
    let result = tokio::select! {
        result = work => result,
        ended = system.wait_for_end() => ended,
    };
    let drained = system.shut_down().await;
    result?;
    Ok(drained?)
}

/// Draws and publishes the catalogue, and returns when all of it is searchable.
async fn publish_and_wait_until_searchable(
    args: &DemoArgs,
    shop: &mut DemoShop,
    progress: &Progress,
    engine: &Engine,
    token: &CancellationToken,
) -> anyhow::Result<()> {
    let (count, started) = (u64::from(args.images), Instant::now());
    let bars = MultiProgress::new();
    let published_bar = bars.add(progress_bar("announced", count)?);
    let searchable_bar = bars.add(progress_bar("searchable", count)?);
    let wait_until_searchable = async {
        let mut last_increase = (0, Instant::now());
        let mut last_probe = Instant::now();
        loop {
            let searchable = engine.snapshots().newest().len() as u64;
            searchable_bar.set_position(searchable);
            let dropped = progress.dead_lettered_messages.load(Ordering::Relaxed)
                + progress.not_found_images.load(Ordering::Relaxed);
            if searchable + dropped >= count || token.is_cancelled() {
                return Ok(());
            }
            if searchable > last_increase.0 {
                last_increase = (searchable, Instant::now());
            } else if last_increase.1.elapsed() > STALL_TIMEOUT {
                bail!(
                    "only {searchable} of {count} pictures are searchable, and their number has not grown for {} s; see the log",
                    STALL_TIMEOUT.as_secs()
                );
            } else if last_increase.1.max(last_probe).elapsed() > PROBE_INTERVAL {
                check_writable(&args.dir)?;
                last_probe = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let publish =
        async { Ok(shop.publish_initial_images(count, token, || published_bar.inc(1)).await?) };
    tokio::try_join!(publish, wait_until_searchable)?;
    bars.clear()?;
    if !token.is_cancelled() {
        let seconds = started.elapsed().as_secs_f64();
        print_line!("{count} pictures drawn, announced, embedded and searchable in {seconds:.1} s");
    }
    Ok(())
}

/// Fails unless exactly the published pictures are searchable.
fn verify_all_searchable<'a>(
    published: impl ExactSizeIterator<Item = &'a str>,
    searchable: usize,
    is_searchable: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let total = published.len();
    let missing: Vec<&str> = published.filter(|id| !is_searchable(id)).collect();
    if !missing.is_empty() {
        let examples = missing[..missing.len().min(10)].join(", ");
        bail!("{} of {total} images are missing: {examples}; the log says why", missing.len());
    }
    if searchable != total {
        bail!("{searchable} images are searchable, but {total} were announced");
    }
    Ok(())
}

async fn print_example_searches(engine: Arc<Engine>, truth: Arc<DrawnTruth>) -> anyhow::Result<()> {
    for text in EXAMPLE_QUERIES {
        let (engine, truth) = (engine.clone(), truth.clone());
        let search = move || {
            let query = Query { input: text.into(), k: Some(5), ..Query::default() };
            let results = engine.search(&query)?;
            let snapshot = engine.snapshots().newest();
            let right_answers = RightAnswers::count(&*truth, &query.input, &snapshot);
            let answer = SearchResponse::new(&results);
            anyhow::Ok(match right_answers {
                Some(right_answers) => answer.with_right_answers(&results, &right_answers),
                None => answer,
            })
        };
        let answer = tokio::task::spawn_blocking(search).await??;
        print_line!("\n“{text}”\n{}", render_side_by_side(&answer));
        if let Some(counts) = render_right_counts(&answer) {
            print_line!("{counts}");
        }
    }
    Ok(())
}

async fn print_score(engine: Arc<Engine>, truth: Arc<DrawnTruth>) -> anyhow::Result<()> {
    let score = tokio::task::spawn_blocking(move || truth.score_samples(&engine)).await??;
    print_line!("{}", render_score(score.as_ref()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_missing_images() {
        let error =
            verify_all_searchable(["p-00001", "p-00002"].into_iter(), 0, |_| false).unwrap_err();
        assert!(error.to_string().contains("2 of 2") && error.to_string().contains("p-00002"));
        assert!(verify_all_searchable([].into_iter(), 0, |_| false).is_ok());
    }
}
