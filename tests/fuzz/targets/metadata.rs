//! Reads the metadata of any bytes: every attribute must be of its declared type and within its bound.

#![no_main]

use bsap::ingest::metadata::{MetadataCharset, MetadataField, metadata_attributes};
use bsap::record::{AttributeType, AttributeTypes};
use chrono::DateTime;
use libfuzzer_sys::fuzz_target;

const MAX_BYTES: usize = 64;

fuzz_target!(|data: &[u8]| {
    use MetadataField::{Caption, Creator, Date, Keywords, Rights, Title};
    let fields = [Title, Caption, Keywords, Creator, Date, Rights];
    let declared: AttributeTypes = fields
        .iter()
        .map(|field| {
            let is_date = *field == Date;
            let declared = if is_date { AttributeType::Time } else { AttributeType::Text };
            (field.name().to_owned(), declared)
        })
        .collect();
    for charset in [MetadataCharset::Detect, MetadataCharset::Latin1, MetadataCharset::MacRoman] {
        let read = metadata_attributes(data, &fields, &declared, charset, MAX_BYTES);
        for (name, text) in read {
            assert!(!text.is_empty(), "{name}");
            match name.as_str() {
                "date" => assert!(DateTime::parse_from_rfc3339(&text).is_ok(), "{text}"),
                _ => assert!(text.len() <= MAX_BYTES && !text.contains('\0'), "{name}: {text}"),
            }
        }
    }
});
