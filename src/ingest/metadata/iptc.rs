//! IPTC-IIM datasets (IPTC Information Interchange Model, version 4.2), and the resources of Photoshop
//! in which JPEGs have them.

use std::borrow::Cow;

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};
use md5::{Digest, Md5};

use super::charset::{MetadataCharset, decode};

/// Maximum length of a block of which texts are read; archives have some kilobytes.
const MAX_BLOCK_BYTES: usize = 1 << 20;
/// Maximum number of datasets and of resources that are read.
const MAX_ITEMS: usize = 4096;

const DATASET_MARKER: u8 = 0x1c;
const ENVELOPE_RECORD: u8 = 1;
const APPLICATION_RECORD: u8 = 2;
/// `CodedCharacterSet`, of the envelope record.
const CODED_CHARACTER_SET: u8 = 90;

/// Photoshop's resource with the IPTC block.
const IPTC_RESOURCE: u16 = 0x0404;
/// Photoshop's resource with the MD5 of the IPTC block for which XMP was last synchronised.
const IPTC_DIGEST_RESOURCE: u16 = 0x0425;

/// Texts of the application record.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct IptcFields {
    /// `ObjectName`.
    pub object_name: Option<String>,
    /// `Headline`.
    pub headline: Option<String>,
    /// `Caption-Abstract`.
    pub caption: Option<String>,
    /// `Keywords`.
    pub keywords: Vec<String>,
    /// `By-line`.
    pub by_lines: Vec<String>,
    /// `CopyrightNotice`.
    pub copyright: Option<String>,
    /// `DateCreated`.
    pub date: Option<String>,
    /// `TimeCreated`.
    pub time: Option<String>,
}

/// Reads a block of datasets; what follows damage is left out.
pub fn read_iptc(block: &[u8], charset: MetadataCharset) -> IptcFields {
    let block = &block[..block.len().min(MAX_BLOCK_BYTES)];
    let datasets: Vec<Dataset<'_>> = Datasets { rest: block }.take(MAX_ITEMS).collect();
    let declared = datasets
        .iter()
        .find(|one| (one.record, one.number) == (ENVELOPE_RECORD, CODED_CHARACTER_SET))
        .and_then(|one| declared_encoding(one.value));
    let texts: Vec<&[u8]> = datasets
        .iter()
        .filter(|one| one.record == APPLICATION_RECORD)
        .map(|one| one.value)
        .collect();
    // A program that declares UTF-8 and writes something else is not believed.
    let encoding = declared
        .filter(|encoding| {
            *encoding != UTF_8 || texts.iter().all(|text| std::str::from_utf8(text).is_ok())
        })
        .unwrap_or_else(|| {
            // The first dataset of the record is its version, in two bytes, and there may be others
            // that are no texts.
            let texts: Vec<&[u8]> =
                texts.iter().copied().filter(|text| !text.contains(&0)).collect();
            charset.encoding_of(&texts)
        });
    let mut fields = IptcFields::default();
    for Dataset { number, value, .. } in
        datasets.into_iter().filter(|one| one.record == APPLICATION_RECORD)
    {
        let text = decode(value, encoding);
        match number {
            5 => fields.object_name = Some(text),
            25 => fields.keywords.push(text),
            55 => fields.date = Some(text),
            60 => fields.time = Some(text),
            80 => fields.by_lines.push(text),
            105 => fields.headline = Some(text),
            116 => fields.copyright = Some(text),
            120 => fields.caption = Some(text),
            _ => {}
        }
    }
    fields
}

/// Returns the encoding that the escape sequences of ISO 2022 declare: UTF-8 or Latin-1.
fn declared_encoding(value: &[u8]) -> Option<&'static Encoding> {
    match value {
        b"\x1b%G" | b"\x1b%/G" | b"\x1b%/H" | b"\x1b%/I" => Some(UTF_8),
        // The upper half of ISO 8859-1, in either of the places where it can be put.
        b"\x1b-A" | b"\x1b.A" | b"\x1b/A" => Some(WINDOWS_1252),
        _ => None,
    }
}

#[derive(Debug, Clone, Copy)]
struct Dataset<'a> {
    record: u8,
    number: u8,
    value: &'a [u8],
}

/// The datasets of a block, up to the first that is damaged.
struct Datasets<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Datasets<'a> {
    type Item = Dataset<'a>;

    fn next(&mut self) -> Option<Dataset<'a>> {
        let [DATASET_MARKER, record, number, high, low, rest @ ..] = self.rest else { return None };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (length, rest) = if length & 0x8000 == 0 {
            (length, rest)
        } else {
            // The length of an extended dataset takes that many bytes itself.
            let (digits, rest) = rest.split_at_checked(length & 0x7fff)?;
            let length = digits.iter().try_fold(0usize, |sum, digit| {
                sum.checked_mul(256)?.checked_add(usize::from(*digit))
            })?;
            (length, rest)
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        Some(Dataset { record: *record, number: *number, value })
    }
}

/// What Photoshop's resources have for us.
#[derive(Debug, Default)]
pub struct PhotoshopResources<'a> {
    /// The IPTC block.
    pub iptc: Option<&'a [u8]>,
    /// The MD5 of the IPTC block for which XMP was last synchronised.
    pub iptc_digest: Option<&'a [u8]>,
}

