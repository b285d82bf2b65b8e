//! What libjpeg-turbo does not give: samples of 12 bits, and how much of a damaged file was decoded. By
//! libjpeg-turbo's port to Rust.

use image::RgbImage;
use libjpeg_turbo_rs::{DecodeLimits, DecodeWarning, Decoder, JpegError, PixelFormat, precision};

use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::pixels::{Pixels, rgb_image};
use super::header::{JpegHeader, MAX_SCANS};

/// Bytes per pixel that the decoder may allocate.
const MAX_BYTES_PER_PIXEL: u64 = 32;

fn limits(options: &DecodeOptions) -> DecodeLimits {
    DecodeLimits {
        max_width: options.max_side as usize,
        max_height: options.max_side as usize,
        max_pixels: options.max_pixels,
        max_scans: MAX_SCANS as usize,
        max_memory: Some(options.max_pixels.saturating_mul(MAX_BYTES_PER_PIXEL)),
    }
}

/// Decodes samples of 12 bits to 8.
pub fn decode_12_bit(
    bytes: &[u8],
    header: &JpegHeader,
    options: &DecodeOptions,
) -> Result<RgbImage, ImageDecodeError> {
    if !header.is_sequential() {
        return Err(ImageDecodeError::unsupported("JPEG", "samples of 12 bits in several scans"));
    }
    let image =
        precision::decompress_12bit_with_limits(bytes, &limits(options)).map_err(convert_error)?;
    let reduce = |sample: i16| (sample.clamp(0, 4_095) >> 4) as u8;
    let data = match image.num_components {
        1 => image.data.iter().flat_map(|sample| [reduce(*sample); 3]).collect(),
        3 => image.data.iter().map(|sample| reduce(*sample)).collect(),
        n => {
            let variant = format!("{n} components of 12 bits");
            return Err(ImageDecodeError::unsupported("JPEG", variant));
        }
    };
    rgb_image(header.width, header.height, data)
}

/// Decodes as much of a damaged image as can be decoded; the rest is grey.
pub fn decode_part(
    bytes: &[u8],
    header: &JpegHeader,
    options: &DecodeOptions,
    damage: ImageDecodeError,
) -> Result<Pixels, ImageDecodeError> {
    // Of other files it cannot be said which part was decoded.
    if !header.is_sequential() || header.sampling.len() == 4 || header.process.is_lossless {
        return Err(damage);
    }
    let decoder = Decoder::new_with_limits(bytes, limits(options));
    let Ok(decoder) = decoder else { return Err(damage) };
    let decoder = decoder.with_lenient(true).with_output_format(PixelFormat::Rgb);
    let Ok(image) = decoder.decode_image() else { return Err(damage) };
    let Some(share) = decoded_share(&image.warnings, header) else { return Err(damage) };
    options.check_share(share, damage)?;
    Ok(Pixels { image: rgb_image(header.width, header.height, image.data)?, decoded_share: share })
}

/// Returns the share of the image before the first fault; `None` if it is unknown.
fn decoded_share(warnings: &[DecodeWarning], header: &JpegHeader) -> Option<f64> {
    let (mut max_h, mut max_v) = (1, 1);
    for (h, v) in &header.sampling {
        (max_h, max_v) = (max_h.max(u32::from(*h)), max_v.max(u32::from(*v)));
    }
    // A single component has units of one block, whatever its sampling factors are.
    if header.sampling.len() == 1 {
        (max_h, max_v) = (1, 1);
    }
    let columns = header.width.div_ceil(8 * max_h) as usize;
    let rows = header.height.div_ceil(8 * max_v) as usize;
    let mut share: Option<f64> = None;
    for warning in warnings {
        let decoded = match warning {
            DecodeWarning::TruncatedData { decoded_mcus, total_mcus } => {
                *decoded_mcus as f64 / (*total_mcus).max(1) as f64
            }
            DecodeWarning::HuffmanError { mcu_x, mcu_y, .. } => {
                (mcu_y * columns + mcu_x) as f64 / (columns * rows).max(1) as f64
            }
            DecodeWarning::ExtraneousData { .. } => continue,
            _ => return None,
        };
        share = Some(share.map_or(decoded, |share| share.min(decoded)));
    }
    share.map(|share| share.clamp(0.0, 1.0))
}

fn convert_error(error: JpegError) -> ImageDecodeError {
    match error {
        JpegError::Unsupported(what) => ImageDecodeError::unsupported("JPEG", what),
        JpegError::LimitExceeded { .. } | JpegError::AllocationFailed { .. } => {
            ImageDecodeError::OutOfBounds(error.to_string())
        }
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
