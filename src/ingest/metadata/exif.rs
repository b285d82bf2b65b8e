//! EXIF and other fields of TIFF directories, in a TIFF file or in a block of another format.

use std::borrow::Cow;

use crate::ingest::containers::{TiffEntry, TiffFile, read_number};

/// Fields of the main directory and of the EXIF directory, as their bytes.
#[derive(Debug, Default)]
pub struct ExifFields<'a> {
    /// `ImageDescription`.
    pub description: Option<&'a [u8]>,
    /// `Artist`.
    pub artist: Option<&'a [u8]>,
    /// `Copyright`.
    pub copyright: Option<&'a [u8]>,
    /// `DateTimeOriginal`.
    pub date_time_original: Option<&'a [u8]>,
    /// `SubSecTimeOriginal`.
    pub fraction_original: Option<&'a [u8]>,
    /// `OffsetTimeOriginal`.
    pub zone_original: Option<&'a [u8]>,
    /// `XPTitle`, by Windows, in UTF-16.
    pub windows_title: Option<&'a [u8]>,
    /// `XPKeywords`, by Windows, in UTF-16, separated by semicolons.
    pub windows_keywords: Option<&'a [u8]>,
    /// An XMP packet, in TIFF files.
    pub xmp: Option<&'a [u8]>,
    /// A block of IPTC datasets, in TIFF files.
    pub iptc: Option<Cow<'a, [u8]>>,
    /// Photoshop's resources, in TIFF files.
    pub photoshop: Option<&'a [u8]>,
}

/// Reads a block that begins with the header of a TIFF. Returns `None` if it does not.
pub fn read_exif(bytes: &[u8]) -> Option<ExifFields<'_>> {
    let tiff = TiffFile::new(bytes)?;
    let mut fields = ExifFields::default();
    let mut exif_directory = None;
    for entry in tiff.entries(tiff.first_directory()?).into_iter().flatten() {
        let value = Some(entry.value);
        match entry.tag {
            270 => fields.description = value,
            315 => fields.artist = value,
            700 => fields.xmp = value,
            33_432 => fields.copyright = value,
            33_723 => fields.iptc = Some(unswap_longs(&entry)),
            34_377 => fields.photoshop = value,
            34_665 => exif_directory = read_pointer(&entry, tiff.is_big_endian),
            40_091 => fields.windows_title = value,
            40_094 => fields.windows_keywords = value,
            // Cameras that write TIFF/EP have times here.
            _ => fields.read_time(&entry),
        }
    }
    for entry in exif_directory.and_then(|offset| tiff.entries(offset)).into_iter().flatten() {
        fields.read_time(&entry);
    }
    Some(fields)
}

impl<'a> ExifFields<'a> {
    fn read_time(&mut self, entry: &TiffEntry<'a>) {
        let field = match entry.tag {
            36_867 => &mut self.date_time_original,
            36_881 => &mut self.zone_original,
            37_521 => &mut self.fraction_original,
            _ => return,
        };
        *field = Some(entry.value);
    }
}

/// Returns the offset of the directory that an entry points to.
fn read_pointer(entry: &TiffEntry<'_>, is_big_endian: bool) -> Option<u64> {
    let bytes = entry.value.get(..8).or_else(|| entry.value.get(..4))?;
    Some(read_number(bytes, is_big_endian))
}

