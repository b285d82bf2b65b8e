//! PNG, WebP, GIF and BMP, by the crate `image`.

use std::borrow::Cow;

use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::error::{LimitErrorKind, UnsupportedErrorKind};
use image::metadata::Orientation;
use image::{
    AnimationDecoder, ColorType, DynamicImage, Frames, ImageDecoder, ImageError, Limits, RgbaImage,
};

use super::deadline::{Deadline, TimedReader};
use super::error::ImageDecodeError;
use super::format::Format;
use super::options::DecodeOptions;
use super::orientation::read_orientation;
use super::pixels::{MAX_FRAMES, Pixels, UNKNOWN_GREY, flatten_onto_white};
use crate::ingest::containers::{
    find_in_png, find_in_webp, gif_frame_end, is_bmp_damaged, is_webp_cut_off, png_chunks,
};

/// Bytes per pixel that a decoder may allocate: 16-bit RGBA and its own buffers.
const MAX_BYTES_PER_PIXEL: u64 = 16;
/// Bytes that a decoder may allocate for the smallest image.
const MIN_MEMORY_LIMIT: u64 = 64 << 20;

/// Opens a decoder; fails if the dimensions exceed the limits.
fn open<'a>(
    bytes: &'a [u8],
    format: Format,
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<Box<dyn ImageDecoder + 'a>, ImageDecodeError> {
    let convert = |error| convert_error(format, error);
    let reader = TimedReader::new(bytes, deadline);
    let mut decoder: Box<dyn ImageDecoder> = match format {
        Format::WebP => Box::new(WebPDecoder::new(reader).map_err(convert)?),
        Format::Gif => Box::new(GifDecoder::new(reader).map_err(convert)?),
        Format::Bmp => Box::new(BmpDecoder::new(reader).map_err(convert)?),
        _ => {
            if png_chunks(bytes).next().is_some_and(|chunk| chunk.kind == b"CgBI") {
                return Err(ImageDecodeError::unsupported("PNG", "CgBI, as Apple's tools pack it"));
            }
            Box::new(PngDecoder::with_limits(reader, memory_limits(options)).map_err(convert)?)
        }
    };
    let (width, height) = decoder.dimensions();
    options.check_dimensions(width, height)?;
    decoder.set_limits(memory_limits(options)).map_err(convert)?;
    Ok(decoder)
}

/// Returns a GIF whose screen has space for its first frame: some writers leave the size of the screen at 0, or at
/// that of another frame. Viewers and Pillow enlarge it.
fn with_sufficient_screen(bytes: &[u8], format: Format) -> Cow<'_, [u8]> {
    let (Format::Gif, Some((right, bottom))) = (format, gif_frame_end(bytes)) else {
        return bytes.into();
    };
    let screen =
        [u16::from_le_bytes([bytes[6], bytes[7]]), u16::from_le_bytes([bytes[8], bytes[9]])];
    if right <= screen[0] && bottom <= screen[1] {
        return bytes.into();
    }
    let mut enlarged = bytes.to_vec();
    enlarged[6..8].copy_from_slice(&screen[0].max(right).to_le_bytes());
    enlarged[8..10].copy_from_slice(&screen[1].max(bottom).to_le_bytes());
    enlarged.into()
}

fn memory_limits(options: &DecodeOptions) -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc =
        Some(options.max_pixels.saturating_mul(MAX_BYTES_PER_PIXEL).max(MIN_MEMORY_LIMIT));
    limits
}

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    format: Format,
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<u64, ImageDecodeError> {
    let bytes = with_sufficient_screen(bytes, format);
    let decoder = open(&bytes, format, options, deadline)?;
    let (width, height) = decoder.dimensions();
    // The pixels in their own format, and again as 8-bit RGB or RGBA.
    Ok(decoder.total_bytes() + u64::from(width) * u64::from(height) * 4)
}

