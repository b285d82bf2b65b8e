//! What decoders of all formats do with pixels.

use image::{DynamicImage, Rgb, RgbImage, RgbaImage};

use super::error::ImageDecodeError;

/// Colour of pixels that could not be decoded.
pub const UNKNOWN_GREY: u8 = 128;
/// Most frames of an animation that are decoded in search of one that shows something.
pub const MAX_FRAMES: usize = 100;

/// Pixels, upright or not, and which share of them was decoded (1: all).
#[derive(Debug)]
pub struct Pixels {
    pub image: RgbImage,
    pub decoded_share: f64,
}

impl Pixels {
    /// All pixels were decoded.
    pub fn whole(image: RgbImage) -> Self {
        Self { image, decoded_share: 1.0 }
    }
}

/// Makes an image of RGB bytes.
pub fn rgb_image(width: u32, height: u32, data: Vec<u8>) -> Result<RgbImage, ImageDecodeError> {
    RgbImage::from_raw(width, height, data)
        .ok_or_else(|| ImageDecodeError::damaged("it has fewer pixels than its header states"))
}

/// Blends transparent pixels onto white.
pub fn flatten_onto_white(image: DynamicImage) -> RgbImage {
    if image.color().has_alpha() { flatten_rgba(&image.into_rgba8()) } else { image.into_rgb8() }
}

/// Blends transparent pixels onto white.
pub fn flatten_rgba(rgba: &RgbaImage) -> RgbImage {
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    for (to, from) in rgb.pixels_mut().zip(rgba.pixels()) {
        let [r, g, b, a] = from.0;
        *to = Rgb([r, g, b].map(|c| onto_white(c, a)));
    }
    rgb
}

/// Blends one colour with an opacity onto white.
pub fn onto_white(colour: u8, alpha: u8) -> u8 {
    let (c, a) = (u32::from(colour), u32::from(alpha));
    ((c * a + 255 * (255 - a) + 127) / 255) as u8
}

/// Blends one colour that is already multiplied by its opacity onto white.
pub fn premultiplied_onto_white(colour: u8, alpha: u8) -> u8 {
    colour.saturating_add(255 - alpha)
}

/// Converts ink (0: none, 255: full) to RGB as Pillow does.
pub fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let paper = 255 - u32::from(k);
    [c, m, y].map(|ink| {
        let product = u32::from(ink) * paper + 128;
        (paper - (((product >> 8) + product) >> 8)) as u8
    })
}
