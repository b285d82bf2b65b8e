//! Measures what the pipeline costs on top of decoding: from events in Kafka to committed rows,
//! with a model that returns a constant, compared with decoding the same files on the same cores.
//! Both sides alternate in one run. Prints medians and their ratio.
//!
//!     just bench --bench pipeline [-- PICTURES [ROUNDS]]
//!
//!     just bench --bench pipeline -- trace CHECKPOINT FILE
//!
//! uses the model of a checkpoint instead and shows where time is spent: it writes a trace for
//! <https://ui.perfetto.dev> to FILE and draws two seconds of it.
//!
//!     just bench --bench pipeline -- decode FILES
//!
//! prints how long decoding each of these files takes, the best of 21 times on one core;
//! `benches/pipeline/pillow.py FILES` prints the same for Pillow.
//!
//! Kafka is librdkafka's mock cluster in this process, on the same cores. Pictures are drawn JPEGs
//! of 640×640 pixels in a local folder.

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

/// Width and height of a picture in pixels.
const IMAGE_SIDE_PX: u32 = 640;
/// Number of pictures of a traced run.
const TRACED_IMAGES: usize = 640;
/// How often a file is decoded, of which the fastest counts.
const DECODE_ROUNDS: usize = 21;
/// Number of partitions of the topic.
const PARTITIONS: i32 = 4;
/// Pictures that are embedded before the measurement starts, so that it excludes joining the
/// consumer group. It ends when the last row is committed.
const WARM_UP_IMAGES: u64 = 64;

/// A model that returns a constant.
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
    if let [mode, files @ ..] = arguments.as_slice()
        && mode == "decode"
    {
        return print_decode_times(files);
    }
    let pictures = numbers.first().copied().unwrap_or(3_000);
    let rounds = numbers.get(1).copied().unwrap_or(3);
    let files = draw_files(folder.path(), pictures)?;
    let (mut decode_rates, mut pipeline_rates) = (Vec::new(), Vec::new());
    let demo = load_clip(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo"))?;
    let encoders = Arc::new(ConstantEncoders(ModelCard { dimension: 512, ..demo.card().clone() }));
    for _ in 0..rounds {
        decode_rates.push(decode_all(&files));
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        pipeline_rates.push(runtime.block_on(ingest_all(&files, encoders.clone()))?);
    }
    let (decode_rate, pipeline_rate) = (median(decode_rates), median(pipeline_rates));
    println!("decoding alone      {decode_rate:8.1} pictures/s");
    println!("events to rows      {pipeline_rate:8.1} pictures/s");
    println!("ratio               {:8.2}", pipeline_rate / decode_rate);
    Ok(())
}

fn load_clip(checkpoint: &str) -> Result<ClipModel> {
    let options =
        clip::ModelOptions { checkpoint: checkpoint.to_owned(), ..clip::ModelOptions::default() };
    Ok(ClipModel::load(&options)?)
}

/// Draws this number of pictures into `folder` and returns their files.
fn draw_files(folder: &Path, pictures: usize) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> = (0..pictures).map(|n| folder.join(format!("{n}.jpg"))).collect();
    // 200 different pictures do not fit into the CPU's cache, so that copies are as good as new
    // ones.
    for (n, file) in files.iter().enumerate() {
        match n.checked_sub(200) {
            None => {
                let jpeg =
                    render_jpeg(&Scene::sample(1, n as u64, PhotoStyle::Studio), IMAGE_SIDE_PX)?;
                std::fs::write(file, jpeg)?;
            }
            Some(original) => {
                std::fs::copy(&files[original], file)?;
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

/// Prints the milliseconds that decoding takes, per file.
fn print_decode_times(files: &[String]) -> Result<()> {
    let options = decode::DecodeOptions::default();
    for file in files {
        let bytes = std::fs::read(file)?;
        let mut best = Duration::MAX;
        for _ in 0..DECODE_ROUNDS {
            let started = Instant::now();
            std::hint::black_box(decode::decode_image(&bytes, &options)?);
            best = best.min(started.elapsed());
        }
        println!("{:9.2} ms {file}", best.as_secs_f64() * 1e3);
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Reads and decodes all files on all cores; returns pictures per second.
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
                    std::hint::black_box(
                        decode::decode_image(&bytes, &options).expect("a picture"),
                    );
                }
            });
        }
    });
    files.len() as f64 / started.elapsed().as_secs_f64()
}

/// Ingests all files from the topic to the table; returns pictures per second.
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
    // Sent concurrently, because a fetch from the mock cluster returns one batch per partition,
    // however small.
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
        kafka_options: kafka,
        fetcher: Fetcher::new(&fetch)?,
        decode_options: decode::DecodeOptions::default(),
        encoders,
        prompt_sets: bsap::prompts::ActivePromptSets::default(),
        table_writer: TableWriter::open(
            &store,
            &generation,
            table::TableOptions::default().max_commit_attempts,
        )
        .await?,
        ingest_options: ingest::IngestOptions::default(),
        progress: progress.clone(),
    };
    let token = CancellationToken::new();
    let running = tokio::spawn(worker.run(token.clone()));
    let count = |counter: &AtomicU64| counter.load(AtomicOrdering::Relaxed);
    let (mut started, mut embedded_before) = (None, 0);
    while count(&progress.stored_rows) < files.len() as u64 {
        if started.is_none() && count(&progress.embedded_images) >= WARM_UP_IMAGES {
            (started, embedded_before) = (Some(Instant::now()), count(&progress.embedded_images));
        }
        if running.is_finished() {
            return Err(format!("the worker ended: {:?}", running.await).into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let started = started.ok_or("too few pictures")?;
    let rate = (files.len() as u64 - embedded_before) as f64 / started.elapsed().as_secs_f64();
    token.cancel();
    running.await??;
    Ok(rate)
}
