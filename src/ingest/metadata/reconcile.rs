//! Decides between EXIF, IPTC and XMP as the guidelines of the Metadata Working Group (version 2.0,
//! 2010) recommend to readers:
//!
//! 1. EXIF comes first, where it has the field.
//! 2. XMP comes before IPTC, unless the file has the MD5 of another IPTC block: then a program that does
//!    not know XMP has changed IPTC since, and IPTC comes first.
//! 3. A text of IPTC that was cut at the greatest length of its dataset is completed from XMP.
//!
//! The guidelines say nothing of titles: those of IPTC and XMP are treated in the same way, then headlines,
//! then what Windows writes into EXIF. Descriptions that cameras put into every picture are ignored.

use std::borrow::Cow;

use super::charset::{MetadataCharset, cut, decode_utf16_le};
use super::container::find_blocks;
use super::date::PhotoDate;
use super::exif::{ExifFields, read_exif};
use super::iptc::{self, IptcFields, read_iptc, read_photoshop_resources};
use super::xmp::{XmpFields, read_xmp};
use crate::ingest::containers::MetadataBlocks;

/// The greatest lengths of IPTC's datasets.
const MAX_OBJECT_NAME: usize = 64;
const MAX_HEADLINE: usize = 256;
const MAX_KEYWORD: usize = 64;
const MAX_BY_LINE: usize = 32;
const MAX_COPYRIGHT: usize = 128;
const MAX_CAPTION: usize = 2000;

/// Descriptions that cameras write into every picture, in capitals.
const CAMERA_DESCRIPTIONS: [&str; 9] = [
    "OLYMPUS DIGITAL CAMERA",
    "MINOLTA DIGITAL CAMERA",
    "KONICA MINOLTA DIGITAL CAMERA",
    "KODAK DIGITAL STILL CAMERA",
    "SAMSUNG DIGITAL CAMERA",
    "SONY DSC",
    "DIGITAL CAMERA",
    "DCIM",
    "EXIF_JPEG_PICTURE",
];

/// What a picture says about itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PhotoMetadata {
    /// Its title.
    pub title: Option<String>,
    /// What it shows.
    pub caption: Option<String>,
    /// Its keywords, in the order of the file.
    pub keywords: Vec<String>,
    /// Who made it.
    pub creators: Vec<String>,
    /// When it was taken.
    pub date: Option<PhotoDate>,
    /// Who owns the rights to it, or what they are.
    pub rights: Option<String>,
}

/// Reads the metadata of an encoded image; empty if it has none.
pub fn read_metadata(bytes: &[u8], charset: MetadataCharset) -> PhotoMetadata {
    let MetadataBlocks { exif, xmp, photoshop, iptc } = find_blocks(bytes);
    let exif = exif.as_deref().and_then(read_exif);
    let resources = photoshop.as_deref().map(read_photoshop_resources).unwrap_or_default();
    let block = iptc::find_block(iptc, &resources);
    let sources = Sources {
        xmp: xmp.map(|packet| read_xmp(&packet, charset)).unwrap_or_default(),
        iptc: block.as_ref().map(|block| read_iptc(block, charset)),
        iptc_is_newer: block
            .as_ref()
            .zip(resources.iptc_digest)
            .is_some_and(|(block, digest)| !iptc::has_digest(block, digest)),
        exif: exif.map(|fields| ExifTexts::new(&fields, charset)).unwrap_or_default(),
    };
    sources.reconcile()
}

/// The texts of EXIF.
#[derive(Debug, Default)]
struct ExifTexts {
    description: Option<String>,
    artists: Vec<String>,
    copyright: Option<String>,
    date: Option<PhotoDate>,
    windows_title: Option<String>,
    windows_keywords: Vec<String>,
}

