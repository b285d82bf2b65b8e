//! Vectors like CLIP's: images and texts in a cone each, clusters, and a few dimensions that spread ten
//! times as far as the others.

use std::sync::Arc;

use bsap::clip::Towers;
use bsap::ingest::decode;
use bsap::balance::normalise::Normaliser;
use bsap::prompts::{EmbeddedSet, PromptSet};
use bsap::record::{AttributeType, Embedding, Image, ImageId, Row, Sequence};
use bsap::search::{Engine, Options, Route, Served};
use bsap::table::{Changes, Part};
use bsap::catalogue::Serving;
use rayon::prelude::*;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Dimensions that spread further, and stand further from 0.
const OUTLIERS: [usize; 4] = [1, 33, 50, 77];
const CLUSTERS: u64 = 1000;
const PROMPTS: u64 = 64;
/// Rows of a commit: whole chunks.
const COMMIT: u64 = 1 << 16;

/// A xorshift generator; the same seed gives the same numbers.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Nearly normal: the sum of four even numbers, with variance 1.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let part = |i: u64| (bits >> (16 * i) & 0xffff) as f32 / 65_536.0 - 0.5;
        (part(0) + part(1) + part(2) + part(3)) * 3f32.sqrt()
    }
}

/// How far a dimension spreads: a falling spectrum, and the outliers.
fn spread(j: usize, dimension: usize) -> f32 {
    let order = (j * 197 + 31) % dimension;
    let falling = 1.0 / (1.0 + 5.0 * order as f32 / dimension as f32);
    if OUTLIERS.contains(&j) { 4.0 } else { falling }
}

fn direction(seed: u64, dimension: usize) -> impl Iterator<Item = f32> {
    let mut random = Random::new(seed);
    (0..dimension).map(move |j| random.normal() * spread(j, dimension))
}

fn unit(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let values: Vec<f32> = values.collect();
    let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / norm).collect()
}

/// The middle of a cone: images and texts have different ones.
pub fn cone(seed: u64, dimension: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let value = |j: usize| {
        let far = if OUTLIERS.contains(&j) { 10.0 } else { 1.0 };
        0.6 * far * random.normal()
    };
    (0..dimension).map(value).collect()
}

fn image(number: u64, cone: &[f32]) -> Vec<f32> {
    let mut random = Random::new(number ^ 0xabcd_0000);
    // A few clusters are large, most are small.
    let place = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
    let cluster = (place * place * CLUSTERS as f64) as u64;
    let own = direction(number + 1_000_000, cone.len());
    unit(
        cone.iter()
            .zip(direction(cluster + 50, cone.len()).zip(own))
            .map(|(m, (c, o))| m + 0.8 * c + 0.6 * o),
    )
}

/// Near a cluster, from the other cone.
pub fn text(number: u64, cone: &[f32]) -> Vec<f32> {
    let own = direction(number + 900_000_000, cone.len());
    let near = direction(number * 37 % CLUSTERS + 50, cone.len());
    unit(cone.iter().zip(near.zip(own)).map(|(m, (c, o))| m + 0.5 * c + 0.7 * o))
}

/// An engine with this many rows, whose vectors are of the model's dimension.
pub fn load(towers: Arc<dyn Towers>, rows: u64, options: Options) -> Result<Engine> {
    let dimension = towers.card().dimension;
    let (images, texts) = (cone(7, dimension), cone(8, dimension));
    let set = PromptSet::new("bench", (0..PROMPTS).map(|i| format!("prompt {i}")).collect());
    let prompts = (0..PROMPTS).map(|i| text(i + 10_000, &texts)).collect();
    let set = Arc::new(EmbeddedSet::of(set, prompts, 100.0, 8));
    let serving = Serving::new(set.key.clone(), Normaliser::Softmax, 0.25);
    let served = Served {
        revision: 1,
        generation: "bench".into(),
        name: "bench".into(),
        stands_as: Route::Live,
        sets: vec![set],
        serving,
        candidate: None,
    };
    let declared = [("part".to_owned(), AttributeType::Integer)].into();
    let engine = Engine::new(towers, served, options).reading(declared, decode::Options::default());
    let runtime = tokio::runtime::Runtime::new()?;
    for (commit, first) in (0..rows).step_by(COMMIT as usize).enumerate() {
        let some = (first..rows.min(first + COMMIT)).into_par_iter();
        let some = some.map(|i| row(i, &image(i, &images)));
        let rows = some.collect::<Result<Vec<Row>, String>>()?;
        let (version, whole) = (commit as u64 + 1, commit == 0);
        let changes = Changes { version, whole, part: Part::All, rows, statistics: Vec::new() };
        runtime.block_on(engine.snapshots().apply(changes))?;
    }
    Ok(engine)
}

fn row(number: u64, embedding: &[f32]) -> Result<Row, String> {
    let image = Image {
        uri: None,
        content_hash: String::new(),
        bytes: 100_000,
        width: 640,
        height: 480,
        // A thousandth of the images each.
        attributes: [("part".into(), (Random::new(number).next() % 1000).to_string())].into(),
        embedding: Embedding::round(embedding),
        statistics: [].into(),
    };
    Ok(Row {
        image_id: ImageId::new(format!("{number:08}")).map_err(|e| e.to_string())?,
        sequence: Sequence::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: Some(image),
    })
}
