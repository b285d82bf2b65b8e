//! Finds the blocks with metadata in a file, by its format.

use std::borrow::Cow;
use std::io::Read as _;

use flate2::bufread::ZlibDecoder;

use super::blocks::{EXIF_PREFIX, MAX_PARTS, MetadataBlocks, without_exif_prefix};
use super::boxes;
use super::exif;
use super::xmp::MAX_PACKET_BYTES;

/// Maximum length of a block in several segments of a JPEG: previews of some hundred kilobytes may be in
/// it.
const MAX_BLOCK_BYTES: usize = 8 << 20;

/// Maximum number of texts with metadata of a PNG that are read; each may be compressed.
const MAX_PNG_TEXTS: usize = 8;

/// Finds the blocks of a JPEG, PNG, WebP, TIFF, HEIC, AVIF or JPEG XL; others have none.
pub fn find_blocks(bytes: &[u8]) -> MetadataBlocks<'_> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => find_in_jpeg(bytes),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', chunks @ ..] => find_in_png(chunks),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', chunks @ ..] => {
            find_in_webp(chunks)
        }
        [b'I', b'I', ..] | [b'M', b'M', ..] => find_in_tiff(bytes),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => boxes::find_in_heif(bytes),
        [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] => boxes::find_in_jpeg_xl(bytes),
        _ => MetadataBlocks::default(),
    }
}

/// Segments up to the first scan.
fn find_in_jpeg(bytes: &[u8]) -> MetadataBlocks<'_> {
    const APP1: u8 = 0xe1;
    const APP13: u8 = 0xed;
    const XMP_PREFIX: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
    const PHOTOSHOP_PREFIX: &[u8] = b"Photoshop 3.0\0";
    let mut blocks = MetadataBlocks::default();
    let mut rest = &bytes[2..];
    for _ in 0..MAX_PARTS {
        let Some((marker, payload, following)) = split_jpeg_segment(rest) else { break };
        rest = following;
        if marker == APP1 {
            if let Some(part) = payload.strip_prefix(EXIF_PREFIX) {
                let is_first = blocks.exif.is_none();
                if is_first || !is_tiff_header(part) {
                    append(&mut blocks.exif, part);
                }
            } else if let Some(xmp) = payload.strip_prefix(XMP_PREFIX) {
                blocks.xmp.get_or_insert(xmp.into());
            }
        } else if let (APP13, Some(part)) = (marker, payload.strip_prefix(PHOTOSHOP_PREFIX)) {
            append(&mut blocks.photoshop, part);
        }
    }
    blocks
}

fn is_tiff_header(bytes: &[u8]) -> bool {
    bytes.starts_with(b"II") || bytes.starts_with(b"MM")
}

/// Adds a part of a block: what is too long for a segment continues in the next, anywhere in a value.
fn append<'a>(block: &mut Option<Cow<'a, [u8]>>, part: &'a [u8]) {
    match block {
        None => *block = Some(part.into()),
        Some(parts) if parts.len() + part.len() <= MAX_BLOCK_BYTES => {
            parts.to_mut().extend_from_slice(part);
        }
        Some(_) => {}
    }
}

/// Returns the first segment's marker and payload, and what follows it; `None` at the first scan.
fn split_jpeg_segment(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    const START_OF_SCAN: u8 = 0xda;
    const END_OF_IMAGE: u8 = 0xd9;
    let [0xff, rest @ ..] = bytes else { return None };
    // Markers may be preceded by any number of fill bytes.
    let fill = rest.iter().take_while(|byte| **byte == 0xff).count();
    let (marker, rest) = rest.get(fill..)?.split_first()?;
    match *marker {
        START_OF_SCAN | END_OF_IMAGE => None,
        marker @ (0x01 | 0xd0..=0xd8) => Some((marker, &[], rest)),
        marker => {
            let length = usize::from(u16::from_be_bytes(rest.get(..2)?.try_into().ok()?));
            Some((marker, rest.get(2..length)?, &rest[length..]))
        }
    }
}

/// Chunks: `eXIf`, the texts of XMP, and the "raw profiles" in which programs put what PNG had no chunk
/// for.
fn find_in_png(mut rest: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    let mut texts = 0;
    for _ in 0..MAX_PARTS {
        let Some((head, following)) = rest.split_at_checked(8) else { break };
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(data) = following.get(..length) else { break };
        match &head[4..] {
            b"eXIf" => blocks.exif = Some(without_exif_prefix(data).into()),
            b"iTXt" | b"zTXt" | b"tEXt" if texts < MAX_PNG_TEXTS => {
                texts += usize::from(add_png_text(&mut blocks, &head[4..], data));
            }
            _ => {}
        }
        // A checksum follows the data.
        rest = following.get(length.saturating_add(4)..).unwrap_or_default();
    }
    blocks
}

