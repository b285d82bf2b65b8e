//! Decodes images: from bytes to pixels.
//!
//! The format is recognised by the content, never by a name. Dimensions are checked before pixels are
//! allocated. EXIF orientation is applied, and transparent pixels are blended onto white: the reference
//! preprocessing of CLIP does neither, but people see the image that way.

use std::io::Cursor;

use image::error::{DecodingError, ImageFormatHint};
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, Rgb, RgbImage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::metadata::{METADATA_MAX_BYTES_RANGE, MetadataCharset, MetadataField};
use crate::validate;

/// Limits of image decoding, and what is read of metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DecodeOptions {
    /// Maximum width or height, in pixels.
    pub max_side: u32,
    /// Maximum number of pixels.
    pub max_pixels: u64,
    /// Maximum memory of all images that are decoded concurrently, in MiB. An image that needs more than
    /// that by itself is decoded alone.
    pub budget_mib: u32,
    /// Fields of the image's own metadata (EXIF, IPTC, XMP) that become attributes of the same name:
    /// `title`, `caption`, `keywords`, `creator`, `date`, `rights`. Each must be declared in `[attributes]`
    /// as `text`, or `date` as `time`. An attribute that the event has is not replaced.
    pub metadata: Vec<MetadataField>,
    /// Maximum size of an attribute from metadata, in bytes; longer texts are cut.
    pub metadata_max_bytes: usize,
    /// How texts in metadata are read that neither say what their character set is nor are UTF-8:
    /// `latin1`, `mac_roman`, or `detect` for the one of these two that gives more letters where words have
    /// letters.
    pub metadata_charset: MetadataCharset,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            max_side: 20_000,
            max_pixels: 100_000_000,
            budget_mib: 1024,
            metadata: Vec::new(),
            metadata_max_bytes: 1024,
            metadata_charset: MetadataCharset::Detect,
        }
    }
}

impl DecodeOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::check_range(&mut problems, "max_side", self.max_side.into(), 16, 65_535);
        validate::check_range(&mut problems, "max_pixels", self.max_pixels, 256, 1_000_000_000);
        validate::check_range(&mut problems, "budget_mib", self.budget_mib.into(), 64, 1 << 20);
        let (min, max) = METADATA_MAX_BYTES_RANGE.into_inner();
        let max_bytes = self.metadata_max_bytes as u64;
        validate::check_range(&mut problems, "metadata_max_bytes", max_bytes, min, max);
        problems
    }
}

/// Why bytes cannot be decoded as an image. Permanent: the same bytes fail again.
#[derive(Debug, thiserror::Error)]
pub enum ImageDecodeError {
    /// Not an image of a known format.
    #[error("not an image of a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)")]
    UnknownFormat,
    /// The image has more pixels than allowed.
    #[error(
        "{width}×{height} pixels are more than decode.max_side = {max_side} or decode.max_pixels = {max_pixels}"
    )]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// `decode.max_side`.
        max_side: u32,
        /// `decode.max_pixels`.
        max_pixels: u64,
    },
    /// Damaged, or of an unsupported variant of its format.
    #[error("the image cannot be decoded: {0}")]
    Damaged(image::ImageError),
}

impl ImageDecodeError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownFormat => "unknown_image_format",
            Self::TooLarge { .. } => "image_too_large",
            Self::Damaged(_) => "image_damaged",
        }
    }
}

/// Estimates the memory that decoding needs, in bytes, from the header of the image. Fails if the
/// dimensions exceed the limits, as [`decode_image`] would.
pub fn estimate_decode_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let decoder = open_decoder(bytes, options)?;
    let (width, height) = decoder.dimensions();
    // The pixels in their own format, and again as 8-bit RGB or RGBA.
    Ok(decoder.total_bytes() + u64::from(width) * u64::from(height) * 4)
}

