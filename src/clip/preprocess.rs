//! From a picture to the square of pixels that the image tower reads, as Hugging Face's
//! `CLIPImageProcessor` does it with PIL.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::ClipError;
use super::checkpoint::{Preprocessor, Size};

/// Pixels around the crop that are resized with it, so that the filter sees the same neighbours
/// as it would in the whole picture: in pixels of the larger of source and target. The widest
/// filter, Lanczos, reaches 3 pixels.
const MARGIN: f64 = 4.0;

/// A square of 8-bit RGB pixels, row by row: side × side × 3 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels(pub Vec<u8>);

/// Resizes and crops.
#[derive(Debug, Clone)]
pub struct Preprocess {
    /// Length of the short edge after resizing; none where both edges become `crop`, whatever
    /// the picture's shape.
    short: Option<u32>,
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
        let resized = edge(config.size)?;
        let cropped = config.crop_size.filter(|_| config.do_center_crop != Some(false));
        let (short, crop) = match (cropped, config.size) {
            (Some(crop), _) => (Some(resized), edge(crop)?),
            (None, Size::Exact { .. }) => (None, resized),
            (None, _) => {
                return Err("neither a crop_size nor a size with height and width is given".into());
            }
        };
        if crop != side || resized < crop {
            return Err(format!(
                "size {resized} and crop_size {crop} do not lead to the model's image_size {side}"
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

    /// What is done, in words.
    pub fn describe(&self) -> String {
        let filter = match self.filter {
            FilterType::CatmullRom => "bicubic",
            FilterType::Bilinear => "bilinear",
            _ => "Lanczos",
        };
        let crop = self.crop;
        match self.short {
            None => format!("{filter} to {crop} × {crop} whatever the shape"),
            Some(short) => format!("{filter}, short edge to {short}, centre {crop} × {crop}"),
        }
    }

    /// Resizes the short edge, then crops the centre. Only the part of the picture that the crop
    /// shows is resized, so that a very long picture costs no more than a square one.
    pub fn apply(&self, picture: &RgbImage) -> Result<Pixels, ClipError> {
        let (width, height) = picture.dimensions();
        if width == 0 || height == 0 {
            return Err(ClipError::Input("the picture has no pixels".into()));
        }
        let long = |edge: u32, side: u32, short: u32| {
            (u64::from(edge) * u64::from(side) / u64::from(short)) as f64
        };
        let (out_width, out_height) = match self.short {
            None => (f64::from(self.crop), f64::from(self.crop)),
            Some(edge) if width <= height => (f64::from(edge), long(edge, height, width)),
            Some(edge) => (long(edge, width, height), f64::from(edge)),
        };
        let (left, box_left, box_width, across) = self.window(f64::from(width), out_width);
        let (top, box_top, box_height, down) = self.window(f64::from(height), out_height);

        let failed = |e: &dyn std::fmt::Display| ClipError::Input(format!("resizing failed: {e}"));
        let source = ImageRef::new(width, height, picture.as_raw(), PixelType::U8x3)
            .map_err(|e| failed(&e))?;
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(self.filter));
        // First all rows, then all columns, rounding to 8 bits between, as PIL does: in the other
        // order noise comes out up to 3 of 255 apart.
        let (first, last) = (box_top.floor(), (box_top + box_height).ceil().min(f64::from(height)));
        let mut rows = Image::new(across, (last - first) as u32, PixelType::U8x3);
        let across_only = options.clone().crop(box_left, first, box_width, last - first);
        Resizer::new().resize(&source, &mut rows, &across_only).map_err(|e| failed(&e))?;
        let mut target = Image::new(across, down, PixelType::U8x3);
        let down_only = options.crop(0.0, box_top - first, f64::from(across), box_height);
        Resizer::new().resize(&rows, &mut target, &down_only).map_err(|e| failed(&e))?;

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
        let margin = (MARGIN * (target / source).max(1.0)).ceil();
        let from = (start - margin).max(0.0);
        let to = (start + crop + margin).min(target);
        let scale = source / target;
        ((start - from) as usize, from * scale, (to - from) * scale, (to - from) as u32)
    }
}
