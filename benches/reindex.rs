//! Statistics of stored rows for 64 prompts at 512 dimensions, against reading the same columns
//! alone: both sides in one run, alternating.
//!
//!     cargo bench --bench reindex -- [ROWS [FOLDER]]

mod rows;

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bsap::clip::{ClipError, ModelCard, Pixels, Towers};
use bsap::balance::normalise::Normaliser;
use bsap::prompts::PromptSet;
use bsap::record::{Ordering, Partition};
use bsap::backfill::{Job, add_set};
use bsap::store::Store;
use bsap::catalogue::{Generation, Serving, StateStore};
use bsap::table::{PartitionBatch, Stored, Writer};
use futures::StreamExt;
use image::RgbImage;
use tokio_util::sync::CancellationToken;

const DIMENSION: usize = 512;
const PROMPTS: usize = 64;
const FILE: usize = 32_768;
const ROUNDS: u32 = 3;

/// Random directions in the place of a model: what is computed with them costs the same.
struct Random(ModelCard);

impl Towers for Random {
    fn card(&self) -> &ModelCard {
        &self.0
    }

    fn prepare(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(Vec::new()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(batch.iter().map(|_| rows::unit(1, DIMENSION)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let seed = |text: &&str| text.bytes().fold(7u64, |a, b| a.wrapping_mul(31) + u64::from(b));
        Ok(texts.iter().map(|text| rows::unit(seed(text), DIMENSION)).collect())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let rows: usize = arguments.next().map_or(Ok(8 * FILE), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let url = arguments.next().unwrap_or_else(|| folder.path().display().to_string());
    let store = Store::open(&url, &BTreeMap::new())?;
    let towers = Random(ModelCard::stand_in("random", DIMENSION));
    let generation =
        Generation::new("random", &towers.0.fingerprint, DIMENSION, 100.0, Ordering::Sequence);
    let set = |name: &str, version: u32| PromptSet {
        name: name.into(),
        version,
        language: "en".into(),
        notes: String::new(),
        texts: (0..PROMPTS).map(|i| format!("prompt {i} of {version}")).collect(),
    };
    let first = set("first", 1).embed(&towers, 8)?;
    let serving = Serving::new(first.key.clone(), Normaliser::Nnn, 0.25);
    StateStore::new(&store).ensure(&generation, &[first.record()], &serving, "bench").await?;
    fill(&store, &generation, rows).await?;

    let lanes = std::thread::available_parallelism()?.get();
    let per_minute = |time: Duration| rows as f64 / time.as_secs_f64() * 60.0 / 1e6;
    let (mut reading, mut measuring) = (Duration::MAX, Duration::MAX);
    for round in 0..ROUNDS {
        let own = Arc::new(set("bench", round + 2).embed(&towers, 8)?);
        let started = Instant::now();
        let mut stored = Stored::open(&store, &generation).await?;
        let (pending, _) = stored.pending(&own.key).await?;
        let (stored, own_key) = (Arc::new(stored), own.key.clone());
        let reads = pending.into_iter().map(|file| {
            let (stored, key, runtime) =
                (stored.clone(), own_key.clone(), tokio::runtime::Handle::current());
            tokio::task::spawn_blocking(move || {
                runtime.block_on(async {
                    stored
                        .measure(&file, &key, &|values| {
                            std::hint::black_box(values);
                            None
                        })
                        .await
                })
            })
        });
        let mut reads = futures::stream::iter(reads).buffer_unordered(lanes);
        while let Some(read) = reads.next().await {
            read??;
        }
        reading = reading.min(started.elapsed());

        add_set(&store, &generation, &own, "bench").await?;
        let job = Job {
            catalogue: store.clone(),
            generation: generation.clone(),
            set: own,
            attempts: 10,
            lanes,
            settle: Duration::ZERO,
        };
        let started = Instant::now();
        let done = job.run(&|_, _| {}, &CancellationToken::new()).await?;
        assert_eq!(done.rows, rows);
        measuring = measuring.min(started.elapsed());
    }
    println!(
        "{rows} rows, {DIMENSION} dimensions, {PROMPTS} prompts, {lanes} at one time, best of {ROUNDS}"
    );
    println!("  reading alone            {reading:>8.2?}  {:.2} M rows/min", per_minute(reading));
    println!(
        "  reindex, reading included{measuring:>8.2?}  {:.2} M rows/min",
        per_minute(measuring)
    );
    println!("  ratio {:.2}", measuring.as_secs_f64() / reading.as_secs_f64());
    Ok(())
}

async fn fill(store: &Store, generation: &Generation, rows: usize) -> Result<(), Box<dyn Error>> {
    let mut writer = Writer::open(store, generation, 10).await?;
    let partition = Partition { topic: "images".into(), number: 0 };
    let mut expected = None;
    for from in (0..rows).step_by(FILE) {
        let to = (from + FILE).min(rows);
        let of = (from..to).map(|i| Ok((i as i64, rows::row(i, 1, DIMENSION, &[])?)));
        let of = of.collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let one = PartitionBatch {
            partition: partition.clone(),
            expected,
            next_offset: to as i64,
            rows: of,
        };
        writer.append(vec![one]).await?;
        expected = Some(to as i64);
    }
    Ok(())
}