impl ExifTexts {
    fn new(fields: &ExifFields<'_>, charset: MetadataCharset) -> Self {
        let copyright_bytes = fields.copyright.map(cut);
        let texts: Vec<&[u8]> = [fields.description, fields.artist, copyright_bytes]
            .into_iter()
            .flatten()
            .map(cut)
            .collect();
        let encoding = charset.encoding_of(&texts);
        let decode = |bytes: &[u8]| super::charset::decode(bytes, encoding);
        // Texts end at the first zero, whatever their length is.
        let text = |bytes: Option<&[u8]>| {
            bytes
                .map(|bytes| decode(cut(bytes).split(|byte| *byte == 0).next().unwrap_or_default()))
        };
        // The photographer's notice, and behind a zero the editor's.
        let copyright = copyright_bytes.map(|bytes| {
            let notices = bytes.split(|byte| *byte == 0).map(decode);
            let notices: Vec<String> = notices.filter_map(|notice| tidy(&notice)).collect();
            notices.join("; ")
        });
        let windows_text = |bytes: Option<&[u8]>| {
            bytes
                .map(|bytes| decode_utf16_le(cut(bytes)))
                .map(|text| text.trim_end_matches('\0').to_owned())
        };
        let date = text(fields.date_time_original).and_then(|date| {
            let [fraction, zone] = [fields.fraction_original, fields.zone_original].map(text);
            PhotoDate::from_exif(&date, fraction.as_deref(), zone.as_deref())
        });
        Self {
            description: text(fields.description)
                .and_then(|text| tidy(&text))
                .filter(|text| !CAMERA_DESCRIPTIONS.contains(&text.to_ascii_uppercase().as_str())),
            artists: text(fields.artist).map(|artists| split_list(&artists)).unwrap_or_default(),
            copyright: copyright.filter(|text| !text.is_empty()),
            date,
            windows_title: windows_text(fields.windows_title).and_then(|text| tidy(&text)),
            windows_keywords: windows_text(fields.windows_keywords)
                .map(|keywords| keywords.split(';').filter_map(tidy).collect())
                .unwrap_or_default(),
        }
    }
}

struct Sources {
    exif: ExifTexts,
    iptc: Option<IptcFields>,
    /// Whether IPTC was changed without XMP.
    iptc_is_newer: bool,
    xmp: XmpFields,
}

impl Sources {
    fn reconcile(self) -> PhotoMetadata {
        let title =
            self.first(&self.xmp.title, |iptc| iptc.object_name.as_slice(), MAX_OBJECT_NAME);
        let headline =
            || self.first(&self.xmp.headline, |iptc| iptc.headline.as_slice(), MAX_HEADLINE);
        let caption =
            || self.first(&self.xmp.description, |iptc| iptc.caption.as_slice(), MAX_CAPTION);
        let rights =
            || self.first(&self.xmp.rights, |iptc| iptc.copyright.as_slice(), MAX_COPYRIGHT);
        let keywords = self.choose(&self.xmp.subject, |iptc| &iptc.keywords, MAX_KEYWORD);
        let creators = || self.choose(&self.xmp.creator, |iptc| &iptc.by_lines, MAX_BY_LINE);
        PhotoMetadata {
            title: title.or_else(headline).or_else(|| self.exif.windows_title.clone()),
            caption: self.exif.description.clone().or_else(caption),
            keywords: if keywords.is_empty() {
                self.exif.windows_keywords.clone()
            } else {
                keywords
            },
            creators: if self.exif.artists.is_empty() {
                creators()
            } else {
                self.exif.artists.clone()
            },
            date: self.exif.date.clone().or_else(|| self.date()),
            rights: self.exif.copyright.clone().or_else(rights),
        }
    }

    /// Chooses between the values of XMP and IPTC.
    fn choose<'a>(
        &'a self,
        xmp: &'a [String],
        of_iptc: impl Fn(&'a IptcFields) -> &'a [String],
        max_length: usize,
    ) -> Vec<String> {
        let values: Vec<Cow<'_, str>> = match &self.iptc {
            Some(iptc) if self.iptc_is_newer || xmp.is_empty() => of_iptc(iptc)
                .iter()
                .enumerate()
                .map(|(index, value)| complete(value, xmp.get(index), max_length).into())
                .collect(),
            _ => xmp.iter().map(|value| value.as_str().into()).collect(),
        };
        values.iter().filter_map(|value| tidy(value)).collect()
    }

    fn first<'a>(
        &'a self,
        xmp: &'a [String],
        of_iptc: impl Fn(&'a IptcFields) -> &'a [String],
        max_length: usize,
    ) -> Option<String> {
        self.choose(xmp, of_iptc, max_length).into_iter().next()
    }

    fn date(&self) -> Option<PhotoDate> {
        let parse = |values: &[String]| values.first().and_then(|text| PhotoDate::parse(text));
        let of_xmp = parse(&self.xmp.date_created);
        let of_iptc = self
            .iptc
            .as_ref()
            .and_then(|iptc| PhotoDate::from_iptc(iptc.date.as_deref()?, iptc.time.as_deref()));
        let chosen = if self.iptc_is_newer { of_iptc } else { of_xmp.or(of_iptc) };
        chosen.or_else(|| parse(&self.xmp.date_time_original))
    }
}

