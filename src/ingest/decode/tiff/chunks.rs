//! Turns a strip or tile into samples of 8 bits, interleaved by pixel.

use super::super::error::ImageDecodeError;
use super::super::jpeg;
use super::compression::decompress;
use super::layout::{Colours, Compression, TiffLayout};

/// Decodes a chunk of `rows` rows with `samples` samples per pixel. Samples of a palette keep their value; others
/// are scaled to 0 to 255. A chunk of JPEG in YCbCr comes as RGB.
pub fn decode_chunk(
    layout: &TiffLayout<'_>,
    data: &[u8],
    rows: u32,
    samples: usize,
) -> Result<Vec<u8>, ImageDecodeError> {
    if layout.compression == Compression::Jpeg {
        return decode_jpeg(layout, data, rows, samples);
    }
    let reversed: Vec<u8>;
    let data = if layout.reverses_bits {
        reversed = data.iter().map(|byte| byte.reverse_bits()).collect();
        &reversed[..]
    } else {
        data
    };
    let width = layout.chunk_width as usize;
    let shape = (layout.chunk_width, rows);
    if let Colours::Ycbcr(ycbcr) = &layout.colours
        && ycbcr.subsampling != (1, 1)
    {
        let (h, v) = (ycbcr.subsampling.0 as usize, ycbcr.subsampling.1 as usize);
        let blocks = width.div_ceil(h) * (rows as usize).div_ceil(v);
        let bytes = decompress(data, layout.compression, blocks * (h * v + 2), shape)?;
        return Ok(spread_subsampled(&bytes, width, rows as usize, h, v));
    }
    let row_samples = width * samples;
    let row_bytes = (row_samples * layout.bits as usize).div_ceil(8);
    let mut bytes = decompress(data, layout.compression, row_bytes * rows as usize, shape)?;
    match layout.bits {
        8 => {
            if layout.has_predictor {
                for row in bytes.chunks_exact_mut(row_bytes) {
                    for i in samples..row.len() {
                        row[i] = row[i].wrapping_add(row[i - samples]);
                    }
                }
            }
            Ok(bytes)
        }
        16 => Ok(reduce_16_bit(layout, &bytes, row_bytes, samples)),
        bits => {
            let is_palette = matches!(layout.colours, Colours::Palette(_));
            let factor = if is_palette { 1 } else { 255 / ((1u16 << bits) - 1) as u8 };
            Ok(unpack_samples(&bytes, row_bytes, row_samples, bits, factor))
        }
    }
}

fn reduce_16_bit(
    layout: &TiffLayout<'_>,
    bytes: &[u8],
    row_bytes: usize,
    samples: usize,
) -> Vec<u8> {
    let mut reduced = Vec::with_capacity(bytes.len() / 2);
    let mut row_values: Vec<u16> = Vec::with_capacity(row_bytes / 2);
    for row in bytes.chunks_exact(row_bytes) {
        row_values.clear();
        row_values.extend(row.chunks_exact(2).map(|pair| {
            let pair = [pair[0], pair[1]];
            if layout.is_big_endian { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) }
        }));
        if layout.has_predictor {
            for i in samples..row_values.len() {
                row_values[i] = row_values[i].wrapping_add(row_values[i - samples]);
            }
        }
        reduced.extend(row_values.iter().map(|value| ((u32::from(*value) + 128) / 257) as u8));
    }
    reduced
}

/// Unpacks samples of fewer than 8 bits; rows begin with a byte.
fn unpack_samples(
    bytes: &[u8],
    row_bytes: usize,
    row_samples: usize,
    bits: u32,
    factor: u8,
) -> Vec<u8> {
    let per_byte = (8 / bits) as usize;
    let mask = ((1u16 << bits) - 1) as u8;
    let mut unpacked = Vec::with_capacity(bytes.len() * per_byte);
    for row in bytes.chunks_exact(row_bytes) {
        unpacked.extend((0..row_samples).map(|i| {
            let shift = 8 - bits as usize * (i % per_byte + 1);
            ((row[i / per_byte] >> shift) & mask) * factor
        }));
    }
    unpacked
}

/// Spreads blocks of `h`×`v` brightnesses and two colours to three samples per pixel.
fn spread_subsampled(bytes: &[u8], width: usize, rows: usize, h: usize, v: usize) -> Vec<u8> {
    let block_bytes = h * v + 2;
    let blocks_across = width.div_ceil(h);
    let mut samples = Vec::with_capacity(width * rows * 3);
    for y in 0..rows {
        for x in 0..width {
            let block = &bytes[(y / v * blocks_across + x / h) * block_bytes..][..block_bytes];
            samples.extend([block[y % v * h + x % h], block[h * v], block[h * v + 1]]);
        }
    }
    samples
}

/// Decodes a chunk that is a JPEG; what all chunks share is in the tables of the directory.
fn decode_jpeg(
    layout: &TiffLayout<'_>,
    data: &[u8],
    rows: u32,
    samples: usize,
) -> Result<Vec<u8>, ImageDecodeError> {
    let data = data
        .strip_prefix(b"\xff\xd8")
        .ok_or_else(|| ImageDecodeError::damaged("a strip or tile is not a JPEG"))?;
    let mut jpeg = vec![0xFF, 0xD8];
    // Says whether colours are YCbCr, which the stream itself does not.
    let transform = u8::from(matches!(layout.colours, Colours::Ycbcr(_)));
    if samples >= 3 {
        jpeg.extend(b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0");
        jpeg.push(transform);
    }
    if let Some(tables) = layout.jpeg_tables {
        let tables = tables.strip_prefix(b"\xff\xd8").unwrap_or(tables);
        jpeg.extend_from_slice(tables.strip_suffix(b"\xff\xd9").unwrap_or(tables));
    }
    jpeg.extend_from_slice(data);
    let kind = match samples {
        1 => jpeg::Samples::Grey,
        3 => jpeg::Samples::Rgb,
        _ => jpeg::Samples::Cmyk,
    };
    let (width, height) = jpeg::frame_size(&jpeg)?;
    // The last strip may state the height of the others.
    if width != layout.chunk_width || height < rows || height > layout.chunk_height {
        return Err(ImageDecodeError::damaged(format!(
            "a strip or tile of {}×{rows} pixels is a JPEG of {width}×{height}",
            layout.chunk_width
        )));
    }
    jpeg::decode_samples(&jpeg, width, height, kind)
}
