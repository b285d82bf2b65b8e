//! Messages that can never be used, put aside in a topic of their own.
//!
//! A dead letter keeps key, value, headers and timestamp of the original untouched and gets headers
//! in the convention of Kafka Connect (`__connect.errors.*`), so that existing tools read it.

use std::time::Duration;

use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kafka;
use crate::record::Message;
use crate::retry::{Decide, Verdict};

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
        if self.topic.is_empty() {
            vec!["topic: is empty; name the topic for dead letters".into()]
        } else {
            Vec::new()
        }
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
}

/// A dead letter that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("dead-letter topic {topic}: {source}")]
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
            ("exception.message", reason.message.clone()),
        ];
        for (name, value) in &added {
            let key = format!("__connect.errors.{name}");
            headers = headers.insert(Header { key: &key, value: Some(value) });
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

    /// Waits until everything that was handed over is acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), DeadLetterError> {
        self.producer
            .flush(timeout)
            .map_err(|source| DeadLetterError { topic: self.topic.clone(), source })
    }
}