/// Reads a series of resources; what follows damage is left out.
pub fn read_photoshop_resources(mut rest: &[u8]) -> PhotoshopResources<'_> {
    let mut resources = PhotoshopResources::default();
    for _ in 0..MAX_ITEMS {
        let Some((id, value, following)) = split_resource(rest) else { break };
        match id {
            IPTC_RESOURCE => resources.iptc = Some(value),
            IPTC_DIGEST_RESOURCE => resources.iptc_digest = Some(value),
            _ => {}
        }
        rest = following;
    }
    resources
}

/// Returns the first resource's id and value, and what follows it.
fn split_resource(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    const SIGNATURES: [&[u8]; 5] = [b"8BIM", b"AgHg", b"DCSR", b"MeSa", b"PHUT"];
    let (signature, rest) = bytes.split_at_checked(4)?;
    if !SIGNATURES.contains(&signature) {
        return None;
    }
    let (id, rest) = rest.split_at_checked(2)?;
    let name_length = usize::from(*rest.first()?);
    // The name with its length, and the value, are padded to an even number of bytes.
    let (_, rest) = rest.split_at_checked((name_length + 2) & !1)?;
    let (length, rest) = rest.split_at_checked(4)?;
    let length = usize::try_from(u32::from_be_bytes(length.try_into().ok()?)).ok()?;
    let (value, rest) = rest.split_at_checked(length)?;
    let rest = rest.get(length & 1..).unwrap_or_default();
    Some((u16::from_be_bytes(id.try_into().ok()?), value, rest))
}

/// Whether the block is the one of which `digest` is the MD5. In a TIFF the block may have been padded
/// with zeros.
pub fn has_digest(block: &[u8], digest: &[u8]) -> bool {
    let padding = block.iter().rev().take(3).take_while(|byte| **byte == 0).count();
    (0..=padding).any(|end| Md5::digest(&block[..block.len() - end]).as_slice() == digest)
}

/// Returns the block itself, or the one in Photoshop's resources.
pub fn find_block<'a>(
    direct: Option<Cow<'a, [u8]>>,
    resources: &PhotoshopResources<'a>,
) -> Option<Cow<'a, [u8]>> {
    direct
        .or(resources.iptc.map(Cow::Borrowed))
        .filter(|block| block.first() == Some(&DATASET_MARKER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(record: u8, number: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![DATASET_MARKER, record, number];
        bytes.extend((value.len() as u16).to_be_bytes());
        bytes.extend(value);
        bytes
    }

    fn read(block: &[u8]) -> IptcFields {
        read_iptc(block, MetadataCharset::Detect)
    }

    #[test]
    fn the_declared_character_set_is_used_if_the_texts_have_it() {
        let block = |charset: &[u8], caption: &[u8]| {
            [dataset(1, 90, charset), dataset(2, 0, &[0, 4]), dataset(2, 120, caption)].concat()
        };
        for (charset, caption) in [
            (&b"\x1b%G"[..], "caf\u{e9}".as_bytes()),
            (b"\x1b.A", b"caf\xe9"),
            (b"\x1b%G", b"caf\xe9"),
            (b"\x1b%G", b"caf\x8e"),
            (b"", b"caf\x8e"),
            (b"", "caf\u{e9}".as_bytes()),
        ] {
            assert_eq!(read(&block(charset, caption)).caption.unwrap(), "café", "{caption:?}");
        }
    }

    #[test]
    fn damage_costs_only_what_follows_it() {
        let mut block = dataset(2, 5, b"title");
        block.extend(dataset(2, 25, b"one"));
        block.extend(dataset(2, 25, b"two"));
        // An extended dataset, as no program writes it for so short a text.
        block.extend([DATASET_MARKER, 2, 120, 0x80, 2, 0, 3, b'a', b'b', b'c']);
        let whole = read(&block);
        assert_eq!(whole.keywords, ["one", "two"]);
        assert_eq!(whole.caption.as_deref(), Some("abc"));
        let cut = read(&block[..block.len() - 1]);
        assert_eq!(cut, IptcFields { caption: None, ..whole });
        block.extend([DATASET_MARKER, 2, 116, 0xff, 0xff]);
        assert_eq!(read(&block).copyright, None);
    }

    #[test]
    fn resources_are_found_behind_named_and_odd_ones() {
        let iptc = dataset(2, 5, b"odd");
        let digest = Md5::digest(&iptc);
        let mut bytes = b"8BIM\x03\xed\x05named\0\0\0\x03abc\0".to_vec();
        for (id, value) in [(IPTC_RESOURCE, iptc.as_slice()), (IPTC_DIGEST_RESOURCE, &digest)] {
            bytes.extend(b"8BIM");
            bytes.extend(id.to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend((value.len() as u32).to_be_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len() + (value.len() & 1), 0);
        }
        let resources = read_photoshop_resources(&bytes);
        assert_eq!(resources.iptc, Some(&iptc[..]));
        assert!(has_digest(&iptc, resources.iptc_digest.unwrap()));
        let padded = [&iptc[..], &[0, 0]].concat();
        assert!(has_digest(&padded, resources.iptc_digest.unwrap()));
        assert!(!has_digest(&iptc[1..], resources.iptc_digest.unwrap()));
        for length in 0..bytes.len() {
            let _ = read_photoshop_resources(&bytes[..length]);
        }
    }
}
