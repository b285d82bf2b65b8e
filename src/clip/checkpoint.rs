//! Reading a checkpoint's files: configuration, weights, fingerprint.

use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::ClipError;
use crate::record::hex;

/// `config.json` of a CLIP checkpoint; what is left out has the default of Hugging Face's
/// `CLIPConfig`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: String,
    #[serde(default = "default::projection_dim")]
    pub projection_dim: usize,
    #[serde(default)]
    pub text_config: TextConfig,
    #[serde(default)]
    pub vision_config: VisionConfig,
    /// This project's own: what users must know of the model.
    #[serde(default)]
    pub notice: Option<String>,
}

/// The text tower.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub eos_token_id: u32,
    #[serde(flatten)]
    pub encoder: EncoderConfig,
}

/// The image tower.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    pub image_size: usize,
    pub patch_size: usize,
    pub num_channels: usize,
    #[serde(flatten)]
    pub encoder: EncoderConfig,
}

/// A stack of transformer blocks.
#[derive(Debug, Clone, Deserialize)]
pub struct EncoderConfig {
    #[serde(default)]
    pub hidden_size: Option<usize>,
    #[serde(default)]
    pub intermediate_size: Option<usize>,
    #[serde(default = "default::layers")]
    pub num_hidden_layers: usize,
    #[serde(default)]
    pub num_attention_heads: Option<usize>,
    #[serde(default = "default::activation")]
    pub hidden_act: String,
    #[serde(default = "default::layer_norm_eps")]
    pub layer_norm_eps: f64,
}

mod default {
    pub fn projection_dim() -> usize {
        512
    }
    pub fn layers() -> usize {
        12
    }
    pub fn activation() -> String {
        "quick_gelu".into()
    }
    pub fn layer_norm_eps() -> f64 {
        1e-5
    }
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: None,
            intermediate_size: None,
            num_hidden_layers: default::layers(),
            num_attention_heads: None,
            hidden_act: default::activation(),
            layer_norm_eps: default::layer_norm_eps(),
        }
    }
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            max_position_embeddings: 77,
            eos_token_id: 49407,
            encoder: EncoderConfig::default(),
        }
    }
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self { image_size: 224, patch_size: 32, num_channels: 3, encoder: EncoderConfig::default() }
    }
}

/// A checkpoint's folder with its configuration read and its weights in memory.
pub struct Checkpoint {
    pub folder: PathBuf,
    pub config: Config,
    pub preprocessor: Preprocessor,
    pub fingerprint: String,
    pub parameters: u64,
    weights: Vec<u8>,
}

/// `preprocessor_config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Preprocessor {
    pub size: Size,
    #[serde(default)]
    pub crop_size: Option<Size>,
    #[serde(default = "yes")]
    pub do_center_crop: bool,
    pub image_mean: [f32; 3],
    pub image_std: [f32; 3],
    #[serde(default = "bicubic")]
    pub resample: u8,
    #[serde(default = "eight_bit")]
    pub rescale_factor: f64,
}

fn yes() -> bool {
    true
}
fn bicubic() -> u8 {
    3
}
fn eight_bit() -> f64 {
    1.0 / 255.0
}

/// A size as old and new preprocessor configurations write it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub enum Size {
    Number(u32),
    Shortest { shortest_edge: u32 },
    Exact { height: u32, width: u32 },
}

impl Checkpoint {
    /// Reads the folder's files; the weights of `model.safetensors` are read once and hashed.
    pub fn read(folder: &Path) -> Result<Self, ClipError> {
        let (config, config_bytes): (Config, _) = json(&folder.join("config.json"))?;
        if config.model_type != "clip" {
            return Err(ClipError::Checkpoint {
                file: folder.join("config.json"),
                reason: format!(
                    "model_type {:?} is not supported; this version reads clip",
                    config.model_type
                ),
            });
        }
        let (preprocessor, preprocessor_bytes) = json(&folder.join("preprocessor_config.json"))?;
        let tokenizer = read(&folder.join("tokenizer.json"))?;
        let file = folder.join("model.safetensors");
        let weights = read(&file)?;
        let mut hasher = Sha256::new();
        for part in [&config_bytes, &preprocessor_bytes, &tokenizer, &weights] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let parameters =
            parameters(&weights).map_err(|reason| ClipError::Checkpoint { file, reason })?;
        Ok(Self {
            folder: folder.to_owned(),
            config,
            preprocessor,
            fingerprint: hex(&hasher.finalize()),
            parameters,
            weights,
        })
    }

    /// The tensors, for building the towers. The raw bytes are handed over, not kept.
    pub fn tensors(
        &mut self,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilder<'static>, ClipError> {
        let weights = std::mem::take(&mut self.weights);
        BufferedSafetensors::new(weights)
            .map(|tensors| VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()))
            .map_err(|e| self.weights_error(&e))
    }

    /// An error about the weights' file.
    pub fn weights_error(&self, error: &candle_core::Error) -> ClipError {
        ClipError::Checkpoint {
            file: self.folder.join("model.safetensors"),
            reason: error.to_string(),
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, ClipError> {
    std::fs::read(file).map_err(|source| ClipError::File { file: file.to_owned(), source })
}

fn json<T: DeserializeOwned>(file: &Path) -> Result<(T, Vec<u8>), ClipError> {
    let bytes = read(file)?;
    let value = serde_json::from_slice(&bytes)
        .map_err(|e| ClipError::Checkpoint { file: file.to_owned(), reason: e.to_string() })?;
    Ok((value, bytes))
}

fn parameters(weights: &[u8]) -> Result<u64, String> {
    let tensors = safetensors::SafeTensors::deserialize(weights).map_err(|e| e.to_string())?;
    Ok(tensors.iter().map(|(_, tensor)| tensor.shape().iter().product::<usize>() as u64).sum())
}
