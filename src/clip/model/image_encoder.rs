//! The image encoder: a vision transformer over patches.

use candle_core::{Result, Tensor};
use candle_nn::{LayerNorm, Module, VarBuilder, layer_norm};

use super::transformer::{AttentionPool, TransformerEncoder};
use crate::clip::checkpoint::{Architecture, ModelConfig};

/// Computes embeddings of pixels.
pub struct ImageEncoder {
    /// [3·patch·patch, hidden]: a convolution whose stride equals its size is one matrix product.
    patch_weights: Tensor,
    patch_bias: Option<Tensor>,
    /// The class token of CLIP; `None` for SigLIP.
    class_token: Option<Tensor>,
    position_embeddings: Tensor,
    pre_norm: Option<LayerNorm>,
    transformer: TransformerEncoder,
    post_norm: LayerNorm,
    pooling: ImagePooling,
    patch_side: usize,
}

/// How the tokens become one vector.
enum ImagePooling {
    /// CLIP: the class token, projected.
    ClassToken(Tensor),
    /// SigLIP: attention of one learned query to all tokens.
    Attention(Box<AttentionPool>),
}

impl ImageEncoder {
    /// Loads `vision_model.*` and the projection.
    pub fn load(config: &ModelConfig, vb: &VarBuilder) -> Result<Self> {
        let image = &config.image_encoder;
        let (hidden, patch, eps) =
            (image.transformer.hidden_size, image.patch_side, image.transformer.layer_norm_eps);
        let weights = vb.pp("vision_model");
        let embeddings = weights.pp("embeddings");
        let patches = embeddings.get((hidden, 3, patch, patch), "patch_embedding.weight")?;
        let count = (image.image_side / patch).pow(2);
        let (class_token, patch_bias, pre_norm, pooling) = match config.architecture {
            Architecture::Clip => {
                let projection = vb.get((config.dimension, hidden), "visual_projection.weight")?;
                (
                    Some(embeddings.get(hidden, "class_embedding")?),
                    None,
                    // Misspelt in the checkpoints of the reference too.
                    Some(layer_norm(hidden, eps, weights.pp("pre_layrnorm"))?),
                    ImagePooling::ClassToken(projection.t()?.contiguous()?),
                )
            }
            Architecture::Siglip => (
                None,
                Some(embeddings.get(hidden, "patch_embedding.bias")?),
                None,
                ImagePooling::Attention(Box::new(AttentionPool::load(
                    &image.transformer,
                    &weights.pp("head"),
                )?)),
            ),
        };
        let tokens = count + usize::from(class_token.is_some());
        Ok(Self {
            patch_weights: patches.reshape((hidden, 3 * patch * patch))?.t()?.contiguous()?,
            patch_bias,
            class_token,
            position_embeddings: embeddings.get((tokens, hidden), "position_embedding.weight")?,
            pre_norm,
            transformer: TransformerEncoder::load(&image.transformer, &weights)?,
            post_norm: layer_norm(hidden, eps, weights.pp("post_layernorm"))?,
            pooling,
            patch_side: patch,
        })
    }

    /// Rounds the weights of the blocks to bfloat16, for a CPU.
    pub fn convert_to_bf16(&mut self) -> Result<()> {
        self.transformer.convert_to_bf16()?;
        match &mut self.pooling {
            ImagePooling::ClassToken(_) => Ok(()),
            ImagePooling::Attention(pool) => pool.convert_to_bf16(),
        }
    }

    /// Maps [batch, 3, side, side] to [batch, dimension], not yet of unit length.
    pub fn encode_pixels(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, side, _) = pixels.dims4()?;
        let (patch, across) = (self.patch_side, side / self.patch_side);
        // Pixels that fill no whole patch are ignored, as by a convolution.
        let used = across * patch;
        let patches = pixels
            .narrow(2, 0, used)?
            .narrow(3, 0, used)?
            .reshape(&[batch, channels, across, patch, across, patch])?
            .permute([0, 2, 4, 1, 3, 5].as_slice())?
            .reshape((batch * across * across, channels * patch * patch))?;
        let (_, hidden) = self.patch_weights.dims2()?;
        let mut x =
            patches.matmul(&self.patch_weights)?.reshape((batch, across * across, hidden))?;
        if let Some(bias) = &self.patch_bias {
            x = x.broadcast_add(bias)?;
        }
        if let Some(class) = &self.class_token {
            x = Tensor::cat(&[&class.expand((batch, 1, hidden))?, &x], 1)?;
        }
        x = x.broadcast_add(&self.position_embeddings)?;
        if let Some(norm) = &self.pre_norm {
            x = norm.forward(&x)?;
        }
        let x = self.transformer.forward(&x, None)?;
        match &self.pooling {
            ImagePooling::ClassToken(projection) => {
                let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
                self.post_norm.forward(&class)?.matmul(projection)
            }
            ImagePooling::Attention(pool) => pool.forward(&self.post_norm.forward(&x)?),
        }
    }
}
