//! `bsap demo`: the real parts on stand-ins, in one process.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::MultiProgress;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::cli::demo::{DemoArgs, RenderArgs};
use super::parts::{self, QueryWorker};
use super::{Done, Failure, bar, logged, table_view};
use crate::balance::normalise::Normaliser;
use crate::config::Config;
use crate::demo::broker::Broker;
use crate::demo::shop::{Shop, render_catalogue};
use crate::demo::{EXAMPLES, write_model};
use crate::ingest::{IngestError, Progress};
use crate::publish::Publisher;
use crate::search::{Engine, Query};
use crate::serve::http::{self, SearchAnswer, StandIn};
use crate::telemetry::{metrics, watch};

/// Marks a folder as a demo's, which the next demo may replace.
const MARK: &str = "made-by-bsap-demo";
/// The model's folder gives it its name.
const MODEL: &str = "demo-clip";
/// The same pictures every time.
const SEED: u64 = 20;
/// Workers that share the topic, as they would on several machines.
const WORKERS: usize = 2;
const PARTITIONS: i32 = 4;
/// A change of the catalogue every so often.
const PERIOD: Duration = Duration::from_secs(3);
/// Catching up is given up when nothing is stored for so long.
const STALLED: Duration = Duration::from_secs(120);

/// Runs the demo.
pub fn run(args: &DemoArgs) -> Done {
    prepare(&args.dir).map_err(Failure::Usage)?;
    let config = config(args).map_err(Failure::Usage)?;
    logged(config, |config, token| demo(args, config, token))
}

/// Draws pictures only.
pub fn render(args: &RenderArgs) -> Done {
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("--out: {}", args.out.display()))
        .map_err(Failure::Usage)?;
    let bar = bar("drawn", args.count)?;
    render_catalogue(&args.out, args.seed, args.count, args.style, args.side, |n| bar.inc(n))?;
    bar.finish_and_clear();
    say!("{} pictures and truth.jsonl in {}", args.count, args.out.display());
    Ok(())
}

/// Empties an earlier demo's folder; never anybody else's.
fn prepare(dir: &Path) -> anyhow::Result<()> {
    let problem = || format!("--dir: {}", dir.display());
    std::fs::create_dir_all(dir).with_context(problem)?;
    let used = std::fs::read_dir(dir).with_context(problem)?.next().is_some();
    if used && !dir.join(MARK).exists() {
        bail!(
            "--dir: {} is not empty and was not made by bsap demo; choose another folder",
            dir.display()
        );
    }
    for part in ["pictures", "catalogue", MODEL] {
        match std::fs::remove_dir_all(dir.join(part)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(problem);
            }
            _ => {}
        }
    }
    std::fs::write(dir.join(MARK), "bsap demo replaces what is in this folder.\n")
        .with_context(problem)?;
    std::fs::create_dir_all(dir.join("pictures")).with_context(problem)?;
    write_model(&dir.join(MODEL)).with_context(problem)
}

/// What the demo sets; everything else is as it is by default.
fn config(args: &DemoArgs) -> anyhow::Result<Config> {
    let dir = args.dir.canonicalize().with_context(|| format!("--dir: {}", args.dir.display()))?;
    let mut config = Config { attributes: Shop::attribute_types(), ..Config::default() };
    config.model.checkpoint = dir.join(MODEL).display().to_string();
    config.prompts.sets = vec!["demo".into(), "photographs".into()];
    // Chosen on the validation split of drawn catalogues (docs/balancing.md); photographs need
    // their own choice.
    config.search.normaliser = Normaliser::Nnn;
    config.table.url = dir.join("catalogue").display().to_string();
    config.fetch.file_roots = vec![dir.join("pictures")];
    config.source.drain_seconds = 3;
    // The mock cluster makes everybody wait for a session when a worker joins late.
    config.source.session_timeout_ms = 6_000;
    config.ingest.drain_seconds = 3;
    config.http.listen.set_port(if args.once { 0 } else { args.port });
    config.http.examples = EXAMPLES.map(String::from).to_vec();
    config.log.file = dir.join("bsap.log");
    Ok(config)
}

fn stand_ins(config: &Config) -> Vec<StandIn> {
    let stand_in = |what: &str, real: &str| StandIn { what: what.into(), real: real.into() };
    vec![
        stand_in(
            "Kafka is librdkafka's mock cluster in this process; it keeps nothing",
            "kafka.brokers",
        ),
        stand_in(
            &format!("Object storage is the folder {}", config.table.url),
            "table.url = \"s3://bucket/prefix\"",
        ),
        stand_in(
            "The catalogue is drawn by the program and changes every few seconds",
            "bsap publish",
        ),
        stand_in(
            "CLIP is a small model that knows only such drawings",
            "model.checkpoint, prompts.sets",
        ),
    ]
}

