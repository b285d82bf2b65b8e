//! Decodes JPEGs by libjpeg-turbo.

use image::metadata::Orientation;
use turbojpeg::{Decompressor, PixelFormat};

use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::orientation::read_orientation;
use super::super::pixels::{Pixels, cmyk_to_rgb, rgb_image};
use super::header::{JpegHeader, MAX_SCANS};
use super::lenient;
use crate::ingest::containers::find_in_jpeg;

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
    let orientation = read_orientation(&find_in_jpeg(bytes));
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
    header: &JpegHeader,
    options: &DecodeOptions,
) -> Result<Pixels, ImageDecodeError> {
    let samples = if header.sampling.len() == 4 { Samples::Cmyk } else { Samples::Rgb };
    let mut decoded = decode_samples(bytes, header.width, header.height, samples);
    if matches!(decoded, Err(ImageDecodeError::Damaged(_))) {
        // libjpeg-turbo fails for a damaged colour profile and for bytes between segments too, and for a missing end
        // marker. If that is all, nothing has to be guessed.
        let mut plain = header.without_ballast(bytes);
        if header.is_sequential() && !has_end(bytes) {
            plain.extend([0xFF, 0xD9]);
        }
        if let Ok(data) = decode_samples(&plain, header.width, header.height, samples) {
            decoded = Ok(data);
        }
    }
    let data = match decoded {
        Ok(data) => data,
        Err(damage @ ImageDecodeError::Damaged(_)) if options.accepts_damaged() => {
            return lenient::decode_part(bytes, header, options, damage);
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
