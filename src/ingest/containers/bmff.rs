//! Boxes of the ISO base media container (ISO 14496-12), and the items in those of HEIC and AVIF (ISO 23008-12).

use std::collections::HashMap;

use super::blocks::MAX_PARTS;

/// Maximum number of items of a file that are looked at.
const MAX_ITEMS: u64 = 65_536;

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

/// Returns the type and content of each box.
pub fn bmff_boxes(mut rest: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
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

/// An item, as the box `iinf` lists it.
pub struct ItemEntry<'a> {
    pub id: u64,
    pub kind: &'a [u8],
    /// Its name and what else follows, separated by zeros.
    pub texts: &'a [u8],
}

/// Reads the box `iinf`.
pub fn item_entries(information: &[u8]) -> impl Iterator<Item = ItemEntry<'_>> {
    let count_bytes = if information.first() == Some(&0) { 2 } else { 4 };
    let entries = information.get(4 + count_bytes..).unwrap_or_default();
    bmff_boxes(entries).filter_map(|(kind, entry)| {
        let mut fields = Fields::new(entry);
        let version = fields.number(1)?;
        fields.number(3)?;
        let id = fields.number(if version == 2 { 2 } else { 4 })?;
        fields.number(2)?;
        let is_entry = kind == b"infe" && matches!(version, 2 | 3);
        is_entry.then_some(ItemEntry { id, kind: fields.take(4)?, texts: fields.rest })
    })
}

/// Where the content of an item is.
#[derive(Debug, Clone, Copy)]
pub enum ItemPlace<'a> {
    /// In one piece, in the file or in `idat`.
    Whole(&'a [u8]),
    /// In several pieces, in another item or in another file.
    Scattered,
    /// Outside of the file, which is cut off.
    Missing,
}

/// Reads the box `iloc`: where the content of each item is.
pub fn read_item_places<'a>(
    locations: &[u8],
    file: &'a [u8],
    idat: &'a [u8],
) -> HashMap<u64, ItemPlace<'a>> {
    let mut found = HashMap::new();
    let mut fields = Fields::new(locations);
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
            let mut place = ItemPlace::Scattered;
            for _ in 0..extents {
                fields.number(index_size)?;
                let offset = fields.number(offset_size)?;
                let length = fields.number(length_size)?;
                let source = if construction == 1 { idat } else { file };
                if extents == 1 && file_index == 0 && construction < 2 {
                    let start = base.checked_add(offset).and_then(|at| usize::try_from(at).ok());
                    let content = start.and_then(|start| {
                        source.get(start..start.checked_add(usize::try_from(length).ok()?)?)
                    });
                    place = content.map_or(ItemPlace::Missing, ItemPlace::Whole);
                }
            }
            found.insert(id, place);
        }
        Some(())
    };
    // What follows damage is left out.
    let _ = read();
    found
}

/// Numbers in big-endian order.
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Takes the next bytes.
    pub fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(bytes)
    }

    /// Reads a number of 0 to 8 bytes; one of no bytes is 0.
    pub fn number(&mut self, length: usize) -> Option<u64> {
        if length > 8 {
            return None;
        }
        Some(self.take(length)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}
