//! Any Kafka message: it becomes events or is rejected with a reason, and never both.
//!
//! The first byte says whether the message has a key, which content type it names, and what orders
//! the catalogue; the rest is its value.

#![no_main]

use std::sync::LazyLock;

use bsap::record::{AttributeTypes, Message, Ordering, Partition};
use bsap::source::{Decoder, Options};
use libfuzzer_sys::fuzz_target;

static DECODERS: LazyLock<[Decoder; 2]> = LazyLock::new(|| {
    [Ordering::Sequence, Ordering::EventTime].map(|ordering| {
        Decoder::new(&Options { ordering, ..Options::default() }, &AttributeTypes::new())
    })
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, value)) = data.split_first() else { return };
    let header = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec().into()));
    let headers = match (kind >> 2) & 3 {
        0 => vec![],
        1 => vec![header("content-type", "application/cloudevents+json")],
        2 => vec![
            header("ce_specversion", "1.0"),
            header("ce_type", "image.upsert"),
            header("ce_source", "/fuzz"),
            header("ce_id", "1"),
        ],
        _ => vec![header("content-type", "application/json")],
    };
    let message = Message {
        partition: Partition { topic: "images".into(), number: 0 },
        offset: 7,
        key: (kind & 1 == 1).then(|| b"an-image".to_vec().into()),
        payload: (kind & 16 == 0).then(|| value.to_vec().into()),
        headers,
        timestamp_ms: Some(1_700_000_000_000),
    };
    let decoder = &DECODERS[usize::from(kind & 2 == 2)];
    match decoder.decode(&message, chrono::DateTime::UNIX_EPOCH + chrono::TimeDelta::days(20_000)) {
        Ok(events) => {
            for event in events {
                let id = event.image_id.as_str();
                assert!(!id.is_empty() && id.len() <= 1024 && !id.chars().any(char::is_control));
            }
        }
        Err(rejected) => assert!(!rejected.to_string().is_empty()),
    }
});
