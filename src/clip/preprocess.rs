//! Resizes and crops a picture to the square that the image encoder reads, as Hugging Face's
//! `CLIPImageProcessor` does it with PIL.

use std::error::Error;

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{F32x3, U8x3};
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::checkpoint::{CropRounding, PreprocessorConfig, ResampleFilter, ResizeMode};
use super::error::ClipError;

/// Width of the border around the crop that is resized with it, so that the filter sees the same
/// neighbours as in the whole picture: in pixels of the larger of source and target. The widest
/// filter, Lanczos, has a radius of 3 pixels.
const CROP_MARGIN_PIXELS: f64 = 4.0;

/// A square of 8-bit RGB pixels, row by row: side × side × 3 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels(pub Vec<u8>);

/// Resizes and crops pictures as a checkpoint configures it.
#[derive(Debug, Clone)]
pub struct ImagePreprocessor {
    resize_mode: ResizeMode,
    /// Side of the centre crop, in pixels.
    crop_side: u32,
    crop_rounding: CropRounding,
    resize_filter: FilterType,
    /// A byte of channel c becomes byte·scale\[c\] − shift\[c\]: rescaled and normalised in one step.
    pub channel_scale: [f32; 3],
    pub channel_shift: [f32; 3],
}

impl ImagePreprocessor {
    /// Creates the preprocessor of a checkpoint whose image encoder reads `side` × `side` pixels. The
    /// error says what is not supported.
    pub fn new(config: &PreprocessorConfig, side: u32) -> Result<Self, String> {
        let resize = config.resize;
        let (ResizeMode::ShortEdge(resized) | ResizeMode::Square(resized)) = resize;
        let crop = match (config.crop_side, resize) {
            (Some(crop), _) => crop,
            (None, ResizeMode::Square(side)) => side,
            (None, ResizeMode::ShortEdge(_)) => {
                return Err(
                    "size gives the short edge only, and do_center_crop is off: pictures would not be square"
                        .into(),
                );
            }
        };
        if crop != side || resized < crop {
            return Err(format!(
                "size {resized} and crop_size {crop} do not lead to the model's image_size {side}"
            ));
        }
        let filter = match config.filter {
            ResampleFilter::Bicubic => FilterType::CatmullRom,
            ResampleFilter::Bilinear => FilterType::Bilinear,
            ResampleFilter::Lanczos => FilterType::Lanczos3,
            ResampleFilter::Box => FilterType::Box,
            ResampleFilter::Hamming => FilterType::Hamming,
        };
        let mut factor = [0.0; 3];
        let mut shift = [0.0; 3];
        for channel in 0..3 {
            factor[channel] = config.rescale_factor as f32 / config.std[channel];
            shift[channel] = config.mean[channel] / config.std[channel];
        }
        Ok(Self {
            resize_mode: resize,
            crop_side: crop,
            crop_rounding: config.crop_rounding,
            resize_filter: filter,
            channel_scale: factor,
            channel_shift: shift,
        })
    }

    /// Describes resizing and cropping in words, for [`super::ModelCard`].
    pub fn describe(&self) -> String {
        let filter = match self.resize_filter {
            FilterType::CatmullRom => "bicubic",
            FilterType::Bilinear => "bilinear",
            FilterType::Box => "box",
            FilterType::Hamming => "Hamming",
            _ => "Lanczos",
        };
        let crop = self.crop_side;
        match self.resize_mode {
            ResizeMode::Square(side) if side == crop => {
                format!("{filter} to {crop} × {crop} whatever the shape")
            }
            ResizeMode::Square(side) => {
                format!("{filter} to {side} × {side} whatever the shape, centre {crop} × {crop}")
            }
            ResizeMode::ShortEdge(short) => {
                format!("{filter}, short edge to {short}, centre {crop} × {crop}")
            }
        }
    }