/// Returns the text of XMP if IPTC's is the beginning of it, cut at the greatest length.
fn complete<'a>(of_iptc: &'a str, of_xmp: Option<&'a String>, max_length: usize) -> &'a str {
    let is_cut = of_iptc.len() == max_length || of_iptc.chars().count() == max_length;
    match of_xmp {
        Some(whole) if is_cut && whole.starts_with(of_iptc) => whole,
        _ => of_iptc,
    }
}

/// Splits a list in one text as the guidelines say: at `; `, except in quotes, which are doubled inside
/// of quotes.
fn split_list(text: &str) -> Vec<String> {
    let mut values: Vec<String> = Vec::new();
    let mut is_quoted = false;
    for part in text.split("; ") {
        let continues = is_quoted;
        let mut part = part;
        if !is_quoted && let Some(rest) = part.strip_prefix('"') {
            is_quoted = true;
            part = rest;
        }
        if is_quoted {
            let closing = part.bytes().rev().take_while(|byte| *byte == b'"').count();
            if closing % 2 == 1 {
                is_quoted = false;
                part = &part[..part.len() - 1];
            }
        }
        let part = part.replace("\"\"", "\"");
        match values.last_mut() {
            Some(last) if continues => {
                last.push_str("; ");
                last.push_str(&part);
            }
            _ => values.push(part),
        }
    }
    values.iter().filter_map(|value| tidy(value)).collect()
}

/// Removes what no text should have: control characters except line breaks, and spaces at both ends.
/// Returns `None` if nothing is left.
fn tidy(text: &str) -> Option<String> {
    let unified = text.replace("\r\n", "\n").replace('\r', "\n");
    let clean: String =
        unified.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let trimmed = clean.trim();
    (!trimmed.is_empty()).then(|| trimmed.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(values: &[&str]) -> Vec<String> {
        values.iter().map(|value| (*value).to_owned()).collect()
    }

    fn sources(iptc_is_newer: bool) -> Sources {
        Sources {
            exif: ExifTexts::default(),
            iptc: Some(IptcFields {
                caption: Some("iptc".into()),
                keywords: texts(&["i1", "i2"]),
                date: Some("20010203".into()),
                ..IptcFields::default()
            }),
            iptc_is_newer,
            xmp: XmpFields {
                description: texts(&["xmp"]),
                subject: texts(&["x1"]),
                creator: texts(&["X"]),
                date_created: texts(&["2004-05-06"]),
                ..XmpFields::default()
            },
        }
    }

    #[test]
    fn xmp_comes_before_iptc_unless_iptc_was_changed_since() {
        let read = sources(false).reconcile();
        assert_eq!(
            (read.caption.as_deref(), &read.keywords[..]),
            (Some("xmp"), &texts(&["x1"])[..])
        );
        assert_eq!(read.date.unwrap().to_iso(), "2004-05-06");
        let read = sources(true).reconcile();
        assert_eq!(
            (read.caption.as_deref(), &read.keywords[..]),
            (Some("iptc"), &texts(&["i1", "i2"])[..])
        );
        assert_eq!(read.date.unwrap().to_iso(), "2001-02-03");
        assert_eq!(read.creators, Vec::<String>::new(), "it was removed from IPTC");
        let exif = ExifTexts { description: Some("exif".into()), ..ExifTexts::default() };
        assert_eq!(Sources { exif, ..sources(true) }.reconcile().caption.as_deref(), Some("exif"));
    }

    #[test]
    fn a_text_that_was_cut_is_completed() {
        let whole = "k".repeat(70);
        assert_eq!(complete(&whole[..64], Some(&whole), 64), whole);
        assert_eq!(complete(&whole[..63], Some(&whole), 64), &whole[..63]);
        assert_eq!(complete(&whole[..64], Some(&"other".to_owned()), 64), &whole[..64]);
        assert_eq!(complete(&whole[..64], None, 64), &whole[..64]);
    }

    #[test]
    fn lists_in_one_text_are_split_outside_of_quotes() {
        for (text, expected) in [
            ("Ann", &["Ann"][..]),
            ("Ann; Ben", &["Ann", "Ben"]),
            ("\"Ann; Ben\"; Cy", &["Ann; Ben", "Cy"]),
            ("\"the \"\"one\"\"\"; Cy", &["the \"one\"", "Cy"]),
            ("\"never closed; Cy", &["never closed; Cy"]),
            (" ; ", &[]),
        ] {
            assert_eq!(split_list(text), texts(expected), "{text}");
        }
    }

    #[test]
    fn control_characters_are_removed_and_line_breaks_unified() {
        assert_eq!(tidy("\u{1b}[31ma\r\nb\rc\0 ").as_deref(), Some("[31ma\nb\nc"));
        assert_eq!(tidy(" \u{7} "), None);
    }
}
