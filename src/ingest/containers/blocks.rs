//! The blocks of a file that have metadata.

use std::borrow::Cow;

/// Maximum number of segments, chunks or boxes that are looked at.
pub const MAX_PARTS: usize = 65_536;

/// What EXIF begins with in a JPEG.
pub const EXIF_PREFIX: &[u8] = b"Exif\0\0";

/// The blocks of a file; at most one of each kind is read.
#[derive(Debug, Default)]
pub struct MetadataBlocks<'a> {
    /// EXIF, beginning with the header of a TIFF.
    pub exif: Option<Cow<'a, [u8]>>,
    /// An XMP packet.
    pub xmp: Option<Cow<'a, [u8]>>,
    /// Photoshop's resources.
    pub photoshop: Option<Cow<'a, [u8]>>,
    /// IPTC datasets outside of Photoshop's resources.
    pub iptc: Option<Cow<'a, [u8]>>,
}

/// Some programs write the prefix of JPEG segments into other formats too.
pub fn without_exif_prefix(block: &[u8]) -> &[u8] {
    block.strip_prefix(EXIF_PREFIX).unwrap_or(block)
}

/// Whether a block begins as a TIFF does.
pub fn is_tiff_header(bytes: &[u8]) -> bool {
    bytes.starts_with(b"II") || bytes.starts_with(b"MM")
}
