//! Scales a picture down and encodes it.

use bytes::Bytes;
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::record::to_hex;

/// The sides that previews have, in pixels. They are few, so that clients with different layouts
/// share what is cached: the smallest for lists, then cards, cards on dense screens, one picture.
const PREVIEW_SIDES: [u32; 4] = [128, 256, 512, 1024];

/// The largest of [`PREVIEW_SIDES`].
pub const MAX_PREVIEW_SIDE: u32 = PREVIEW_SIDES[PREVIEW_SIDES.len() - 1];

/// Of JPEG, 1 to 100: artefacts are not visible at the size of a card, and files are a third of
/// those at 95.
const JPEG_QUALITY: u8 = 82;

/// Bytes of a hash that an entity tag has.
const TAG_BYTES: usize = 16;

/// The length of a preview's longer side, one of [`PREVIEW_SIDES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PreviewSide(u32);

impl PreviewSide {
    /// Returns the smallest side of at least `pixels`; `None` if that is 0 or more than the largest.
    pub fn new(pixels: u32) -> Option<Self> {
        if pixels == 0 {
            return None;
        }
        PREVIEW_SIDES.into_iter().find(|side| *side >= pixels).map(Self)
    }
}

/// An encoded preview. Clones share its bytes.
#[derive(Debug, Clone)]
pub struct Preview {
    /// A JPEG.
    pub jpeg: Bytes,
    /// Its entity tag: equal for equal bytes.
    pub entity_tag: String,
}

impl Preview {
    /// Wraps the bytes of a JPEG.
    pub fn from_jpeg(jpeg: Vec<u8>) -> Self {
        let hash = to_hex(&Sha256::digest(&jpeg)[..TAG_BYTES]);
        Self { jpeg: jpeg.into(), entity_tag: format!("\"{hash}\"") }
    }

    /// Scales `picture` down until its longer side fits `side`, and encodes it. Smaller pictures are
    /// not enlarged. The error says why that is not possible.
    pub fn from_picture(picture: &RgbImage, side: PreviewSide) -> Result<Self, String> {
        let (width, height) = fit_dimensions(picture.dimensions(), side);
        let resized = if (width, height) == picture.dimensions() {
            None
        } else {
            Some(scale_down(picture, width, height)?)
        };
        let pixels = resized.as_ref().unwrap_or(picture.as_raw());
        let mut jpeg = Vec::new();
        // Both sides are at most MAX_PREVIEW_SIDE.
        jpeg_encoder::Encoder::new(&mut jpeg, JPEG_QUALITY)
            .encode(pixels, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
            .map_err(|error| error.to_string())?;
        Ok(Self::from_jpeg(jpeg))
    }
}

/// Returns the width and height of the preview of a picture.
fn fit_dimensions((width, height): (u32, u32), PreviewSide(side): PreviewSide) -> (u32, u32) {
    let longer = u64::from(width.max(height)).max(1);
    let side = u64::from(side).min(longer);
    let fit = |edge: u32| ((u64::from(edge) * side + longer / 2) / longer).max(1) as u32;
    (fit(width), fit(height))
}

fn scale_down(picture: &RgbImage, width: u32, height: u32) -> Result<Vec<u8>, String> {
    let source =
        TypedImageRef::<U8x3>::from_buffer(picture.width(), picture.height(), picture.as_raw())
            .map_err(|error| error.to_string())?;
    let mut pixels = vec![0; width as usize * height as usize * 3];
    let mut target = TypedImage::<U8x3>::from_buffer(width, height, &mut pixels)
        .map_err(|error| error.to_string())?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Hamming));
    Resizer::new()
        .resize_typed(&source, &mut target, &options)
        .map_err(|error| error.to_string())?;
    Ok(pixels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::decode::{DecodeOptions, decode_image};

    #[test]
    fn a_side_is_rounded_up_to_one_of_few() {
        let side = |pixels| PreviewSide::new(pixels).map(|side| side.0);
        for (pixels, expected) in [
            (0, None),
            (1, Some(128)),
            (128, Some(128)),
            (129, Some(256)),
            (1024, Some(1024)),
            (1025, None),
            (u32::MAX, None),
        ] {
            assert_eq!(side(pixels), expected, "{pixels}");
        }
    }

    #[test]
    fn a_preview_keeps_shape_and_colours_and_is_never_enlarged() {
        let red = image::Rgb([200, 30, 60]);
        for ((width, height), expected) in [
            ((400, 200), (128, 64)),
            ((200, 400), (64, 128)),
            ((10, 5), (10, 5)),
            ((20_000, 1), (128, 1)),
            ((1, 1), (1, 1)),
            ((128, 128), (128, 128)),
            ((257, 129), (128, 64)),
        ] {
            let picture = RgbImage::from_pixel(width, height, red);
            let preview = Preview::from_picture(&picture, PreviewSide(128)).unwrap();
            let decoded = decode_image(&preview.jpeg, &DecodeOptions::default()).unwrap();
            assert_eq!(decoded.dimensions(), expected);
            for (value, original) in decoded.get_pixel(0, 0).0.into_iter().zip(red.0) {
                assert!(value.abs_diff(original) <= 4, "{value} was {original}");
            }
        }
    }
}
