//! Messages that can never be used, put aside in a topic of their own.
//!
//! A dead letter keeps key, value, headers and timestamp of the original untouched and gets headers
//! in the convention of Kafka Connect (`__connect.errors.*`), so that existing tools read it.

pub(crate) mod reader;

use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use reader::{DeadLetter, DeadLetterFilter, DeadLetterReadError, read_dead_letters};

use crate::record::KafkaMessage;
use crate::retry::{Classify, Disposition};
use crate::{kafka, validate};

/// Before the names of Kafka Connect's headers.
const CONNECT_HEADER_PREFIX: &str = "__connect.errors.";
/// Header: when the message was put aside, as RFC 3339. Its timestamp is the original's.
const TIME_HEADER: &str = "bsap.dead_letter.timestamp";
/// Header: which of several records was wrong.
const RECORD_HEADER: &str = "bsap.dead_letter.record_index";
/// Header of a message that was sent again: where it lay among the dead letters.
const REPLAYED_HEADER: &str = "bsap.dead_letter.replayed_from";
/// Characters of the reason that are kept: headers count towards the size of a message.
const MAX_REASON_CHARS: usize = 2_000;

/// Where dead letters go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeadLetterOptions {
    /// Topic for messages that can never be used.
    pub topic: String,
}

impl Default for DeadLetterOptions {
    fn default() -> Self {
        Self { topic: "images.dead-letters".into() }
    }
}

impl DeadLetterOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::check_topic_name(&mut problems, "topic", &self.topic);
        problems
    }
}

/// Why a message is put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterReason {
    /// The stage that gave up: `decode_event`, `fetch`, `decode_image`, `embed`.
    pub stage: &'static str,
    /// Stable code of the fault.
    pub code: &'static str,
    /// What was wrong, for a reader.
    pub message: String,
    /// Which of several records of the message was wrong, counted from 0.
    pub record: Option<usize>,
}

/// A dead letter that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {source}{}", if kafka::classify_error(.source) == Disposition::DeadLetter {
    "; raise max.message.bytes of the dead-letter topic well above that of the source topic, then start again"
} else { "" })]
pub struct DeadLetterWriteError {
    topic: String,
    source: rdkafka::error::KafkaError,
}

impl Classify for DeadLetterWriteError {
    /// Never [`Verdict::DeadLetter`]: what cannot be put aside stops the worker and stays in Kafka.
    fn disposition(&self) -> Disposition {
        match kafka::classify_error(&self.source) {
            Disposition::Retry => Disposition::Retry,
            Disposition::DeadLetter | Disposition::Fatal => Disposition::Fatal,
        }
    }
}

/// Writes dead letters.
pub struct DeadLetterWriter {
    producer: FutureProducer,
    topic: String,
}

impl DeadLetterWriter {
    /// Makes the producer; no connection is opened yet.
    pub fn new(
        kafka: &kafka::KafkaOptions,
        options: &DeadLetterOptions,
    ) -> Result<Self, DeadLetterWriteError> {
        let producer = kafka
            .producer_config()
            .create()
            .map_err(|source| DeadLetterWriteError { topic: options.topic.clone(), source })?;
        Ok(Self { producer, topic: options.topic.clone() })
    }

    /// Puts `message` aside and returns when all in-sync replicas have it.
    pub async fn write(
        &self,
        message: &KafkaMessage,
        reason: &DeadLetterReason,
    ) -> Result<(), DeadLetterWriteError> {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &message.headers {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let added = [
            ("topic", message.partition.topic.to_string()),
            ("partition", message.partition.number.to_string()),
            ("offset", message.offset.to_string()),
            ("stage", reason.stage.to_string()),
            ("exception.class.name", reason.code.to_string()),
            ("exception.message", reason.message.chars().take(MAX_REASON_CHARS).collect()),
        ];
        for (name, value) in &added {
            let key = format!("{CONNECT_HEADER_PREFIX}{name}");
            headers = headers.insert(Header { key: &key, value: Some(value) });
        }
        let dead_lettered_at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        headers = headers.insert(Header { key: TIME_HEADER, value: Some(&dead_lettered_at) });
        if let Some(record) = reason.record {
            headers =
                headers.insert(Header { key: RECORD_HEADER, value: Some(&record.to_string()) });
        }
        let mut record = FutureRecord::to(&self.topic).headers(headers);
        record.key = message.key.as_deref();
        record.payload = message.payload.as_deref();
        record.timestamp = message.timestamp_ms;
        self.producer
            .send::<[u8], [u8], _>(record, Duration::from_secs(30))
            .await
            .map(|_| ())
            .map_err(|(source, _)| DeadLetterWriteError { topic: self.topic.clone(), source })
    }

    /// Sends a dead letter again to where it came from, as it was but for one more header. Returns
    /// when all in-sync replicas have it.
    pub async fn replay(&self, letter: &DeadLetter) -> Result<(), DeadLetterWriteError> {
        let original = &letter.message;
        let mut headers = OwnedHeaders::new();
        for (key, value) in original.headers.iter().filter(|(key, _)| key != REPLAYED_HEADER) {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let position = letter.position();
        headers = headers.insert(Header { key: REPLAYED_HEADER, value: Some(&position) });
        let topic = &original.partition.topic;
        // The same partition: what orders the events of an image stays in force.
        let mut record =
            FutureRecord::to(topic).headers(headers).partition(original.partition.number);
        record.key = original.key.as_deref();
        record.payload = original.payload.as_deref();
        record.timestamp = original.timestamp_ms;
        self.producer
            .send::<[u8], [u8], _>(record, Duration::from_secs(30))
            .await
            .map(|_| ())
            .map_err(|(source, _)| DeadLetterWriteError { topic: topic.to_string(), source })
    }

    /// Waits until everything that was handed over is acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), DeadLetterWriteError> {
        self.producer
            .flush(timeout)
            .map_err(|source| DeadLetterWriteError { topic: self.topic.clone(), source })
    }
}
