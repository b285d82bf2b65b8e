//! The orientation that EXIF or XMP state.

use image::metadata::Orientation;

use super::tiff_directory::TiffDirectory;
use crate::ingest::containers::{EXIF_PREFIX, MetadataBlocks};

/// The tag of the orientation, in EXIF and in TIFF files.
pub const ORIENTATION_TAG: u16 = 0x0112;

/// Returns how an image must be turned: as its EXIF states it, or else its XMP. Invalid values turn nothing.
pub fn read_orientation(blocks: &MetadataBlocks<'_>) -> Orientation {
    let exif = blocks.exif.as_deref().and_then(exif_orientation);
    let value = exif.or_else(|| blocks.xmp.as_deref().and_then(xmp_orientation));
    value.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// Reads the orientation of an EXIF block, with or without the prefix that JPEG requires.
fn exif_orientation(exif: &[u8]) -> Option<u8> {
    let mut exif = exif;
    // Some writers add the prefix twice.
    while let Some(rest) = exif.strip_prefix(EXIF_PREFIX) {
        exif = rest;
    }
    directory_orientation(&TiffDirectory::read_first(exif)?)
}

/// Reads the orientation of a directory.
pub fn directory_orientation(directory: &TiffDirectory<'_>) -> Option<u8> {
    u8::try_from(directory.integer(ORIENTATION_TAG)?).ok()
}

/// Reads the orientation of an XMP packet: an attribute or an element `tiff:Orientation`.
fn xmp_orientation(xmp: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    let mut rest = xmp;
    while let Some(at) = rest.windows(NAME.len()).position(|window| window == NAME) {
        rest = &rest[at + NAME.len()..];
        let value = rest.trim_ascii_start();
        let value = match value.split_first() {
            Some((b'=', value)) => value
                .trim_ascii_start()
                .strip_prefix(b"\"")
                .or_else(|| value.trim_ascii_start().strip_prefix(b"'")),
            Some((b'>', value)) => Some(value),
            _ => None,
        };
        if let Some([digit @ b'0'..=b'9', ..]) = value.map(<[u8]>::trim_ascii_start) {
            return Some(digit - b'0');
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orientation_of_xmp_is_read_in_both_spellings() {
        for (xmp, expected) in [
            (&b"<rdf:Description tiff:Orientation=\"6\"/>"[..], Some(6)),
            (b"<rdf:Description tiff:Orientation = '8'/>", Some(8)),
            (b"<tiff:Orientation>3</tiff:Orientation>", Some(3)),
            (b"<tiff:Orientation rdf:x=\"1\"/>", None),
            (b"tiff:Orientation", None),
        ] {
            assert_eq!(xmp_orientation(xmp), expected);
        }
    }
}
