//! Joins strips and tiles to an image.

use image::metadata::Orientation;

use super::super::deadline::Deadline;
use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::orientation::{ORIENTATION_TAG, directory_orientation, read_orientation};
use super::super::pixels::{Pixels, UNKNOWN_GREY, rgb_image};
use super::super::tiff_directory::TiffDirectory;
use super::chunks::decode_chunk;
use super::colour::Converter;
use super::layout::TiffLayout;
use crate::ingest::containers::MetadataBlocks;

const XMP_TAG: u16 = 700;

fn read_directory(bytes: &[u8]) -> Result<TiffDirectory<'_>, ImageDecodeError> {
    if bytes.get(8..10) == Some(b"CR") && bytes.starts_with(b"II*\0") {
        return Err(ImageDecodeError::unsupported("TIFF", "camera raw (CR2)"));
    }
    TiffDirectory::read_first(bytes)
        .ok_or_else(|| ImageDecodeError::damaged("its directory lies outside of the file"))
}

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let layout = TiffLayout::read(&read_directory(bytes)?, options)?;
    let pixels = u64::from(layout.width) * u64::from(layout.height);
    let chunk_pixels = u64::from(layout.chunk_width) * u64::from(layout.chunk_height);
    // RGB, and one strip or tile as it is stored, decompressed, and as samples.
    let sample_bytes = u64::from(layout.bits.div_ceil(8)) * layout.samples as u64;
    Ok(pixels * 3 + chunk_pixels * sample_bytes * 3)
}

/// Decodes the first image of a TIFF. Returns how it must be turned.
pub fn decode(
    bytes: &[u8],
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<(Pixels, Orientation), ImageDecodeError> {
    let directory = read_directory(bytes)?;
    let layout = TiffLayout::read(&directory, options)?;
    let orientation = if directory.has(ORIENTATION_TAG) {
        directory_orientation(&directory)
            .and_then(Orientation::from_exif)
            .unwrap_or(Orientation::NoTransforms)
    } else {
        let xmp = directory.bytes(XMP_TAG).map(Into::into);
        read_orientation(&MetadataBlocks { xmp, ..MetadataBlocks::default() })
    };
    let converter = Converter::new(&layout);
    let (width, height) = (layout.width as usize, layout.height as usize);
    let mut rgb = vec![UNKNOWN_GREY; width * height * 3];
    let (columns, rows) =
        (layout.width.div_ceil(layout.chunk_width), layout.height.div_ceil(layout.chunk_height));
    let mut damage = None;
    let mut decoded_pixels = 0u64;
    for row in 0..rows {
        for column in 0..columns {
            deadline.check()?;
            let (left, top) = (column * layout.chunk_width, row * layout.chunk_height);
            let shown_width = layout.chunk_width.min(layout.width - left) as usize;
            let shown_height = layout.chunk_height.min(layout.height - top);
            let samples = match read_position(bytes, &layout, column + row * columns, shown_height)
            {
                Ok(samples) => samples,
                Err(error @ ImageDecodeError::Damaged(_)) if options.accepts_damaged() => {
                    damage = damage.or(Some(error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let chunk_row_samples = layout.chunk_width as usize * layout.samples;
            for (y, samples) in
                samples.chunks_exact(chunk_row_samples).take(shown_height as usize).enumerate()
            {
                let at = ((top as usize + y) * width + left as usize) * 3;
                let pixels = samples.chunks_exact(layout.samples);
                for (to, pixel) in rgb[at..at + shown_width * 3].chunks_exact_mut(3).zip(pixels) {
                    to.copy_from_slice(&converter.to_rgb(pixel));
                }
            }
            decoded_pixels += shown_width as u64 * u64::from(shown_height);
        }
    }
    let decoded_share = decoded_pixels as f64 / (width as f64 * height as f64);
    if let Some(damage) = damage {
        options.check_share(decoded_share, damage)?;
    }
    let image = rgb_image(layout.width, layout.height, rgb)?;
    Ok((Pixels { image, decoded_share }, orientation))
}

/// Decodes the strip or tile at a position, or one of each plane, to interleaved samples.
fn read_position(
    bytes: &[u8],
    layout: &TiffLayout<'_>,
    position: u32,
    shown_height: u32,
) -> Result<Vec<u8>, ImageDecodeError> {
    // Tiles are whole; the last strip has only the rows that the image has.
    let rows = if layout.is_tiled { layout.chunk_height } else { shown_height };
    if !layout.is_planar {
        return decode_chunk(
            layout,
            chunk_bytes(bytes, layout, position as usize)?,
            rows,
            layout.samples,
        );
    }
    let chunks_per_plane = layout.chunks.len() / layout.samples;
    let mut interleaved = vec![0; layout.chunk_width as usize * rows as usize * layout.samples];
    for plane in 0..layout.samples {
        let data = chunk_bytes(bytes, layout, position as usize + plane * chunks_per_plane)?;
        let samples = decode_chunk(layout, data, rows, 1)?;
        for (pixel, sample) in interleaved.chunks_exact_mut(layout.samples).zip(samples) {
            pixel[plane] = sample;
        }
    }
    Ok(interleaved)
}

/// Returns the bytes of a strip or tile, as far as the file has them.
fn chunk_bytes<'a>(
    bytes: &'a [u8],
    layout: &TiffLayout<'_>,
    index: usize,
) -> Result<&'a [u8], ImageDecodeError> {
    let (offset, size) = layout.chunks[index];
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let rest = bytes.get(start..).filter(|rest| !rest.is_empty());
    let rest = rest.ok_or_else(|| {
        ImageDecodeError::damaged("a strip or tile lies behind the end of the file")
    })?;
    Ok(&rest[..size.min(rest.len())])
}
