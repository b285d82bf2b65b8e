//! The first directory of a TIFF file, which EXIF has too: values by their tags.

use std::collections::BTreeMap;

use crate::ingest::containers::{TiffEntry, TiffFile, read_number};

/// The first directory of a file.
#[derive(Debug)]
pub struct TiffDirectory<'a> {
    /// Whether numbers are stored with the most significant byte first.
    pub is_big_endian: bool,
    entries: BTreeMap<u16, TiffEntry<'a>>,
}

impl<'a> TiffDirectory<'a> {
    /// Reads the first directory of a TIFF or BigTIFF file. Entries that cannot be read are left out. Returns `None`
    /// if the directory itself cannot be read.
    pub fn read_first(bytes: &'a [u8]) -> Option<Self> {
        let file = TiffFile::new(bytes)?;
        let mut entries = BTreeMap::new();
        for entry in file.entries(file.first_directory()?)? {
            entries.entry(entry.tag).or_insert(entry);
        }
        Some(Self { is_big_endian: file.is_big_endian, entries })
    }

    /// Whether the directory has a tag.
    pub fn has(&self, tag: u16) -> bool {
        self.entries.contains_key(&tag)
    }

    /// Returns the bytes of a value.
    pub fn bytes(&self, tag: u16) -> Option<&'a [u8]> {
        Some(self.entries.get(&tag)?.value)
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
        Some(entry.value.chunks_exact(size).map(|bytes| self.number(bytes)).collect())
    }

    /// Returns the first integer of a value.
    pub fn integer(&self, tag: u16) -> Option<u64> {
        self.integers(tag)?.first().copied()
    }

    /// Returns the fractions of a value.
    pub fn fractions(&self, tag: u16) -> Option<Vec<f64>> {
        let entry = self.entries.get(&tag).filter(|entry| entry.kind == 5)?;
        entry
            .value
            .chunks_exact(8)
            .map(|pair| {
                let (numerator, denominator) = (self.number(&pair[..4]), self.number(&pair[4..]));
                (denominator > 0).then(|| numerator as f64 / denominator as f64)
            })
            .collect()
    }

    fn number(&self, bytes: &[u8]) -> u64 {
        read_number(bytes, self.is_big_endian)
    }
}
