//! Messages that can never be used, put aside in a topic of their own.
//!
//! A dead letter keeps key, value, headers and timestamp of the original untouched and gets headers
//! in the convention of Kafka Connect (`__connect.errors.*`), so that existing tools read it.

pub(crate) mod read;

use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use read::{DeadLetter, Filter, ReadError, read};

use crate::record::Message;
use crate::retry::{Decide, Verdict};
use crate::{kafka, validate};

/// Before the names of Kafka Connect's headers.
const CONNECT: &str = "__connect.errors.";
/// Header: when the message was put aside, as RFC 3339. Its timestamp is the original's.
const AT: &str = "bsap.dead_letter.at";
/// Header: which of several records was wrong.
const RECORD: &str = "bsap.dead_letter.record";
/// Header of a message that was sent again: where it lay among the dead letters.
const REPLAYED: &str = "bsap.dead_letter.replayed";
/// Characters of the reason that are kept: headers count towards the size of a message.
const LONGEST_MESSAGE: usize = 2_000;

/// Where dead letters go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Topic for messages that can never be used.
    pub topic: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { topic: "images.dead-letters".into() }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::topic(&mut problems, "topic", &self.topic);
        problems
    }
}

/// Why a message is put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
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
#[error("topic {topic}: {source}{}", if kafka::verdict(.source) == Verdict::DeadLetter {
    "; raise max.message.bytes of the dead-letter topic well above that of the source topic, then start again"
} else { "" })]
pub struct DeadLetterError {
    topic: String,
    source: rdkafka::error::KafkaError,
}

impl Decide for DeadLetterError {
    /// Never [`Verdict::DeadLetter`]: what cannot be put aside stops the worker and stays in Kafka.
    fn verdict(&self) -> Verdict {
        match kafka::verdict(&self.source) {
            Verdict::Retry => Verdict::Retry,
            Verdict::DeadLetter | Verdict::Fatal => Verdict::Fatal,
        }
    }
}

/// Writes dead letters.
pub struct DeadLetters {
    producer: FutureProducer,
    topic: String,
}

impl DeadLetters {
    /// Makes the producer; no connection is opened yet.
    pub fn new(kafka: &kafka::Options, options: &Options) -> Result<Self, DeadLetterError> {
        let producer = kafka
            .producer()
            .create()
            .map_err(|source| DeadLetterError { topic: options.topic.clone(), source })?;
        Ok(Self { producer, topic: options.topic.clone() })
    }

    /// Puts `message` aside and returns when all in-sync replicas have it.
    pub async fn put(&self, message: &Message, reason: &Reason) -> Result<(), DeadLetterError> {
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
            ("exception.message", reason.message.chars().take(LONGEST_MESSAGE).collect()),
        ];
        for (name, value) in &added {
            let key = format!("{CONNECT}{name}");
            headers = headers.insert(Header { key: &key, value: Some(value) });
        }
        let at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        headers = headers.insert(Header { key: AT, value: Some(&at) });
        if let Some(record) = reason.record {
            headers = headers.insert(Header { key: RECORD, value: Some(&record.to_string()) });
        }
        let mut record = FutureRecord::to(&self.topic).headers(headers);
        record.key = message.key.as_deref();
        record.payload = message.payload.as_deref();
        record.timestamp = message.timestamp_ms;
        self.producer
            .send::<[u8], [u8], _>(record, Duration::from_secs(30))
            .await
            .map(|_| ())
            .map_err(|(source, _)| DeadLetterError { topic: self.topic.clone(), source })
    }

    /// Sends a dead letter again to where it came from, as it was but for one more header. Returns
    /// when all in-sync replicas have it.
    pub async fn replay(&self, letter: &DeadLetter) -> Result<(), DeadLetterError> {
        let original = &letter.message;
        let mut headers = OwnedHeaders::new();
        for (key, value) in original.headers.iter().filter(|(key, _)| key != REPLAYED) {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let place = letter.place();
        headers = headers.insert(Header { key: REPLAYED, value: Some(&place) });
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
            .map_err(|(source, _)| DeadLetterError { topic: topic.to_string(), source })
    }

    /// Waits until everything that was handed over is acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), DeadLetterError> {
        self.producer
            .flush(timeout)
            .map_err(|source| DeadLetterError { topic: self.topic.clone(), source })
    }
}
