//! Decompresses strips and tiles.

use std::io::Read as _;

use weezl::{BitOrder, LzwStatus};

use super::super::error::ImageDecodeError;
use super::fax;
use super::layout::Compression;

/// Decompresses a strip or tile to exactly `size` bytes: `rows` rows of `width` bits if it is a fax.
pub fn decompress(
    data: &[u8],
    compression: Compression,
    size: usize,
    (width, rows): (u32, u32),
) -> Result<Vec<u8>, ImageDecodeError> {
    match compression {
        Compression::None => data.get(..size).map(<[u8]>::to_vec).ok_or_else(too_short),
        Compression::Lzw => unpack_lzw(data, size),
        Compression::Deflate => inflate(data, size),
        Compression::PackBits => unpack_bits(data, size),
        Compression::FaxRle => fax::decode(data, fax::Coding::Rle, width, rows),
        Compression::FaxG3 { is_two_dimensional } => {
            fax::decode(data, fax::Coding::G3 { is_two_dimensional }, width, rows)
        }
        Compression::FaxG4 => fax::decode(data, fax::Coding::G4, width, rows),
        Compression::Jpeg => {
            Err(ImageDecodeError::damaged("a JPEG cannot be decompressed as bytes"))
        }
    }
}

fn unpack_lzw(data: &[u8], size: usize) -> Result<Vec<u8>, ImageDecodeError> {
    // Before TIFF 6, codes began with the least significant bit.
    if data.len() >= 2 && data[0] == 0 && data[1] & 1 == 1 {
        return Err(ImageDecodeError::unsupported("TIFF", "LZW of before TIFF 6"));
    }
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    let mut bytes = vec![0; size];
    let (mut read, mut written) = (0, 0);
    while written < size {
        let result = decoder.decode_bytes(&data[read..], &mut bytes[written..]);
        read += result.consumed_in;
        written += result.consumed_out;
        match result.status {
            Ok(LzwStatus::Ok) if result.consumed_in + result.consumed_out > 0 => {}
            Ok(_) => break,
            Err(_) if written >= size => break,
            Err(error) => return Err(ImageDecodeError::damaged(format!("LZW: {error}"))),
        }
    }
    if written < size { Err(too_short()) } else { Ok(bytes) }
}

fn inflate(data: &[u8], size: usize) -> Result<Vec<u8>, ImageDecodeError> {
    let mut decoder = flate2::read::ZlibDecoder::new(data);
    let mut bytes = vec![0; size];
    let damaged = |error: std::io::Error| ImageDecodeError::damaged(format!("Deflate: {error}"));
    decoder.read_exact(&mut bytes).map_err(damaged)?;
    // Reading on checks the checksum, which follows the last byte.
    decoder.read(&mut [0]).map_err(damaged)?;
    Ok(bytes)
}

fn unpack_bits(data: &[u8], size: usize) -> Result<Vec<u8>, ImageDecodeError> {
    let mut bytes = Vec::with_capacity(size);
    let mut rest = data;
    while bytes.len() < size {
        let (head, after) = rest.split_first().ok_or_else(too_short)?;
        let head = *head as i8;
        rest = after;
        if head >= 0 {
            let count = head as usize + 1;
            bytes.extend_from_slice(rest.get(..count).ok_or_else(too_short)?);
            rest = &rest[count..];
        } else if head != -128 {
            let (byte, after) = rest.split_first().ok_or_else(too_short)?;
            bytes.resize(bytes.len() + usize::from(head.unsigned_abs()) + 1, *byte);
            rest = after;
        }
    }
    bytes.truncate(size);
    Ok(bytes)
}

fn too_short() -> ImageDecodeError {
    ImageDecodeError::damaged("a strip or tile ends early")
}
