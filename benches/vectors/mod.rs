//! Synthetic vectors that are distributed like CLIP's: images and texts in one cone each, clusters,
//! and a few dimensions that spread ten times as far as the others.

use std::sync::Arc;

use bsap::balance::normalise::Normaliser;
use bsap::balance::statistics::StatisticsSettings;
use bsap::catalogue::ServingConfig;
use bsap::clip::Encoders;
use bsap::ingest::decode;
use bsap::prompts::{EmbeddedPromptSet, PromptSet};
use bsap::record::{AttributeType, Embedding, ImageId, ImageRow, SequenceKey, StoredImage};
use bsap::search::{Engine, SearchOptions, ServingRole, ServingSnapshot};
use bsap::table::{SnapshotPart, TableChanges};
use rayon::prelude::*;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Dimensions with a larger spread and a mean further from 0.
const OUTLIER_DIMENSIONS: [usize; 4] = [1, 33, 50, 77];
const CLUSTER_COUNT: u64 = 1000;
const PROMPT_COUNT: u64 = 64;
/// Rows per commit, a multiple of the snapshot's chunk size.
const ROWS_PER_COMMIT: u64 = 1 << 16;

/// A xorshift generator; the same seed gives the same numbers.
struct XorShift(u64);

impl XorShift {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a nearly normal number with variance 1: the scaled sum of four uniform numbers.
    fn next_normal(&mut self) -> f32 {
        let bits = self.next_u64();
        let uniform = |i: u64| (bits >> (16 * i) & 0xffff) as f32 / 65_536.0 - 0.5;
        (uniform(0) + uniform(1) + uniform(2) + uniform(3)) * 3f32.sqrt()
    }
}

/// Returns the spread of a dimension: a decreasing spectrum, and larger values for the outliers.
fn dimension_spread(j: usize, dimension: usize) -> f32 {
    let order = (j * 197 + 31) % dimension;
    let decreasing = 1.0 / (1.0 + 5.0 * order as f32 / dimension as f32);
    if OUTLIER_DIMENSIONS.contains(&j) { 4.0 } else { decreasing }
}

fn random_direction(seed: u64, dimension: usize) -> impl Iterator<Item = f32> {
    let mut random = XorShift::new(seed);
    (0..dimension).map(move |j| random.next_normal() * dimension_spread(j, dimension))
}

fn to_unit_vector(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let values: Vec<f32> = values.collect();
    let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / norm).collect()
}

/// Returns the centre of a cone; images and texts have different ones.
pub fn cone_centre(seed: u64, dimension: usize) -> Vec<f32> {
    let mut random = XorShift::new(seed);
    let value = |j: usize| {
        let distance = if OUTLIER_DIMENSIONS.contains(&j) { 10.0 } else { 1.0 };
        0.6 * distance * random.next_normal()
    };
    (0..dimension).map(value).collect()
}

fn image_vector(number: u64, cone: &[f32]) -> Vec<f32> {
    let mut random = XorShift::new(number ^ 0xabcd_0000);
    // The square makes a few clusters large and most of them small.
    let uniform = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let cluster = (uniform * uniform * CLUSTER_COUNT as f64) as u64;
    let towards_cluster = random_direction(cluster + 50, cone.len());
    let deviation = random_direction(number + 1_000_000, cone.len());
    let values = cone.iter().zip(towards_cluster.zip(deviation));
    to_unit_vector(values.map(|(centre, (cluster, own))| centre + 0.8 * cluster + 0.6 * own))
}

/// Returns a text's vector in `cone`, in the direction of one of the images' clusters.
pub fn text_vector(number: u64, cone: &[f32]) -> Vec<f32> {
    let towards_cluster = random_direction(number * 37 % CLUSTER_COUNT + 50, cone.len());
    let deviation = random_direction(number + 900_000_000, cone.len());
    let values = cone.iter().zip(towards_cluster.zip(deviation));
    to_unit_vector(values.map(|(centre, (cluster, own))| centre + 0.5 * cluster + 0.7 * own))
}

/// Loads an engine with this number of rows, whose vectors have the model's dimension.
pub fn load_engine(
    encoders: Arc<dyn Encoders>,
    rows: u64,
    options: SearchOptions,
) -> Result<Engine> {
    let dimension = encoders.card().dimension;
    let (images, texts) = (cone_centre(7, dimension), cone_centre(8, dimension));
    let set = PromptSet::new("bench", (0..PROMPT_COUNT).map(|i| format!("prompt {i}")).collect());
    let prompts = (0..PROMPT_COUNT).map(|i| text_vector(i + 10_000, &texts)).collect();
    let settings = StatisticsSettings::with_top_k(8);
    let set = Arc::new(EmbeddedPromptSet::from_embeddings(set, prompts, 100.0, settings));
    let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Softmax, 0.25);
    let served = ServingSnapshot {
        state_revision: 1,
        generation_id: "bench".into(),
        configuration_name: "bench".into(),
        role: ServingRole::Live,
        prompt_sets: vec![set],
        serving,
        candidate: None,
    };
    let declared = [("part".to_owned(), AttributeType::Integer)].into();
    let engine = Engine::new(encoders, served, options)
        .with_attributes_and_decoding(declared, decode::DecodeOptions::default());
    let runtime = tokio::runtime::Runtime::new()?;
    for (commit, first) in (0..rows).step_by(ROWS_PER_COMMIT as usize).enumerate() {
        let numbers = (first..rows.min(first + ROWS_PER_COMMIT)).into_par_iter();
        let rows = numbers
            .map(|i| image_row(i, &image_vector(i, &images)))
            .collect::<Result<Vec<ImageRow>, String>>()?;
        let changes = TableChanges {
            table_version: commit as u64 + 1,
            is_full_snapshot: commit == 0,
            part: SnapshotPart::All,
            rows,
        };
        runtime.block_on(engine.snapshots().apply_changes(changes))?;
    }
    Ok(engine)
}

fn image_row(number: u64, embedding: &[f32]) -> Result<ImageRow, String> {
    let image = StoredImage {
        uri: None,
        content_hash: String::new(),
        byte_size: 100_000,
        width: 640,
        height: 480,
        // Each of 1,000 values is that of a thousandth of the images.
        attributes: [("part".into(), (XorShift::new(number).next_u64() % 1000).to_string())].into(),
        embedding: Embedding::from_unit_vector(embedding),
        statistics: [].into(),
        decoding: None,
    };
    Ok(ImageRow {
        image_id: ImageId::new(format!("{number:08}")).map_err(|e| e.to_string())?,
        sequence: SequenceKey::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: Some(image),
    })
}
