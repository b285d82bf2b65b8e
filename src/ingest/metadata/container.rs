//! Finds the blocks with metadata in a file, by its format.

use std::borrow::Cow;

use super::boxes;
use super::exif;
use crate::ingest::containers::{MetadataBlocks, find_in_jpeg, find_in_png, find_in_webp};

/// Finds the blocks of a JPEG, PNG, WebP, TIFF, HEIC, AVIF or JPEG XL; others have none.
pub fn find_blocks(bytes: &[u8]) -> MetadataBlocks<'_> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => find_in_jpeg(bytes),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => find_in_png(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => find_in_webp(bytes),
        [b'I', b'I', ..] | [b'M', b'M', ..] => find_in_tiff(bytes),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => boxes::find_in_heif(bytes),
        [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] => boxes::find_in_jpeg_xl(bytes),
        _ => MetadataBlocks::default(),
    }
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
