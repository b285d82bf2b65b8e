//! What containers say that decoders of pixels do not: metadata, brands, and whether the file is cut off.

use std::borrow::Cow;
use std::io::Read as _;

use super::orientation::Metadata;

/// Most bytes of metadata that are inflated: more than any real EXIF or XMP of a PNG.
const MAX_INFLATED_BYTES: u64 = 4 << 20;

/// Most brands that are looked at; files have three to ten.
const MAX_BRANDS: usize = 64;

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
        rest = rest.get(size + 12..).unwrap_or_default();
        Some(PngChunk { kind, data })
    })
}

/// Finds EXIF and XMP of a PNG, wherever they are in the file.
pub fn png_metadata(bytes: &[u8]) -> Metadata<'_> {
    let mut found = Metadata::default();
    for chunk in png_chunks(bytes) {
        match chunk.kind {
            b"eXIf" => found.exif = Some(chunk.data.into()),
            // As ImageMagick stored EXIF before there was a chunk for it.
            b"zTXt" | b"tEXt" if found.exif.is_none() => {
                found.exif = raw_profile(&chunk).map(Cow::Owned);
            }
            b"iTXt" if found.xmp.is_none() => found.xmp = xmp_text(chunk.data),
            b"IEND" => break,
            _ => {}
        }
    }
    found
}

/// Reads EXIF from a text chunk: lines of a name, a length, and hexadecimal digits.
fn raw_profile(chunk: &PngChunk<'_>) -> Option<Vec<u8>> {
    let text = ["exif", "APP1"].iter().find_map(|name| {
        chunk.data.strip_prefix(format!("Raw profile type {name}\0").as_bytes())
    })?;
    let text: Cow<'_, [u8]> = match (chunk.kind, text) {
        (b"zTXt", [0, deflated @ ..]) => inflate(deflated)?.into(),
        (b"tEXt", text) => text.into(),
        _ => return None,
    };
    let mut lines = text.split(|byte| *byte == b'\n').skip_while(|line| line.is_empty());
    let (_name, _length) = (lines.next()?, lines.next()?);
    let digits: Vec<u8> =
        lines.flatten().filter_map(|c| (*c as char).to_digit(16)).map(|d| d as u8).collect();
    Some(digits.chunks_exact(2).map(|pair| (pair[0] << 4) | pair[1]).collect())
}

/// Reads XMP from an international text chunk.
fn xmp_text(data: &[u8]) -> Option<Cow<'_, [u8]>> {
    let rest = data.strip_prefix(b"XML:com.adobe.xmp\0")?;
    let (is_compressed, rest) = (*rest.first()?, rest.get(2..)?);
    // The language and the translated keyword, each ended by a zero.
    let mut parts = rest.splitn(3, |byte| *byte == 0);
    let text = parts.nth(2)?;
    if is_compressed == 1 { inflate(text).map(Cow::Owned) } else { Some(text.into()) }
}

fn inflate(deflated: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    flate2::read::ZlibDecoder::new(deflated)
        .take(MAX_INFLATED_BYTES)
        .read_to_end(&mut text)
        .ok()?;
    Some(text)
}

/// Returns where the first frame of a GIF ends, from the left and from the top.
pub fn gif_frame_end(bytes: &[u8]) -> Option<(u16, u16)> {
    let table_bytes = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + table_bytes(*bytes.get(10)?);
    loop {
        match bytes.get(at)? {
            // An extension: its kind, then blocks of a stated size up to an empty one.
            0x21 => {
                at += 2;
                while let size @ 1.. = usize::from(*bytes.get(at)?) {
                    at += size + 1;
                }
                at += 1;
            }
            0x2C => {
                let number = |i: usize| {
                    Some(u16::from_le_bytes([*bytes.get(at + i)?, *bytes.get(at + i + 1)?]))
                };
                let (left, top, width, height) = (number(1)?, number(3)?, number(5)?, number(7)?);
                return Some((left.checked_add(width)?, top.checked_add(height)?));
            }
            _ => return None,
        }
    }
}

/// A WebP file.
#[derive(Debug)]
pub struct WebpContainer<'a> {
    /// EXIF and XMP.
    pub metadata: Metadata<'a>,
    /// Whether the file ends before the size that it states.
    pub is_cut_off: bool,
}

/// Reads the chunks of a WebP.
pub fn read_webp(bytes: &[u8]) -> WebpContainer<'_> {
    let size_at = |at: usize| {
        Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
    };
    let mut metadata = Metadata::default();
    let stated_size = size_at(4).unwrap_or(0);
    let mut at = 12;
    let mut is_cut_off = stated_size.saturating_add(8) > bytes.len() + 1;
    while let Some((kind, size)) = bytes.get(at..at + 4).zip(size_at(at + 4)) {
        let Some(data) = bytes.get(at + 8..(at + 8).saturating_add(size)) else {
            is_cut_off |= at < stated_size.saturating_add(8);
            break;
        };
        match kind {
            b"EXIF" if metadata.exif.is_none() => metadata.exif = Some(data.into()),
            b"XMP " if metadata.xmp.is_none() => metadata.xmp = Some(data.into()),
            _ => {}
        }
        at += 8 + size + (size & 1);
    }
    WebpContainer { metadata, is_cut_off }
}

/// Whether a BMP has not the bytes that its header states: its pixels overlap its palette, or without compression,
/// reach beyond the end of the file.
pub fn is_bmp_damaged(bytes: &[u8]) -> bool {
    bmp_contradicts_header(bytes).unwrap_or(false)
}

fn bmp_contradicts_header(bytes: &[u8]) -> Option<bool> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let short = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (start, header_size) = (u64::from(number(10)?), number(14)?);
    if header_size < 40 {
        return None;
    }
    let (width, height) = (u64::from(number(18)?), u64::from((number(22)? as i32).unsigned_abs()));
    let (bits, compression) = (u64::from(short(28)?), number(30)?);
    let palette_bytes = if bits <= 8 { 4 * u64::from(number(46)?) } else { 0 };
    if start < 14 + u64::from(header_size) + palette_bytes {
        return Some(true);
    }
    // 0: none, 3 and 6: none with masks.
    if !matches!(compression, 0 | 3 | 6) {
        return None;
    }
    let row_bytes = width.checked_mul(bits)?.div_ceil(32) * 4;
    Some(start.checked_add(row_bytes.checked_mul(height)?)? > bytes.len() as u64)
}

/// Returns the brands of a file in the ISO base media container, the major one first; `None` if it is none.
pub fn bmff_brands(bytes: &[u8]) -> Option<Vec<&[u8]>> {
    if bytes.get(4..8)? != b"ftyp" {
        return None;
    }
    let size = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let body = bytes.get(8..size.clamp(8, bytes.len()))?;
    let (major, rest) = body.split_at_checked(4)?;
    // The four bytes after the major brand are its version.
    let compatible = rest.get(4..).unwrap_or_default();
    Some(std::iter::once(major).chain(compatible.chunks_exact(4).take(MAX_BRANDS)).collect())
}