/// Decodes an image to 8-bit RGB, with its EXIF orientation applied.
pub fn decode_image(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, ImageDecodeError> {
    let mut decoder = open_decoder(bytes, options)?;
    let mut limits = Limits::default();
    // Enough for 16-bit RGBA and the decoder's own buffers.
    limits.max_alloc = Some(options.max_pixels.saturating_mul(16).max(64 << 20));
    decoder.set_limits(limits).map_err(ImageDecodeError::Damaged)?;
    let orientation = decoder.orientation().map_err(ImageDecodeError::Damaged)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(ImageDecodeError::Damaged)?;
    // The first frame of a GIF may be empty, whatever the header states for the whole image.
    if image.width() == 0 || image.height() == 0 {
        let reason = DecodingError::new(ImageFormatHint::Unknown, "the image has no pixels");
        return Err(ImageDecodeError::Damaged(ImageError::Decoding(reason)));
    }
    image.apply_orientation(orientation);
    Ok(flatten_onto_white(image))
}

/// Opens a decoder; fails if the dimensions exceed the limits.
fn open_decoder<'a>(
    bytes: &'a [u8],
    options: &DecodeOptions,
) -> Result<impl ImageDecoder + use<'a>, ImageDecodeError> {
    let reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| ImageDecodeError::Damaged(e.into()))?;
    if reader.format().is_none() {
        return Err(ImageDecodeError::UnknownFormat);
    }
    let decoder = reader.into_decoder().map_err(ImageDecodeError::Damaged)?;
    let (width, height) = decoder.dimensions();
    let too_large = width > options.max_side
        || height > options.max_side
        || u64::from(width) * u64::from(height) > options.max_pixels;
    if too_large {
        return Err(ImageDecodeError::TooLarge {
            width,
            height,
            max_side: options.max_side,
            max_pixels: options.max_pixels,
        });
    }
    Ok(decoder)
}

/// Blends transparent pixels onto white.
fn flatten_onto_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    for (to, from) in rgb.pixels_mut().zip(rgba.pixels()) {
        let [r, g, b, a] = from.0.map(u32::from);
        let onto_white = |c: u32| ((c * a + 255 * (255 - a) + 127) / 255) as u8;
        *to = Rgb([onto_white(r), onto_white(g), onto_white(b)]);
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageFormat, Rgba, RgbaImage};

    fn encode_image(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn every_format_is_detected_from_its_content() {
        let image = DynamicImage::from(RgbImage::from_pixel(9, 7, Rgb([200, 30, 60])));
        for format in [
            ImageFormat::Jpeg,
            ImageFormat::Png,
            ImageFormat::WebP,
            ImageFormat::Gif,
            ImageFormat::Bmp,
            ImageFormat::Tiff,
        ] {
            let decoded =
                decode_image(&encode_image(&image, format), &DecodeOptions::default()).unwrap();
            assert_eq!(decoded.dimensions(), (9, 7), "{format:?}");
            let is_red_kept = decoded.get_pixel(4, 3).0[0].abs_diff(200) < 6;
            assert!(is_red_kept, "{format:?}");
        }
    }

    #[test]
    fn transparent_pixels_are_blended_onto_white() {
        let mut image = RgbaImage::from_pixel(2, 1, Rgba([0, 0, 0, 0]));
        image.put_pixel(1, 0, Rgba([0, 0, 0, 128]));
        let decoded =
            decode_image(&encode_image(&image.into(), ImageFormat::Png), &DecodeOptions::default())
                .unwrap();
        assert_eq!(decoded.get_pixel(0, 0).0, [255; 3]);
        assert_eq!(decoded.get_pixel(1, 0).0, [127; 3]);
    }

    #[test]
    fn a_decompression_bomb_is_rejected_by_its_header() {
        // A PNG that claims 50,000 × 50,000 pixels and has none.
        let mut png = encode_image(&DynamicImage::new_rgb8(1, 1), ImageFormat::Png);
        png[16..20].copy_from_slice(&50_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&50_000u32.to_be_bytes());
        let crc = crc32(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = decode_image(&png, &DecodeOptions::default()).unwrap_err();
        assert_eq!(error.code(), "image_too_large");
    }

    #[test]
    fn non_images_are_rejected() {
        for (bytes, code) in [
            (&b""[..], "unknown_image_format"),
            (b"hello", "unknown_image_format"),
            (b"\x89PNG\r\n\x1a\n", "image_damaged"),
            (b"\xff\xd8\xff\xe0", "image_damaged"),
            (&std::fs::read("tests/fuzz/corpus/picture/no-pixels").unwrap(), "image_damaged"),
        ] {
            assert_eq!(decode_image(bytes, &DecodeOptions::default()).unwrap_err().code(), code);
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xEDB8_8320 * (crc & 1));
            }
        }
        !crc
    }
}
