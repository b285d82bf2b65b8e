//! From what is asked to a unit vector.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Input, MAX_TEXTS, QueryError, WeightedText};
use crate::clip::Towers;
use crate::ingest::decode::{self, decode};
use crate::record::hex;
use crate::search::Options;
use crate::search::snapshot::Snapshot;

/// Largest weight of a text of a mixture.
const MAX_WEIGHT: f32 = 100.0;
/// A sum shorter than this has no direction to speak of.
const SHORTEST: f64 = 1e-3;

/// Embeds queries, and remembers some.
pub struct Embedder {
    towers: Arc<dyn Towers>,
    decode: decode::Options,
    max_text_chars: usize,
    most: usize,
    texts: Mutex<HashMap<String, Arc<Vec<f32>>>>,
    /// By hash. Holding it is the turn to decode and embed a picture: either takes all the memory
    /// and all the cores that one query may have.
    pictures: Mutex<HashMap<String, Arc<Vec<f32>>>>,
}

impl Embedder {
    /// Of `towers`, with nothing remembered.
    pub fn new(towers: Arc<dyn Towers>, options: &Options) -> Self {
        Self {
            towers,
            decode: decode::Options::default(),
            max_text_chars: options.max_text_chars,
            most: options.cached_queries,
            texts: Mutex::default(),
            pictures: Mutex::default(),
        }
    }

    /// The same, decoding pictures within these limits.
    pub fn decoding(self, decode: decode::Options) -> Self {
        Self { decode, ..self }
    }

    /// The limits within which pictures are decoded.
    pub fn decode(&self) -> &decode::Options {
        &self.decode
    }

    /// The model.
    pub fn towers(&self) -> &Arc<dyn Towers> {
        &self.towers
    }

    /// The embedding of `input`, an image of which is taken from `snapshot`. Gives up where `left`
    /// says that nobody waits for it any more.
    pub fn embed(
        &self,
        input: &Input,
        snapshot: &Snapshot,
        left: &CancellationToken,
    ) -> Result<Arc<Vec<f32>>, QueryError> {
        if left.is_cancelled() {
            return Err(QueryError::GivenUp);
        }
        match input {
            Input::Text(text) => self.text("text", text),
            Input::Texts(texts) => self.mixture(texts),
            Input::Image(id) => {
                let embedding = snapshot.embedding(id);
                let embedding = embedding.ok_or_else(|| QueryError::NoImage(id.clone()))?;
                Ok(Arc::new(embedding.values().to_vec()))
            }
            Input::Picture(bytes) => self.picture(bytes, left),
            Input::Vector(values) => self.vector(values),
        }
    }

    fn text(&self, field: &'static str, text: &str) -> Result<Arc<Vec<f32>>, QueryError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(QueryError::invalid(field, "is empty; say what to look for"));
        }
        let length = text.chars().count();
        if length > self.max_text_chars {
            let reason = format!("has {length} characters, more than {}", self.max_text_chars);
            return Err(QueryError::invalid(field, reason));
        }
        let cache = || self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache().get(text) {
            return Ok(known.clone());
        }
        let embedded = self.towers.embed_texts(&[text])?.into_iter().next();
        let embedding = Arc::new(embedded.unwrap_or_default());
        remember(&mut cache(), self.most, text, &embedding);
        Ok(embedding)
    }

    fn mixture(&self, texts: &[WeightedText]) -> Result<Arc<Vec<f32>>, QueryError> {
        let invalid = |reason| QueryError::invalid("texts", reason);
        if !(1..=MAX_TEXTS).contains(&texts.len()) {
            return Err(invalid(format!(
                "has {} texts; 1 to {MAX_TEXTS} can be mixed",
                texts.len()
            )));
        }
        let mut sum = vec![0f64; self.towers.card().dimension];
        for WeightedText { text, weight } in texts {
            if !(-MAX_WEIGHT..=MAX_WEIGHT).contains(weight) {
                let range = format!("-{MAX_WEIGHT} and {MAX_WEIGHT}");
                return Err(invalid(format!("the weight {weight} is not between {range}")));
            }
            for (sum, value) in sum.iter_mut().zip(&*self.text("texts", text)?) {
                *sum += f64::from(*weight) * f64::from(*value);
            }
        }
        let unit = unit(&sum, SHORTEST);
        unit.ok_or_else(|| invalid("the weighted texts cancel each other out".into()))
    }

    fn picture(&self, bytes: &[u8], left: &CancellationToken) -> Result<Arc<Vec<f32>>, QueryError> {
        let hash = hex(&Sha256::digest(bytes));
        let mut cache = self.pictures.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache.get(&hash) {
            return Ok(known.clone());
        }
        // It may have waited for its turn for long.
        if left.is_cancelled() {
            return Err(QueryError::GivenUp);
        }
        let picture = decode(bytes, &self.decode);
        let picture = picture.map_err(|e| QueryError::invalid("image", e.to_string()))?;
        let pixels = self.towers.prepare(&picture)?;
        drop(picture);
        let embedded = self.towers.embed_images(&[pixels])?.into_iter().next();
        let embedding = Arc::new(embedded.unwrap_or_default());
        remember(&mut cache, self.most, &hash, &embedding);
        Ok(embedding)
    }

    fn vector(&self, values: &[f32]) -> Result<Arc<Vec<f32>>, QueryError> {
        let dimension = self.towers.card().dimension;
        let invalid = |reason| QueryError::invalid("vector", reason);
        if values.len() != dimension {
            let reason = format!("has {} numbers; an embedding has {dimension}", values.len());
            return Err(invalid(reason));
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(invalid(format!("number {i} is not finite")));
        }
        let wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        unit(&wide, 0.0).ok_or_else(|| invalid("has the length 0, and so no direction".into()))
    }
}

fn remember(
    cache: &mut HashMap<String, Arc<Vec<f32>>>,
    most: usize,
    name: &str,
    embedding: &Arc<Vec<f32>>,
) {
    if cache.len() >= most {
        cache.clear();
    }
    if most > 0 {
        cache.insert(name.to_owned(), embedding.clone());
    }
}

/// The vector of length 1 in this direction; none where it is not longer than `shortest`.
fn unit(vector: &[f64], shortest: f64) -> Option<Arc<Vec<f32>>> {
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    (norm > shortest).then(|| Arc::new(vector.iter().map(|v| (v / norm) as f32).collect()))
}
