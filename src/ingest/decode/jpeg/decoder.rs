//! Decodes JPEGs by libjpeg-turbo.

use std::borrow::Cow;

use image::metadata::Orientation;
use turbojpeg::{Decompressor, PixelFormat};

use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::pixels::{Pixels, cmyk_to_rgb, rgb_image};
use super::header::JpegHeader;
use super::lenient;

/// Most scans of a progressive JPEG: real ones have some ten, and each costs a pass over the image.
pub const MAX_SCANS: u32 = 500;

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let header = JpegHeader::read(bytes)?;
    options.check_dimensions(header.width, header.height)?;
    let components = header.sampling.len() as u64;
    // Several scans need all coefficients, of two bytes each; otherwise a few rows do.
    let coefficients = if header.is_sequential() { 1 } else { 2 * components };
    Ok(u64::from(header.width) * u64::from(header.height) * (3 + components + coefficients))
}

/// Returns width and height.
pub fn frame_size(bytes: &[u8]) -> Result<(u32, u32), ImageDecodeError> {
    let header = JpegHeader::read(bytes)?;
    Ok((header.width, header.height))
}

/// Decodes a JPEG. Returns how it must be turned.
pub fn decode(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<(Pixels, Orientation), ImageDecodeError> {
    let header = JpegHeader::read(bytes)?;
    options.check_dimensions(header.width, header.height)?;
    let orientation = header.metadata.orientation();
    let pixels = match (header.precision, header.process.is_lossless) {
        (8, _) => decode_8_bit(bytes, &header, options)?,
        (12, false) => Pixels::whole(lenient::decode_12_bit(bytes, &header, options)?),
        (bits, _) => {
            return Err(ImageDecodeError::unsupported("JPEG", format!("samples of {bits} bits")));
        }
    };
    Ok((pixels, orientation))
}

fn decode_8_bit(
    bytes: &[u8],
    header: &JpegHeader<'_>,
    options: &DecodeOptions,
) -> Result<Pixels, ImageDecodeError> {
    let bytes = without_damaged_profile(bytes, header);
    let samples = if header.sampling.len() == 4 { Samples::Cmyk } else { Samples::Rgb };
    let mut decoded = decode_samples(&bytes, header.width, header.height, samples);
    if decoded.is_err() && header.is_sequential() && !has_end(&bytes) {
        // If only the end marker is missing, nothing has to be guessed.
        let ended = [&bytes[..], &[0xFF, 0xD9]].concat();
        decoded = decode_samples(&ended, header.width, header.height, samples);
    }
    let data = match decoded {
        Ok(data) => data,
        Err(damage @ ImageDecodeError::Damaged(_)) if options.accepts_damaged() => {
            return lenient::decode_part(&bytes, header, options, damage);
        }
        Err(error) => return Err(error),
    };
    let data = match samples {
        Samples::Cmyk => data
            .chunks_exact(4)
            .flat_map(|pixel| {
                // Adobe's programs store inverted values, and so does who writes no marker of Adobe: Pillow and
                // browsers take all such files as inverted.
                cmyk_to_rgb([pixel[0], pixel[1], pixel[2], pixel[3]].map(|c| 255 - c))
            })
            .collect(),
        _ => data,
    };
    Ok(Pixels::whole(rgb_image(header.width, header.height, data)?))
}

/// Whether the end marker is in the last bytes.
fn has_end(bytes: &[u8]) -> bool {
    const TAIL_BYTES: usize = 64;
    bytes[bytes.len().saturating_sub(TAIL_BYTES)..].windows(2).any(|pair| pair == [0xFF, 0xD9])
}

/// Leaves out the segments of colour profiles if their numbering is wrong: the profile is not used, and
/// libjpeg-turbo refuses the whole image for it.
fn without_damaged_profile<'a>(bytes: &'a [u8], header: &JpegHeader<'_>) -> Cow<'a, [u8]> {
    // The marker, the size and `ICC_PROFILE` with a zero precede the number and the count.
    let numbers = header.icc_segments.iter().map(|segment| {
        bytes.get(segment.start + 16..segment.start + 18).map(|pair| (pair[0], pair[1]))
    });
    let count = header.icc_segments.len();
    let mut found: Vec<u8> = Vec::new();
    for pair in numbers {
        match pair {
            Some((number, of)) if usize::from(of) == count && number >= 1 && number <= of => {
                found.push(number);
            }
            _ => found.clear(),
        }
    }
    found.sort_unstable();
    found.dedup();
    if found.len() == count {
        return bytes.into();
    }
    let mut kept = Vec::with_capacity(bytes.len());
    let mut at = 0;
    for segment in &header.icc_segments {
        kept.extend_from_slice(&bytes[at..segment.start]);
        at = segment.end;
    }
    kept.extend_from_slice(&bytes[at..]);
    kept.into()
}

/// What a decoder returns per pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Samples {
    /// One byte.
    Grey,
    /// Three bytes.
    Rgb,
    /// Four bytes, as they are stored.
    Cmyk,
}

/// Decodes a stream of known dimensions. Fails if anything in it is damaged.
pub fn decode_samples(
    jpeg: &[u8],
    width: u32,
    height: u32,
    samples: Samples,
) -> Result<Vec<u8>, ImageDecodeError> {
    let format = match samples {
        Samples::Grey => PixelFormat::GRAY,
        Samples::Rgb => PixelFormat::RGB,
        Samples::Cmyk => PixelFormat::CMYK,
    };
    let (width, height) = (width as usize, height as usize);
    let pitch = width * format.size();
    let mut pixels = vec![0; pitch * height];
    let mut decompressor = Decompressor::new().map_err(|error| convert_error(&error))?;
    decompressor.set_scan_limit(MAX_SCANS).map_err(|error| convert_error(&error))?;
    let output = turbojpeg::Image { pixels: &mut pixels[..], width, pitch, height, format };
    decompressor.decompress(jpeg, output).map_err(|error| convert_error(&error))?;
    Ok(pixels)
}

fn convert_error(error: &turbojpeg::Error) -> ImageDecodeError {
    let message = error.to_string();
    let has = |parts: &[&str]| parts.iter().any(|part| message.contains(part));
    if has(&["scans"]) {
        ImageDecodeError::OutOfBounds(message)
    } else if has(&[
        "nsupported",
        "not supported",
        "Sorry",
        "not compiled",
        "omitted at compile time",
    ]) {
        ImageDecodeError::unsupported("JPEG", message)
    } else {
        ImageDecodeError::damaged(message)
    }
}
