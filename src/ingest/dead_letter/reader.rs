//! Reads the dead-letter topic.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::letter::DeadLetter;
use super::options::DeadLetterOptions;
use crate::diagnosis::describe;
use crate::kafka::{self, FailureKind};
use crate::retry::{Classify, Disposition};

/// How long one poll waits: bounds the delay of a cancellation.
const POLL_TIMEOUT: Duration = Duration::from_millis(200);

/// Why dead letters cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DeadLetterReadError {
    /// Kafka rejected a request or failed.
    #[error("topic {topic}: {}", describe(.source))]
    Kafka {
        /// The dead-letter topic.
        topic: String,
        /// The error of librdkafka.
        source: KafkaError,
    },
    /// The topic does not exist.
    #[error("topic {topic} does not exist; see dead_letter.topic")]
    TopicNotFound {
        /// The dead-letter topic.
        topic: String,
    },
    /// Kafka sent nothing for a whole request timeout, although there are more messages.
    #[error(
        "topic {topic}: received nothing for {seconds} s; check that the brokers are reachable"
    )]
    Stalled {
        /// The dead-letter topic.
        topic: String,
        /// `kafka.request_timeout_ms`, in seconds.
        seconds: u64,
    },
}

impl Classify for DeadLetterReadError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Kafka { source, .. } => kafka::classify_error(source),
            Self::TopicNotFound { .. } => Disposition::Fatal,
            Self::Stalled { .. } => Disposition::Retry,
        }
    }
}

/// Selects dead letters; an empty list matches all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterFilter {
    /// Positions of original messages, as returned by [`DeadLetter::origin`].
    pub origins: Vec<String>,
    /// Stages that rejected the message.
    pub stages: Vec<String>,
    /// Codes of the fault.
    pub codes: Vec<String>,
    /// Dead-lettered at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Dead-lettered before this time.
    pub until: Option<DateTime<Utc>>,
}

impl DeadLetterFilter {
    /// Whether `letter` is selected.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let selects = |selected: &[String], value: &str| {
            selected.is_empty() || selected.iter().any(|one| one == value)
        };
        selects(&self.origins, &letter.origin())
            && selects(&self.stages, &letter.stage)
            && selects(&self.codes, &letter.code)
            && self.since.is_none_or(|since| letter.dead_lettered_at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.dead_lettered_at.is_some_and(|at| at < until))
    }
}

/// Reads all dead letters that the topic holds now, each partition in order, and calls `on_letter` for
/// those that `filter` selects, until it returns false or `token` is cancelled. Returns how many messages
/// of the topic are not dead letters. Blocks.
pub fn read_dead_letters(
    kafka: &kafka::KafkaOptions,
    options: &DeadLetterOptions,
    filter: &DeadLetterFilter,
    token: &CancellationToken,
    mut on_letter: impl FnMut(DeadLetter) -> bool,
) -> Result<u64, DeadLetterReadError> {
    let kafka_error = |source| DeadLetterReadError::Kafka { topic: options.topic.clone(), source };
    let timeout = Duration::from_millis(kafka.request_timeout_ms);
    let mut config = kafka.client_config();
    // librdkafka requires a group id. The group has no members: partitions are assigned manually and no
    // offset is committed.
    config.set("group.id", "bsap-dead-letters").set("enable.auto.commit", "false");
    let consumer: BaseConsumer =
        config.set("enable.partition.eof", "true").create().map_err(kafka_error)?;
    let metadata = consumer.fetch_metadata(Some(&options.topic), timeout).map_err(kafka_error)?;
    let count = match kafka::partition_count(&metadata, &options.topic) {
        Err(error) if kafka::failure_kind(&error) == FailureKind::TopicMissing => 0,
        count => count.map_err(kafka_error)?,
    };
    if count == 0 {
        return Err(DeadLetterReadError::TopicNotFound { topic: options.topic.clone() });
    }
    // Stop at the current ends: `on_letter` may replay a letter, which can be dead-lettered again.
    let (mut assignment, mut ends) = (TopicPartitionList::new(), BTreeMap::new());
    for number in 0..count as i32 {
        let (first, end) =
            consumer.fetch_watermarks(&options.topic, number, timeout).map_err(kafka_error)?;
        if first < end {
            assignment
                .add_partition_offset(&options.topic, number, Offset::Beginning)
                .map_err(kafka_error)?;
            ends.insert(number, end);
        }
    }
    consumer.assign(&assignment).map_err(kafka_error)?;
    let (mut not_dead_letters, mut last_received_at) = (0, Instant::now());
    while !ends.is_empty() && !token.is_cancelled() {
        match consumer.poll(POLL_TIMEOUT) {
            Some(Ok(message)) => {
                last_received_at = Instant::now();
                let (number, offset) = (message.partition(), message.offset());
                let Some(end) = ends.get(&number).copied() else { continue };
                if offset + 1 >= end {
                    ends.remove(&number);
                }
                if offset >= end {
                    continue;
                }
                match DeadLetter::from_message(kafka::to_owned_message(&message)) {
                    Some(letter) if filter.matches(&letter) => {
                        if !on_letter(letter) {
                            break;
                        }
                    }
                    Some(_) => {}
                    None => not_dead_letters += 1,
                }
            }
            // The last offsets of a log may hold no message.
            Some(Err(KafkaError::PartitionEOF(number))) => {
                ends.remove(&number);
                last_received_at = Instant::now();
            }
            Some(Err(error)) if kafka::classify_error(&error) == Disposition::Fatal => {
                return Err(kafka_error(error));
            }
            Some(Err(_)) | None if last_received_at.elapsed() > timeout => {
                let (topic, seconds) = (options.topic.clone(), timeout.as_secs());
                return Err(DeadLetterReadError::Stalled { topic, seconds });
            }
            Some(Err(_)) | None => {}
        }
    }
    Ok(not_dead_letters)
}