    /// Resizes, then crops the centre. Only the part of the picture that the crop shows is resized,
    /// so that a very long picture costs no more than a square one.
    pub fn resize_and_crop(&self, picture: &RgbImage) -> Result<Pixels, ClipError> {
        let (width, height) = picture.dimensions();
        if width == 0 || height == 0 {
            return Err(ClipError::InvalidInput("the picture has no pixels".into()));
        }
        let long = |edge: u32, side: u32, short: u32| {
            (u64::from(edge) * u64::from(side) / u64::from(short)) as f64
        };
        let (out_width, out_height) = match self.resize_mode {
            ResizeMode::Square(side) => (f64::from(side), f64::from(side)),
            ResizeMode::ShortEdge(edge) if width <= height => {
                (f64::from(edge), long(edge, height, width))
            }
            ResizeMode::ShortEdge(edge) => (long(edge, width, height), f64::from(edge)),
        };
        let (left, box_left, box_width, across) = self.crop_window(f64::from(width), out_width);
        let (top, box_top, box_height, down) = self.crop_window(f64::from(height), out_height);

        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(self.resize_filter));
        // First all rows, then all columns, rounded to 8 bits in between, and in the other order for
        // tall pictures, as Pillow 13 does it: a different order changes noise by up to 8 of 255.
        let tall = height > 2 * width && out_height < f64::from(height);
        let steps = if tall {
            let (first, columns, left, box_width) = cover_whole_pixels(box_left, box_width, width);
            let columns_only = options.clone().crop(first, box_top, f64::from(columns), box_height);
            let rows_only = options.crop(left, 0.0, box_width, f64::from(down));
            [(columns, down, columns_only), (across, down, rows_only)]
        } else {
            let (first, rows, top, box_height) = cover_whole_pixels(box_top, box_height, height);
            let rows_only = options.clone().crop(box_left, first, box_width, f64::from(rows));
            let columns_only = options.crop(0.0, top, f64::from(across), box_height);
            [(across, rows, rows_only), (across, down, columns_only)]
        };
        // The 8-bit path has 16-bit coefficients. Enlarging uses few of them, so that their rounding
        // is visible (2 of 255); enlarged pictures are small enough for exact arithmetic.
        let enlarges = out_width > f64::from(width) || out_height > f64::from(height);
        let resized = if enlarges {
            resize_f32(picture, steps).map_err(|e| resize_error(&e))?
        } else {
            resize_u8(picture, steps).map_err(|e| resize_error(&e))?
        };

        let side = self.crop_side as usize;
        let mut pixels = Vec::with_capacity(side * side * 3);
        for row in resized.chunks_exact(across as usize * 3).skip(top).take(side) {
            pixels.extend_from_slice(&row[left * 3..(left + side) * 3]);
        }
        Ok(Pixels(pixels))
    }

    /// Returns, along one axis: where the crop starts in the resized window, the start and the length
    /// of the window in the source, and its length in the target.
    fn crop_window(&self, source: f64, target: f64) -> (usize, f64, f64, u32) {
        let crop = f64::from(self.crop_side);
        let margins = (target - crop) / 2.0;
        let start = match self.crop_rounding {
            CropRounding::Down => margins.floor(),
            CropRounding::HalfToEven => margins.round_ties_even(),
        };
        let margin = (CROP_MARGIN_PIXELS * (target / source).max(1.0)).ceil();
        let from = (start - margin).max(0.0);
        let to = (start + crop + margin).min(target);
        let (scale, first) = (source / target, from * source / target);
        // Rounding must not exceed the picture.
        let length = ((to - from) * scale).min(source - first);
        ((start - from) as usize, first, length, (to - from) as u32)
    }
}

/// Returns the whole pixels that the interval of `length` from `start` covers, out of `total`: the
/// first one, how many, and the start and the length of the interval relative to the first.
fn cover_whole_pixels(start: f64, length: f64, total: u32) -> (f64, u32, f64, f64) {
    let first = start.floor();
    let last = (start + length).ceil().min(f64::from(total));
    let within = start - first;
    // Rounding must not exceed the picture.
    (first, (last - first) as u32, within, length.min(last - first - within))
}

fn resize_error(error: &dyn std::fmt::Display) -> ClipError {
    ClipError::InvalidInput(format!("resizing failed: {error}"))
}

/// Width, height and options of each of the two resizing passes.
type ResizePasses = [(u32, u32, ResizeOptions); 2];

/// Resizes in 8-bit arithmetic.
///
/// The type of the pixels is fixed, and both passes read the same type of image: `Resizer::resize`, which
/// looks at the type at run time, compiles the filters of all thirty.
fn resize_u8(picture: &RgbImage, steps: ResizePasses) -> Result<Vec<u8>, Box<dyn Error>> {
    let (width, height) = picture.dimensions();
    let mut resizer = Resizer::new();
    let [(half_width, half_height, first), (across, down, second)] = steps;
    let source = TypedImageRef::<U8x3>::from_buffer(width, height, picture.as_raw())?;
    let mut half = TypedImage::new(half_width, half_height);
    resizer.resize_typed(&source, &mut half, &first)?;
    let half = TypedImageRef::new(half_width, half_height, half.pixels())?;
    let mut resized = vec![0; across as usize * down as usize * 3];
    let mut target = TypedImage::<U8x3>::from_buffer(across, down, &mut resized)?;
    resizer.resize_typed(&half, &mut target, &second)?;
    Ok(resized)
}

