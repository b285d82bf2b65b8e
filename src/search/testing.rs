//! Rows, encoders and prompt sets for tests of search and of the modules that use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use chrono::DateTime;
use image::RgbImage;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::snapshot::{ServingRole, ServingSnapshot};
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::{StatisticsKey, StatisticsSettings};
use crate::catalogue::ServingConfig;
use crate::clip::{ClipError, Encoders, ModelCard, Pixels, UnreadText};
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::record::{Attributes, Embedding, ImageId, ImageRow, SequenceKey, StoredImage};

/// Returns a random unit vector that is distributed like CLIP's embeddings: around a common mean, with
/// two dimensions that spread far.
pub fn clip_like_embedding(seed: u64, dimension: usize) -> Vec<f32> {
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

/// Returns an upsert, or a delete if `embedding` is `None`.
pub fn sample_row(id: &str, sequence: u64, embedding: Option<Vec<f32>>) -> ImageRow {
    ImageRow {
        image_id: ImageId::new(id).unwrap(),
        sequence: SequenceKey::from_number(sequence),
        event_time: DateTime::from_timestamp(sequence as i64, 0),
        embedded_at: DateTime::from_timestamp(1, 0).unwrap(),
        image: embedding.map(|embedding| StoredImage {
            uri: None,
            content_hash: String::new(),
            byte_size: 0,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::from_unit_vector(&embedding),
            statistics: [].into(),
            decoding: None,
        }),
    }
}

/// Fake encoders that embed texts and pictures by their hash. A word is a token.
pub struct HashEncoders {
    pub card: ModelCard,
    /// Number of consecutive failures that it reports.
    pub failures: AtomicU32,
    /// Number of pictures that it has embedded.
    pub embedded_images: AtomicU32,
}

impl HashEncoders {
    /// Creates encoders with embeddings of `dimension` values.
    pub fn new(dimension: usize) -> Arc<Self> {
        Arc::new(Self {
            card: ModelCard::without_checkpoint("hashed", dimension),
            failures: AtomicU32::default(),
            embedded_images: AtomicU32::default(),
        })
    }

    /// Embeds the bytes of a text or the pixels of a picture.
    pub fn embed_bytes(&self, bytes: &[u8]) -> Vec<f32> {
        let seed =
            bytes.iter().fold(17u64, |seed, b| seed.wrapping_mul(31).wrapping_add((*b).into()));
        clip_like_embedding(seed, self.card.dimension)
    }
}

impl Encoders for HashEncoders {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn consecutive_failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(image.as_raw().clone()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        self.embedded_images.fetch_add(batch.len() as u32, Ordering::Relaxed);
        Ok(batch.iter().map(|pixels| self.embed_bytes(&pixels.0)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(texts.iter().map(|text| self.embed_bytes(text.as_bytes())).collect())
    }

    fn find_unread(&self, text: &str) -> UnreadText {
        let words = text.split(' ').skip(self.card.context_length).collect::<Vec<_>>();
        UnreadText { tail: words.join(" "), ..UnreadText::default() }
    }
}

/// Returns a prompt set of six prompts with random embeddings.
pub fn sample_prompt_set(name: &str, dimension: usize) -> Arc<EmbeddedPromptSet> {
    let texts: Vec<String> = (0..6).map(|i| format!("{name} {i}")).collect();
    let embeddings =
        (0..6).map(|i| clip_like_embedding(name.len() as u64 * 1000 + i, dimension)).collect();
    let set = PromptSet::new(name, texts);
    let settings = StatisticsSettings::with_top_k(3);
    Arc::new(EmbeddedPromptSet::from_embeddings(set, embeddings, 100.0, settings))
}

/// Returns a live configuration that serves the first of `sets`.
pub fn sample_serving_snapshot(sets: Vec<Arc<EmbeddedPromptSet>>) -> ServingSnapshot {
    let first = sets.first().map(|set| set.statistics_key.clone());
    let serving = ServingConfig::new(
        first.unwrap_or_else(|| StatisticsKey::from_stored("none")),
        Normaliser::Softmax,
        0.5,
    );
    ServingSnapshot {
        state_revision: 1,
        generation_id: "g".into(),
        configuration_name: "live".into(),
        role: ServingRole::Live,
        prompt_sets: sets,
        serving,
        candidate: None,
    }
}
