//! Compares a backfill of statistics (64 prompts, 512 dimensions) with reading the same columns
//! alone. Both sides alternate in one run.
//!
//!     cargo bench --bench reindex -- [ROWS [FOLDER]]

mod rows;

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bsap::backfill::{StatisticsBackfill, add_prompt_set};
use bsap::balance::normalise::Normaliser;
use bsap::balance::statistics::StatisticsSettings;
use bsap::catalogue::{ServingConfig, StateStore};
use bsap::clip::{ClipError, Encoders, ModelCard, Pixels};
use bsap::prompts::PromptSet;
use bsap::record::{TopicPartition, VersionOrdering};
use bsap::store::Store;
use bsap::table::{BackfillSource, Generation, PartitionBatch, TableWriter};
use futures::StreamExt;
use image::RgbImage;
use tokio_util::sync::CancellationToken;

const DIMENSION: usize = 512;
const PROMPT_COUNT: usize = 64;
const ROWS_PER_FILE: usize = 32_768;
const MEASURED_ROUNDS: u32 = 3;

/// A model that returns random unit vectors: computations with them cost the same as with real
/// ones.
struct RandomEncoders(ModelCard);

impl Encoders for RandomEncoders {
    fn card(&self) -> &ModelCard {
        &self.0
    }

    fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(Vec::new()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(batch.iter().map(|_| rows::random_unit_vector(1, DIMENSION)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let seed = |text: &&str| text.bytes().fold(7u64, |a, b| a.wrapping_mul(31) + u64::from(b));
        Ok(texts.iter().map(|text| rows::random_unit_vector(seed(text), DIMENSION)).collect())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let rows: usize = arguments.next().map_or(Ok(8 * ROWS_PER_FILE), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let url = arguments.next().unwrap_or_else(|| folder.path().display().to_string());
    let store = Store::open(&url, &BTreeMap::new())?;
    let encoders = RandomEncoders(ModelCard::without_checkpoint("random", DIMENSION));
    let generation = Generation::new(
        "random",
        &encoders.0.fingerprint,
        DIMENSION,
        100.0,
        VersionOrdering::Sequence,
    );
    let set = |name: &str, version: u32| PromptSet {
        name: name.into(),
        version,
        language: "en".into(),
        notes: String::new(),
        texts: (0..PROMPT_COUNT).map(|i| format!("prompt {i} of {version}")).collect(),
    };
    let first = set("first", 1).embed(&encoders, StatisticsSettings::with_top_k(8))?;
    let serving = ServingConfig::new(first.statistics_key.clone(), Normaliser::Nnn, 0.25);
    StateStore::new(&store)
        .initialise_or_extend(&generation, &[first.to_record()], &serving, "bench")
        .await?;
    fill_table(&store, &generation, rows).await?;

    let threads = std::thread::available_parallelism()?.get();
    let per_minute = |time: Duration| rows as f64 / time.as_secs_f64() * 60.0 / 1e6;
    let (mut reading, mut backfilling) = (Duration::MAX, Duration::MAX);
    for round in 0..MEASURED_ROUNDS {
        let prompt_set =
            Arc::new(set("bench", round + 2).embed(&encoders, StatisticsSettings::with_top_k(8))?);
        let started = Instant::now();
        let mut source = BackfillSource::open(&store, &generation).await?;
        let (pending, _) =
            source.list_pending_files_and_coverage(&prompt_set.statistics_key).await?;
        let (source, key) = (Arc::new(source), prompt_set.statistics_key.clone());
        let reads = pending.into_iter().map(|file| {
            let (source, key, runtime) =
                (source.clone(), key.clone(), tokio::runtime::Handle::current());
            tokio::task::spawn_blocking(move || {
                runtime.block_on(async {
                    source
                        .compute_file_statistics(&file, &key, &|values| {
                            std::hint::black_box(values);
                            None
                        })
                        .await
                })
            })
        });
        let mut reads = futures::stream::iter(reads).buffer_unordered(threads);
        while let Some(read) = reads.next().await {
            read??;
        }
        reading = reading.min(started.elapsed());

        add_prompt_set(&store, &generation, &prompt_set, "bench").await?;
        let job = StatisticsBackfill {
            catalogue: store.clone(),
            generation: generation.clone(),
            prompt_set,
            max_commit_attempts: 10,
            max_concurrent_files: threads,
            propagation_delay: Duration::ZERO,
        };
        let started = Instant::now();
        let result = job.run(&|_, _| {}, &CancellationToken::new()).await?;
        assert_eq!(result.measured_row_count, rows);
        backfilling = backfilling.min(started.elapsed());
    }
    println!(
        "{rows} rows, {DIMENSION} dimensions, {PROMPT_COUNT} prompts, {threads} threads, best of {MEASURED_ROUNDS}"
    );
    println!("  reading alone            {reading:>8.2?}  {:.2} M rows/min", per_minute(reading));
    println!(
        "  backfill, reading incl.  {backfilling:>8.2?}  {:.2} M rows/min",
        per_minute(backfilling)
    );
    println!("  ratio {:.2}", backfilling.as_secs_f64() / reading.as_secs_f64());
    Ok(())
}

async fn fill_table(
    store: &Store,
    generation: &Generation,
    rows: usize,
) -> Result<(), Box<dyn Error>> {
    let mut writer = TableWriter::open(store, generation, 10).await?;
    let partition = TopicPartition { topic: "images".into(), number: 0 };
    let mut expected_position = None;
    for from in (0..rows).step_by(ROWS_PER_FILE) {
        let to = (from + ROWS_PER_FILE).min(rows);
        let batch_rows =
            (from..to).map(|i| Ok((i as i64, rows::random_row(i, 1, DIMENSION, &[])?)));
        let batch = PartitionBatch {
            log_number: 0,
            anchor: None,
            last_message: None,
            partition: partition.clone(),
            expected_position,
            next_offset: to as i64,
            rows: batch_rows.collect::<Result<Vec<_>, Box<dyn Error>>>()?,
        };
        writer.append(vec![batch], &CancellationToken::new()).await?;
        expected_position = Some(to as i64);
    }
    Ok(())
}
