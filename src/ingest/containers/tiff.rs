//! Directories of TIFF and BigTIFF files, which EXIF has too.
//!
//! Own code, because of a TIFF only few directories may be read, not the file, and because files by old programs have
//! offsets that lead nowhere: what cannot be read is left out, and the rest is kept.

/// Maximum number of entries of a directory that are read; real ones have some dozens.
const MAX_ENTRIES: u64 = 1024;

/// A file or block that begins with the header of a TIFF.
#[derive(Debug, Clone, Copy)]
pub struct TiffFile<'a> {
    bytes: &'a [u8],
    /// Whether numbers are stored with the most significant byte first.
    pub is_big_endian: bool,
    /// With offsets of eight bytes.
    is_big: bool,
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct TiffEntry<'a> {
    pub tag: u16,
    /// The type of the value.
    pub kind: u16,
    pub value: &'a [u8],
}

impl<'a> TiffFile<'a> {
    /// Reads the header; returns `None` if there is none.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let is_big_endian = match bytes.get(..2)? {
            b"MM" => true,
            b"II" => false,
            _ => return None,
        };
        let file = Self { bytes, is_big_endian, is_big: false };
        match file.number(2, 2)? {
            42 => Some(file),
            43 => Some(Self { is_big: true, ..file }),
            _ => None,
        }
    }

    /// Returns where the first directory is.
    pub fn first_directory(&self) -> Option<u64> {
        if self.is_big { self.number(8, 8) } else { self.number(4, 4) }
    }

    /// Returns the entries of a directory whose types are known and whose values are within the file; `None` if the
    /// directory begins outside of it.
    pub fn entries(&self, directory: u64) -> Option<impl Iterator<Item = TiffEntry<'a>> + use<'a>> {
        let (count_bytes, entry_bytes) = if self.is_big { (8, 20) } else { (2, 12) };
        let count = self.number(directory, count_bytes)?.min(MAX_ENTRIES);
        let file = *self;
        Some((0..count).filter_map(move |index| {
            file.entry(directory.checked_add(count_bytes as u64)?.checked_add(index * entry_bytes)?)
        }))
    }

    fn entry(&self, start: u64) -> Option<TiffEntry<'a>> {
        let offset_bytes = if self.is_big { 8 } else { 4 };
        let tag = self.number(start, 2)? as u16;
        let kind = self.number(start + 2, 2)? as u16;
        let count = self.number(start + 4, offset_bytes)?;
        let item_bytes = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 | 17 | 18 => 8,
            _ => return None,
        };
        let length = usize::try_from(count.checked_mul(item_bytes)?).ok()?;
        let in_place = start + 4 + offset_bytes as u64;
        let at =
            if length <= offset_bytes { in_place } else { self.number(in_place, offset_bytes)? };
        let at = usize::try_from(at).ok()?;
        let value = self.bytes.get(at..at.checked_add(length)?)?;
        Some(TiffEntry { tag, kind, value })
    }

    /// Reads an unsigned number of `length` bytes, at most eight.
    fn number(&self, offset: u64, length: usize) -> Option<u64> {
        let start = usize::try_from(offset).ok()?;
        let bytes = self.bytes.get(start..start.checked_add(length)?)?;
        Some(read_number(bytes, self.is_big_endian))
    }
}

/// Reads an unsigned number of at most eight bytes.
pub fn read_number(bytes: &[u8], is_big_endian: bool) -> u64 {
    let push = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    if is_big_endian { bytes.iter().fold(0, push) } else { bytes.iter().rev().fold(0, push) }
}
