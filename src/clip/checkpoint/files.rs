//! The files of a checkpoint: configuration, weights and the fingerprint over all of them.

use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::model_config::{Architecture, ModelConfig};
use super::preprocessor_config::PreprocessorConfig;
use crate::clip::error::ClipError;
use crate::record::to_hex;

/// A checkpoint with its configuration parsed and its weights in memory.
pub struct Checkpoint {
    pub folder: PathBuf,
    pub model_config: ModelConfig,
    pub preprocessor_config: PreprocessorConfig,
    pub fingerprint: String,
    pub parameter_count: u64,
    weight_bytes: Vec<u8>,
}

impl Checkpoint {
    /// Reads and hashes the files of `folder`, each once.
    pub fn read(folder: &Path) -> Result<Self, ClipError> {
        let file = folder.join("config.json");
        let config_bytes = read_file(&file)?;
        let config = ModelConfig::parse(&config_bytes)
            .map_err(|reason| ClipError::InvalidCheckpoint { file, reason })?;
        let (preprocessor, preprocessor_bytes) =
            read_json(&folder.join("preprocessor_config.json"))?;
        let tokenizer = read_file(&folder.join("tokenizer.json"))?;
        let file = folder.join("model.safetensors");
        let weights = read_file(&file)?;
        let padding = match config.architecture {
            Architecture::Clip => None,
            // It names the padding token, which changes embeddings.
            Architecture::Siglip => Some(read_file(&folder.join("tokenizer_config.json"))?),
        };
        let parts = [&config_bytes, &preprocessor_bytes, &tokenizer, &weights];
        let mut hasher = Sha256::new();
        for part in parts.into_iter().chain(&padding) {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let parameters = count_parameters(&weights)
            .map_err(|reason| ClipError::InvalidCheckpoint { file, reason })?;
        Ok(Self {
            folder: folder.to_owned(),
            model_config: config,
            preprocessor_config: preprocessor,
            fingerprint: to_hex(&hasher.finalize()),
            parameter_count: parameters,
            weight_bytes: weights,
        })
    }

    /// Returns the tensors for building the encoders, and releases the raw bytes: a second call
    /// fails.
    pub fn take_tensors(
        &mut self,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilder<'static>, ClipError> {
        let weights = std::mem::take(&mut self.weight_bytes);
        BufferedSafetensors::new(weights)
            .map(|tensors| VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()))
            .map_err(|e| self.weights_error(&e))
    }

    /// Returns an error about `model.safetensors`.
    pub fn weights_error(&self, error: &candle_core::Error) -> ClipError {
        ClipError::InvalidCheckpoint {
            file: self.folder.join("model.safetensors"),
            reason: error.to_string(),
        }
    }
}

fn read_file(file: &Path) -> Result<Vec<u8>, ClipError> {
    std::fs::read(file).map_err(|source| ClipError::File { file: file.to_owned(), source })
}

/// Reads a JSON file; returns its value and its bytes.
pub fn read_json<T: DeserializeOwned>(file: &Path) -> Result<(T, Vec<u8>), ClipError> {
    let bytes = read_file(file)?;
    let value = serde_json::from_slice(&bytes).map_err(|e| ClipError::InvalidCheckpoint {
        file: file.to_owned(),
        reason: e.to_string(),
    })?;
    Ok((value, bytes))
}

fn count_parameters(weights: &[u8]) -> Result<u64, String> {
    let tensors = safetensors::SafeTensors::deserialize(weights).map_err(|e| e.to_string())?;
    Ok(tensors.iter().map(|(_, tensor)| tensor.shape().iter().product::<usize>() as u64).sum())
}
