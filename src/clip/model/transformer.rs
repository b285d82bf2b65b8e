//! The transformer of both encoders (pre-norm, as in "Learning Transferable Visual Models From
//! Natural Language Supervision", 2021).

use candle_core::{D, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{LayerNorm, Module, VarBuilder, layer_norm};

use crate::clip::checkpoint::{Activation, TransformerConfig};
use crate::clip::kernels::bf16_weights::Bf16Weights;
use crate::clip::kernels::fused_ops::{
    add_bias_and_activate, add_bias_and_residual, is_contiguous_cpu_f32,
};
use crate::clip::kernels::skinny_matmul::{MAX_SKINNY_ROWS, multiply_skinny};

/// A linear layer with weights [out, in] and a bias [out].
struct LinearLayer {
    weight: LinearWeight,
    bias: Tensor,
}

enum LinearWeight {
    Full(Tensor),
    Bf16(Bf16Weights),
}

impl LinearLayer {
    fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight: LinearWeight::Full(weight), bias }
    }

    /// Rounds the weights to bfloat16, for a CPU.
    fn convert_to_bf16(&mut self) -> Result<()> {
        if let LinearWeight::Full(weight) = &self.weight {
            self.weight = LinearWeight::Bf16(Bf16Weights::new(weight)?);
        }
        Ok(())
    }

    /// Maps [.., in] to [.., out], without the bias.
    fn multiply_without_bias(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let width = shape.pop().unwrap_or_default();
        let x = x.reshape(((), width))?;
        let (product, out) = match &self.weight {
            LinearWeight::Bf16(weight) => {
                (weight.multiply(&x.contiguous()?)?, weight.output_width())
            }
            LinearWeight::Full(weight) => {
                let is_skinny = x.dim(0)? <= MAX_SKINNY_ROWS
                    && is_contiguous_cpu_f32(&x)
                    && is_contiguous_cpu_f32(weight);
                let product =
                    if is_skinny { multiply_skinny(&x, weight)? } else { x.matmul(&weight.t()?)? };
                (product, weight.dim(0)?)
            }
        };
        shape.push(out);
        product.reshape(shape)
    }

    fn load(from: usize, to: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self::new(vb.get((to, from), "weight")?, vb.get(to, "bias")?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        add_bias_and_activate(self.multiply_without_bias(x)?, &self.bias, None)
    }

    fn forward_with_activation(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        add_bias_and_activate(self.multiply_without_bias(x)?, &self.bias, Some(activation))
    }

    /// Adds the output for `x` to `residual`.
    fn forward_plus_residual(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        add_bias_and_residual(self.multiply_without_bias(x)?, &self.bias, residual)
    }
}

/// The MLP of a block: two linear layers with a non-linearity in between.
struct Mlp {
    fc1: LinearLayer,
    fc2: LinearLayer,
    activation: Activation,
}

impl Mlp {
    /// Loads `fc1` and `fc2` below `vb`.
    fn load(config: &TransformerConfig, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            fc1: LinearLayer::load(config.hidden_size, config.intermediate_size, &vb.pp("fc1"))?,
            fc2: LinearLayer::load(config.intermediate_size, config.hidden_size, &vb.pp("fc2"))?,
            activation: config.activation,
        })
    }

    fn convert_to_bf16(&mut self) -> Result<()> {
        self.fc1.convert_to_bf16()?;
        self.fc2.convert_to_bf16()
    }

    /// Adds the output for `x` to `residual`; both are [.., hidden].
    fn forward_plus_residual(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.fc2
            .forward_plus_residual(residual, &self.fc1.forward_with_activation(x, self.activation)?)
    }
}

/// Computes attention over [batch, tokens, hidden]: splits into heads, weights the values by the
/// softmax of query–key products, and joins the heads. `mask` is added to the scores of every head.
fn multi_head_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, tokens, hidden) = q.dims3()?;
    let size = hidden / heads;
    let split =
        |x: &Tensor| x.reshape((batch, x.dim(1)?, heads, size))?.transpose(1, 2)?.contiguous();
    let scores = (split(q)? * (size as f64).powf(-0.5))?.matmul(&split(k)?.t()?)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let mixed = softmax_last_dim(&scores)?.matmul(&split(v)?)?;
    mixed.transpose(1, 2)?.reshape((batch, tokens, hidden))
}

struct TransformerBlock {
    norm1: LayerNorm,
    /// Queries, keys and values in one product: weight [3·hidden, hidden].
    qkv_projection: LinearLayer,
    output_projection: LinearLayer,
    norm2: LayerNorm,
    mlp: Mlp,
    head_count: usize,
}

