//! From a picture to the square of pixels that the image tower reads, as Hugging Face's
//! `CLIPImageProcessor` does it with PIL.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::ClipError;
use super::checkpoint::{Preprocessor, Size};

/// Pixels around the crop that are resized with it, so that the filter sees the same neighbours
/// as it would in the whole picture.
const MARGIN: f64 = 4.0;

/// A square of 8-bit RGB pixels, row by row: side × side × 3 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels(pub Vec<u8>);

/// Resizes and crops.
#[derive(Debug, Clone)]
pub struct Preprocess {
    /// Length of the short edge after resizing.
    short: u32,
    /// Side of the centre crop.
    crop: u32,
    filter: FilterType,
    /// Multiplied by the rescale factor and normalised: value·factor − shift, per channel.
    pub factor: [f32; 3],
    pub shift: [f32; 3],
}

impl Preprocess {
    /// From a checkpoint's configuration, for a tower that reads `side` × `side` pixels. The error
    /// says what is not supported.
    pub fn new(config: &Preprocessor, side: u32) -> Result<Self, String> {
        let edge = |size: Size| match size {
            Size::Number(n) | Size::Shortest { shortest_edge: n } => Ok(n),
            Size::Exact { height, width } if height == width => Ok(height),
            Size::Exact { height, width } => Err(format!("size {width}×{height} is not square")),
        };
        let short = edge(config.size)?;
        let crop = match config.crop_size {
            Some(size) if config.do_center_crop => edge(size)?,
            _ => return Err(
                "do_center_crop is off or crop_size is missing; this version needs a centre crop"
                    .into(),
            ),
        };
        if crop != side || short < crop {
            return Err(format!(
                "size {short} and crop_size {crop} do not lead to the model's image_size {side}"
            ));
        }
        let filter = match config.resample {
            3 => FilterType::CatmullRom,
            2 => FilterType::Bilinear,
            1 => FilterType::Lanczos3,
            other => {
                return Err(format!(
                    "resample {other} is not 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"
                ));
            }
        };
        let mut factor = [0.0; 3];
        let mut shift = [0.0; 3];
        for channel in 0..3 {
            factor[channel] = config.rescale_factor as f32 / config.image_std[channel];
            shift[channel] = config.image_mean[channel] / config.image_std[channel];
        }
        Ok(Self { short, crop, filter, factor, shift })
    }

    /// Resizes the short edge, then crops the centre. Only the part of the picture that the crop
    /// shows is resized, so that a very long picture costs no more than a square one.
    pub fn apply(&self, picture: &RgbImage) -> Result<Pixels, ClipError> {
        let (width, height) = picture.dimensions();
        if width == 0 || height == 0 {
            return Err(ClipError::Input("the picture has no pixels".into()));
        }
        let long = |side: u32, short: u32| {
            (u64::from(self.short) * u64::from(side) / u64::from(short)) as f64
        };
        let (out_width, out_height) = if width <= height {
            (f64::from(self.short), long(height, width))
        } else {
            (long(width, height), f64::from(self.short))
        };
        let (left, box_left, box_width, across) = self.window(f64::from(width), out_width);
        let (top, box_top, box_height, down) = self.window(f64::from(height), out_height);

        let failed = |e: &dyn std::fmt::Display| ClipError::Input(format!("resizing failed: {e}"));
        let source = ImageRef::new(width, height, picture.as_raw(), PixelType::U8x3)
            .map_err(|e| failed(&e))?;
        let mut target = Image::new(across, down, PixelType::U8x3);
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(self.filter))
            .crop(box_left, box_top, box_width, box_height);
        Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;

        let side = self.crop as usize;
        let mut pixels = Vec::with_capacity(side * side * 3);
        for row in target.buffer().chunks_exact(across as usize * 3).skip(top).take(side) {
            pixels.extend_from_slice(&row[left * 3..(left + side) * 3]);
        }
        Ok(Pixels(pixels))
    }

    /// Along one axis: where the crop starts in the resized window, the window's start and length
    /// in the source, and its length in the target.
    fn window(&self, source: f64, target: f64) -> (usize, f64, f64, u32) {
        let crop = f64::from(self.crop);
        let start = ((target - crop) / 2.0).floor();
        let from = (start - MARGIN).max(0.0);
        let to = (start + crop + MARGIN).min(target);
        let scale = source / target;
        ((start - from) as usize, from * scale, (to - from) * scale, (to - from) as u32)
    }
}
