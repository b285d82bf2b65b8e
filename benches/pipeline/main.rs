//! What the pipeline adds to plain decoding: events from Kafka to committed rows, the towers stubbed
//! by a constant, against decoding the same files on the same cores. Alternating in one run; prints
//! medians and the share of plain decoding's speed that the pipeline reaches.
//!
//!     just bench --bench pipeline [-- PICTURES [ROUNDS]]
//!
//!     just bench --bench pipeline -- trace CHECKPOINT FILE
//!
//! runs it with the towers of a checkpoint instead, and shows where time goes: a trace for
//! <https://ui.perfetto.dev> is written to FILE, and two seconds of it are drawn.
//!
//! Kafka is librdkafka's mock cluster, in this process and on these cores; pictures are drawn JPEGs
//! of 640×640 in a local folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering as AtomicOrdering};
use std::time::{Duration, Instant};

use bsap::clip::{self, ClipError, ClipModel, Encoders, ModelCard, Pixels};
use bsap::demo::broker::MockBroker;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::ingest::dead_letter::{self, DeadLetterWriter};
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::source::{self, Decoder};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::kafka;
use bsap::record::{AttributeTypes, VersionOrdering};
use bsap::store::Store;
use bsap::table::{self, Generation, TableWriter};
use futures::{StreamExt, TryStreamExt};
use image::RgbImage;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::json;
use tokio_util::sync::CancellationToken;

mod trace;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Edge of a picture in pixels.
const IMAGE_SIDE_PX: u32 = 640;
/// Pictures of a trace.
const TRACED_IMAGES: usize = 640;
/// Partitions of the topic.
const PARTITIONS: i32 = 4;
/// Pictures done before the clock starts: joining the group is not what is measured. It stops when
/// the last row is committed.
const WARM_UP_IMAGES: u64 = 64;

/// A model that computes nothing.
struct ConstantEncoders(ModelCard);

impl Encoders for ConstantEncoders {
    fn card(&self) -> &ModelCard {
        &self.0
    }
    fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(Vec::new()))
    }
    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        let mut unit = vec![0.0; self.0.dimension];
        unit[0] = 1.0;
        Ok(vec![unit; batch.len()])
    }
    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(vec![vec![1.0; self.0.dimension]; texts.len()])
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let numbers: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let folder = tempfile::tempdir()?;
    if let [mode, checkpoint, file] = arguments.as_slice()
        && mode == "trace"
    {
        let files = draw_files(folder.path(), TRACED_IMAGES)?;
        return trace::trace_pipeline(&files, checkpoint, Path::new(file));
    }
    let pictures = numbers.first().copied().unwrap_or(3_000);
    let rounds = numbers.get(1).copied().unwrap_or(3);
    let files = draw_files(folder.path(), pictures)?;
    let (mut plain, mut whole) = (Vec::new(), Vec::new());
    let demo = load_clip(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo"))?;
    let encoders = Arc::new(ConstantEncoders(ModelCard { dimension: 512, ..demo.card().clone() }));
    for _ in 0..rounds {
        plain.push(decode_all(&files));
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        whole.push(runtime.block_on(ingest_all(&files, encoders.clone()))?);
    }
    let (plain, whole) = (median(plain), median(whole));
    println!("plain decoding      {plain:8.1} pictures/s");
    println!("events to rows      {whole:8.1} pictures/s");
    println!("share               {:8.2}", whole / plain);
    Ok(())
}

fn load_clip(checkpoint: &str) -> Result<ClipModel> {
    let options =
        clip::ModelOptions { checkpoint: checkpoint.to_owned(), ..clip::ModelOptions::default() };
    Ok(ClipModel::load(&options)?)
}

/// So many files in `folder`.
fn draw_files(folder: &Path, pictures: usize) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> = (0..pictures).map(|n| folder.join(format!("{n}.jpg"))).collect();
    // A few hundred different ones are enough for the cache to be of no help.
    for (n, file) in files.iter().enumerate() {
        match n.checked_sub(200) {
            None => {
                let jpeg =
                    render_jpeg(&Scene::sample(1, n as u64, PhotoStyle::Studio), IMAGE_SIDE_PX)?;
                std::fs::write(file, jpeg)?;
            }
            Some(same) => {
                std::fs::copy(&files[same], file)?;
            }
        }
    }
    let size = files.iter().map(|f| std::fs::metadata(f).map_or(0, |m| m.len())).sum::<u64>();
    println!(
        "{pictures} JPEGs of {IMAGE_SIDE_PX}×{IMAGE_SIDE_PX}, {} KiB each",
        size / pictures as u64 / 1024
    );
    Ok(files)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Pictures a second of reading and decoding alone, on all cores.
