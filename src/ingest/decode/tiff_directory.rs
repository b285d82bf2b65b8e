//! Directories of TIFF files, which EXIF has too: tags and their values.

use std::collections::BTreeMap;

/// Most entries of a directory that are read; real ones have some dozens.
const MAX_ENTRIES: u64 = 4_096;

/// The value of a tag.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    kind: u16,
    data: &'a [u8],
}

/// The first directory of a file.
#[derive(Debug)]
pub struct TiffDirectory<'a> {
    /// Whether numbers are stored with the most significant byte first.
    pub is_big_endian: bool,
    entries: BTreeMap<u16, Entry<'a>>,
}

impl<'a> TiffDirectory<'a> {
    /// Reads the first directory of a TIFF or BigTIFF file. Entries whose values lie outside of the file are left
    /// out. Returns `None` if the directory itself cannot be read.
    pub fn read_first(bytes: &'a [u8]) -> Option<Self> {
        let is_big_endian = match bytes.get(..2)? {
            b"MM" => true,
            b"II" => false,
            _ => return None,
        };
        let number = |at: usize, size: usize| read_number(bytes, at, size, is_big_endian);
        let is_big_tiff = match number(2, 2)? {
            42 => false,
            43 => true,
            _ => return None,
        };
        let (start, count_size, word, entry_size) =
            if is_big_tiff { (number(8, 8)?, 8, 8, 20) } else { (number(4, 4)?, 2, 4, 12) };
        let start = usize::try_from(start).ok()?;
        let count = number(start, count_size)?.min(MAX_ENTRIES);
        let mut entries = BTreeMap::new();
        for i in 0..count as usize {
            let at = start.checked_add(count_size + i * entry_size)?;
            let Some(tag) = number(at, 2) else { break };
            let Some((kind, values)) = number(at + 2, 2).zip(number(at + 4, word)) else { break };
            let inline_at = at + 4 + word;
            let Some(size) = values.checked_mul(size_of_kind(kind as u16)) else { continue };
            let at =
                if size <= word as u64 { Some(inline_at as u64) } else { number(inline_at, word) };
            let data = at
                .and_then(|at| {
                    Some(usize::try_from(at).ok()?..usize::try_from(at.checked_add(size)?).ok()?)
                })
                .and_then(|range| bytes.get(range));
            if let Some(data) = data {
                entries.entry(tag as u16).or_insert(Entry { kind: kind as u16, data });
            }
        }
        Some(Self { is_big_endian, entries })
    }

    /// Whether the directory has a tag.
    pub fn has(&self, tag: u16) -> bool {
        self.entries.contains_key(&tag)
    }

    /// Returns the bytes of a value.
    pub fn bytes(&self, tag: u16) -> Option<&'a [u8]> {
        Some(self.entries.get(&tag)?.data)
    }

    /// Returns the integers of a value; `None` if there is none, or it is not made of integers.
    pub fn integers(&self, tag: u16) -> Option<Vec<u64>> {
        let entry = self.entries.get(&tag)?;
        let size = match entry.kind {
            1 | 7 => 1,
            3 => 2,
            4 | 13 => 4,
            16 | 18 => 8,
            _ => return None,
        };
        let count = entry.data.len() / size;
        (0..count).map(|i| read_number(entry.data, i * size, size, self.is_big_endian)).collect()
    }

    /// Returns the first integer of a value.
    pub fn integer(&self, tag: u16) -> Option<u64> {
        self.integers(tag)?.first().copied()
    }

    /// Returns the fractions of a value.
    pub fn fractions(&self, tag: u16) -> Option<Vec<f64>> {
        let entry = self.entries.get(&tag).filter(|entry| entry.kind == 5)?;
        let number = |at| read_number(entry.data, at, 4, self.is_big_endian);
        (0..entry.data.len() / 8)
            .map(|i| Some(number(i * 8)? as f64 / number(i * 8 + 4).filter(|n| *n > 0)? as f64))
            .collect()
    }
}

/// Size of one value of a type, in bytes.
fn size_of_kind(kind: u16) -> u64 {
    match kind {
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16 | 17 | 18 => 8,
        _ => 1,
    }
}

fn read_number(bytes: &[u8], at: usize, size: usize, is_big_endian: bool) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    let push = |value: u64, byte: &u8| (value << 8) | u64::from(*byte);
    Some(if is_big_endian { bytes.iter().fold(0, push) } else { bytes.iter().rev().fold(0, push) })
}
