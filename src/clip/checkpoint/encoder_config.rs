//! The architecture and the sizes of both encoders, with all defaults filled in.

/// Longest text in tokens. The mask of the text encoder has this many values squared, and is made before
/// the weights show whether the number is true.
const MAX_CONTEXT_LENGTH: usize = 4_096;

/// Longest side of the square that the image encoder reads, in pixels: a batch of squares has to fit into
/// memory.
const MAX_IMAGE_SIDE: usize = 4_096;

/// The architecture of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// OpenAI CLIP and OpenCLIP: class token, causal text encoder, both projected.
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

/// How the tensors of a checkpoint are named and laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorNaming {
    /// As `transformers` names them.
    Transformers,
    /// As `open_clip` names them; with `custom_text`, those of the text encoder begin with `text.`.
    OpenClip {
        /// Whether the text encoder has a module of its own.
        custom_text: bool,
    },
    /// `open_clip` around an image encoder of `timm`.
    OpenClipTimm,
}

/// Who cleans a text before it is tokenised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextCleaning {
    /// The class of the tokenizer.
    ByTokenizerClass,
    /// `open_clip`: `lower` for CLIP; for SigLIP `canonicalize`, that is lower case, without ASCII
    /// punctuation, single spaces.
    OpenClip,
}

/// The configuration of a checkpoint, with all defaults filled in.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Decides the layers of both encoders.
    pub architecture: Architecture,
    /// How the weights are named.
    pub tensor_naming: TensorNaming,
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
    /// Of CLIP: the id at whose first place the embedding is taken. 2 means the largest id.
    pub end_of_text_id: u32,
    pub cleaning: TextCleaning,
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

impl ModelConfig {
    /// Checks sizes against each other and against limits. `text` and `vision` are the names of the
    /// encoders' objects in the file.
    pub fn validate(&self, text: &str, vision: &str) -> Result<(), String> {
        for (name, encoder) in
            [(text, self.text_encoder.transformer), (vision, self.image_encoder.transformer)]
        {
            let (hidden, heads) = (encoder.hidden_size, encoder.head_count);
            if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
                return Err(format!("{name}: width {hidden} is no multiple of {heads} heads"));
            }
            if !(encoder.layer_norm_eps.is_finite() && encoder.layer_norm_eps > 0.0) {
                return Err(format!(
                    "{name}: the eps of layer norms is {}, not above 0",
                    encoder.layer_norm_eps
                ));
            }
        }
        let context = self.text_encoder.context_length;
        if context == 0 || context > MAX_CONTEXT_LENGTH {
            return Err(format!(
                "{text}: a text of {context} tokens is not supported, only 1 to {MAX_CONTEXT_LENGTH}"
            ));
        }
        let (side, patch) = (self.image_encoder.image_side, self.image_encoder.patch_side);
        if patch == 0 || side < patch || side > MAX_IMAGE_SIDE {
            return Err(format!(
                "{vision}: image_size {side} with patch_size {patch} is not supported"
            ));
        }
        Ok(())
    }
}
