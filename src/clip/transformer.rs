//! The transformer that both towers are made of (pre-norm, as in "Learning Transferable Visual
//! Models From Natural Language Supervision", 2021).

use candle_core::{D, Result, Tensor};
use candle_nn::ops::{sigmoid, softmax_last_dim};
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, layer_norm, linear};

use super::checkpoint::EncoderConfig;

/// Sizes that differ between the towers where a configuration leaves them out.
pub struct Sizes {
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
}

impl EncoderConfig {
    /// The sizes, with `default` for those that are left out.
    pub fn sizes(&self, default: &Sizes) -> Sizes {
        Sizes {
            hidden: self.hidden_size.unwrap_or(default.hidden),
            intermediate: self.intermediate_size.unwrap_or(default.intermediate),
            heads: self.num_attention_heads.unwrap_or(default.heads),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Activation {
    QuickGelu,
    Gelu,
    GeluTanh,
}

impl Activation {
    fn parse(name: &str) -> Result<Self> {
        match name {
            "quick_gelu" => Ok(Self::QuickGelu),
            "gelu" => Ok(Self::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Self::GeluTanh),
            other => candle_core::bail!(
                "hidden_act {other:?} is not quick_gelu, gelu or gelu_pytorch_tanh"
            ),
        }
    }

    fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::QuickGelu => x * sigmoid(&(x * 1.702)?)?,
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
        }
    }
}

struct Block {
    norm1: LayerNorm,
    /// Queries, keys and values in one product: weight [3·hidden, hidden].
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    heads: usize,
}

impl Block {
    fn load(config: &EncoderConfig, sizes: &Sizes, vb: &VarBuilder) -> Result<Self> {
        let hidden = sizes.hidden;
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
            fc1: linear(hidden, sizes.intermediate, vb.pp("mlp.fc1"))?,
            fc2: linear(sizes.intermediate, hidden, vb.pp("mlp.fc2"))?,
            activation: Activation::parse(&config.hidden_act)?,
            heads: sizes.heads,
        })
    }

    /// `x` and the result are [batch, tokens, hidden]; `mask` is added to the scores of every head.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?, mask)?)?;
        let inner = self.activation.apply(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        x + self.fc2.forward(&inner)?
    }

    fn attention(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, hidden) = x.dims3()?;
        let size = hidden / self.heads;
        let qkv = self
            .qkv
            .forward(x)?
            .reshape((batch, tokens, 3, self.heads, size))?
            .permute((2, 0, 3, 1, 4))?;
        let q = (qkv.get(0)?.contiguous()? * (size as f64).powf(-0.5))?;
        let k = qkv.get(1)?.contiguous()?;
        let v = qkv.get(2)?.contiguous()?;
        let scores = q.matmul(&k.t()?)?;
        let scores = match mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let mixed = softmax_last_dim(&scores)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch, tokens, hidden))?;
        self.out.forward(&mixed)
    }
}

/// A stack of blocks.
pub struct Encoder {
    blocks: Vec<Block>,
}

impl Encoder {
    /// Loads `encoder.layers.*` below `vb`.
    pub fn load(config: &EncoderConfig, sizes: &Sizes, vb: &VarBuilder) -> Result<Self> {
        if sizes.heads == 0 || !sizes.hidden.is_multiple_of(sizes.heads) {
            candle_core::bail!(
                "hidden_size {} is no multiple of num_attention_heads {}",
                sizes.hidden,
                sizes.heads
            );
        }
        let layers = vb.pp("encoder.layers");
        let blocks = (0..config.num_hidden_layers)
            .map(|i| Block::load(config, sizes, &layers.pp(i)))
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

/// Scales every row of `x` [batch, dimension] to unit length.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length)
}
