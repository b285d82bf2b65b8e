//! Any Kafka message: it becomes events or is rejected with a reason, and never both.
//!
//! The first byte says whether the message has a key and a value, how it is marked, what orders the
//! catalogue, and whether it comes from the topic of images to be embedded again; the rest is its
//! value.

#![no_main]

use std::sync::LazyLock;

use bsap::record::{AttributeType, AttributeTypes, Message, Ordering, Partition};
use bsap::ingest::source::{Decoder, Options};
use bsap::ingest::source::decoder::again;
use libfuzzer_sys::fuzz_target;

const AGAIN: &str = "images.reindex";
const GENERATION: &str = "abcdef0123456789";

static DECODERS: LazyLock<[Decoder; 4]> = LazyLock::new(|| {
    let kinds = [
        AttributeType::Text,
        AttributeType::Integer,
        AttributeType::Number,
        AttributeType::Boolean,
        AttributeType::Time,
    ];
    let attributes: AttributeTypes = kinds.map(|kind| (kind.name().to_owned(), kind)).into();
    [Ordering::Sequence, Ordering::EventTime, Ordering::Offset, Ordering::Sequencer].map(
        |ordering| {
            Decoder::new(&Options { ordering, ..Options::default() }, &attributes)
                .remembering(400)
                .embedding_again(AGAIN, GENERATION)
        },
    )
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, value)) = data.split_first() else { return };
    let header =
        |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec().into()));
    let mut headers = match (kind >> 2) & 3 {
        0 => vec![],
        1 => vec![header("content-type", "application/cloudevents+json")],
        2 => vec![
            header("ce_specversion", "1.0"),
            header("ce_type", "bsap.image.upsert"),
            header("ce_source", "/fuzz"),
            header("ce_id", "1"),
            header("ce_subject", "an-image"),
            header("ce_sequence", "4"),
            header("content-type", "application/json"),
        ],
        _ => vec![header("content-type", "application/json")],
    };
    let is_again = kind & 64 != 0;
    if is_again {
        headers.extend([header(again::GENERATION, GENERATION), header(again::SEQUENCE, "7")]);
    }
    let topic = if is_again { AGAIN } else { "images" };
    let message = Message {
        partition: Partition { topic: topic.into(), number: 0 },
        offset: 7,
        key: (kind & 1 == 1).then(|| b"an-image".to_vec().into()),
        payload: (kind & 16 == 0).then(|| value.to_vec().into()),
        headers,
        timestamp_ms: Some(1_700_000_000_000),
    };
    let decoder = &DECODERS[usize::from(kind & 2 != 0) + 2 * usize::from(kind & 32 != 0)];
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