#[allow(clippy::expect_used)]
fn decode_all(files: &[PathBuf]) -> f64 {
    let next = AtomicUsize::new(0);
    let options = decode::DecodeOptions::default();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(file) = files.get(next.fetch_add(1, AtomicOrdering::Relaxed)) {
                    let bytes = std::fs::read(file).expect("the file was written above");
                    std::hint::black_box(decode::decode(&bytes, &options).expect("a picture"));
                }
            });
        }
    });
    files.len() as f64 / started.elapsed().as_secs_f64()
}

/// Pictures a second from the topic to the table.
async fn ingest_all(files: &[PathBuf], encoders: Arc<dyn Encoders>) -> Result<f64> {
    let broker = MockBroker::start(&[("images", PARTITIONS), ("images.dead-letters", 1)])?;
    let kafka = kafka::KafkaOptions {
        brokers: broker.bootstrap_servers(),
        ..kafka::KafkaOptions::default()
    };
    let producer: FutureProducer = kafka.producer_config().create()?;
    let events = files.iter().enumerate().map(|(n, file)| {
        let uri = url::Url::from_file_path(file).map_err(|()| "no absolute path")?;
        let id = format!("picture-{n}");
        let event = json!({"image_id": id, "sequence": 1, "uri": uri.as_str()}).to_string();
        Result::<_>::Ok((id, event))
    });
    // Many at one time: a fetch of the mock cluster brings one batch a partition, however small.
    let sent = futures::stream::iter(events).map(|event| async {
        let (id, event) = event?;
        let record = FutureRecord::to("images").key(&id).payload(&event);
        producer.send(record, Duration::from_secs(9)).await.map_err(|(e, _)| e)?;
        Result::<_>::Ok(())
    });
    sent.buffer_unordered(1_000).try_collect::<Vec<()>>().await?;
    let folder = tempfile::tempdir()?;
    let store = Store::open(&folder.path().display().to_string(), &BTreeMap::new())?;
    let card = encoders.card();
    let generation = Generation::new(
        "bench",
        &card.fingerprint,
        card.dimension,
        100.0,
        VersionOrdering::Sequence,
    );
    let source = source::SourceOptions {
        ordering: VersionOrdering::Sequence,
        ..source::SourceOptions::default()
    };
    let fetch = fetch::FetchOptions {
        file_roots: files[0].parent().map(Into::into).into_iter().collect(),
        ..fetch::FetchOptions::default()
    };
    let progress = Arc::new(Progress::default());
    let worker = Worker {
        decoder: Decoder::new(&source, &AttributeTypes::new()),
        source_options: source,
        dead_letter_writer: DeadLetterWriter::new(
            &kafka,
            &dead_letter::DeadLetterOptions::default(),
        )?,
        kafka,
        fetcher: Fetcher::new(&fetch)?,
        decode_options: decode::DecodeOptions::default(),
        encoders,
        prompt_sets: bsap::prompts::ActivePromptSets::default(),
        writer: TableWriter::open(
            &store,
            &generation,
            table::TableOptions::default().max_commit_attempts,
        )
        .await?,
        options: ingest::IngestOptions::default(),
        progress: progress.clone(),
    };
    let token = CancellationToken::new();
    let running = tokio::spawn(worker.run(token.clone()));
    let count = |counter: &AtomicU64| counter.load(AtomicOrdering::Relaxed);
    let (mut first, mut before) = (None, 0);
    while count(&progress.stored_rows) < files.len() as u64 {
        if first.is_none() && count(&progress.embedded) >= WARM_UP_IMAGES {
            (first, before) = (Some(Instant::now()), count(&progress.embedded));
        }
        if running.is_finished() {
            return Err(format!("the worker ended: {:?}", running.await).into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let first = first.ok_or("too few pictures")?;
    let rate = (files.len() as u64 - before) as f64 / first.elapsed().as_secs_f64();
    token.cancel();
    running.await??;
    Ok(rate)
}
