//! Decodes images of all formats.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};

#[cfg(feature = "avif")]
use super::avif;
use super::deadline::Deadline;
use super::error::ImageDecodeError;
use super::format::{Format, Recognised, recognise};
use super::options::DecodeOptions;
use super::{heic, jpeg, jpeg_xl, raster, tiff};

/// A decoded image.
#[derive(Debug)]
pub struct DecodedImage {
    /// Its pixels, upright.
    pub image: RgbImage,
    /// The share of the pixels that were decoded. 1 unless the file is damaged and `decode.damaged` is `accept`.
    pub decoded_share: f64,
}

/// Estimates the memory that decoding needs, in bytes, from the header of the image. Fails if the
/// dimensions exceed the limits, as [`decode_image`] would.
pub fn estimate_decode_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let format = recognise_readable(bytes)?;
    catch_panics(format, || match format {
        Format::Jpeg => jpeg::estimate_memory_bytes(bytes, options),
        Format::Tiff => tiff::estimate_memory_bytes(bytes, options),
        Format::Heic => heic::estimate_memory_bytes(bytes, options),
        #[cfg(feature = "avif")]
        Format::Avif => avif::estimate_memory_bytes(bytes, options),
        Format::JpegXl => jpeg_xl::estimate_memory_bytes(bytes, options),
        Format::Png | Format::WebP | Format::Gif | Format::Bmp => {
            let deadline = Deadline::start(options.timeout_ms);
            raster::estimate_memory_bytes(bytes, format, options, deadline)
        }
    })
}

/// Decodes an image to 8-bit RGB, upright.
pub fn decode_image(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, ImageDecodeError> {
    Ok(decode_with_report(bytes, options)?.image)
}

/// Decodes an image to 8-bit RGB, upright, and says how much of it was decoded.
pub fn decode_with_report(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<DecodedImage, ImageDecodeError> {
    let format = recognise_readable(bytes)?;
    let deadline = Deadline::start(options.timeout_ms);
    let decoded = catch_panics(format, || match format {
        Format::Jpeg => jpeg::decode(bytes, options),
        Format::Tiff => tiff::decode(bytes, options, deadline),
        // Their decoders turn the image.
        Format::Heic => Ok((heic::decode(bytes, options)?, Orientation::NoTransforms)),
        Format::JpegXl => {
            Ok((jpeg_xl::decode(bytes, options, deadline)?, Orientation::NoTransforms))
        }
        #[cfg(feature = "avif")]
        Format::Avif => avif::decode(bytes, options, deadline),
        Format::Png | Format::WebP | Format::Gif | Format::Bmp => {
            raster::decode(bytes, format, options, deadline)
        }
    });
    // Decoders that cannot be interrupted end too late; those that can report an error of their own.
    deadline.check()?;
    let (pixels, orientation) = decoded?;
    let mut image = DynamicImage::from(pixels.image);
    image.apply_orientation(orientation);
    Ok(DecodedImage { image: image.into_rgb8(), decoded_share: pixels.decoded_share })
}

fn recognise_readable(bytes: &[u8]) -> Result<Format, ImageDecodeError> {
    match recognise(bytes) {
        Recognised::Readable(format) => Ok(format),
        Recognised::Unreadable(name) => Err(ImageDecodeError::unsupported(name, "")),
        Recognised::Unknown => Err(ImageDecodeError::UnknownFormat),
    }
}

/// Runs a decoder. Files are made by strangers and decoders by others: a panic is this file's fault only.
fn catch_panics<T>(
    format: Format,
    decode: impl FnOnce() -> Result<T, ImageDecodeError>,
) -> Result<T, ImageDecodeError> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(ImageDecodeError::Panicked {
            format: format.name(),
            message: text.unwrap_or("it panicked").to_owned(),
        })
    })
}
