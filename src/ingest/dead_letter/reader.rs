//! Reading dead letters back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::{CONNECT_HEADER_PREFIX, DeadLetterOptions, RECORD_HEADER, TIME_HEADER};
use crate::kafka;
use crate::record::{KafkaMessage, TopicPartition};
use crate::retry::{Classify, Disposition};

/// How long one poll waits: bounds how late a cancellation is seen.
const POLL_TIMEOUT: Duration = Duration::from_millis(200);

/// Why dead letters cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DeadLetterReadError {
    /// Kafka refused or failed.
    #[error("topic {topic}: {source}")]
    Kafka {
        /// The topic.
        topic: String,
        /// Why.
        source: KafkaError,
    },
    /// There is no such topic.
    #[error("topic {topic} does not exist; see dead_letter.topic")]
    TopicNotFound {
        /// The topic.
        topic: String,
    },
    /// Kafka stopped sending.
    #[error("topic {topic}: nothing came for {seconds} s; check that the brokers are reachable")]
    Stalled {
        /// The topic.
        topic: String,
        /// How long was waited.
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

/// A message that was put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it lies in the dead-letter topic.
    pub partition: TopicPartition,
    /// Its offset there.
    pub offset: i64,
    /// Which stage gave up.
    pub stage: String,
    /// Stable code of the fault.
    pub code: String,
    /// What was wrong, for a reader.
    pub reason: String,
    /// Which of several records was wrong, counted from 0.
    pub record: Option<usize>,
    /// When it was put aside.
    pub dead_lettered_at: Option<DateTime<Utc>>,
    /// The message as it was, with the position that it had.
    pub message: KafkaMessage,
}

impl DeadLetter {
    /// A message of the dead-letter topic; `None` where headers say nothing of its origin.
    fn from_message(stored: KafkaMessage) -> Option<Self> {
        // The last of a name: an original may have been a dead letter before.
        let find = |name: &str| {
            let header = stored.headers.iter().rev().find(|(key, _)| key == name)?;
            Some(String::from_utf8_lossy(header.1.as_deref()?).into_owned())
        };
        let connect = |name: &str| find(&format!("{CONNECT_HEADER_PREFIX}{name}"));
        let partition = TopicPartition {
            topic: connect("topic")?.into(),
            number: connect("partition")?.parse().ok()?,
        };
        let offset = connect("offset")?.parse().ok()?;
        let (stage, code) = (connect("stage"), connect("exception.class.name"));
        let reason = connect("exception.message");
        let record = find(RECORD_HEADER).and_then(|index| index.parse().ok());
        let at =
            find(TIME_HEADER).and_then(|at| Some(DateTime::parse_from_rfc3339(&at).ok()?.to_utc()));
        let ours = |name: &str| {
            name.starts_with(CONNECT_HEADER_PREFIX) || name == TIME_HEADER || name == RECORD_HEADER
        };
        let mut headers = stored.headers;
        headers.retain(|(name, _)| !ours(name));
        Some(Self {
            partition: stored.partition,
            offset: stored.offset,
            stage: stage.unwrap_or_default(),
            code: code.unwrap_or_default(),
            reason: reason.unwrap_or_default(),
            record,
            dead_lettered_at: at,
            message: KafkaMessage { partition, offset, headers, ..stored },
        })
    }

    /// Where the message came from: `topic[partition]@offset`.
    pub fn origin(&self) -> String {
        format!("{}@{}", self.message.partition, self.message.offset)
    }

    /// Where it lies among the dead letters: `topic[partition]@offset`.
    pub fn position(&self) -> String {
        format!("{}@{}", self.partition, self.offset)
    }
}

/// Which dead letters are meant; empty lists mean any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterFilter {
    /// Origins, as [`DeadLetter::origin`] writes them.
    pub origins: Vec<String>,
    /// Stages.
    pub stages: Vec<String>,
    /// Codes.
    pub codes: Vec<String>,
    /// Not put aside before this.
    pub since: Option<DateTime<Utc>>,
    /// Put aside before this.
    pub until: Option<DateTime<Utc>>,
}

impl DeadLetterFilter {
    /// Whether `letter` is meant.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let among = |wanted: &[String], value: &str| {
            wanted.is_empty() || wanted.iter().any(|one| one == value)
        };
        among(&self.origins, &letter.origin())
            && among(&self.stages, &letter.stage)
            && among(&self.codes, &letter.code)
            && self.since.is_none_or(|since| letter.dead_lettered_at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.dead_lettered_at.is_some_and(|at| at < until))
    }
}

/// Reads all dead letters that are there now, partition by partition in order, and hands those that
/// `filter` means to `on_letter`, until it says false or `token` is cancelled. Returns how many
/// messages of the topic are no dead letters. Blocks.
pub fn read_dead_letters(
    kafka: &kafka::KafkaOptions,
    options: &DeadLetterOptions,
    filter: &DeadLetterFilter,
    token: &CancellationToken,
    mut on_letter: impl FnMut(DeadLetter) -> bool,
) -> Result<u64, DeadLetterReadError> {
    let wrap = |source| DeadLetterReadError::Kafka { topic: options.topic.clone(), source };
    let timeout = Duration::from_millis(kafka.request_timeout_ms);
    let mut config = kafka.client_config();
    // Partitions are assigned by hand and nothing is committed: the group has no members.
    config.set("group.id", "bsap-dead-letters").set("enable.auto.commit", "false");
    let consumer: BaseConsumer =
        config.set("enable.partition.eof", "true").create().map_err(wrap)?;
    let metadata = consumer.fetch_metadata(Some(&options.topic), timeout).map_err(wrap)?;
    let count = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    if count == 0 {
        return Err(DeadLetterReadError::TopicNotFound { topic: options.topic.clone() });
    }
    // What is put aside later, such as a letter that was sent again and failed again, is not there now.
    let (mut assignment, mut ends) = (TopicPartitionList::new(), BTreeMap::new());
    for number in 0..count as i32 {
        let (first, end) =
            consumer.fetch_watermarks(&options.topic, number, timeout).map_err(wrap)?;
        if first < end {
            assignment
                .add_partition_offset(&options.topic, number, Offset::Beginning)
                .map_err(wrap)?;
            ends.insert(number, end);
        }
    }
    consumer.assign(&assignment).map_err(wrap)?;
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
            // The last positions of a log may hold no message.
            Some(Err(KafkaError::PartitionEOF(number))) => {
                ends.remove(&number);
                last_received_at = Instant::now();
            }
            Some(Err(error)) if kafka::classify_error(&error) == Disposition::Fatal => {
                return Err(wrap(error));
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
