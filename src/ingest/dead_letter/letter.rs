//! A dead letter and its headers.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};

use crate::record::{KafkaMessage, TopicPartition, to_hex};

/// Prefix of Kafka Connect's header names.
pub(super) const CONNECT_HEADER_PREFIX: &str = "__connect.errors.";
/// Header with the time at which the message was dead-lettered, as RFC 3339. The timestamp of the Kafka
/// message is the original's.
pub(super) const DEAD_LETTERED_AT_HEADER: &str = "bsap.dead_letter.timestamp";
/// Header with [`DeadLetterReason::record_index`].
pub(super) const RECORD_INDEX_HEADER: &str = "bsap.dead_letter.record_index";
/// Header with [`OmittedValue::bytes`].
pub(super) const OMITTED_BYTES_HEADER: &str = "bsap.dead_letter.omitted_bytes";
/// Header with [`OmittedValue::sha256`].
pub(super) const OMITTED_SHA256_HEADER: &str = "bsap.dead_letter.omitted_sha256";
/// Header of a replayed message: its position in the dead-letter topic.
pub(super) const REPLAYED_FROM_HEADER: &str = "bsap.dead_letter.replayed_from";

/// Why a message is dead-lettered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterReason {
    /// The stage that rejected the message: `decode_event`, `fetch` or `decode_image`.
    pub stage: &'static str,
    /// Stable code of the fault.
    pub code: &'static str,
    /// Why, for people.
    pub explanation: String,
    /// Position of the rejected event in the message, counted from 0; `None` if the message holds a
    /// single event.
    pub record_index: Option<usize>,
}

/// The value of a message that was too large for the dead-letter topic. It is in the message's own topic, as long as
/// that keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OmittedValue {
    /// Size of the value.
    pub bytes: u64,
    /// SHA-256 of the value, in hexadecimal digits.
    pub sha256: String,
}

impl OmittedValue {
    pub(super) fn of(value: &[u8]) -> Self {
        Self { bytes: value.len() as u64, sha256: to_hex(&Sha256::digest(value)) }
    }
}

/// A message of the dead-letter topic, split into the original message and why it was rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Partition of the dead-letter topic.
    pub dead_letter_partition: TopicPartition,
    /// Offset in the dead-letter topic.
    pub dead_letter_offset: i64,
    /// The stage that rejected the message.
    pub stage: String,
    /// Stable code of the fault.
    pub code: String,
    /// Why, for people.
    pub reason: String,
    /// Position of the rejected event in the message, counted from 0; `None` if the message holds a
    /// single event.
    pub record_index: Option<usize>,
    /// When it was dead-lettered.
    pub dead_lettered_at: Option<DateTime<Utc>>,
    /// The original message, with its original partition and offset.
    pub original_message: KafkaMessage,
    /// The value that the original message lacks here; `None` if it is complete.
    pub omitted_value: Option<OmittedValue>,
}

impl DeadLetter {
    /// Reads a message of the dead-letter topic; `None` if its headers do not name its origin.
    pub(super) fn from_message(stored: KafkaMessage) -> Option<Self> {
        // The last header of each name: the original may have been a dead letter itself.
        let last_header = |name: &str| {
            let header = stored.headers.iter().rev().find(|(key, _)| key == name)?;
            Some(String::from_utf8_lossy(header.1.as_deref()?).into_owned())
        };
        let connect = |name: &str| last_header(&format!("{CONNECT_HEADER_PREFIX}{name}"));
        let partition = TopicPartition {
            topic: connect("topic")?.into(),
            number: connect("partition")?.parse().ok()?,
        };
        let offset = connect("offset")?.parse().ok()?;
        let (stage, code) = (connect("stage"), connect("exception.class.name"));
        let reason = connect("exception.message");
        let record = last_header(RECORD_INDEX_HEADER).and_then(|index| index.parse().ok());
        let dead_lettered_at = last_header(DEAD_LETTERED_AT_HEADER)
            .and_then(|time| Some(DateTime::parse_from_rfc3339(&time).ok()?.to_utc()));
        let is_dead_letter_header = |name: &str| {
            name.starts_with(CONNECT_HEADER_PREFIX)
                || name == DEAD_LETTERED_AT_HEADER
                || name == RECORD_INDEX_HEADER
                || name == OMITTED_BYTES_HEADER
                || name == OMITTED_SHA256_HEADER
        };
        let omitted_value = last_header(OMITTED_BYTES_HEADER)
            .and_then(|bytes| bytes.parse().ok())
            .zip(last_header(OMITTED_SHA256_HEADER))
            .filter(|_| stored.payload.is_none())
            .map(|(bytes, sha256)| OmittedValue { bytes, sha256 });
        let mut headers = stored.headers;
        headers.retain(|(name, _)| !is_dead_letter_header(name));
        Some(Self {
            dead_letter_partition: stored.partition,
            dead_letter_offset: stored.offset,
            stage: stage.unwrap_or_default(),
            code: code.unwrap_or_default(),
            reason: reason.unwrap_or_default(),
            record_index: record,
            dead_lettered_at,
            original_message: KafkaMessage { partition, offset, headers, ..stored },
            omitted_value,
        })
    }

    /// Returns the position of the original message: `topic[partition]@offset`.
    pub fn origin(&self) -> String {
        format!("{}@{}", self.original_message.partition, self.original_message.offset)
    }

    /// Returns the position in the dead-letter topic: `topic[partition]@offset`.
    pub fn dead_letter_position(&self) -> String {
        format!("{}@{}", self.dead_letter_partition, self.dead_letter_offset)
    }
}
