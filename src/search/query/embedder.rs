//! From what is asked to a unit vector.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::request::{MAX_WEIGHTED_TEXTS, QueryInput, WeightedText};
use crate::clip::Encoders;
use crate::ingest::decode::{self, decode};
use crate::record::to_hex;
use crate::search::error::QueryError;
use crate::search::options::SearchOptions;
use crate::search::snapshot::Snapshot;

/// Largest weight of a text of a mixture.
const MAX_TEXT_WEIGHT: f32 = 100.0;
/// A sum shorter than this has no direction to speak of.
const MIN_NORM: f64 = 1e-3;

/// Embeds queries, and remembers some.
pub struct QueryEmbedder {
    encoders: Arc<dyn Encoders>,
    decode_options: decode::DecodeOptions,
    max_text_chars: usize,
    max_cached: usize,
    text_cache: Mutex<HashMap<String, Arc<Vec<f32>>>>,
    /// By hash. Holding it is the turn to decode and embed a picture: either takes all the memory
    /// and all the cores that one query may have.
    image_cache: Mutex<HashMap<String, Arc<Vec<f32>>>>,
}

impl QueryEmbedder {
    /// Of `towers`, with nothing remembered.
    pub fn new(towers: Arc<dyn Encoders>, options: &SearchOptions) -> Self {
        Self {
            encoders: towers,
            decode_options: decode::DecodeOptions::default(),
            max_text_chars: options.max_text_chars,
            max_cached: options.cached_queries,
            text_cache: Mutex::default(),
            image_cache: Mutex::default(),
        }
    }

    /// The same, decoding pictures within these limits.
    pub fn with_decode_options(self, decode: decode::DecodeOptions) -> Self {
        Self { decode_options: decode, ..self }
    }

    /// The limits within which pictures are decoded.
    pub fn decode_options(&self) -> &decode::DecodeOptions {
        &self.decode_options
    }

    /// The model.
    pub fn encoders(&self) -> &Arc<dyn Encoders> {
        &self.encoders
    }

    /// The embedding of `input`, an image of which is taken from `snapshot`. Gives up where `left`
    /// says that nobody waits for it any more.
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
        if let Some(known) = cache().get(text) {
            return Ok(known.clone());
        }
        let embedded = self.encoders.embed_texts(&[text])?.into_iter().next();
        let embedding = Arc::new(embedded.unwrap_or_default());
        cache_embedding(&mut cache(), self.max_cached, text, &embedding);
        Ok(embedding)
    }

    fn embed_weighted_texts(&self, texts: &[WeightedText]) -> Result<Arc<Vec<f32>>, QueryError> {
        let invalid = |reason| QueryError::invalid_field("texts", reason);
        if !(1..=MAX_WEIGHTED_TEXTS).contains(&texts.len()) {
            return Err(invalid(format!(
                "has {} texts; 1 to {MAX_WEIGHTED_TEXTS} can be mixed",
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
        if let Some(known) = cache.get(&hash) {
            return Ok(known.clone());
        }
        // It may have waited for its turn for long.
        if cancel.is_cancelled() {
            return Err(QueryError::Cancelled);
        }
        let picture = decode(bytes, &self.decode_options);
        let picture = picture.map_err(|e| QueryError::invalid_field("image", e.to_string()))?;
        let pixels = self.encoders.preprocess_image(&picture)?;
        drop(picture);
        let embedded = self.encoders.embed_images(&[pixels])?.into_iter().next();
        let embedding = Arc::new(embedded.unwrap_or_default());
        cache_embedding(&mut cache, self.max_cached, &hash, &embedding);
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
        let wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        to_unit_vector(&wide, 0.0)
            .ok_or_else(|| invalid("has the length 0, and so no direction".into()))
    }
}

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

/// The vector of length 1 in this direction; none where it is not longer than `shortest`.
fn to_unit_vector(vector: &[f64], min_norm: f64) -> Option<Arc<Vec<f32>>> {
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    (norm > min_norm).then(|| Arc::new(vector.iter().map(|v| (v / norm) as f32).collect()))
}
