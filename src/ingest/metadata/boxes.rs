//! Metadata in the boxes of HEIC and AVIF (ISO 23008-12) and of JPEG XL (ISO 18181-2).

use std::borrow::Cow;
use std::collections::HashMap;

use crate::ingest::containers::{MAX_PARTS, MetadataBlocks, without_exif_prefix};

/// Maximum number of items of a file that are looked at.
const MAX_ITEMS: u64 = 65_536;

/// Returns the type and content of each box.
fn split_boxes(mut rest: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let (head, following) = rest.split_at_checked(8)?;
        let length = u32::from_be_bytes(head[..4].try_into().ok()?);
        let content_bytes = match length {
            // Up to the end of the file.
            0 => Some((following, following.len())),
            1 => {
                let (long, following) = following.split_at_checked(8)?;
                let long = usize::try_from(u64::from_be_bytes(long.try_into().ok()?)).ok()?;
                long.checked_sub(16).map(|length| (following, length))
            }
            length => (length as usize).checked_sub(8).map(|length| (following, length)),
        };
        let (following, length) = content_bytes?;
        let (content, after) = following.split_at_checked(length)?;
        rest = after;
        Some((&head[4..], content))
    })
    .take(MAX_PARTS)
}

/// Finds the boxes `Exif` and `xml `, unless they are compressed.
pub fn find_in_jpeg_xl(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    for (kind, content) in split_boxes(bytes) {
        match kind {
            b"Exif" => blocks.exif = exif_after_offset(content).map(Cow::Borrowed),
            b"xml " => blocks.xmp = Some(content.into()),
            _ => {}
        }
    }
    blocks
}

/// Finds the items of the types `Exif` and `mime` with XMP.
pub fn find_in_heif(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    let Some((_, meta)) = split_boxes(bytes).find(|(kind, _)| *kind == b"meta") else {
        return blocks;
    };
    // Version and flags come first.
    let children = || split_boxes(meta.get(4..).unwrap_or_default());
    let child =
        |wanted: &[u8]| children().find(|(kind, _)| *kind == wanted).map(|(_, content)| content);
    let (Some(information), Some(locations)) = (child(b"iinf"), child(b"iloc")) else {
        return blocks;
    };
    let locations = read_locations(locations, bytes, child(b"idat").unwrap_or_default());
    for (id, kind) in metadata_items(information) {
        let Some(content) = locations.get(&id) else { continue };
        match kind {
            ItemKind::Exif => blocks.exif = exif_after_offset(content).map(Cow::Borrowed),
            ItemKind::Xmp => blocks.xmp = Some(Cow::Borrowed(content)),
        }
    }
    blocks
}

/// EXIF in boxes begins with the offset of the TIFF header in what follows.
fn exif_after_offset(content: &[u8]) -> Option<&[u8]> {
    let (offset, rest) = content.split_at_checked(4)?;
    let offset = u32::from_be_bytes(offset.try_into().ok()?) as usize;
    Some(without_exif_prefix(rest.get(offset..)?))
}

enum ItemKind {
    Exif,
    Xmp,
}

/// Reads the box `iinf`: the ids of the items that have metadata.
fn metadata_items(information: &[u8]) -> Vec<(u64, ItemKind)> {
    let count_bytes = if information.first() == Some(&0) { 2 } else { 4 };
    let entries = information.get(4 + count_bytes..).unwrap_or_default();
    let read_entry = |(kind, entry): (&[u8], &[u8])| {
        if kind != b"infe" {
            return None;
        }
        let mut fields = Fields { rest: entry };
        let version = fields.number(1)?;
        fields.number(3)?;
        let id = fields.number(if version == 2 { 2 } else { 4 })?;
        fields.number(2)?;
        match (version, fields.take(4)?) {
            (2 | 3, b"Exif") => Some((id, ItemKind::Exif)),
            (2 | 3, b"mime") => {
                let mut texts = fields.rest.split(|byte| *byte == 0);
                (texts.nth(1)? == b"application/rdf+xml").then_some((id, ItemKind::Xmp))
            }
            _ => None,
        }
    };
    split_boxes(entries).filter_map(read_entry).collect()
}

/// Reads the box `iloc`: the content of each item that is in one piece, in the file or in `idat`.
fn read_locations<'a>(locations: &[u8], file: &'a [u8], idat: &'a [u8]) -> HashMap<u64, &'a [u8]> {
    let mut found = HashMap::new();
    let mut fields = Fields { rest: locations };
    let mut read = || {
        let version = fields.number(1)?;
        fields.number(3)?;
        let sizes = fields.number(2)? as usize;
        let [offset_size, length_size, base_size, index_size] =
            [sizes >> 12, sizes >> 8, sizes >> 4, sizes].map(|size| size & 15);
        let id_size = if version < 2 { 2 } else { 4 };
        let count = fields.number(id_size)?;
        for _ in 0..count.min(MAX_ITEMS) {
            let id = fields.number(id_size)?;
            let construction = if version == 0 { 0 } else { fields.number(2)? & 15 };
            // An index of other files; 0 is this one.
            let file_index = fields.number(2)?;
            let base = fields.number(base_size)?;
            let extents = fields.number(2)?;
            let index_size = if version > 0 { index_size } else { 0 };
            if extents > 1 && index_size + offset_size + length_size == 0 {
                // The loop would not be bounded by the length of the box.
                return None;
            }
            for _ in 0..extents {
                fields.number(index_size)?;
                let offset = fields.number(offset_size)?;
                let length = fields.number(length_size)?;
                let source = if construction == 1 { idat } else { file };
                let content = usize::try_from(base.checked_add(offset)?).ok().and_then(|start| {
                    let end = start.checked_add(usize::try_from(length).ok()?)?;
                    source.get(start..end)
                });
                let is_whole = extents == 1 && file_index == 0 && construction < 2;
                if let Some(content) = content.filter(|_| is_whole) {
                    found.insert(id, content);
                }
            }
        }
        Some(())
    };
    // What follows damage is left out.
    let _ = read();
    found
}

/// Numbers in big-endian order.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(bytes)
    }

    /// Reads a number of 0 to 8 bytes; one of no bytes is 0.
    fn number(&mut self, length: usize) -> Option<u64> {
        if length > 8 {
            return None;
        }
        Some(self.take(length)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}
