//! Chunks of WebPs.

use super::blocks::{MAX_PARTS, MetadataBlocks, without_exif_prefix};

/// Where the first chunk begins.
const FIRST_CHUNK: usize = 12;

struct Chunk<'a> {
    kind: &'a [u8],
    data: &'a [u8],
    /// Where the next one begins.
    end: usize,
}

/// Returns the chunks, up to the first that is cut off.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = Chunk<'_>> {
    let mut at = FIRST_CHUNK;
    std::iter::from_fn(move || {
        let size = size_at(bytes, at + 4)?;
        let (kind, data) = (&bytes[at..at + 4], bytes.get(at + 8..(at + 8).checked_add(size)?)?);
        // Chunks are padded to an even number of bytes.
        at += 8 + size + (size & 1);
        Some(Chunk { kind, data, end: at })
    })
}

fn size_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

/// Finds the blocks of a WebP; of several of one kind the first counts, as the format says.
pub fn find_in_webp(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    for Chunk { kind, data, .. } in chunks(bytes).take(MAX_PARTS) {
        match kind {
            b"EXIF" if blocks.exif.is_none() => {
                blocks.exif = Some(without_exif_prefix(data).into());
            }
            b"XMP " if blocks.xmp.is_none() => blocks.xmp = Some(data.into()),
            _ => {}
        }
    }
    blocks
}

/// Whether the file, or a chunk in it, ends before the size that it states.
pub fn is_webp_cut_off(bytes: &[u8]) -> bool {
    let stated_end = size_at(bytes, 4).unwrap_or(0).saturating_add(8);
    let read_end = chunks(bytes).last().map_or(FIRST_CHUNK, |chunk| chunk.end);
    let begins_another = bytes.len() >= read_end.saturating_add(8);
    stated_end > bytes.len() + 1 || (begins_another && read_end < stated_end)
}
