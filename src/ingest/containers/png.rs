//! Chunks of PNGs.

use std::borrow::Cow;
use std::io::Read as _;

use flate2::bufread::ZlibDecoder;

use super::blocks::{EXIF_PREFIX, MAX_PARTS, MetadataBlocks, is_tiff_header, without_exif_prefix};

/// Maximum number of texts with metadata that are read; each may be compressed.
const MAX_TEXTS: usize = 8;
/// Maximum length of a compressed text: more than any real EXIF or XMP of a PNG.
const MAX_INFLATED_BYTES: u64 = 4 << 20;

/// A chunk of a PNG.
pub struct PngChunk<'a> {
    pub kind: &'a [u8],
    pub data: &'a [u8],
}

/// Returns the chunks of a PNG, up to the first that is cut off.
pub fn png_chunks(bytes: &[u8]) -> impl Iterator<Item = PngChunk<'_>> {
    let mut rest = bytes.get(8..).unwrap_or_default();
    std::iter::from_fn(move || {
        let size = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let (kind, data) = (rest.get(4..8)?, rest.get(8..size.checked_add(8)?)?);
        // A checksum follows the data.
        rest = rest.get(size.saturating_add(12)..).unwrap_or_default();
        Some(PngChunk { kind, data })
    })
}

/// Finds the blocks of a PNG, before and behind its pixels: `eXIf`, the texts of XMP, and the "raw profiles" in which
/// programs put what PNG had no chunk for.
pub fn find_in_png(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    let mut texts = 0;
    for PngChunk { kind, data } in png_chunks(bytes).take(MAX_PARTS) {
        match kind {
            b"eXIf" => blocks.exif = Some(without_exif_prefix(data).into()),
            b"iTXt" | b"zTXt" | b"tEXt" if texts < MAX_TEXTS => {
                texts += usize::from(add_text(&mut blocks, kind, data));
            }
            b"IEND" => break,
            _ => {}
        }
    }
    blocks
}

/// Adds what a text chunk has; returns whether it is one with metadata.
fn add_text<'a>(blocks: &mut MetadataBlocks<'a>, kind: &[u8], data: &'a [u8]) -> bool {
    const XMP_KEYWORD: &[u8] = b"XML:com.adobe.xmp";
    const PROFILE_PREFIX: &[u8] = b"Raw profile type ";
    let Some(end) = data.iter().position(|byte| *byte == 0) else { return false };
    let (keyword, rest) = (&data[..end], &data[end + 1..]);
    if keyword != XMP_KEYWORD && !keyword.starts_with(PROFILE_PREFIX) {
        return false;
    }
    let Some(text) = read_text(kind, rest) else { return true };
    if keyword == XMP_KEYWORD {
        blocks.xmp = Some(text);
        return true;
    }
    let Some(profile) = read_raw_profile(&text) else { return true };
    match &keyword[PROFILE_PREFIX.len()..] {
        b"xmp" => blocks.xmp = Some(profile.into()),
        // The content of a JPEG's segment.
        b"exif" | b"APP1"
            if blocks.exif.is_none()
                && (profile.starts_with(EXIF_PREFIX) || is_tiff_header(&profile)) =>
        {
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
fn read_text<'a>(kind: &[u8], rest: &'a [u8]) -> Option<Cow<'a, [u8]>> {
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

fn inflate(compressed: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    ZlibDecoder::new(compressed).take(MAX_INFLATED_BYTES).read_to_end(&mut text).ok()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A PNG of these chunks, without checksums.
    fn png(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
        let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
        for (kind, data) in chunks {
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend([&kind[..], data, &[0; 4]].concat());
        }
        bytes
    }

    #[test]
    fn few_texts_with_metadata_are_read_and_any_number_of_others_skipped() {
        let xmp: (&[u8; 4], &[u8]) = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>");
        let empty: (&[u8; 4], &[u8]) = (b"tEXt", b"Raw profile type exif\0\nexif\n");
        let comment: (&[u8; 4], &[u8]) = (b"tEXt", b"Comment\0none");
        for (chunks, is_found) in [
            ([vec![comment; 100], vec![empty; MAX_TEXTS - 1], vec![xmp]].concat(), true),
            ([vec![empty; MAX_TEXTS], vec![xmp]].concat(), false),
            (vec![(b"IEND", &b""[..]), xmp], false),
        ] {
            assert_eq!(find_in_png(&png(&chunks)).xmp.is_some(), is_found);
        }
    }

    #[test]
    fn exif_in_a_raw_profile_is_read_with_and_without_prefix_and_gives_way_to_its_own_chunk() {
        for (digits, expected) in [
            ("45786966\n000049492a00\n", Some(&b"II*\0"[..])),
            ("4d4d002a", Some(b"MM\0*")),
            ("00000000", None),
            ("49492a0g", None),
        ] {
            let text = format!("Raw profile type APP1\0\nexif\n       4\n{digits}");
            let profile: (&[u8; 4], &[u8]) = (b"tEXt", text.as_bytes());
            assert_eq!(find_in_png(&png(&[profile])).exif.as_deref(), expected, "{digits}");
            let own: (&[u8; 4], &[u8]) = (b"eXIf", b"II*\0own");
            for chunks in [[profile, own], [own, profile]] {
                assert_eq!(find_in_png(&png(&chunks)).exif.as_deref(), Some(own.1), "{digits}");
            }
        }
    }
}