/// Adds what a text chunk has; returns whether it is one with metadata.
fn add_png_text<'a>(blocks: &mut MetadataBlocks<'a>, kind: &[u8], data: &'a [u8]) -> bool {
    const XMP_KEYWORD: &[u8] = b"XML:com.adobe.xmp";
    const PROFILE_PREFIX: &[u8] = b"Raw profile type ";
    let Some(end) = data.iter().position(|byte| *byte == 0) else { return false };
    let (keyword, rest) = (&data[..end], &data[end + 1..]);
    if keyword != XMP_KEYWORD && !keyword.starts_with(PROFILE_PREFIX) {
        return false;
    }
    let Some(text) = png_text(kind, rest) else { return true };
    if keyword == XMP_KEYWORD {
        blocks.xmp = Some(text);
        return true;
    }
    let Some(profile) = read_raw_profile(&text) else { return true };
    match &keyword[PROFILE_PREFIX.len()..] {
        b"xmp" => blocks.xmp = Some(profile.into()),
        // The content of a JPEG's segment.
        b"exif" | b"APP1" if profile.starts_with(EXIF_PREFIX) && blocks.exif.is_none() => {
            blocks.exif = Some(without_exif_prefix(&profile).to_vec().into());
        }
        b"iptc" | b"8bim" if profile.starts_with(b"8BIM") => {
            blocks.photoshop = Some(profile.into());
        }
        b"iptc" => blocks.iptc = Some(profile.into()),
        _ => {}
    }
    true
}

/// Returns the text of a chunk, from what follows its keyword.
fn png_text<'a>(kind: &[u8], rest: &'a [u8]) -> Option<Cow<'a, [u8]>> {
    match kind {
        b"tEXt" => Some(rest.into()),
        // The method of compression, of which there is one.
        b"zTXt" => inflate(rest.get(1..)?).map(Cow::Owned),
        _ => {
            // Whether it is compressed, by which method, a language and a translated keyword.
            let (is_compressed, rest) = (rest.first() == Some(&1), rest.get(2..)?);
            let text = rest.splitn(3, |byte| *byte == 0).nth(2)?;
            if is_compressed { inflate(text).map(Cow::Owned) } else { Some(text.into()) }
        }
    }
}

/// Inflates at most as many bytes as are read of an XMP packet.
fn inflate(compressed: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    ZlibDecoder::new(compressed).take(MAX_PACKET_BYTES as u64).read_to_end(&mut text).ok()?;
    Some(text)
}

/// Reads ImageMagick's form: a line with the name, one with the length, and hexadecimal digits.
fn read_raw_profile(text: &[u8]) -> Option<Vec<u8>> {
    let mut lines = text.trim_ascii_start().splitn(3, |byte| *byte == b'\n');
    let digits = lines.nth(2)?.iter().filter(|byte| !byte.is_ascii_whitespace());
    let values: Option<Vec<u8>> =
        digits.map(|byte| Some(char::from(*byte).to_digit(16)? as u8)).collect();
    Some(values?.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn find_in_webp(mut rest: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    for _ in 0..MAX_PARTS {
        let Some((head, following)) = rest.split_at_checked(8) else { break };
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let Some(data) = following.get(..length) else { break };
        match &head[..4] {
            b"EXIF" => blocks.exif = Some(without_exif_prefix(data).into()),
            b"XMP " => blocks.xmp = Some(data.into()),
            _ => {}
        }
        // Chunks are padded to an even number of bytes.
        rest = following.get(length.saturating_add(length & 1)..).unwrap_or_default();
    }
    blocks
}

fn find_in_tiff(bytes: &[u8]) -> MetadataBlocks<'_> {
    let Some(fields) = exif::read_exif(bytes) else { return MetadataBlocks::default() };
    MetadataBlocks {
        xmp: fields.xmp.map(Cow::Borrowed),
        photoshop: fields.photoshop.map(Cow::Borrowed),
        iptc: fields.iptc,
        exif: Some(bytes.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(marker: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u16 + 2).to_be_bytes();
        [&[0xff, marker][..], &length, payload].concat()
    }

    #[test]
    fn blocks_in_several_segments_are_joined() {
        let parts = [
            &[0xff, 0xd8][..],
            &segment(0xe1, b"Exif\0\0II*\0first"),
            &segment(0xed, b"Photoshop 3.0\08BIM"),
            // Fill bytes before a marker.
            &[0xff, 0xff],
            &segment(0xe1, b"Exif\0\0 second"),
            &segment(0xe1, b"Exif\0\0MM\0*another block"),
            &segment(0xed, b"Photoshop 3.0\0 more"),
            &segment(0xda, b""),
            &segment(0xed, b"Photoshop 3.0\0in the scan"),
        ];
        let jpeg = parts.concat();
        let blocks = find_blocks(&jpeg);
        assert_eq!(blocks.exif.unwrap(), &b"II*\0first second"[..]);
        assert_eq!(blocks.photoshop.unwrap(), &b"8BIM more"[..]);
        assert!(blocks.xmp.is_none());
    }
}