/// Returns the bytes of an IPTC block, which many programs store as if it were numbers of four
/// bytes; some then swapped them.
fn unswap_longs<'a>(entry: &TiffEntry<'a>) -> Cow<'a, [u8]> {
    const DATASET_MARKER: u8 = 0x1c;
    const TYPE_LONG: u16 = 4;
    let value = entry.value;
    let is_swapped = entry.kind == TYPE_LONG
        && value.first() != Some(&DATASET_MARKER)
        && value.get(3) == Some(&DATASET_MARKER);
    if !is_swapped {
        return Cow::Borrowed(value);
    }
    value.chunks(4).flat_map(|long| long.iter().rev().copied()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TIFF with these fields of type ASCII in its first directory.
    fn tiff_with(fields: &[(u16, &[u8])], is_little_endian: bool, is_big: bool) -> Vec<u8> {
        let number = |value: u64, length: usize| {
            if is_little_endian {
                value.to_le_bytes()[..length].to_vec()
            } else {
                value.to_be_bytes()[8 - length..].to_vec()
            }
        };
        let offset_bytes = if is_big { 8 } else { 4 };
        let mut tiff = if is_little_endian { b"II".to_vec() } else { b"MM".to_vec() };
        tiff.extend(number(if is_big { 43 } else { 42 }, 2));
        if is_big {
            tiff.extend([number(8, 2), number(0, 2)].concat());
        }
        let start = tiff.len() + offset_bytes;
        tiff.extend(number(start as u64, offset_bytes));
        let (count_bytes, entry_bytes) = if is_big { (8, 20) } else { (2, 12) };
        tiff.extend(number(fields.len() as u64, count_bytes));
        let mut values_start = start + count_bytes + fields.len() * entry_bytes;
        for (tag, value) in fields {
            tiff.extend(
                [number((*tag).into(), 2), number(2, 2), number(value.len() as u64, offset_bytes)]
                    .concat(),
            );
            if value.len() <= offset_bytes {
                tiff.extend(*value);
                tiff.resize(tiff.len() + offset_bytes - value.len(), 0);
            } else {
                tiff.extend(number(values_start as u64, offset_bytes));
                values_start += value.len();
            }
        }
        for (_, value) in fields.iter().filter(|(_, value)| value.len() > offset_bytes) {
            tiff.extend(*value);
        }
        tiff
    }

    #[test]
    fn all_four_forms_of_tiff_are_read_and_damage_costs_only_what_it_hits() {
        let fields: [(u16, &[u8]); 3] =
            [(270, b"a long description"), (315, b"Ann"), (33_432, b"a long notice")];
        for (is_little_endian, is_big) in
            [(true, false), (false, false), (true, true), (false, true)]
        {
            let tiff = tiff_with(&fields, is_little_endian, is_big);
            let read = read_exif(&tiff).unwrap();
            assert_eq!(read.description, Some(&b"a long description"[..]));
            assert_eq!(read.artist, Some(&b"Ann"[..]));
            assert_eq!(read.copyright, Some(&b"a long notice"[..]));
            let read = read_exif(&tiff[..tiff.len() - 1]).unwrap();
            assert_eq!((read.artist, read.copyright), (Some(&b"Ann"[..]), None));
            let tiff =
                tiff_with(&[(36_867, &b"2006:02:14 22:00:58"[..])], is_little_endian, is_big);
            let date = read_exif(&tiff).unwrap().date_time_original;
            assert_eq!(date, Some(&b"2006:02:14 22:00:58"[..]));
            for length in 0..tiff.len() {
                let _ = read_exif(&tiff[..length]);
            }
        }
        assert!(read_exif(b"GIF89a").is_none());
    }

    #[test]
    fn a_swapped_block_of_iptc_is_turned_back() {
        let entry = |kind, value| TiffEntry { tag: 33_723, kind, value };
        for (kind, stored, expected) in [
            (4, &b"\x05\x02\x1c\0\x01"[..], &b"\x05\x02\x1c\0\x01"[..]),
            (4, b"\x00\x05\x02\x1cba\x02\0", b"\x1c\x02\x05\x00\0\x02ab"),
            (4, b"\x1c\x02\x05\x1c", b"\x1c\x02\x05\x1c"),
            (7, b"\x00\x05\x02\x1c", b"\x00\x05\x02\x1c"),
        ] {
            assert_eq!(&*unswap_longs(&entry(kind, stored)), expected);
        }
    }
}
