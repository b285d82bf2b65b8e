//! A loaded CLIP model: both encoders on their device.

mod device;
mod image_encoder;
mod text_encoder;
mod transformer;

use candle_core::{DType, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use image::RgbImage;

use super::checkpoint::{Architecture, Checkpoint, KeyReport, hub};
use super::encoders::Encoders;
use super::error::ClipError;
use super::model_card::ModelCard;
use super::options::{CPU_PRECISION_HINT, ModelOptions, Precision};
use super::preprocess::{ImagePreprocessor, Pixels};
use super::tokenizer::TextTokenizer;
use super::unread_text::UnreadText;
use device::ComputeDevice;
use image_encoder::ImageEncoder;
use text_encoder::TextEncoder;
use transformer::normalise_rows;

/// Batches given to a GPU at the same time: while it computes one, the host copies the pixels of the
/// other and measures its embeddings.
const GPU_CONCURRENT_BATCHES: usize = 2;

/// A CLIP or SigLIP model with its weights on a device.
pub struct ClipModel {
    card: ModelCard,
    layout: &'static str,
    keys: KeyReport,
    preprocessor: ImagePreprocessor,
    tokenizer: TextTokenizer,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    dtype: DType,
    device: ComputeDevice,
}

impl ClipModel {
    /// Loads a checkpoint. A checkpoint that cannot be computed exactly is an error that names the
    /// file and the reason.
    pub fn load(options: &ModelOptions) -> std::result::Result<Self, ClipError> {
        let compute_device = ComputeDevice::open(options.device)?;
        let device = compute_device.device();
        if device.is_cpu() && options.dtype == Precision::F16 {
            let reason = format!("model.dtype: {CPU_PRECISION_HINT}");
            return Err(ClipError::Device { device: "cpu".into(), reason });
        }
        let dtype = options.dtype.tensor_dtype(device);
        let (name, folder) = hub::find_or_download_checkpoint(
            &options.checkpoint,
            &options.revision,
            options.offline,
        )?;
        let mut checkpoint = Checkpoint::read(&folder)?;
        let config = checkpoint.model_config.clone();
        let side = config.image_encoder.image_side as u32;
        let preprocess =
            ImagePreprocessor::new(&checkpoint.preprocessor_config, side).map_err(|reason| {
                ClipError::InvalidCheckpoint { file: checkpoint.preprocessor_file.clone(), reason }
            })?;
        let tensors = checkpoint.tensors(dtype, device);
        let weights_error = |e| checkpoint.weights_error(&e);
        let mut image = ImageEncoder::load(&config, &tensors).map_err(weights_error)?;
        let mut text =
            TextEncoder::load(&config, &tensors, device, dtype).map_err(weights_error)?;
        if device.is_cpu() && options.dtype == Precision::Bf16 {
            image.convert_to_bf16()?;
            text.convert_to_bf16()?;
        }
        let logit_scale = load_scalar(&tensors, "logit_scale").map_err(weights_error)?.exp();
        if !logit_scale.is_finite() {
            let error = candle_core::Error::Msg("exp of logit_scale is not finite".into());
            return Err(weights_error(error));
        }
        // Of CLIP only checkpoints trained with SigLIP's loss have it.
        let logit_bias = (config.architecture == Architecture::Siglip
            || tensors.contains_tensor("logit_bias"))
        .then(|| load_scalar(&tensors, "logit_bias").map_err(weights_error))
        .transpose()?;
        drop(tensors);
        checkpoint.check_unread_tensors()?;
        let card = ModelCard {
            name,
            architecture: config.architecture.name().to_owned(),
            fingerprint: checkpoint.fingerprint.clone(),
            dimension: config.dimension,
            image_side: side,
            context_length: config.text_encoder.context_length,
            preprocessing: preprocess.describe(),
            logit_scale,
            logit_bias,
            parameters: checkpoint.count_parameters(),
            notice: config.notice.clone(),
        };
        let (layout, keys) = (checkpoint.layout.name(), std::mem::take(&mut checkpoint.keys));
        let tokenizer = TextTokenizer::new(checkpoint.tokenizer, &config)?;
        Ok(Self {
            card,
            layout,
            keys,
            preprocessor: preprocess,
            tokenizer,
            image_encoder: image,
            text_encoder: text,
            dtype,
            device: compute_device,
        })
    }

    /// Returns the name of the layout of the checkpoint: that of the library that saves it so.
    pub fn layout(&self) -> &'static str {
        self.layout
    }

    /// Returns what became of every key of the checkpoint's files.
    pub fn keys(&self) -> &KeyReport {
        &self.keys
    }

    /// Returns the token ids of `text` as the text encoder reads them.
    pub fn tokenise(&self, text: &str) -> std::result::Result<Vec<u32>, ClipError> {
        self.tokenizer.tokenise(text)
    }

    /// Returns normalised pixels as one tensor [batch, 3, side, side].
    fn pixels_to_tensor(&self, pictures: &[Pixels]) -> Result<Tensor> {
        let side = self.card.image_side as usize;
        let (factor, shift) = (self.preprocessor.channel_scale, self.preprocessor.channel_shift);
        let device = self.device.device();
        if !device.is_cpu() {
            // Copied as bytes, a quarter of the size of f32, and normalised on the device.
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

impl Encoders for ClipModel {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn preprocess_image(&self, image: &RgbImage) -> std::result::Result<Pixels, ClipError> {
        self.preprocessor.resize_and_crop(image)
    }

    fn concurrent_batches(&self) -> usize {
        if self.device.device().is_cpu() { 1 } else { GPU_CONCURRENT_BATCHES }
    }

    fn consecutive_failures(&self) -> u32 {
        self.device.consecutive_failures()
    }

    fn supports_script(&self, text: &str) -> bool {
        self.tokenizer.supports_script(text)
    }

    fn find_unread(&self, text: &str) -> UnreadText {
        self.tokenizer.find_unread(text)
    }

    fn embed_images(&self, batch: &[Pixels]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        let embedded = self.device.run_batch(batch, |part| {
            let embedded = self.image_encoder.encode_pixels(&self.pixels_to_tensor(part)?)?;
            normalise_rows(&embedded.to_dtype(DType::F32)?)?.to_vec2()
        })?;
        ClipError::ensure_finite("picture", embedded)
    }

    fn embed_texts(&self, texts: &[&str]) -> std::result::Result<Vec<Vec<f32>>, ClipError> {
        let tokens = texts
            .iter()
            .map(|text| self.tokenizer.tokenise(text))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let embedded = self.device.run_batch(&tokens, |part| {
            let embedded = self.text_encoder.encode_token_rows(part)?;
            normalise_rows(&embedded.to_dtype(DType::F32)?)?.to_vec2()
        })?;
        ClipError::ensure_finite("text", embedded)
    }
}

/// Loads one number, of shape [] or, in some exports, [1]. It is always f32, whatever the precision of
/// the encoders: the logit scale is part of the keys of statistics, which CPU and GPU must agree on.
fn load_scalar(tensors: &VarBuilder, name: &str) -> Result<f32> {
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
    fn the_logit_scale_is_not_rounded_to_the_compute_dtype() {
        // CLIP's: 4.59375 in bf16, 4.6055 in f16.
        for shape in [Shape::from(()), Shape::from(1)] {
            let written = Tensor::from_vec(vec![4.6052f32], shape, &Device::Cpu).unwrap();
            let written = HashMap::from([("logit_scale".to_owned(), written)]);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let tensors = VarBuilder::from_tensors(written.clone(), dtype, &Device::Cpu);
                assert_eq!(load_scalar(&tensors, "logit_scale").unwrap(), 4.6052, "{dtype:?}");
            }
        }
    }
}
