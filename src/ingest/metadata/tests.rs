//! Compares with exiftool: `tests/metadata/make_fixtures.py` made the files and what is expected.

use std::path::Path;

use serde_json::{Value, json};

use super::attributes::{MetadataField, metadata_attributes};
use super::charset::MetadataCharset;
use super::reconcile::read_metadata;
use crate::record::{AttributeType, AttributeTypes};

const FIXTURES: &str = "tests/fixtures/metadata";

fn read_as_json(bytes: &[u8]) -> Value {
    let read = read_metadata(bytes, MetadataCharset::Detect);
    json!({
        "title": read.title, "caption": read.caption, "keywords": read.keywords,
        "creators": read.creators, "date": read.date.map(|date| date.to_iso()), "rights": read.rights,
    })
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(FIXTURES).join(name)).unwrap()
}

#[test]
fn exiftool_reads_the_same() {
    let expected: Value = serde_json::from_slice(&fixture("expected.json")).unwrap();
    let expected = expected.as_object().unwrap();
    assert!(expected.len() > 20);
    for (name, expected) in expected {
        assert_eq!(read_as_json(&fixture(name)), *expected, "{name}");
    }
}

#[test]
fn damaged_files_are_read_as_far_as_possible() {
    let mut state = 1u64;
    for entry in std::fs::read_dir(FIXTURES).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for length in (0..bytes.len()).step_by(31) {
            read_as_json(&bytes[..length]);
        }
        for _ in 0..60 {
            let mut damaged = bytes.clone();
            for _ in 0..4 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) as usize % damaged.len();
                damaged[at] = (state >> 20) as u8;
            }
            read_as_json(&damaged);
        }
    }
}

#[test]
fn only_listed_and_declared_fields_become_attributes() {
    use MetadataField::{Caption, Creator, Date, Keywords, Rights, Title};
    let declared = |names: &[(&str, AttributeType)]| -> AttributeTypes {
        names.iter().map(|(name, declared)| ((*name).to_owned(), *declared)).collect()
    };
    let all = declared(&[
        ("title", AttributeType::Text),
        ("caption", AttributeType::Text),
        ("keywords", AttributeType::Text),
        ("creator", AttributeType::Text),
        ("date", AttributeType::Time),
        ("rights", AttributeType::Text),
    ]);
    let bytes = fixture("xmp.jpg");
    let read = |fields: &[MetadataField], declared: &AttributeTypes, max_bytes| {
        let attributes =
            metadata_attributes(&bytes, fields, declared, MetadataCharset::Detect, max_bytes);
        serde_json::to_value(attributes).unwrap()
    };
    assert_eq!(
        read(&[Title, Caption, Keywords, Creator, Date, Rights], &all, 20),
        json!({
            "title": "港の朝",
            "caption": "Fähre im Hafen von",
            "keywords": "船; a, b & <c>",
            "creator": "Ann; Бен",
            "date": "2024-05-01T10:30:45.250000Z",
            "rights": "© Ann",
        })
    );
    assert_eq!(read(&[Title], &all, 1024), json!({"title": "港の朝"}));
    assert_eq!(read(&[], &all, 1024), json!({}));
    assert_eq!(
        read(&[Title, Date], &declared(&[("date", AttributeType::Text)]), 1024),
        json!({"date": "2024-05-01T12:30:45.25+02:00"})
    );
    assert_eq!(read(&[Title], &declared(&[("title", AttributeType::Integer)]), 1024), json!({}));
}

#[test]
fn descriptions_by_cameras_are_ignored() {
    let mut bytes = fixture("exif-latin1.jpg");
    let described = b"Ein Kran \xfcber dem Dock";
    let at = bytes.windows(described.len()).position(|window| window == described).unwrap();
    bytes[at..at + described.len()].copy_from_slice(b"OLYMPUS DIGITAL CAMERA");
    let read = read_as_json(&bytes);
    assert_eq!((&read["caption"], &read["rights"]), (&Value::Null, &json!("© 2020 Ann")));
}
