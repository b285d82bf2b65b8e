//! Converts brightness and colour differences to RGB (ITU-T H.273).

use image::RgbImage;

use super::super::error::ImageDecodeError;
use super::super::format::Format;
use super::super::pixels::rgb_image;
use super::frame::{ColourCoding, Frame, Samples};

/// How three samples become RGB.
#[derive(Debug, Clone, Copy)]
enum Matrix {
    /// They are green, blue and red.
    Identity,
    /// Brightness, and the differences to green and orange.
    YCgCo,
    /// Brightness, of which red and blue have these shares, and the differences to blue and red.
    Ycbcr { red: f32, blue: f32 },
}

impl Matrix {
    fn new(coefficients: u16) -> Result<Self, ImageDecodeError> {
        let (red, blue) = match coefficients {
            0 => return Ok(Self::Identity),
            1 => (0.2126, 0.0722),
            // Not specified is taken for that of JPEG, as libavif takes it.
            2 | 5 | 6 => (0.299, 0.114),
            4 => (0.30, 0.11),
            7 => (0.212, 0.087),
            8 => return Ok(Self::YCgCo),
            9 => (0.2627, 0.0593),
            other => {
                let variant = format!("colours by the matrix {other} of H.273");
                return Err(ImageDecodeError::unsupported(Format::Avif.name(), variant));
            }
        };
        Ok(Self::Ycbcr { red, blue })
    }

    /// Converts a brightness of 0 to 1 and two differences of -0.5 to 0.5.
    fn to_rgb(self, y: f32, u: f32, v: f32) -> [f32; 3] {
        match self {
            Self::Identity => [v, y, u],
            Self::YCgCo => [y - u + v, y + u, y - u - v],
            Self::Ycbcr { red, blue } => {
                let r = y + 2.0 * (1.0 - red) * v;
                let b = y + 2.0 * (1.0 - blue) * u;
                [r, (y - red * r - blue * b) / (1.0 - red - blue), b]
            }
        }
    }
}

/// Scales samples to 0 to 1, or to -0.5 to 0.5.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: f32,
    scale: f32,
}

impl Range {
    fn of_brightness(bits: usize, is_full: bool) -> Self {
        let unit = (1u32 << (bits - 8)) as f32;
        if is_full {
            Self { offset: 0.0, scale: 1.0 / (256.0 * unit - 1.0) }
        } else {
            Self { offset: 16.0 * unit, scale: 1.0 / (219.0 * unit) }
        }
    }

    fn of_differences(bits: usize, is_full: bool) -> Self {
        let unit = (1u32 << (bits - 8)) as f32;
        let scale = 1.0 / if is_full { 256.0 * unit - 1.0 } else { 224.0 * unit };
        Self { offset: 128.0 * unit, scale }
    }

    fn apply(self, sample: u16) -> f32 {
        (f32::from(sample) - self.offset) * self.scale
    }
}

fn to_byte(value: f32) -> u8 {
    // Casts stay within 0 and 255.
    (value * 255.0 + 0.5) as u8
}

/// Converts a frame to RGB.
pub fn frame_to_rgb(frame: &Frame, coding: ColourCoding) -> Result<RgbImage, ImageDecodeError> {
    let (width, height) = (frame.width() as usize, frame.height() as usize);
    let (bits, is_full) = (frame.bits(), coding.is_full_range);
    let brightness = Range::of_brightness(bits, is_full);
    let plane = frame.brightness();
    let mut row = vec![0; width];
    let mut rgb = Vec::with_capacity(width * height * 3);
    let Some(sharing) = frame.sharing() else {
        for y in 0..height {
            plane.read_row(y, &mut row);
            rgb.extend(row.iter().flat_map(|sample| [to_byte(brightness.apply(*sample)); 3]));
        }
        return rgb_image(frame.width(), frame.height(), rgb);
    };
    let matrix = Matrix::new(coding.matrix_coefficients)?;
    let differences = match matrix {
        Matrix::Identity if sharing != (1, 1) => {
            let variant = "RGB of which pixels share colours";
            return Err(ImageDecodeError::unsupported(Format::Avif.name(), variant));
        }
        Matrix::Identity => brightness,
        _ => Range::of_differences(bits, is_full),
    };
    let mut upsamplers = frame.colours().map(|plane| Upsampler::new(plane, sharing, width, height));
    for y in 0..height {
        plane.read_row(y, &mut row);
        let [u, v] = &mut upsamplers;
        for ((y, u), v) in row.iter().zip(u.row(y)).zip(v.row(y)) {
            let pixel =
                matrix.to_rgb(brightness.apply(*y), differences.apply(*u), differences.apply(*v));
            rgb.extend(pixel.map(to_byte));
        }
    }
    rgb_image(frame.width(), frame.height(), rgb)
}

/// Converts the brightness of a frame to opacities.
pub fn frame_to_alpha(frame: &Frame) -> Vec<u8> {
    let range = Range::of_brightness(frame.bits(), frame.colour_coding().is_full_range);
    let plane = frame.brightness();
    let mut row = vec![0; frame.width() as usize];
    let mut alpha = Vec::with_capacity(row.len() * frame.height() as usize);
    for y in 0..frame.height() as usize {
        plane.read_row(y, &mut row);
        alpha.extend(row.iter().map(|sample| to_byte(range.apply(*sample))));
    }
    alpha
}

/// Spreads colours to the pixels that share them: each pixel has three quarters of the nearest colour and one of the
/// next, across and down, as libavif does it.
struct Upsampler {
    plane: Samples,
    sharing: (usize, usize),
    height: usize,
    near: Vec<u16>,
    far: Vec<u16>,
    row: Vec<u16>,
}

impl Upsampler {
    fn new(plane: Samples, sharing: (usize, usize), width: usize, height: usize) -> Self {
        let columns = width.div_ceil(sharing.0);
        Self {
            plane,
            sharing,
            height: height.div_ceil(sharing.1),
            near: vec![0; columns],
            far: vec![0; columns],
            row: vec![0; width],
        }
    }

    /// Returns the colours of a row of pixels.
    fn row(&mut self, y: usize) -> &[u16] {
        let (across, down) = self.sharing;
        if across == 1 {
            self.plane.read_row(y, &mut self.row);
            return &self.row;
        }
        let neighbours = |at: usize, sharing: usize, count: usize| {
            let near = at / sharing;
            let far = match (sharing, at % 2) {
                (1, _) => near,
                (_, 0) => near.saturating_sub(1),
                _ => (near + 1).min(count - 1),
            };
            (near, far)
        };
        let (near, far) = neighbours(y, down, self.height);
        self.plane.read_row(near, &mut self.near);
        self.plane.read_row(far, &mut self.far);
        let columns = self.near.len();
        for (x, colour) in self.row.iter_mut().enumerate() {
            let (near, far) = neighbours(x, across, columns);
            let sum = 9 * u32::from(self.near[near])
                + 3 * u32::from(self.near[far])
                + 3 * u32::from(self.far[near])
                + u32::from(self.far[far]);
            *colour = ((sum + 8) / 16) as u16;
        }
        &self.row
    }
}
