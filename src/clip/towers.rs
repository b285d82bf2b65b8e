//! A CLIP checkpoint, loaded: both towers on their device.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Module, VarBuilder, embedding, layer_norm};
use image::RgbImage;

use super::checkpoint::{Checkpoint, Config};
use super::preprocess::{Pixels, Preprocess};
use super::tokenizer::TextTokenizer;
use super::transformer::{Encoder, Sizes, unit};
use super::{ClipError, ModelCard, Options, Precision, Towers, open_device};

/// A loaded CLIP model.
pub struct Clip {
    card: ModelCard,
    preprocess: Preprocess,
    tokenizer: TextTokenizer,
    image: ImageTower,
    text: TextTower,
    device: Device,
    dtype: DType,
}

impl Clip {
    /// Loads a checkpoint. Refuses what it cannot compute exactly, naming the file and the reason.
    pub fn load(options: &Options) -> std::result::Result<Self, ClipError> {
        let device = open_device(options.device)?;
        if device.is_cpu() && options.dtype != Precision::F32 {
            return Err(ClipError::Device {
                device: "cpu".into(),
                reason: "computes in f32 only; set model.dtype to f32".into(),
            });
        }
        let dtype = options.dtype.dtype();
        let mut checkpoint = Checkpoint::read(&options.checkpoint)?;
        let config = checkpoint.config.clone();
        let side = config.vision_config.image_size as u32;
        let preprocess = Preprocess::new(&checkpoint.preprocessor, side).map_err(|reason| {
            ClipError::Checkpoint {
                file: checkpoint.folder.join("preprocessor_config.json"),
                reason,
            }
        })?;
        let tokenizer = TextTokenizer::load(&checkpoint.folder, &config.text_config)?;
        let tensors = checkpoint.tensors(dtype, &device)?;
        let wrong = |e| checkpoint.weights_error(&e);
        let image = ImageTower::load(&config, &tensors).map_err(wrong)?;
        let text = TextTower::load(&config, &tensors, &device, dtype).map_err(wrong)?;
        let logit_scale = logit_scale(&tensors).map_err(wrong)?;
        let folder =
            options.checkpoint.canonicalize().unwrap_or_else(|_| options.checkpoint.clone());
        let card = ModelCard {
            name: folder
                .file_name()
                .map_or_else(|| "clip".into(), |n| n.to_string_lossy().into_owned()),
            architecture: config.model_type.clone(),
            fingerprint: checkpoint.fingerprint.clone(),
            dimension: config.projection_dim,
            image_side: side,
            context_length: config.text_config.max_position_embeddings,
            logit_scale,
            parameters: checkpoint.parameters,
            notice: config.notice.clone(),
        };
        Ok(Self { card, preprocess, tokenizer, image, text, device, dtype })
    }

    /// Normalised pixels as one tensor [batch, 3, side, side].
    fn batch(&self, pictures: &[Pixels]) -> Result<Tensor> {
        let side = self.card.image_side as usize;
        let area = side * side;
        let (factor, shift) = (self.preprocess.factor, self.preprocess.shift);
        let mut values = vec![0f32; pictures.len() * 3 * area];
        for (picture, planes) in pictures.iter().zip(values.chunks_exact_mut(3 * area)) {
            for (channel, plane) in planes.chunks_exact_mut(area).enumerate() {
                let pixels = picture.0.iter().skip(channel).step_by(3);
                for (value, pixel) in plane.iter_mut().zip(pixels) {
                    *value = f32::from(*pixel) * factor[channel] - shift[channel];
                }
            }
        }
        Tensor::from_vec(values, (pictures.len(), 3, side, side), &self.device)?
            .to_dtype(self.dtype)
    }
}

impl Towers for Clip {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn prepare(&self, image: &RgbImage) -> std::result::Result<Pixels, ClipError> {
        self.preprocess.apply(image)
    }

    fn knows_script(&self, text: &str) -> bool {
        self.tokenizer.knows_script(text)
    }

    fn embed_images(&self, batch: &[Pixels]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let embedded = self.image.forward(&self.batch(batch)?)?;
        Ok(unit(&embedded.to_dtype(DType::F32)?)?.to_vec2()?)
    }

    fn embed_texts(&self, texts: &[&str]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let tokens = texts
            .iter()
            .map(|text| self.tokenizer.tokens(text))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let embedded = self.text.forward(&tokens)?;
        Ok(unit(&embedded.to_dtype(DType::F32)?)?.to_vec2()?)
    }
}

fn logit_scale(tensors: &VarBuilder) -> Result<f32> {
    let log = tensors.get((), "logit_scale")?;
    Ok(log.to_dtype(DType::F32)?.to_scalar::<f32>()?.exp())
}

struct ImageTower {
    /// [hidden, 3·patch·patch]: a convolution whose stride is its size is one product.
    patches: Tensor,
    class: Tensor,
    positions: Tensor,
    before: LayerNorm,
    encoder: Encoder,
    after: LayerNorm,
    projection: Tensor,
    patch: usize,
}

