//! What a loaded model is: its name, sizes and fingerprint.

use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::record::to_hex;

/// Name, sizes and fingerprint of a model.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ModelCard {
    /// Name of the checkpoint's folder, or `organisation/name` on the hub.
    pub name: String,
    /// `clip` or `siglip`.
    pub architecture: String,
    /// SHA-256 over weights, architecture, preprocessing and tokenizer, in hexadecimal. Embeddings
    /// of models with different fingerprints are never compared.
    pub fingerprint: String,
    /// Dimension of an embedding.
    pub dimension: usize,
    /// Side of the square that the image encoder reads, in pixels.
    pub image_side: u32,
    /// Longest text in tokens.
    pub context_length: usize,
    /// How a picture is resized and cropped before the image encoder reads it.
    pub preprocessing: String,
    /// L: exp of the checkpoint's `logit_scale`.
    pub logit_scale: f32,
    /// SigLIP's bias: the probability of a match is σ(L·cosine + bias). It ranks as the cosine
    /// does.
    pub logit_bias: Option<f32>,
    /// Number of parameters.
    pub parameters: u64,
    /// What users must know of the model, from `notice` in its config; for instance that its
    /// weights are random.
    pub notice: Option<String>,
}

impl ModelCard {
    /// Returns the card of an implementation of [`super::Encoders`] that has no checkpoint, as
    /// benches and tests use: embeddings of `dimension` values, CLIP's logit scale of 100.
    pub fn without_checkpoint(name: &str, dimension: usize) -> Self {
        Self {
            name: name.to_owned(),
            architecture: "none".into(),
            fingerprint: to_hex(&Sha256::digest(name)),
            dimension,
            image_side: 1,
            context_length: 77,
            preprocessing: String::new(),
            logit_scale: 100.0,
            logit_bias: None,
            parameters: 0,
            notice: None,
        }
    }
}