impl TransformerBlock {
    fn load(config: &TransformerConfig, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden_size;
        let attention = vb.pp("self_attn");
        let parts = ["q_proj", "k_proj", "v_proj"].map(|name| attention.pp(name));
        let mut weights = Vec::with_capacity(3);
        let mut biases = Vec::with_capacity(3);
        for part in &parts {
            weights.push(part.get((hidden, hidden), "weight")?);
            biases.push(part.get(hidden, "bias")?);
        }
        Ok(Self {
            norm1: layer_norm(hidden, config.layer_norm_eps, vb.pp("layer_norm1"))?,
            qkv_projection: LinearLayer::new(Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?),
            output_projection: LinearLayer::load(hidden, hidden, &attention.pp("out_proj"))?,
            norm2: layer_norm(hidden, config.layer_norm_eps, vb.pp("layer_norm2"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            head_count: config.head_count,
        })
    }

    fn convert_to_bf16(&mut self) -> Result<()> {
        self.qkv_projection.convert_to_bf16()?;
        self.output_projection.convert_to_bf16()?;
        self.mlp.convert_to_bf16()
    }

    /// `x` and the result are [batch, tokens, hidden].
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let qkv = self.qkv_projection.forward(&self.norm1.forward(x)?)?.chunk(3, 2)?;
        let x = self.output_projection.forward_plus_residual(
            x,
            &multi_head_attention(&qkv[0], &qkv[1], &qkv[2], self.head_count, mask)?,
        )?;
        self.mlp.forward_plus_residual(&x, &self.norm2.forward(&x)?)
    }
}

/// A stack of transformer blocks.
pub struct TransformerEncoder {
    blocks: Vec<TransformerBlock>,
}

impl TransformerEncoder {
    /// Loads `encoder.layers.*` below `vb`.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder) -> Result<Self> {
        let layers = vb.pp("encoder.layers");
        let blocks = (0..config.layer_count)
            .map(|i| TransformerBlock::load(config, &layers.pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self { blocks })
    }

    /// Rounds the weights to bfloat16, for a CPU.
    pub fn convert_to_bf16(&mut self) -> Result<()> {
        self.blocks.iter_mut().try_for_each(TransformerBlock::convert_to_bf16)
    }

    /// Maps [batch, tokens, hidden] to the same shape.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for block in &self.blocks {
            x = block.forward(&x, mask)?;
        }
        Ok(x)
    }
}

/// The pooling of SigLIP: one learned query attends to all tokens, then a residual MLP.
pub struct AttentionPool {
    learned_query: Tensor,
    query_projection: LinearLayer,
    /// Keys and values in one product.
    key_value_projection: LinearLayer,
    output_projection: LinearLayer,
    norm: LayerNorm,
    mlp: Mlp,
    head_count: usize,
}

impl AttentionPool {
    /// Loads `probe`, `attention`, `layernorm` and `mlp` below `vb`.
    pub fn load(config: &TransformerConfig, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden_size;
        let attention = vb.pp("attention");
        let weight = attention.get((3 * hidden, hidden), "in_proj_weight")?;
        let bias = attention.get(3 * hidden, "in_proj_bias")?;
        let part = |start: usize, length: usize| {
            let weight = weight.narrow(0, start * hidden, length * hidden)?;
            let bias = bias.narrow(0, start * hidden, length * hidden)?;
            Ok::<_, candle_core::Error>(LinearLayer::new(weight, bias))
        };
        Ok(Self {
            learned_query: vb.get((1, 1, hidden), "probe")?,
            query_projection: part(0, 1)?,
            key_value_projection: part(1, 2)?,
            output_projection: LinearLayer::load(hidden, hidden, &attention.pp("out_proj"))?,
            norm: layer_norm(hidden, config.layer_norm_eps, vb.pp("layernorm"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            head_count: config.head_count,
        })
    }

    /// Rounds the weights to bfloat16, for a CPU.
    pub fn convert_to_bf16(&mut self) -> Result<()> {
        for projection in [
            &mut self.query_projection,
            &mut self.key_value_projection,
            &mut self.output_projection,
        ] {
            projection.convert_to_bf16()?;
        }
        self.mlp.convert_to_bf16()
    }

    /// Maps [batch, tokens, hidden] to [batch, hidden].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, hidden) = x.dims3()?;
        let query =
            self.query_projection.forward(&self.learned_query)?.expand((batch, 1, hidden))?;
        let kv = self.key_value_projection.forward(x)?.chunk(2, 2)?;
        let pooled = self.output_projection.forward(&multi_head_attention(
            &query,
            &kv[0],
            &kv[1],
            self.head_count,
            None,
        )?)?;
        self.mlp.forward_plus_residual(&pooled, &self.norm.forward(&pooled)?)?.squeeze(1)
    }
}

/// Scales every row of `x` [batch, dimension] to unit length.
pub fn normalise_rows(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length)
}
