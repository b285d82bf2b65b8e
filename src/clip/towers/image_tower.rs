//! The image tower: a vision transformer over patches.

use candle_core::{Result, Tensor};
use candle_nn::{LayerNorm, Module, VarBuilder, layer_norm};

use super::transformer::{AttentionPool, Encoder};
use crate::clip::checkpoint::{Architecture, Config};

/// Pixels to embeddings.
pub struct ImageTower {
    /// [3·patch·patch, hidden]: a convolution whose stride is its size is one product.
    patches: Tensor,
    patch_bias: Option<Tensor>,
    /// CLIP's class token.
    class: Option<Tensor>,
    positions: Tensor,
    before: Option<LayerNorm>,
    encoder: Encoder,
    after: LayerNorm,
    head: Head,
    patch: usize,
}

/// From tokens to one vector.
enum Head {
    /// CLIP: the class token, projected.
    Class(Tensor),
    /// SigLIP.
    Pool(Box<AttentionPool>),
}

impl ImageTower {
    /// Loads `vision_model.*` and what follows it.
    pub fn load(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let image = &config.image;
        let (hidden, patch, eps) =
            (image.encoder.hidden, image.patch, image.encoder.layer_norm_eps);
        let tower = vb.pp("vision_model");
        let embeddings = tower.pp("embeddings");
        let patches = embeddings.get((hidden, 3, patch, patch), "patch_embedding.weight")?;
        let count = (image.side / patch).pow(2);
        let (class, patch_bias, before, head) = match config.architecture {
            Architecture::Clip => {
                let projection = vb.get((config.dimension, hidden), "visual_projection.weight")?;
                (
                    Some(embeddings.get(hidden, "class_embedding")?),
                    None,
                    // The reference's own spelling.
                    Some(layer_norm(hidden, eps, tower.pp("pre_layrnorm"))?),
                    Head::Class(projection.t()?.contiguous()?),
                )
            }
            Architecture::Siglip => (
                None,
                Some(embeddings.get(hidden, "patch_embedding.bias")?),
                None,
                Head::Pool(Box::new(AttentionPool::load(&image.encoder, &tower.pp("head"))?)),
            ),
        };
        let tokens = count + usize::from(class.is_some());
        Ok(Self {
            patches: patches.reshape((hidden, 3 * patch * patch))?.t()?.contiguous()?,
            patch_bias,
            class,
            positions: embeddings.get((tokens, hidden), "position_embedding.weight")?,
            before,
            encoder: Encoder::load(&image.encoder, &tower)?,
            after: layer_norm(hidden, eps, tower.pp("post_layernorm"))?,
            head,
            patch,
        })
    }

    /// Rounds the weights of the blocks to bfloat16, for a CPU.
    pub fn reduce(&mut self) -> Result<()> {
        self.encoder.reduce()?;
        match &mut self.head {
            Head::Class(_) => Ok(()),
            Head::Pool(pool) => pool.reduce(),
        }
    }

    /// [batch, 3, side, side] to [batch, dimension], not yet unit length.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, side, _) = pixels.dims4()?;
        let (patch, across) = (self.patch, side / self.patch);
        // Pixels that fill no whole patch are left out, as a convolution does.
        let used = across * patch;
        let cut = pixels
            .narrow(2, 0, used)?
            .narrow(3, 0, used)?
            .reshape(&[batch, channels, across, patch, across, patch])?
            .permute([0, 2, 4, 1, 3, 5].as_slice())?
            .reshape((batch * across * across, channels * patch * patch))?;
        let (_, hidden) = self.patches.dims2()?;
        let mut x = cut.matmul(&self.patches)?.reshape((batch, across * across, hidden))?;
        if let Some(bias) = &self.patch_bias {
            x = x.broadcast_add(bias)?;
        }
        if let Some(class) = &self.class {
            x = Tensor::cat(&[&class.expand((batch, 1, hidden))?, &x], 1)?;
        }
        x = x.broadcast_add(&self.positions)?;
        if let Some(before) = &self.before {
            x = before.forward(&x)?;
        }
        let x = self.encoder.forward(&x, None)?;
        match &self.head {
            Head::Class(projection) => {
                let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
                self.after.forward(&class)?.matmul(projection)
            }
            Head::Pool(pool) => pool.forward(&self.after.forward(&x)?),
        }
    }
}
