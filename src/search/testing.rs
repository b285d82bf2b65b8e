//! Rows and prompt sets for this module's tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use chrono::DateTime;
use image::RgbImage;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::engine::traffic::Route;
use super::snapshot::Served;
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::Serving;
use crate::clip::{ClipError, ModelCard, Pixels, Towers};
use crate::prompts::{EmbeddedSet, PromptSet};
use crate::record::{Attributes, Embedding, Image, ImageId, Row, Sequence};

/// A unit vector like CLIP's: around a common mean, two dimensions spread far.
pub fn embedding(seed: u64, dimension: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut vector: Vec<f32> = (0..dimension)
        .map(|j| match j {
            1 | 5 => 4.0 + rng.random_range(-4f32..4.0),
            _ => 0.3 + rng.random_range(-1f32..1.0),
        })
        .collect();
    let norm = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    for v in &mut vector {
        *v /= norm;
    }
    vector
}

/// An upsert, or a delete where there is no embedding.
pub fn row(id: &str, sequence: u64, embedding: Option<Vec<f32>>) -> Row {
    Row {
        image_id: ImageId::new(id).unwrap(),
        sequence: Sequence::from_number(sequence),
        event_time: DateTime::from_timestamp(sequence as i64, 0),
        embedded_at: DateTime::from_timestamp(1, 0).unwrap(),
        image: embedding.map(|embedding| Image {
            uri: None,
            content_hash: String::new(),
            bytes: 0,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::round(&embedding),
            statistics: [].into(),
        }),
    }
}

/// A model that knows nothing: texts and pictures are embedded by their hash.
pub struct Hashed {
    pub card: ModelCard,
    /// How often it says that it has failed.
    pub failures: AtomicU32,
    /// Pictures that it has embedded.
    pub pictures: AtomicU32,
}

impl Hashed {
    /// With embeddings of `dimension` values.
    pub fn new(dimension: usize) -> Arc<Self> {
        Arc::new(Self {
            card: ModelCard::stand_in("hashed", dimension),
            failures: AtomicU32::default(),
            pictures: AtomicU32::default(),
        })
    }

    /// Of a text or a picture's pixels.
    pub fn embedding(&self, of: &[u8]) -> Vec<f32> {
        let seed = of.iter().fold(17u64, |seed, b| seed.wrapping_mul(31).wrapping_add((*b).into()));
        embedding(seed, self.card.dimension)
    }
}

impl Towers for Hashed {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    fn prepare(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(image.as_raw().clone()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        self.pictures.fetch_add(batch.len() as u32, Ordering::Relaxed);
        Ok(batch.iter().map(|pixels| self.embedding(&pixels.0)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(texts.iter().map(|text| self.embedding(text.as_bytes())).collect())
    }
}

/// A prompt set of six random prompts.
pub fn set(name: &str, dimension: usize) -> Arc<EmbeddedSet> {
    let texts: Vec<String> = (0..6).map(|i| format!("{name} {i}")).collect();
    let embeddings = (0..6).map(|i| embedding(name.len() as u64 * 1000 + i, dimension)).collect();
    let set = PromptSet::new(name, texts);
    Arc::new(EmbeddedSet::of(set, embeddings, 100.0, 3))
}

/// A configuration that serves the first of `sets`.
pub fn served(sets: Vec<Arc<EmbeddedSet>>) -> Served {
    let first = sets.first().map(|set| set.key.clone());
    let serving = Serving::new(
        first.unwrap_or_else(|| StatisticsKey::from_stored("none")),
        Normaliser::Softmax,
        0.5,
    );
    Served {
        revision: 1,
        generation: "g".into(),
        name: "live".into(),
        stands_as: Route::Live,
        sets,
        serving,
        candidate: None,
    }
}
