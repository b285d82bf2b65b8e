//! Errors of loading and running a model.

use std::path::PathBuf;

use crate::diagnosis::describe;

/// Why a model cannot be used, or an input cannot be embedded. Only [`ClipError::InvalidInput`] is
/// about the picture or the text, and [`ClipError::NotFinite`] may be; all others are about the model or
/// its device.
#[derive(Debug, thiserror::Error)]
pub enum ClipError {
    /// The checkpoint is not on this machine and could not be downloaded.
    #[error("{checkpoint}: {reason}")]
    CheckpointUnavailable {
        /// `model.checkpoint` as configured.
        checkpoint: String,
        /// Which file is missing, or what the hub answered.
        reason: String,
    },
    /// A file of the checkpoint cannot be read.
    #[error("{file}: {}", describe(.source))]
    File {
        /// Path of the file.
        file: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// A file of the checkpoint is missing, or has invalid or unsupported content.
    #[error("{file}: {reason}")]
    InvalidCheckpoint {
        /// Path of the file.
        file: PathBuf,
        /// The invalid field or tensor, and what would be supported.
        reason: String,
    },
    /// The device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// `cpu`, or `cuda:0` and so on.
        device: String,
        /// What failed, and which setting would work.
        reason: String,
    },
    /// An embedding has values that are no finite numbers; they are never stored or compared.
    #[error(
        "the embedding of {kind} {number} of {count} is not finite (NaN or infinite values); bsap model inspect tests the model"
    )]
    NotFinite {
        /// Picture or text.
        kind: &'static str,
        /// Which one of the batch, counted from 1.
        number: usize,
        /// Size of the batch.
        count: usize,
    },
    /// This picture or text cannot be embedded.
    #[error("{0}")]
    InvalidInput(String),
    /// The model loads, but computes wrong embeddings.
    #[error("the self-test failed: {0}")]
    SelfTest(String),
    /// A computation failed on the device.
    #[error("the model failed: {}", describe(.0))]
    Compute(#[from] candle_core::Error),
}

impl ClipError {
    /// Whether the checkpoint is refused: one of its files is missing, broken or not supported. A user
    /// has to change the checkpoint, or choose another one.
    pub fn refuses_checkpoint(&self) -> bool {
        matches!(self, Self::File { .. } | Self::InvalidCheckpoint { .. })
    }

    /// Returns `embeddings` if all of their values are finite.
    pub(crate) fn ensure_finite(
        kind: &'static str,
        embeddings: Vec<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>, Self> {
        let is_finite = |embedding: &Vec<f32>| embedding.iter().all(|value| value.is_finite());
        match embeddings.iter().position(|embedding| !is_finite(embedding)) {
            None => Ok(embeddings),
            Some(at) => Err(Self::NotFinite { kind, number: at + 1, count: embeddings.len() }),
        }
    }
}
