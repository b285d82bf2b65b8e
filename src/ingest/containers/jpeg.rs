//! Segments of JPEGs.

use std::borrow::Cow;
use std::ops::Range;

use super::blocks::{EXIF_PREFIX, MAX_PARTS, MetadataBlocks, is_tiff_header};

/// Maximum length of a block in several segments: previews of some hundred kilobytes may be in it.
const MAX_BLOCK_BYTES: usize = 8 << 20;

/// A segment of a JPEG.
pub struct JpegSegment<'a> {
    pub marker: u8,
    pub payload: &'a [u8],
    /// Where it is, from its marker on.
    pub range: Range<usize>,
}

/// Returns the segments up to the header of the first scan, or the first that is cut off. What is between segments is
/// skipped.
pub fn jpeg_segments(bytes: &[u8]) -> impl Iterator<Item = JpegSegment<'_>> {
    let mut at = 2;
    std::iter::from_fn(move || {
        loop {
            at += bytes.get(at..)?.iter().position(|byte| *byte == 0xFF)?;
            // Any number of fill bytes may precede a marker.
            at += bytes[at..].iter().take_while(|byte| **byte == 0xFF).count();
            let marker = *bytes.get(at)?;
            let start = at - 1;
            at += 1;
            let length = match marker {
                // Not markers: a stuffed byte, a byte of its own, a restart.
                0x00 | 0x01 | 0xD0..=0xD7 => continue,
                // A start, which has no payload.
                0xD8 => 0,
                // The end.
                0xD9 => return None,
                _ => usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)),
            };
            let payload = bytes.get(at..at + length)?;
            let payload = if marker == 0xD8 { payload } else { payload.get(2..)? };
            at += length;
            let range = start..at;
            if marker == 0xDA {
                at = bytes.len();
            }
            return Some(JpegSegment { marker, payload, range });
        }
    })
}

/// Finds the blocks of a JPEG.
pub fn find_in_jpeg(bytes: &[u8]) -> MetadataBlocks<'_> {
    const APP1: u8 = 0xE1;
    const APP13: u8 = 0xED;
    const XMP_PREFIX: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
    const PHOTOSHOP_PREFIX: &[u8] = b"Photoshop 3.0\0";
    let mut blocks = MetadataBlocks::default();
    for JpegSegment { marker, payload, .. } in jpeg_segments(bytes).take(MAX_PARTS) {
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
            b"bytes between segments",
            &segment(0xed, b"Photoshop 3.0\0 more"),
            &segment(0xda, b""),
            &segment(0xed, b"Photoshop 3.0\0in the scan"),
        ];
        let jpeg = parts.concat();
        let blocks = find_in_jpeg(&jpeg);
        assert_eq!(blocks.exif.unwrap(), &b"II*\0first second"[..]);
        assert_eq!(blocks.photoshop.unwrap(), &b"8BIM more"[..]);
        assert!(blocks.xmp.is_none());
        for length in 0..jpeg.len() {
            let _ = find_in_jpeg(&jpeg[..length]);
        }
    }
}
