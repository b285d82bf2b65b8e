//! The text encoder: a transformer over tokens, whose output is that of the last token.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};

use super::transformer::TransformerEncoder;
use crate::clip::checkpoint::{Architecture, ModelConfig};

/// Computes embeddings of token ids.
pub struct TextEncoder {
    token_embeddings: Embedding,
    position_embeddings: Tensor,
    transformer: TransformerEncoder,
    final_norm: LayerNorm,
    projection: Linear,
    /// [context, context], 0 on and below the diagonal, −∞ above: a token attends to no later one.
    /// `None` for SigLIP, whose tokens attend to all.
    causal_mask: Option<Tensor>,
    device: Device,
}

impl TextEncoder {
    /// Loads `text_model.*` and the projection.
    pub fn load(
        config: &ModelConfig,
        vb: &VarBuilder,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let text = &config.text_encoder;
        let (hidden, context) = (text.transformer.hidden_size, text.context_length);
        let weights = vb.pp("text_model");
        let embeddings = weights.pp("embeddings");
        let (causal_mask, projection) = match config.architecture {
            Architecture::Clip => {
                let mask: Vec<f32> = (0..context * context)
                    .map(|i| if i % context > i / context { f32::NEG_INFINITY } else { 0.0 })
                    .collect();
                let mask = Tensor::from_vec(mask, (context, context), device)?.to_dtype(dtype)?;
                let weight = vb.get((config.dimension, hidden), "text_projection.weight")?;
                (Some(mask), Linear::new(weight, None))
            }
            Architecture::Siglip => (None, linear(hidden, config.dimension, weights.pp("head"))?),
        };
        Ok(Self {
            token_embeddings: embedding(
                text.vocabulary_size,
                hidden,
                embeddings.pp("token_embedding"),
            )?,
            position_embeddings: embeddings.get((context, hidden), "position_embedding.weight")?,
            transformer: TransformerEncoder::load(&text.transformer, &weights)?,
            final_norm: layer_norm(
                hidden,
                text.transformer.layer_norm_eps,
                weights.pp("final_layer_norm"),
            )?,
            projection,
            causal_mask,
            device: device.clone(),
        })
    }

    /// Rounds the weights of the blocks to bfloat16, for a CPU.
    pub fn convert_to_bf16(&mut self) -> Result<()> {
        self.transformer.convert_to_bf16()
    }

    /// Maps rows of token ids to [batch, dimension], not yet of unit length. The output is taken at
    /// the last token of each row; rows of different lengths need a causal mask.
    pub fn encode_token_rows(&self, rows: &[Vec<u32>]) -> Result<Tensor> {
        let longest = rows.iter().map(Vec::len).max().unwrap_or_default();
        let mut ids = Vec::with_capacity(rows.len() * longest);
        let mut ends = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            ends.push((i * longest + row.len() - 1) as u32);
            ids.extend_from_slice(row);
            // No token attends to what follows the end-of-text token.
            ids.resize((i + 1) * longest, 0);
        }
        let ids = Tensor::from_vec(ids, (rows.len(), longest), &self.device)?;
        let positions = self.position_embeddings.narrow(0, 0, longest)?;
        let mask = match &self.causal_mask {
            Some(mask) => Some(mask.narrow(0, 0, longest)?.narrow(1, 0, longest)?.contiguous()?),
            None => None,
        };
        let x = self.token_embeddings.forward(&ids)?.broadcast_add(&positions)?;
        let x = self.transformer.forward(&x, mask.as_ref())?.flatten_to(1)?;
        let ends = Tensor::new(ends, &self.device)?;
        self.projection.forward(&self.final_norm.forward(&x.index_select(&ends, 0)?)?)
    }
}
