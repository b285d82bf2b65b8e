//! Writes dead letters.

use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};

use super::letter::{
    CONNECT_HEADER_PREFIX, DEAD_LETTERED_AT_HEADER, DeadLetter, DeadLetterReason,
    OMITTED_BYTES_HEADER, OMITTED_SHA256_HEADER, OmittedValue, RECORD_INDEX_HEADER,
    REPLAYED_FROM_HEADER,
};
use super::options::DeadLetterOptions;
use crate::diagnosis::describe;
use crate::diagnosis::redact::redact;
use crate::kafka;
use crate::record::KafkaMessage;
use crate::retry::{Classify, Disposition};

/// Maximum length of the reason in characters: headers count towards the size of a message.
const MAX_REASON_CHARS: usize = 2_000;

/// A message could not be written to the dead-letter topic, or back to its own topic.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {}{}", describe(.source), if kafka::classify_error(.source) == Disposition::DeadLetter {
    "; key and headers alone are too large: raise max.message.bytes of the dead-letter topic well above that of the source topic, then start again"
} else { "" })]
pub struct DeadLetterWriteError {
    topic: String,
    source: rdkafka::error::KafkaError,
}

impl Classify for DeadLetterWriteError {
    /// Never [`Disposition::DeadLetter`]: if a message cannot be dead-lettered, the worker stops and the
    /// message stays in its topic.
    fn disposition(&self) -> Disposition {
        match kafka::classify_error(&self.source) {
            Disposition::Retry => Disposition::Retry,
            Disposition::DeadLetter | Disposition::Fatal => Disposition::Fatal,
        }
    }
}

/// Writes messages to the dead-letter topic, and dead letters back to the topics they came from.
pub struct DeadLetterWriter {
    producer: FutureProducer,
    topic: String,
}

impl DeadLetterWriter {
    /// Creates the producer; opens no connection yet.
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

    /// Returns the dead-letter topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Dead-letters `message` and returns when all in-sync replicas have it: without its value if the topic
    /// does not take a message of that size, but with the size and the hash of the value. Returns what was omitted.
    pub async fn write(
        &self,
        message: &KafkaMessage,
        reason: &DeadLetterReason,
    ) -> Result<Option<OmittedValue>, DeadLetterWriteError> {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &message.headers {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let connect_headers = [
            ("topic", message.partition.topic.to_string()),
            ("partition", message.partition.number.to_string()),
            ("offset", message.offset.to_string()),
            ("stage", reason.stage.to_string()),
            ("exception.class.name", reason.code.to_string()),
            (
                "exception.message",
                redact(&reason.explanation).chars().take(MAX_REASON_CHARS).collect(),
            ),
        ];
        for (name, value) in &connect_headers {
            let key = format!("{CONNECT_HEADER_PREFIX}{name}");
            headers = headers.insert(Header { key: &key, value: Some(value) });
        }
        let dead_lettered_at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        headers =
            headers.insert(Header { key: DEAD_LETTERED_AT_HEADER, value: Some(&dead_lettered_at) });
        if let Some(record) = reason.record_index {
            headers = headers
                .insert(Header { key: RECORD_INDEX_HEADER, value: Some(&record.to_string()) });
        }
        let value = message.payload.as_deref();
        let too_large = match self.send(message, value, headers.clone()).await {
            Err(error) if kafka::classify_error(&error.source) == Disposition::DeadLetter => error,
            sent => return sent.map(|()| None),
        };
        let Some(value) = value else { return Err(too_large) };
        let omitted = OmittedValue::of(value);
        let marks = [
            (OMITTED_BYTES_HEADER, omitted.bytes.to_string()),
            (OMITTED_SHA256_HEADER, omitted.sha256.clone()),
        ];
        for (key, value) in &marks {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        self.send(message, None, headers).await.map(|()| Some(omitted))
    }

    async fn send(
        &self,
        message: &KafkaMessage,
        value: Option<&[u8]>,
        headers: OwnedHeaders,
    ) -> Result<(), DeadLetterWriteError> {
        let mut record = FutureRecord::to(&self.topic).headers(headers);
        record.key = message.key.as_deref();
        record.payload = value;
        record.timestamp = message.timestamp_ms;
        self.producer
            .send::<[u8], [u8], _>(record, Duration::from_secs(30))
            .await
            .map(|_| ())
            .map_err(|(source, _)| DeadLetterWriteError { topic: self.topic.clone(), source })
    }

    /// Sends the original message to its topic again, with one more header. Returns when all in-sync
    /// replicas have it.
    pub async fn replay(&self, letter: &DeadLetter) -> Result<(), DeadLetterWriteError> {
        let original = &letter.original_message;
        let mut headers = OwnedHeaders::new();
        for (key, value) in original.headers.iter().filter(|(key, _)| key != REPLAYED_FROM_HEADER) {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let position = letter.dead_letter_position();
        headers = headers.insert(Header { key: REPLAYED_FROM_HEADER, value: Some(&position) });
        let topic = &original.partition.topic;
        // To the same partition, so that the events of an image stay in order.
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

    /// Waits until all sent messages are acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), DeadLetterWriteError> {
        self.producer
            .flush(timeout)
            .map_err(|source| DeadLetterWriteError { topic: self.topic.clone(), source })
    }
}
