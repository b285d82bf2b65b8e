//! A CLIP checkpoint, loaded: both towers on their device.

mod device;
mod image_tower;
mod text_tower;
mod transformer;

use candle_core::{DType, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use image::RgbImage;

use super::checkpoint::{Architecture, Checkpoint, hub};
use super::preprocess::{Pixels, Preprocess};
use super::tokenizer::TextTokenizer;
use super::{CPU_PRECISIONS, ClipError, ModelCard, Options, Precision, Towers};
use device::Computer;
use image_tower::ImageTower;
use text_tower::TextTower;
use transformer::unit;

/// Batches that a GPU is given at one time: while it computes one, the host copies and measures the
/// other.
const DEVICE_BATCHES: usize = 2;

/// A loaded CLIP model.
pub struct Clip {
    card: ModelCard,
    preprocess: Preprocess,
    tokenizer: TextTokenizer,
    image: ImageTower,
    text: TextTower,
    dtype: DType,
    computer: Computer,
}

impl Clip {
    /// Loads a checkpoint. Refuses what it cannot compute exactly, naming the file and the reason.
    pub fn load(options: &Options) -> std::result::Result<Self, ClipError> {
        let computer = Computer::open(options.device)?;
        let device = computer.device();
        if device.is_cpu() && options.dtype == Precision::F16 {
            let reason = format!("model.dtype: {CPU_PRECISIONS}");
            return Err(ClipError::Device { device: "cpu".into(), reason });
        }
        let dtype = options.dtype.dtype(device);
        let (name, folder) = hub::find(options)?;
        let mut checkpoint = Checkpoint::read(&folder)?;
        let config = checkpoint.config.clone();
        let side = config.image.side as u32;
        let preprocess = Preprocess::new(&checkpoint.preprocessor, side).map_err(|reason| {
            ClipError::Checkpoint {
                file: checkpoint.folder.join("preprocessor_config.json"),
                reason,
            }
        })?;
        let tokenizer = TextTokenizer::load(&checkpoint.folder, &config)?;
        let tensors = checkpoint.tensors(dtype, device)?;
        let wrong = |e| checkpoint.weights_error(&e);
        let mut image = ImageTower::load(&config, &tensors).map_err(wrong)?;
        let mut text = TextTower::load(&config, &tensors, device, dtype).map_err(wrong)?;
        if device.is_cpu() && options.dtype == Precision::Bf16 {
            image.reduce()?;
            text.reduce()?;
        }
        let logit_scale = scalar(&tensors, "logit_scale").map_err(wrong)?.exp();
        let logit_bias = match config.architecture {
            Architecture::Clip => None,
            Architecture::Siglip => Some(scalar(&tensors, "logit_bias").map_err(wrong)?),
        };
        let card = ModelCard {
            name,
            architecture: config.architecture.name().to_owned(),
            fingerprint: checkpoint.fingerprint.clone(),
            dimension: config.dimension,
            image_side: side,
            context_length: config.text.context,
            preprocessing: preprocess.describe(),
            logit_scale,
            logit_bias,
            parameters: checkpoint.parameters,
            notice: config.notice.clone(),
        };
        Ok(Self { card, preprocess, tokenizer, image, text, dtype, computer })
    }

    /// The token ids of `text` as the text tower reads them.
    pub fn tokens(&self, text: &str) -> std::result::Result<Vec<u32>, ClipError> {
        self.tokenizer.tokens(text)
    }

    /// Normalised pixels as one tensor [batch, 3, side, side].
    fn batch(&self, pictures: &[Pixels]) -> Result<Tensor> {
        let side = self.card.image_side as usize;
        let (factor, shift) = (self.preprocess.factor, self.preprocess.shift);
        let device = self.computer.device();
        if !device.is_cpu() {
            // As bytes: a quarter of what crosses the bus, and the device has the cores for the rest.
            let bytes = pictures.iter().flat_map(|picture| &picture.0).copied().collect();
            let bytes = Tensor::from_vec::<_, u8>(bytes, (pictures.len(), side, side, 3), device)?;
            let channels = |values: [f32; 3]| Tensor::new(&values, device);
            let pixels = bytes.permute((0, 3, 1, 2))?.contiguous()?.to_dtype(DType::F32)?;
            let factor = channels(factor)?.reshape((1, 3, 1, 1))?;
            let shift = channels(shift)?.reshape((1, 3, 1, 1))?;
            return pixels.broadcast_mul(&factor)?.broadcast_sub(&shift)?.to_dtype(self.dtype);
        }
        let area = side * side;
        let mut values = vec![0f32; pictures.len() * 3 * area];
        for (picture, planes) in pictures.iter().zip(values.chunks_exact_mut(3 * area)) {
            for (channel, plane) in planes.chunks_exact_mut(area).enumerate() {
                let pixels = picture.0.iter().skip(channel).step_by(3);
                for (value, pixel) in plane.iter_mut().zip(pixels) {
                    *value = f32::from(*pixel) * factor[channel] - shift[channel];
                }
            }
        }
        Tensor::from_vec(values, (pictures.len(), 3, side, side), device)
    }
}

impl Towers for Clip {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn prepare(&self, image: &RgbImage) -> std::result::Result<Pixels, ClipError> {
        self.preprocess.apply(image)
    }

    fn batches_at_once(&self) -> usize {
        if self.computer.device().is_cpu() { 1 } else { DEVICE_BATCHES }
    }

    fn failures(&self) -> u32 {
        self.computer.failures()
    }

    fn knows_script(&self, text: &str) -> bool {
        self.tokenizer.knows_script(text)
    }

    fn embed_images(&self, batch: &[Pixels]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        self.computer.run(batch, |part| {
            let embedded = self.image.forward(&self.batch(part)?)?;
            unit(&embedded.to_dtype(DType::F32)?)?.to_vec2()
        })
    }

    fn embed_texts(&self, texts: &[&str]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        let tokens = texts
            .iter()
            .map(|text| self.tokenizer.tokens(text))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        self.computer.run(&tokens, |part| {
            let embedded = self.text.forward(part)?;
            unit(&embedded.to_dtype(DType::F32)?)?.to_vec2()
        })
    }
}

/// One number: of shape [] or, as some exports have it, [1]. Whatever the towers compute in, it is not
/// rounded to that: the logit scale stands in the keys of statistics, which CPU and GPU must agree on.
fn scalar(tensors: &VarBuilder, name: &str) -> Result<f32> {
    let read = |shape: Shape| {
        tensors.get_with_hints_dtype(shape, name, candle_nn::Init::default(), DType::F32)
    };
    let tensor = read(Shape::from(())).or_else(|_| read(Shape::from(1)))?;
    tensor.flatten_all()?.get(0)?.to_scalar()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    #[test]
    fn the_logit_scale_is_not_rounded_to_what_the_towers_compute_in() {
        // CLIP's: 4.59375 in bf16, 4.6055 in f16.
        for shape in [Shape::from(()), Shape::from(1)] {
            let written = Tensor::from_vec(vec![4.6052f32], shape, &Device::Cpu).unwrap();
            let written = HashMap::from([("logit_scale".to_owned(), written)]);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let tensors = VarBuilder::from_tensors(written.clone(), dtype, &Device::Cpu);
                assert_eq!(scalar(&tensors, "logit_scale").unwrap(), 4.6052, "{dtype:?}");
            }
        }
    }
}
