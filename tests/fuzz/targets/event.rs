//! Decodes any Kafka message: it must yield valid events or a reason for the rejection.
//!
//! The bits of the first byte decide whether the message has a key and a value, which headers it has, which
//! ordering the catalogue uses, and whether the message is in the topic of images to be embedded again. The
//! other bytes are its value.

#![no_main]

use std::sync::LazyLock;

use bsap::ingest::source::decoder::reembed::{GENERATION_HEADER, SEQUENCE_HEADER};
use bsap::ingest::source::{Decoder, SourceOptions};
use bsap::record::{
    AttributeType, AttributeTypes, ImageChange, KafkaMessage, TopicPartition, VersionOrdering,
};
use libfuzzer_sys::fuzz_target;

const REEMBED_TOPIC: &str = "images.reindex";
const GENERATION: &str = "abcdef0123456789";

static DECODERS: LazyLock<[Decoder; 4]> = LazyLock::new(|| {
    let types = [
        AttributeType::Text,
        AttributeType::Integer,
        AttributeType::Number,
        AttributeType::Boolean,
        AttributeType::Time,
    ];
    let attributes: AttributeTypes = types.map(|one| (one.as_str().to_owned(), one)).into();
    [
        VersionOrdering::Sequence,
        VersionOrdering::EventTime,
        VersionOrdering::Offset,
        VersionOrdering::Sequencer,
    ]
    .map(|ordering| {
        Decoder::new(&SourceOptions { ordering, ..SourceOptions::default() }, &attributes)
            .with_tombstone_retention_days(400)
            .with_reembed_topic(REEMBED_TOPIC, GENERATION)
    })
});

fuzz_target!(|data: &[u8]| {
    let Some((flags, value)) = data.split_first() else { return };
    let header =
        |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec().into()));
    let mut headers = match (flags >> 2) & 3 {
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
    let is_reembed = flags & 64 != 0;
    if is_reembed {
        headers.extend([header(GENERATION_HEADER, GENERATION), header(SEQUENCE_HEADER, "7")]);
    }
    let topic = if is_reembed { REEMBED_TOPIC } else { "images" };
    let message = KafkaMessage {
        partition: TopicPartition { topic: topic.into(), number: 0 },
        log_number: 0,
        offset: 7,
        key: (flags & 1 == 1).then(|| b"an-image".to_vec().into()),
        payload: (flags & 16 == 0).then(|| value.to_vec().into()),
        headers,
        timestamp_ms: Some(1_700_000_000_000),
    };
    let decoder = &DECODERS[usize::from(flags & 2 != 0) + 2 * usize::from(flags & 32 != 0)];
    match decoder.decode(&message, chrono::DateTime::UNIX_EPOCH + chrono::TimeDelta::days(20_000)) {
        Ok(events) => {
            for event in events {
                if let ImageChange::Embedded { embedding, .. } = &event.change {
                    match embedding.to_unit_vector(4) {
                        Ok(unit) => assert!(unit.len() == 4 && unit.iter().all(|v| v.is_finite())),
                        Err(reason) => assert!(!reason.is_empty()),
                    }
                }
                let id = event.image_id.as_str();
                assert!(!id.is_empty() && id.len() <= 1024 && !id.chars().any(char::is_control));
            }
        }
        Err(rejected) => assert!(!rejected.to_string().is_empty()),
    }
});
