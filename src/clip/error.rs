//! Errors of loading and running a model.

use std::path::PathBuf;

/// Why a model cannot be used, or an input cannot be embedded. Only [`ClipError::InvalidInput`] is
/// about the picture or the text; all others are about the model or its device.
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
    /// A file of the checkpoint is missing or cannot be read.
    #[error("{file}: {source}")]
    File {
        /// Path of the file.
        file: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// A file of the checkpoint has invalid or unsupported content.
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
    /// This picture or text cannot be embedded.
    #[error("{0}")]
    InvalidInput(String),
    /// The model loads, but computes wrong embeddings.
    #[error("the self-test failed: {0}")]
    SelfTest(String),
    /// A computation failed on the device.
    #[error("the model failed: {0}")]
    Compute(#[from] candle_core::Error),
}
