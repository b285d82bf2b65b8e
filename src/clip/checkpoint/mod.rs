//! Reading a checkpoint's files: configuration, weights, fingerprint.

pub(crate) mod hub;

use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::ClipError;
use crate::record::to_hex;

/// What a model is built like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// OpenAI CLIP and OpenCLIP exports: class token, causal text tower, both projected.
    Clip,
    /// SigLIP, and SigLIP 2 of a fixed resolution: attention pooling, texts padded to full length.
    Siglip,
}

impl Architecture {
    /// As `model_type` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clip => "clip",
            Self::Siglip => "siglip",
        }
    }
}

/// `config.json` as it is written; what is left out has the default of Hugging Face's classes.
#[derive(Debug, Clone, Deserialize)]
struct ModelConfigJson {
    #[serde(default)]
    projection_dim: Option<usize>,
    #[serde(default)]
    text_config: EncoderConfigJson,
    #[serde(default)]
    vision_config: EncoderConfigJson,
    #[serde(default)]
    notice: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct EncoderConfigJson {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    eos_token_id: Option<u32>,
    projection_size: Option<usize>,
    image_size: Option<usize>,
    patch_size: Option<usize>,
    num_channels: Option<usize>,
}

/// A checkpoint's configuration, complete.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// What it is built like.
    pub architecture: Architecture,
    /// Dimension of an embedding.
    pub dimension: usize,
    /// The text tower.
    pub text: TextConfig,
    /// The image tower.
    pub image: ImageConfig,
    /// This project's own: what users must know of the model.
    pub notice: Option<String>,
}

/// The text tower.
#[derive(Debug, Clone)]
pub struct TextConfig {
    pub vocabulary_size: usize,
    pub context_length: usize,
    pub end_of_text_id: u32,
    pub transformer: TransformerConfig,
}

/// The image tower.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    pub image_side: usize,
    pub patch_side: usize,
    pub transformer: TransformerConfig,
}

/// A stack of transformer blocks.
#[derive(Debug, Clone, Copy)]
pub struct TransformerConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layer_count: usize,
    pub head_count: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
}

/// The non-linearity between the two products of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(1.702·x), OpenAI's.
    QuickGelu,
    /// x·Φ(x), OpenCLIP's.
    Gelu,
    /// Its approximation by tanh, SigLIP's.
    GeluTanh,
}

impl EncoderConfigJson {
    fn into_transformer_config(
        self,
        default: TransformerConfig,
    ) -> Result<TransformerConfig, String> {
        let activation = match self.hidden_act.as_deref() {
            None => default.activation,
            Some("quick_gelu") => Activation::QuickGelu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh" | "gelu_new") => Activation::GeluTanh,
            Some(other) => {
                return Err(format!(
                    "hidden_act {other:?} is not quick_gelu, gelu or gelu_pytorch_tanh"
                ));
            }
        };
        let encoder = TransformerConfig {
            hidden_size: self.hidden_size.unwrap_or(default.hidden_size),
            intermediate_size: self.intermediate_size.unwrap_or(default.intermediate_size),
            layer_count: self.num_hidden_layers.unwrap_or(default.layer_count),
            head_count: self.num_attention_heads.unwrap_or(default.head_count),
            activation,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(default.layer_norm_eps),
        };
        if encoder.head_count == 0 || !encoder.hidden_size.is_multiple_of(encoder.head_count) {
            return Err(format!(
                "hidden_size {} is no multiple of num_attention_heads {}",
                encoder.hidden_size, encoder.head_count
            ));
        }
        Ok(encoder)
    }
}

