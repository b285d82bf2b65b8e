//! `config.json`: the architecture and the sizes of both encoders.

use serde::Deserialize;

/// The architecture of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// OpenAI CLIP and OpenCLIP exports: class token, causal text encoder, both projected.
    Clip,
    /// SigLIP, and SigLIP 2 of a fixed resolution: attention pooling, texts padded to the full
    /// context length.
    Siglip,
}

impl Architecture {
    /// Returns the value of `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clip => "clip",
            Self::Siglip => "siglip",
        }
    }
}

/// `config.json` as written. A missing field has the default of the classes of Hugging Face.
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

/// The configuration of a checkpoint, with all defaults filled in.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Decides the layers of both encoders.
    pub architecture: Architecture,
    /// Dimension of an embedding.
    pub dimension: usize,
    /// Sizes of the text encoder.
    pub text_encoder: TextEncoderConfig,
    /// Sizes of the image encoder.
    pub image_encoder: ImageEncoderConfig,
    /// What users must know of the model; a field of this project, not of Hugging Face.
    pub notice: Option<String>,
}

/// Sizes of the text encoder.
#[derive(Debug, Clone)]
pub struct TextEncoderConfig {
    pub vocabulary_size: usize,
    pub context_length: usize,
    pub end_of_text_id: u32,
    pub transformer: TransformerConfig,
}

/// Sizes of the image encoder, in pixels.
#[derive(Debug, Clone)]
pub struct ImageEncoderConfig {
    pub image_side: usize,
    pub patch_side: usize,
    pub transformer: TransformerConfig,
}

/// Sizes of a stack of transformer blocks.
#[derive(Debug, Clone, Copy)]
pub struct TransformerConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layer_count: usize,
    pub head_count: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
}

/// The non-linearity between the two products of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(1.702·x), used by OpenAI.
    QuickGelu,
    /// x·Φ(x), used by OpenCLIP.
    Gelu,
    /// The approximation of GELU by tanh, used by SigLIP.
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
    /// Parses `config.json`, with the defaults of its architecture for missing fields.
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
        let text_projection = text.projection_size;
        let text = TextEncoderConfig {
            vocabulary_size: text.vocab_size.unwrap_or(vocabulary),
            context_length: text.max_position_embeddings.unwrap_or(context),
            end_of_text_id: text.eos_token_id.unwrap_or(49_407),
            transformer: text
                .into_transformer_config(text_default)
                .map_err(|e| format!("text_config: {e}"))?,
        };
        let image = ImageEncoderConfig {
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
        let text_projection = text_projection.unwrap_or(text.transformer.hidden_size);
        if architecture == Architecture::Siglip && text_projection != dimension {
            return Err(format!(
                "text_config: projection_size {text_projection} differs from the image encoder's hidden_size {dimension}"
            ));
        }
        Ok(Self {
            architecture,
            dimension,
            text_encoder: text,
            image_encoder: image,
            notice: written.notice,
        })
    }
}
