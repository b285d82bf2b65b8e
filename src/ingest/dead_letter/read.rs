//! Reading dead letters back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::{AT, CONNECT, Options, RECORD};
use crate::kafka;
use crate::record::{Message, Partition};
use crate::retry::{Decide, Verdict};

/// How long one poll waits: bounds how late a cancellation is seen.
const POLL: Duration = Duration::from_millis(200);

/// Why dead letters cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
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
    Missing {
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

impl Decide for ReadError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Kafka { source, .. } => kafka::verdict(source),
            Self::Missing { .. } => Verdict::Fatal,
            Self::Stalled { .. } => Verdict::Retry,
        }
    }
}

/// A message that was put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it lies in the dead-letter topic.
    pub partition: Partition,
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
    pub at: Option<DateTime<Utc>>,
    /// The message as it was, with the position that it had.
    pub message: Message,
}

impl DeadLetter {
    /// A message of the dead-letter topic; `None` where headers say nothing of its origin.
    fn of(stored: Message) -> Option<Self> {
        // The last of a name: an original may have been a dead letter before.
        let find = |name: &str| {
            let header = stored.headers.iter().rev().find(|(key, _)| key == name)?;
            Some(String::from_utf8_lossy(header.1.as_deref()?).into_owned())
        };
        let connect = |name: &str| find(&format!("{CONNECT}{name}"));
        let partition = Partition {
            topic: connect("topic")?.into(),
            number: connect("partition")?.parse().ok()?,
        };
        let offset = connect("offset")?.parse().ok()?;
        let (stage, code) = (connect("stage"), connect("exception.class.name"));
        let reason = connect("exception.message");
        let record = find(RECORD).and_then(|index| index.parse().ok());
        let at = find(AT).and_then(|at| Some(DateTime::parse_from_rfc3339(&at).ok()?.to_utc()));
        let ours = |name: &str| name.starts_with(CONNECT) || name == AT || name == RECORD;
        let mut headers = stored.headers;
        headers.retain(|(name, _)| !ours(name));
        Some(Self {
            partition: stored.partition,
            offset: stored.offset,
            stage: stage.unwrap_or_default(),
            code: code.unwrap_or_default(),
            reason: reason.unwrap_or_default(),
            record,
            at,
            message: Message { partition, offset, headers, ..stored },
        })
    }

    /// Where the message came from: `topic[partition]@offset`.
    pub fn origin(&self) -> String {
        format!("{}@{}", self.message.partition, self.message.offset)
    }

    /// Where it lies among the dead letters: `topic[partition]@offset`.
    pub fn place(&self) -> String {
        format!("{}@{}", self.partition, self.offset)
    }
}

/// Which dead letters are meant; empty lists mean any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
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

impl Filter {
    /// Whether `letter` is meant.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let among = |wanted: &[String], value: &str| {
            wanted.is_empty() || wanted.iter().any(|one| one == value)
        };
        among(&self.origins, &letter.origin())
            && among(&self.stages, &letter.stage)
            && among(&self.codes, &letter.code)
            && self.since.is_none_or(|since| letter.at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.at.is_some_and(|at| at < until))
    }
}

/// Reads all dead letters that are there now, partition by partition in order, and hands those that
/// `filter` means to `on_letter`, until it says false or `token` is cancelled. Returns how many
/// messages of the topic are no dead letters. Blocks.
pub fn read(
    kafka: &kafka::Options,
    options: &Options,
    filter: &Filter,
    token: &CancellationToken,
    mut on_letter: impl FnMut(DeadLetter) -> bool,
) -> Result<u64, ReadError> {
    let wrap = |source| ReadError::Kafka { topic: options.topic.clone(), source };
    let patience = Duration::from_millis(kafka.request_timeout_ms);
    let mut config = kafka.client();
    // Partitions are assigned by hand and nothing is committed: the group has no members.
    config.set("group.id", "bsap-dead-letters").set("enable.auto.commit", "false");
    let consumer: BaseConsumer =
        config.set("enable.partition.eof", "true").create().map_err(wrap)?;
    let metadata = consumer.fetch_metadata(Some(&options.topic), patience).map_err(wrap)?;
    let count = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    if count == 0 {
        return Err(ReadError::Missing { topic: options.topic.clone() });
    }
    // What is put aside later, such as a letter that was sent again and failed again, is not there now.
    let (mut all, mut ends) = (TopicPartitionList::new(), BTreeMap::new());
    for number in 0..count as i32 {
        let (first, end) =
            consumer.fetch_watermarks(&options.topic, number, patience).map_err(wrap)?;
        if first < end {
            all.add_partition_offset(&options.topic, number, Offset::Beginning).map_err(wrap)?;
            ends.insert(number, end);
        }
    }
    consumer.assign(&all).map_err(wrap)?;
    let (mut strange, mut last) = (0, Instant::now());
    while !ends.is_empty() && !token.is_cancelled() {
        match consumer.poll(POLL) {
            Some(Ok(message)) => {
                last = Instant::now();
                let (number, offset) = (message.partition(), message.offset());
                let Some(end) = ends.get(&number).copied() else { continue };
                if offset + 1 >= end {
                    ends.remove(&number);
                }
                if offset >= end {
                    continue;
                }
                match DeadLetter::of(kafka::owned(&message)) {
                    Some(letter) if filter.matches(&letter) => {
                        if !on_letter(letter) {
                            break;
                        }
                    }
                    Some(_) => {}
                    None => strange += 1,
                }
            }
            // The last positions of a log may hold no message.
            Some(Err(KafkaError::PartitionEOF(number))) => {
                ends.remove(&number);
                last = Instant::now();
            }
            Some(Err(error)) if kafka::verdict(&error) == Verdict::Fatal => {
                return Err(wrap(error));
            }
            Some(Err(_)) | None if last.elapsed() > patience => {
                let (topic, seconds) = (options.topic.clone(), patience.as_secs());
                return Err(ReadError::Stalled { topic, seconds });
            }
            Some(Err(_)) | None => {}
        }
    }
    Ok(strange)
}