impl ImageTower {
    fn load(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let vision = &config.vision_config;
        let sizes = vision.encoder.sizes(&Sizes { hidden: 768, intermediate: 3072, heads: 12 });
        let (hidden, patch, eps) = (sizes.hidden, vision.patch_size, vision.encoder.layer_norm_eps);
        if vision.num_channels != 3 || patch == 0 || !vision.image_size.is_multiple_of(patch) {
            candle_core::bail!(
                "image_size {}, patch_size {patch}, num_channels {} are not supported",
                vision.image_size,
                vision.num_channels
            );
        }
        let tokens = (vision.image_size / patch).pow(2) + 1;
        let tower = vb.pp("vision_model");
        let embeddings = tower.pp("embeddings");
        let patches = embeddings.get((hidden, 3, patch, patch), "patch_embedding.weight")?;
        Ok(Self {
            patches: patches.reshape((hidden, 3 * patch * patch))?.t()?.contiguous()?,
            class: embeddings.get(hidden, "class_embedding")?,
            positions: embeddings.get((tokens, hidden), "position_embedding.weight")?,
            // The reference's own spelling.
            before: layer_norm(hidden, eps, tower.pp("pre_layrnorm"))?,
            encoder: Encoder::load(&vision.encoder, &sizes, &tower)?,
            after: layer_norm(hidden, eps, tower.pp("post_layernorm"))?,
            projection: vb
                .get((config.projection_dim, hidden), "visual_projection.weight")?
                .t()?
                .contiguous()?,
            patch,
        })
    }

    /// [batch, 3, side, side] to [batch, dimension], not yet unit length.
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, side, _) = pixels.dims4()?;
        let (patch, across) = (self.patch, side / self.patch);
        let cut = pixels
            .reshape(&[batch, channels, across, patch, across, patch])?
            .permute([0, 2, 4, 1, 3, 5].as_slice())?
            .reshape((batch * across * across, channels * patch * patch))?;
        let hidden = self.class.dim(0)?;
        let patches = cut.matmul(&self.patches)?.reshape((batch, across * across, hidden))?;
        let class = self.class.expand((batch, 1, hidden))?;
        let x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        let x = self.encoder.forward(&self.before.forward(&x)?, None)?;
        let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        self.after.forward(&class)?.matmul(&self.projection)
    }
}

struct TextTower {
    tokens: Embedding,
    positions: Tensor,
    encoder: Encoder,
    after: LayerNorm,
    projection: Tensor,
    /// [context, context], 0 on and below the diagonal, −∞ above: a token sees none behind it.
    mask: Tensor,
    device: Device,
}

impl TextTower {
    fn load(config: &Config, vb: &VarBuilder, device: &Device, dtype: DType) -> Result<Self> {
        let text = &config.text_config;
        let sizes = text.encoder.sizes(&Sizes { hidden: 512, intermediate: 2048, heads: 8 });
        let hidden = sizes.hidden;
        let context = text.max_position_embeddings;
        let tower = vb.pp("text_model");
        let embeddings = tower.pp("embeddings");
        let mask: Vec<f32> = (0..context * context)
            .map(|i| if i % context > i / context { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        Ok(Self {
            tokens: embedding(text.vocab_size, hidden, embeddings.pp("token_embedding"))?,
            positions: embeddings.get((context, hidden), "position_embedding.weight")?,
            encoder: Encoder::load(&text.encoder, &sizes, &tower)?,
            after: layer_norm(hidden, text.encoder.layer_norm_eps, tower.pp("final_layer_norm"))?,
            projection: vb
                .get((config.projection_dim, hidden), "text_projection.weight")?
                .t()?
                .contiguous()?,
            mask: Tensor::from_vec(mask, (context, context), device)?.to_dtype(dtype)?,
            device: device.clone(),
        })
    }

    /// Token ids, each row ending with end-of-text, to [batch, dimension], not yet unit length.
    fn forward(&self, rows: &[Vec<u32>]) -> Result<Tensor> {
        let longest = rows.iter().map(Vec::len).max().unwrap_or_default();
        let mut ids = Vec::with_capacity(rows.len() * longest);
        let mut ends = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            ends.push((i * longest + row.len() - 1) as u32);
            ids.extend_from_slice(row);
            // Behind the end-of-text token, whatever stands there is never seen.
            ids.resize((i + 1) * longest, 0);
        }
        let ids = Tensor::from_vec(ids, (rows.len(), longest), &self.device)?;
        let positions = self.positions.narrow(0, 0, longest)?;
        let mask = self.mask.narrow(0, 0, longest)?.narrow(1, 0, longest)?.contiguous()?;
        let x = self.tokens.forward(&ids)?.broadcast_add(&positions)?;
        let x = self.encoder.forward(&x, Some(&mask))?.flatten_to(1)?;
        let ends = Tensor::new(ends, &self.device)?;
        self.after.forward(&x.index_select(&ends, 0)?)?.matmul(&self.projection)
    }
}