/// Resizes in f32 arithmetic, rounded to 8 bits after each pass.
fn resize_f32(picture: &RgbImage, steps: ResizePasses) -> Result<Vec<u8>, Box<dyn Error>> {
    let (width, height) = picture.dimensions();
    let mut resizer = Resizer::new();
    let pixels: Vec<F32x3> = picture.pixels().map(|p| F32x3::new(p.0.map(f32::from))).collect();
    let mut image = TypedImage::from_pixels(width, height, pixels)?;
    for (across, down, options) in steps {
        let mut next = TypedImage::new(across, down);
        resizer.resize_typed(&image, &mut next, &options)?;
        for pixel in next.pixels_mut() {
            pixel.0 = pixel.0.map(|value| (value + 0.5).floor().clamp(0.0, 255.0));
        }
        image = next;
    }
    Ok(image.pixels().iter().flat_map(|pixel| pixel.0.map(|value| value as u8)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::checkpoint::{Architecture, KeyReport};

    #[test]
    fn pictures_of_every_size_become_squares() {
        const SIDE: u32 = 28;
        let filter = FilterType::CatmullRom;
        let (factor, shift) = ([1.0; 3], [0.0; 3]);
        let lengths = [SIDE, SIDE + 5];
        for resize in
            lengths.map(ResizeMode::Square).into_iter().chain(lengths.map(ResizeMode::ShortEdge))
        {
            let preprocess = ImagePreprocessor {
                resize_mode: resize,
                crop_side: SIDE,
                crop_rounding: CropRounding::Down,
                resize_filter: filter,
                channel_scale: factor,
                channel_shift: shift,
            };
            for long in 1..260 {
                for (width, height) in [(long, 3), (3, long), (long, 29)] {
                    let picture = RgbImage::from_pixel(width, height, image::Rgb([10, 128, 250]));
                    let pixels = preprocess.resize_and_crop(&picture);
                    let pixels = pixels.unwrap_or_else(|e| panic!("{width}×{height}: {e}"));
                    assert_eq!(pixels.0, [10, 128, 250].repeat((SIDE * SIDE) as usize));
                }
            }
        }
    }

    #[test]
    fn margins_that_cannot_be_equal_are_rounded_as_the_reference_does() {
        let mut preprocess = ImagePreprocessor {
            resize_mode: ResizeMode::ShortEdge(10),
            crop_side: 10,
            crop_rounding: CropRounding::Down,
            resize_filter: FilterType::Bilinear,
            channel_scale: [1.0; 3],
            channel_shift: [0.0; 3],
        };
        let starts = |preprocess: &ImagePreprocessor| {
            [10.0, 11.0, 12.0, 13.0, 14.0, 15.0].map(|long| preprocess.crop_window(long, long).0)
        };
        assert_eq!(starts(&preprocess), [0, 0, 1, 1, 2, 2]);
        // Halves go to the even neighbour.
        preprocess.crop_rounding = CropRounding::HalfToEven;
        assert_eq!(starts(&preprocess), [0, 0, 1, 2, 2, 2]);
    }

    /// Hugging Face's `CLIPImageProcessor` distorts to a size that has height and width.
    #[test]
    fn a_size_with_height_and_width_distorts_and_a_number_is_the_short_edge() {
        let mut stripes = RgbImage::from_pixel(96, 32, image::Rgb([255, 0, 0]));
        for (x, _, pixel) in stripes.enumerate_pixels_mut() {
            pixel.0.rotate_right(x as usize / 32);
        }
        let first = |size: &str| {
            let written = format!(
                r#"{{"size": {size}, "crop_size": {{"height": 32, "width": 32}}, "do_center_crop": true,
                    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}}"#
            );
            let written = serde_json::from_str(&written).unwrap();
            let keys = &mut KeyReport::default();
            let written = PreprocessorConfig::parse("", "", &written, Architecture::Clip, keys);
            let preprocess = ImagePreprocessor::new(&written.unwrap(), 32).unwrap();
            let pixels = preprocess.resize_and_crop(&stripes).unwrap();
            (pixels.0[..3].to_vec(), preprocess.resize_mode)
        };
        for (size, colour, resize) in [
            ("32", [0u8, 255, 0], ResizeMode::ShortEdge(32)),
            (r#"{"shortest_edge": 32}"#, [0, 255, 0], ResizeMode::ShortEdge(32)),
            (r#"{"height": 32, "width": 32}"#, [255, 0, 0], ResizeMode::Square(32)),
            (r#"{"height": 40, "width": 40}"#, [255, 0, 0], ResizeMode::Square(40)),
        ] {
            assert_eq!(first(size), (colour.to_vec(), resize), "{size}");
        }
    }
}
