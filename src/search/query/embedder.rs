//! Turns the input of a query into a unit vector.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::request::{MAX_WEIGHTED_TEXTS, QueryInput, WeightedText};
use crate::clip::Encoders;
use crate::ingest::decode::{self, decode_image};
use crate::record::to_hex;
use crate::search::error::QueryError;
use crate::search::options::SearchOptions;
use crate::search::snapshot::Snapshot;

/// Largest absolute weight of a weighted text.
const MAX_TEXT_WEIGHT: f32 = 100.0;
/// The direction of a weighted sum that is shorter than this would be noise.
const MIN_NORM: f64 = 1e-3;

/// Embeds queries and caches recent embeddings.
pub struct QueryEmbedder {
    encoders: Arc<dyn Encoders>,
    decode_options: decode::DecodeOptions,
    max_text_chars: usize,
    /// Number of embeddings after which a cache is emptied; 0 disables both caches.
    max_cached_embeddings: usize,
    text_cache: Mutex<HashMap<String, Arc<Vec<f32>>>>,
    /// By SHA-256 of the file. The lock is held while a picture is decoded and embedded, so that this
    /// is done for one picture at a time: decoding takes all the memory, and embedding all the cores,
    /// that one query may use.
    image_cache: Mutex<HashMap<String, Arc<Vec<f32>>>>,
}

impl QueryEmbedder {
    /// Creates an embedder with empty caches.
    pub fn new(encoders: Arc<dyn Encoders>, options: &SearchOptions) -> Self {
        Self {
            encoders,
            decode_options: decode::DecodeOptions::default(),
            max_text_chars: options.max_text_chars,
            max_cached_embeddings: options.cached_queries,
            text_cache: Mutex::default(),
            image_cache: Mutex::default(),
        }
    }

    /// Returns the same embedder with other limits for decoding pictures.
    pub fn with_decode_options(self, decode_options: decode::DecodeOptions) -> Self {
        Self { decode_options, ..self }
    }

    /// Returns the limits for decoding pictures.
    pub fn decode_options(&self) -> &decode::DecodeOptions {
        &self.decode_options
    }

    /// Returns the text and image encoders of the model.
    pub fn encoders(&self) -> &Arc<dyn Encoders> {
        &self.encoders
    }

    /// Returns the unit embedding of `input`. The embedding of an image of the catalogue is read from
    /// `snapshot`. Returns [`QueryError::Cancelled`] if `cancel` is cancelled before the encoder runs.
    pub fn embed_query(
        &self,
        input: &QueryInput,
        snapshot: &Snapshot,
        cancel: &CancellationToken,
    ) -> Result<Arc<Vec<f32>>, QueryError> {
        if cancel.is_cancelled() {
            return Err(QueryError::Cancelled);
        }
        match input {
            QueryInput::Text(text) => self.embed_text("text", text),
            QueryInput::WeightedTexts(texts) => self.embed_weighted_texts(texts),
            QueryInput::ImageId(id) => {
                let embedding = snapshot.embedding(id);
                let embedding = embedding.ok_or_else(|| QueryError::ImageNotFound(id.clone()))?;
                Ok(Arc::new(embedding.values().to_vec()))
            }
            QueryInput::ImageBytes(bytes) => self.embed_image(bytes, cancel),
            QueryInput::Vector(values) => self.normalise_vector(values),
        }
    }

    fn embed_text(&self, field: &'static str, text: &str) -> Result<Arc<Vec<f32>>, QueryError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(QueryError::invalid_field(field, "is empty; say what to look for"));
        }
        let length = text.chars().count();
        if length > self.max_text_chars {
            let reason = format!("has {length} characters, more than {}", self.max_text_chars);
            return Err(QueryError::invalid_field(field, reason));
        }
        let cache = || self.text_cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = cache().get(text) {
            return Ok(embedding.clone());
        }
        let embedding = self.encoders.embed_texts(&[text])?.into_iter().next();
        let embedding = Arc::new(embedding.unwrap_or_default());
        cache_embedding(&mut cache(), self.max_cached_embeddings, text, &embedding);
        Ok(embedding)
    }

    fn embed_weighted_texts(&self, texts: &[WeightedText]) -> Result<Arc<Vec<f32>>, QueryError> {
        let invalid = |reason| QueryError::invalid_field("texts", reason);
        if !(1..=MAX_WEIGHTED_TEXTS).contains(&texts.len()) {
            return Err(invalid(format!(
                "has {} texts; 1 to {MAX_WEIGHTED_TEXTS} can be combined",
                texts.len()
            )));
        }
        let mut sum = vec![0f64; self.encoders.card().dimension];
        for WeightedText { text, weight } in texts {
            if !(-MAX_TEXT_WEIGHT..=MAX_TEXT_WEIGHT).contains(weight) {
                let range = format!("-{MAX_TEXT_WEIGHT} and {MAX_TEXT_WEIGHT}");
                return Err(invalid(format!("the weight {weight} is not between {range}")));
            }
            for (sum, value) in sum.iter_mut().zip(&*self.embed_text("texts", text)?) {
                *sum += f64::from(*weight) * f64::from(*value);
            }
        }
        let unit = to_unit_vector(&sum, MIN_NORM);
        unit.ok_or_else(|| invalid("the weighted texts cancel each other out".into()))
    }

    fn embed_image(
        &self,
        bytes: &[u8],
        cancel: &CancellationToken,
    ) -> Result<Arc<Vec<f32>>, QueryError> {
        let hash = to_hex(&Sha256::digest(bytes));
        let mut cache = self.image_cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = cache.get(&hash) {
            return Ok(embedding.clone());
        }
        // Waiting for the lock may have taken long.
        if cancel.is_cancelled() {
            return Err(QueryError::Cancelled);
        }
        let picture = decode_image(bytes, &self.decode_options);
        let picture = picture.map_err(|e| QueryError::invalid_field("image", e.to_string()))?;
        let pixels = self.encoders.preprocess_image(&picture)?;
        drop(picture);
        let embedding = self.encoders.embed_images(&[pixels])?.into_iter().next();
        let embedding = Arc::new(embedding.unwrap_or_default());
        cache_embedding(&mut cache, self.max_cached_embeddings, &hash, &embedding);
        Ok(embedding)
    }

    fn normalise_vector(&self, values: &[f32]) -> Result<Arc<Vec<f32>>, QueryError> {
        let dimension = self.encoders.card().dimension;
        let invalid = |reason| QueryError::invalid_field("vector", reason);
        if values.len() != dimension {
            let reason = format!("has {} numbers; an embedding has {dimension}", values.len());
            return Err(invalid(reason));
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(invalid(format!("number {i} is not finite")));
        }
        let values: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        to_unit_vector(&values, 0.0)
            .ok_or_else(|| invalid("has length 0 and therefore no direction".into()))
    }
}

/// Adds an embedding to a cache, which is emptied first if it is full.
fn cache_embedding(
    cache: &mut HashMap<String, Arc<Vec<f32>>>,
    max_cached: usize,
    key: &str,
    embedding: &Arc<Vec<f32>>,
) {
    if cache.len() >= max_cached {
        cache.clear();
    }
    if max_cached > 0 {
        cache.insert(key.to_owned(), embedding.clone());
    }
}

/// Returns the vector of length 1 in the same direction; `None` if `vector` is not longer than
/// `min_norm`.
fn to_unit_vector(vector: &[f64], min_norm: f64) -> Option<Arc<Vec<f32>>> {
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    (norm > min_norm).then(|| Arc::new(vector.iter().map(|v| (v / norm) as f32).collect()))
}