impl ModelConfig {
    /// Completes what `config.json` says with the defaults of its architecture.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct ModelTypeJson {
            model_type: String,
        }
        let ModelTypeJson { model_type } =
            serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let architecture = match model_type.as_str() {
            "clip" => Architecture::Clip,
            "siglip" => Architecture::Siglip,
            other => {
                return Err(format!(
                    "model_type {other:?} is not supported; this version reads clip and siglip"
                ));
            }
        };
        let written: ModelConfigJson = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let ModelConfigJson { text_config: text, vision_config: image, .. } = written;
        let base = TransformerConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            layer_count: 12,
            head_count: 12,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        };
        let siglip =
            TransformerConfig { activation: Activation::GeluTanh, layer_norm_eps: 1e-6, ..base };
        let (text_default, image_default, vocabulary, context, patch) = match architecture {
            Architecture::Clip => {
                let text = TransformerConfig {
                    hidden_size: 512,
                    intermediate_size: 2048,
                    head_count: 8,
                    ..base
                };
                (text, base, 49_408, 77, 32)
            }
            Architecture::Siglip => (siglip, siglip, 32_000, 64, 16),
        };
        let (side, patch) = (image.image_size.unwrap_or(224), image.patch_size.unwrap_or(patch));
        let channels = image.num_channels.unwrap_or(3);
        if channels != 3 || patch == 0 || side < patch {
            return Err(format!(
                "vision_config: image_size {side}, patch_size {patch}, num_channels {channels} are not supported"
            ));
        }
        let projected = text.projection_size;
        let text = TextConfig {
            vocabulary_size: text.vocab_size.unwrap_or(vocabulary),
            context_length: text.max_position_embeddings.unwrap_or(context),
            end_of_text_id: text.eos_token_id.unwrap_or(49_407),
            transformer: text
                .into_transformer_config(text_default)
                .map_err(|e| format!("text_config: {e}"))?,
        };
        let image = ImageConfig {
            image_side: side,
            patch_side: patch,
            transformer: image
                .into_transformer_config(image_default)
                .map_err(|e| format!("vision_config: {e}"))?,
        };
        let dimension = match architecture {
            Architecture::Clip => written.projection_dim.unwrap_or(512),
            Architecture::Siglip => image.transformer.hidden_size,
        };
        let projected = projected.unwrap_or(text.transformer.hidden_size);
        if architecture == Architecture::Siglip && projected != dimension {
            return Err(format!(
                "text_config: projection_size {projected} differs from the image tower's hidden_size {dimension}"
            ));
        }
        Ok(Self { architecture, dimension, text, image, notice: written.notice })
    }
}

/// A checkpoint's folder with its configuration read and its weights in memory.
pub struct Checkpoint {
    pub folder: PathBuf,
    pub config: ModelConfig,
    pub preprocessor: PreprocessorConfig,
    pub fingerprint: String,
    pub parameter_count: u64,
    weight_bytes: Vec<u8>,
}

/// `preprocessor_config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct PreprocessorConfig {
    pub size: PreprocessorSize,
    #[serde(default)]
    pub crop_size: Option<PreprocessorSize>,
    #[serde(default)]
    pub do_center_crop: Option<bool>,
    pub image_mean: [f32; 3],
    pub image_std: [f32; 3],
    #[serde(default = "default_resample")]
    pub resample: u8,
    #[serde(default = "default_rescale_factor")]
    pub rescale_factor: f64,
}

fn default_resample() -> u8 {
    3
}
fn default_rescale_factor() -> f64 {
    1.0 / 255.0
}

/// A size as old and new preprocessor configurations write it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub enum PreprocessorSize {
    Number(u32),
    Shortest { shortest_edge: u32 },
    Exact { height: u32, width: u32 },
}

impl Checkpoint {
    /// Reads the folder's files; the weights of `model.safetensors` are read once and hashed.
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
            // Says which token fills a text up, which changes embeddings.
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
            config,
            preprocessor,
            fingerprint: to_hex(&hasher.finalize()),
            parameter_count: parameters,
            weight_bytes: weights,
        })
    }

    /// The tensors, for building the towers. The raw bytes are handed over, not kept.
    pub fn build_tensors(
        &mut self,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilder<'static>, ClipError> {
        let weights = std::mem::take(&mut self.weight_bytes);
        BufferedSafetensors::new(weights)
            .map(|tensors| VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()))
            .map_err(|e| self.weights_error(&e))
    }

    /// An error about the weights' file.
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

/// The value of a JSON file, and its bytes.
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
