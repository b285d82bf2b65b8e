//! The transformer that both towers are made of (pre-norm, as in "Learning Transferable Visual
//! Models From Natural Language Supervision", 2021).

use candle_core::{D, Result, Tensor};
use candle_nn::ops::{sigmoid, softmax_last_dim};
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, layer_norm, linear};

use super::checkpoint::{Activation, EncoderConfig};

impl Activation {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::QuickGelu => x * sigmoid(&(x * 1.702)?)?,
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
        }
    }
}

/// The two products of a block with a non-linearity between.
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl Mlp {
    /// Loads `fc1` and `fc2` below `vb`.
    pub fn load(config: &EncoderConfig, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            fc1: linear(config.hidden, config.intermediate, vb.pp("fc1"))?,
            fc2: linear(config.intermediate, config.hidden, vb.pp("fc2"))?,
            activation: config.activation,
        })
    }

    /// [.., hidden] to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.activation.apply(&self.fc1.forward(x)?)?)
    }
}

/// Splits [batch, tokens, hidden] into heads, weighs the values by how queries meet keys, and joins
/// the heads again. `mask` is added to the scores of every head.
fn attend(
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

struct Block {
    norm1: LayerNorm,
    /// Queries, keys and values in one product: weight [3·hidden, hidden].
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    mlp: Mlp,
    heads: usize,
}

impl Block {
    fn load(config: &EncoderConfig, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden;
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
            qkv: Linear::new(Tensor::cat(&weights, 0)?, Some(Tensor::cat(&biases, 0)?)),
            out: linear(hidden, hidden, attention.pp("out_proj"))?,
            norm2: layer_norm(hidden, config.layer_norm_eps, vb.pp("layer_norm2"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            heads: config.heads,
        })
    }

    /// `x` and the result are [batch, tokens, hidden].
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?, mask)?)?;
        &x + self.mlp.forward(&self.norm2.forward(&x)?)?
    }

    fn attention(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?.chunk(3, 2)?;
        self.out.forward(&attend(&qkv[0], &qkv[1], &qkv[2], self.heads, mask)?)
    }
}

/// A stack of blocks.
pub struct Encoder {
    blocks: Vec<Block>,
}

impl Encoder {
    /// Loads `encoder.layers.*` below `vb`.
    pub fn load(config: &EncoderConfig, vb: &VarBuilder) -> Result<Self> {
        let layers = vb.pp("encoder.layers");
        let blocks = (0..config.layers)
            .map(|i| Block::load(config, &layers.pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self { blocks })
    }

    /// [batch, tokens, hidden] to the same shape.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let mut x = x.clone();
        for block in &self.blocks {
            x = block.forward(&x, mask)?;
        }
        Ok(x)
    }
}

/// SigLIP's pooling: one learned query attends to all tokens, then a residual block.
pub struct AttentionPool {
    probe: Tensor,
    query: Linear,
    /// Keys and values in one product.
    kv: Linear,
    out: Linear,
    norm: LayerNorm,
    mlp: Mlp,
    heads: usize,
}

impl AttentionPool {
    /// Loads `probe`, `attention`, `layernorm` and `mlp` below `vb`.
    pub fn load(config: &EncoderConfig, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden;
        let attention = vb.pp("attention");
        let weight = attention.get((3 * hidden, hidden), "in_proj_weight")?;
        let bias = attention.get(3 * hidden, "in_proj_bias")?;
        let part = |start: usize, length: usize| {
            let weight = weight.narrow(0, start * hidden, length * hidden)?;
            let bias = bias.narrow(0, start * hidden, length * hidden)?;
            Ok::<_, candle_core::Error>(Linear::new(weight, Some(bias)))
        };
        Ok(Self {
            probe: vb.get((1, 1, hidden), "probe")?,
            query: part(0, 1)?,
            kv: part(1, 2)?,
            out: linear(hidden, hidden, attention.pp("out_proj"))?,
            norm: layer_norm(hidden, config.layer_norm_eps, vb.pp("layernorm"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            heads: config.heads,
        })
    }

    /// [batch, tokens, hidden] to [batch, hidden].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, hidden) = x.dims3()?;
        let query = self.query.forward(&self.probe)?.expand((batch, 1, hidden))?;
        let kv = self.kv.forward(x)?.chunk(2, 2)?;
        let pooled = self.out.forward(&attend(&query, &kv[0], &kv[1], self.heads, None)?)?;
        let pooled = (&pooled + self.mlp.forward(&self.norm.forward(&pooled)?)?)?;
        pooled.squeeze(1)
    }
}

/// Scales every row of `x` [batch, dimension] to unit length.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length)
}
