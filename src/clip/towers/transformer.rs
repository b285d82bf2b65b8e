//! The transformer that both towers are made of (pre-norm, as in "Learning Transferable Visual
//! Models From Natural Language Supervision", 2021).

use candle_core::{D, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{LayerNorm, Module, VarBuilder, layer_norm};

use crate::clip::checkpoint::{Activation, EncoderConfig};
use crate::clip::kernels::ops::{bias_activation, bias_residual, on_cpu};
use crate::clip::kernels::product::{MOST_ROWS, skinny};
use crate::clip::kernels::reduced::Reduced;

/// A product with weights [out, in] and a bias [out].
struct Projection {
    weight: Weight,
    bias: Tensor,
}

enum Weight {
    Whole(Tensor),
    Reduced(Reduced),
}

impl Projection {
    fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight: Weight::Whole(weight), bias }
    }

    /// Rounds the weights to bfloat16, for a CPU.
    fn reduce(&mut self) -> Result<()> {
        if let Weight::Whole(weight) = &self.weight {
            self.weight = Weight::Reduced(Reduced::new(weight)?);
        }
        Ok(())
    }

    /// [.., in] to [.., out], without the bias.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let width = shape.pop().unwrap_or_default();
        let x = x.reshape(((), width))?;
        let (product, out) = match &self.weight {
            Weight::Reduced(weight) => (weight.product(&x.contiguous()?)?, weight.out()),
            Weight::Whole(weight) => {
                let few = x.dim(0)? <= MOST_ROWS && on_cpu(&x) && on_cpu(weight);
                let product = if few { skinny(&x, weight)? } else { x.matmul(&weight.t()?)? };
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
        bias_activation(self.product(x)?, &self.bias, None)
    }

    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        bias_activation(self.product(x)?, &self.bias, Some(activation))
    }

    /// The product of `x`, added to `residual`.
    fn onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        bias_residual(self.product(x)?, &self.bias, residual)
    }
}

/// The two products of a block with a non-linearity between, added to what came in.
struct Mlp {
    fc1: Projection,
    fc2: Projection,
    activation: Activation,
}

impl Mlp {
    /// Loads `fc1` and `fc2` below `vb`.
    fn load(config: &EncoderConfig, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            fc1: Projection::load(config.hidden, config.intermediate, &vb.pp("fc1"))?,
            fc2: Projection::load(config.intermediate, config.hidden, &vb.pp("fc2"))?,
            activation: config.activation,
        })
    }

    fn reduce(&mut self) -> Result<()> {
        self.fc1.reduce()?;
        self.fc2.reduce()
    }

    /// `x` and what is added to it are [.., hidden].
    fn onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.fc2.onto(residual, &self.fc1.activated(x, self.activation)?)
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
    qkv: Projection,
    out: Projection,
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
            qkv: Projection::new(Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?),
            out: Projection::load(hidden, hidden, &attention.pp("out_proj"))?,
            norm2: layer_norm(hidden, config.layer_norm_eps, vb.pp("layer_norm2"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            heads: config.heads,
        })
    }

    fn reduce(&mut self) -> Result<()> {
        self.qkv.reduce()?;
        self.out.reduce()?;
        self.mlp.reduce()
    }

    /// `x` and the result are [batch, tokens, hidden].
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?.chunk(3, 2)?;
        let x = self.out.onto(x, &attend(&qkv[0], &qkv[1], &qkv[2], self.heads, mask)?)?;
        self.mlp.onto(&x, &self.norm2.forward(&x)?)
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

    /// Rounds the weights to bfloat16, for a CPU.
    pub fn reduce(&mut self) -> Result<()> {
        self.blocks.iter_mut().try_for_each(Block::reduce)
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
    query: Projection,
    /// Keys and values in one product.
    kv: Projection,
    out: Projection,
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
            Ok::<_, candle_core::Error>(Projection::new(weight, bias))
        };
        Ok(Self {
            probe: vb.get((1, 1, hidden), "probe")?,
            query: part(0, 1)?,
            kv: part(1, 2)?,
            out: Projection::load(hidden, hidden, &attention.pp("out_proj"))?,
            norm: layer_norm(hidden, config.layer_norm_eps, vb.pp("layernorm"))?,
            mlp: Mlp::load(config, &vb.pp("mlp"))?,
            heads: config.heads,
        })
    }

    /// Rounds the weights to bfloat16, for a CPU.
    pub fn reduce(&mut self) -> Result<()> {
        for projection in [&mut self.query, &mut self.kv, &mut self.out] {
            projection.reduce()?;
        }
        self.mlp.reduce()
    }

    /// [batch, tokens, hidden] to [batch, hidden].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, hidden) = x.dims3()?;
        let query = self.query.forward(&self.probe)?.expand((batch, 1, hidden))?;
        let kv = self.kv.forward(x)?.chunk(2, 2)?;
        let pooled = self.out.forward(&attend(&query, &kv[0], &kv[1], self.heads, None)?)?;
        self.mlp.onto(&pooled, &self.norm.forward(&pooled)?)?.squeeze(1)
    }
}

/// Scales every row of `x` [batch, dimension] to unit length.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length)
}