async fn demo(args: &DemoArgs, mut config: Config, token: CancellationToken) -> Done {
    // A port in use shows before anything is drawn.
    let listener = http::listen(&config.http).await.map_err(Failure::usage)?;
    let url = listener.url()?;
    let broker =
        Broker::start(&[(&config.source.topic, PARTITIONS), (&config.dead_letter.topic, 1)])?;
    config.kafka.brokers = broker.brokers();
    let towers = parts::towers(&config)?;
    let notice = towers.card().notice.clone();
    say!("bsap demo: {} drawn pictures, everything in this process", args.images);
    for part in stand_ins(&config) {
        say!("  {}\n    for the real one set {}", part.what, part.real);
    }
    if let Some(notice) = &notice {
        say!("\nNOTE: {notice}\n");
    }

    let progress = Arc::new(Progress::default());
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        let worker = parts::worker(&config, towers.clone(), progress.clone()).await?;
        let store = parts::store(&config).await?;
        parts::governed(&config, &store, &worker, &token).detach_all();
        workers.spawn(worker.run(token.clone()));
    }
    // For the page, which asks the workers what waits.
    let watch = watch::Options { listen: ([127, 0, 0, 1], 0).into(), ..watch::Options::default() };
    let address = watch::start(&watch, progress.clone(), token.child_token()).await;
    metrics::started("worker");
    let asked = address.map(|address| format!("http://{address}").parse());
    config.http.workers = asked.transpose()?.into_iter().collect();
    let worker = parts::query_worker(&config, &[("model.checkpoint", towers)]).await?;
    let app = parts::app(&config, &worker, stand_ins(&config))?;
    let QueryWorker { engines, reader, feedback, .. } = worker;
    tokio::spawn(feedback.run(token.clone()));
    tokio::spawn(engines.clone().keep_watch(token.clone()));
    let engine = engines.live();
    let mut server = JoinSet::new();
    {
        let token = token.clone();
        server.spawn(async move { Ok(reader.run(token).await?) });
    }
    {
        let token = token.clone();
        server.spawn(async move {
            http::serve(app, listener, token).await;
            anyhow::Ok(())
        });
    }
    if !args.once {
        say!("\nThe page is at {url} and the log in {}\n", config.log.file.display());
    }

    let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
    let mut shop = Shop::new(&config.fetch.file_roots[0], publisher, SEED, args.style);
    let work = async {
        catch_up(args.images.into(), &mut shop, &progress, &engine, &token).await?;
        if token.is_cancelled() {
            Ok(())
        } else if args.once {
            let snapshot = engine.snapshots().newest();
            let is_there = |id: &str| snapshot.get(id).is_some();
            missing(shop.scenes().keys().map(String::as_str), snapshot.len(), is_there)?;
            ask(&shop, engine).await
        } else {
            say!(
                "Adding, changing and deleting a picture every {} s. Ctrl-C ends.\n",
                PERIOD.as_secs()
            );
            let told = |change: crate::demo::shop::Change| {
                say!(
                    "{} {}  {:8} {}",
                    chrono::Local::now().format("%H:%M:%S"),
                    change.image_id,
                    change.what,
                    change.title
                );
            };
            Ok(shop.trade(PERIOD, &token, told).await?)
        }
    };
    // Whatever ends first ends the demo; all the others drain.
    let result = tokio::select! {
        result = work => result,
        Some(ended) = workers.join_next() => settled(ended),
        Some(ended) = server.join_next() => ended.map_err(anyhow::Error::from).flatten(),
    };
    token.cancel();
    while let Some(ended) = workers.join_next().await {
        settled(ended)?;
    }
    while let Some(ended) = server.join_next().await {
        ended??;
    }
    drop(broker);
    Ok(result?)
}

fn settled(ended: Result<Result<bool, IngestError>, tokio::task::JoinError>) -> anyhow::Result<()> {
    ended??;
    Ok(())
}

/// Draws and announces the catalogue, and returns when all of it is searchable.
async fn catch_up(
    count: u64,
    shop: &mut Shop,
    progress: &Progress,
    engine: &Engine,
    token: &CancellationToken,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let bars = MultiProgress::new();
    let announced = bars.add(bar("announced", count)?);
    let stored = bars.add(bar("searchable", count)?);
    let watch = async {
        let mut last = (0, Instant::now());
        loop {
            let done = engine.snapshots().newest().len() as u64;
            stored.set_position(done);
            let settled = progress.dead_lettered.load(Ordering::Relaxed)
                + progress.gone.load(Ordering::Relaxed);
            if done + settled >= count || token.is_cancelled() {
                return Ok(());
            }
            if done > last.0 {
                last = (done, Instant::now());
            } else if last.1.elapsed() > STALLED {
                bail!(
                    "only {done} of {count} pictures are searchable, and nothing has moved for {} s; see the log",
                    STALLED.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let open = async { Ok(shop.open(count, token, || announced.inc(1)).await?) };
    tokio::try_join!(open, watch)?;
    bars.clear()?;
    if !token.is_cancelled() {
        let seconds = started.elapsed().as_secs_f64();
        say!("{count} pictures drawn, announced, embedded and searchable in {seconds:.1} s");
    }
    Ok(())
}

/// Every picture that was announced must be found, and no other.
fn missing<'a>(
    announced: impl ExactSizeIterator<Item = &'a str>,
    searchable: usize,
    is_there: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let total = announced.len();
    let missing: Vec<&str> = announced.filter(|id| !is_there(id)).collect();
    if !missing.is_empty() {
        let some = missing[..missing.len().min(10)].join(", ");
        bail!("{} of {total} images are missing: {some}; the log says why", missing.len());
    }
    if searchable != total {
        bail!("{searchable} images are searchable, but {total} were announced");
    }
    Ok(())
}

async fn ask(shop: &Shop, engine: Arc<Engine>) -> anyhow::Result<()> {
    for text in EXAMPLES {
        let query = Query { input: text.into(), k: Some(5), ..Query::default() };
        let asked = engine.clone();
        let results = tokio::task::spawn_blocking(move || asked.search(&query)).await??;
        say!("\n“{text}”\n{}", table_view::side_by_side(&SearchAnswer::new(&results)));
    }
    say!("\nAll {} images are there.", shop.scenes().len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_missing_is_named() {
        let error = missing(["p-00001", "p-00002"].into_iter(), 0, |_| false).unwrap_err();
        assert!(error.to_string().contains("2 of 2") && error.to_string().contains("p-00002"));
        assert!(missing([].into_iter(), 0, |_| false).is_ok());
    }
}