/// Decodes an image; of an animation the first frame that shows something. Returns how it must be turned.
pub fn decode(
    bytes: &[u8],
    format: Format,
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<(Pixels, Orientation), ImageDecodeError> {
    let bytes = &*with_sufficient_screen(bytes, format);
    let (orientation, is_damaged) = match format {
        Format::Png => (read_orientation(&find_in_png(bytes)), false),
        Format::WebP => (read_orientation(&find_in_webp(bytes)), is_webp_cut_off(bytes)),
        Format::Bmp => (Orientation::NoTransforms, is_bmp_damaged(bytes)),
        _ => (Orientation::NoTransforms, false),
    };
    let decoder = open(bytes, format, options, deadline)?;
    let decoded = if is_damaged {
        Err(ImageDecodeError::damaged("the file does not have the bytes that its header states"))
    } else {
        DynamicImage::from_decoder(decoder).map_err(|error| convert_error(format, error))
    };
    let mut image = match decoded {
        Ok(image) => image,
        Err(damage @ ImageDecodeError::Damaged(_)) if options.accepts_damaged() => {
            return Ok((decode_part(bytes, format, options, deadline, damage)?, orientation));
        }
        Err(error) => return Err(error),
    };
    // The first frame of a GIF may be empty, whatever the header states for the whole image.
    options.check_dimensions(image.width(), image.height())?;
    if shows_nothing(&image) {
        if format == Format::Bmp {
            // Writers that mean no opacity leave its byte at 0; viewers show such images.
            image = DynamicImage::from(image.into_rgb8());
        } else if let Some(frame) = first_visible_frame(bytes, format, options, deadline) {
            options.check_dimensions(frame.width(), frame.height())?;
            image = frame.into();
        }
    }
    Ok((Pixels::whole(flatten_onto_white(image)), orientation))
}

/// Whether every pixel is transparent.
fn shows_nothing(image: &DynamicImage) -> bool {
    match image {
        DynamicImage::ImageRgba8(image) => image.pixels().all(|p| p.0[3] == 0),
        DynamicImage::ImageLumaA8(image) => image.pixels().all(|p| p.0[1] == 0),
        DynamicImage::ImageRgba16(image) => image.pixels().all(|p| p.0[3] == 0),
        DynamicImage::ImageLumaA16(image) => image.pixels().all(|p| p.0[1] == 0),
        _ => false,
    }
}

/// Returns the first frame of an animation that is not wholly transparent.
fn first_visible_frame(
    bytes: &[u8],
    format: Format,
    options: &DecodeOptions,
    deadline: Deadline,
) -> Option<RgbaImage> {
    let reader = TimedReader::new(bytes, deadline);
    let limits = memory_limits(options);
    let frames: Frames<'_> = match format {
        Format::Gif => {
            let mut decoder = GifDecoder::new(reader).ok()?;
            decoder.set_limits(limits).ok()?;
            decoder.into_frames()
        }
        Format::WebP => {
            let mut decoder = WebPDecoder::new(reader).ok()?;
            decoder.set_limits(limits).ok()?;
            if !decoder.has_animation() {
                return None;
            }
            decoder.into_frames()
        }
        Format::Png => {
            let decoder = PngDecoder::with_limits(reader, limits).ok()?;
            if !decoder.is_apng().ok()? {
                return None;
            }
            decoder.apng().ok()?.into_frames()
        }
        _ => return None,
    };
    frames
        .take(MAX_FRAMES)
        .map_while(Result::ok)
        .map(image::Frame::into_buffer)
        .find(|frame| frame.pixels().any(|p| p.0[3] != 0))
}

/// Decodes as much of a damaged image as its decoder gives. Decoders write pixels in place, so those that still have
/// the value that they had before were not decoded.
fn decode_part(
    bytes: &[u8],
    format: Format,
    options: &DecodeOptions,
    deadline: Deadline,
    damage: ImageDecodeError,
) -> Result<Pixels, ImageDecodeError> {
    let decoder = open(bytes, format, options, deadline)?;
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let bytes_per_pixel = usize::from(color.bytes_per_pixel());
    let size = usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX);
    let mut data = vec![0; size];
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = marker_byte(i);
    }
    if decoder.read_image(&mut data).is_ok() && !matches!(format, Format::Bmp) {
        return Err(damage);
    }
    let mut decoded_pixels = 0u64;
    for (i, pixel) in data.chunks_exact_mut(bytes_per_pixel).enumerate() {
        if pixel.iter().enumerate().all(|(j, b)| *b == marker_byte(i * bytes_per_pixel + j)) {
            pixel.fill(UNKNOWN_GREY);
            // Opaque, or the grey would be blended with white.
            if color.has_alpha() {
                let alpha_bytes = bytes_per_pixel / usize::from(color.channel_count());
                pixel[bytes_per_pixel - alpha_bytes..].fill(255);
            }
        } else {
            decoded_pixels += 1;
        }
    }
    let share = decoded_pixels as f64 / (f64::from(width) * f64::from(height));
    options.check_share(share, damage.clone())?;
    let image = dynamic_image(width, height, color, data).ok_or(damage)?;
    Ok(Pixels { image: flatten_onto_white(image), decoded_share: share })
}

/// A value that no row of pixels has by chance: it changes with the position.
fn marker_byte(position: usize) -> u8 {
    ((position as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

fn dynamic_image(width: u32, height: u32, color: ColorType, data: Vec<u8>) -> Option<DynamicImage> {
    let words = |data: &[u8]| -> Vec<u16> {
        data.chunks_exact(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]])).collect()
    };
    Some(match color {
        ColorType::L8 => image::GrayImage::from_raw(width, height, data)?.into(),
        ColorType::La8 => image::GrayAlphaImage::from_raw(width, height, data)?.into(),
        ColorType::Rgb8 => image::RgbImage::from_raw(width, height, data)?.into(),
        ColorType::Rgba8 => image::RgbaImage::from_raw(width, height, data)?.into(),
        ColorType::L16 => {
            image::ImageBuffer::<image::Luma<u16>, _>::from_raw(width, height, words(&data))?.into()
        }
        ColorType::La16 => {
            image::ImageBuffer::<image::LumaA<u16>, _>::from_raw(width, height, words(&data))?
                .into()
        }
        ColorType::Rgb16 => {
            image::ImageBuffer::<image::Rgb<u16>, _>::from_raw(width, height, words(&data))?.into()
        }
        ColorType::Rgba16 => {
            image::ImageBuffer::<image::Rgba<u16>, _>::from_raw(width, height, words(&data))?.into()
        }
        _ => return None,
    })
}

fn convert_error(format: Format, error: ImageError) -> ImageDecodeError {
    match error {
        ImageError::Unsupported(error) => ImageDecodeError::unsupported(
            format.name(),
            match error.kind() {
                UnsupportedErrorKind::GenericFeature(feature) => feature,
                UnsupportedErrorKind::Color(color) => format!("samples of the type {color:?}"),
                _ => error.to_string(),
            },
        ),
        ImageError::Limits(error) => match error.kind() {
            LimitErrorKind::Unsupported { .. } => {
                ImageDecodeError::unsupported(format.name(), error.to_string())
            }
            _ => ImageDecodeError::OutOfBounds(error.to_string()),
        },
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
