//! HEIC, by the crate `heic-decoder`.

use heic_decoder::{ChromaUpsampling, HeifError, RgbOptions};
use image::RgbaImage;

use super::error::ImageDecodeError;
use super::format::Format;
use super::options::DecodeOptions;
use super::pixels::{Pixels, flatten_rgba, premultiplied_onto_white, rgb_image};

/// Bytes per pixel that decoding needs: planes of four bytes per sample, twice because tiles are assembled or
/// turned, and RGB.
const BYTES_PER_PIXEL: u64 = 27;

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let (width, height) = check_header(bytes, options)?;
    Ok(u64::from(width) * u64::from(height) * BYTES_PER_PIXEL)
}

/// Checks the dimensions, both as coded and as shown.
fn check_header(bytes: &[u8], options: &DecodeOptions) -> Result<(u32, u32), ImageDecodeError> {
    let info = heic_decoder::probe(bytes).map_err(convert_error)?;
    let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
    options.check_dimensions(side(info.width), side(info.height))?;
    let (width, height) = (side(info.coded_width), side(info.coded_height));
    options.check_dimensions(width, height)?;
    Ok((width, height))
}

/// Decodes a HEIC file, upright: only turns and mirrors of the container count, not those of EXIF.
pub fn decode(bytes: &[u8], options: &DecodeOptions) -> Result<Pixels, ImageDecodeError> {
    check_header(bytes, options)?;
    let mut decoded = heic_decoder::decode(bytes).map_err(convert_error)?;
    let (width, height) = (decoded.width as u32, decoded.height as u32);
    options.check_dimensions(width, height)?;
    // Each colour is used for the pixels that share it, as libheif does, and with it Pillow: the nearest sample, if
    // samples lie in the middle of their pixels.
    let sampling = &mut decoded.chroma_sampling;
    sampling.origin_x = (sampling.sub_x - 1) as f32 / 2.0;
    sampling.origin_y = (sampling.sub_y - 1) as f32 / 2.0;
    let conversion = RgbOptions { color: None, upsampling: ChromaUpsampling::Nearest };
    if decoded.alpha.is_none() {
        let rgb = decoded.to_rgb8_with_options(&conversion).map_err(convert_error)?;
        return Ok(Pixels::whole(rgb_image(width, height, rgb.data)?));
    }
    let rgba = decoded.to_rgba8_with_options(&conversion).map_err(convert_error)?;
    if rgba.premultiplied {
        let data = rgba
            .data
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]].map(|c| premultiplied_onto_white(c, p[3])))
            .collect();
        return Ok(Pixels::whole(rgb_image(width, height, data)?));
    }
    let image = RgbaImage::from_raw(width, height, rgba.data);
    let image = image.ok_or_else(|| ImageDecodeError::damaged("it has too few pixels"))?;
    Ok(Pixels::whole(flatten_rgba(&image)))
}

fn convert_error(error: HeifError) -> ImageDecodeError {
    match error {
        HeifError::Unsupported(what) => ImageDecodeError::unsupported(Format::Heic.name(), what),
        HeifError::LimitExceeded(_) => ImageDecodeError::OutOfBounds(error.to_string()),
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
