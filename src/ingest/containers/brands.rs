//! Brands of files in the ISO base media container.

/// Most brands that are looked at; files have three to ten.
const MAX_BRANDS: usize = 64;

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
