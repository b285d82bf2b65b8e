//! A limit on what a topic holds that its consumers have not stored yet, for brokers that keep little.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;
use tokio::time::Instant;

use crate::kafka::{self, KafkaOptions};
use crate::retry::Disposition;

/// How often the committed offsets are fetched while the topic is full.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long fetching the committed offsets may fail before publishing fails: as long as the producer
/// tries to deliver a message.
const MAX_POLL_FAILURE: Duration = Duration::from_secs(30);
/// What a record and a batch of one record take besides key, value and headers: at most 61 bytes for the
/// batch and 36 for lengths and times of the record.
const RECORD_OVERHEAD_BYTES: usize = 100;

/// How much a topic may hold that a consumer group has not stored yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BacklogLimit {
    /// The consumer group. Workers commit an offset to Kafka once the rows before it are in the table.
    pub group: String,
    /// Maximum number of messages, at least 1.
    pub max_messages: u64,
    /// Maximum size of the messages of all partitions, before compression. A message that is larger is sent
    /// once all others are stored.
    pub max_bytes: u64,
}

/// What a topic holds that the consumer group had not stored when its offsets were last fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BacklogSize {
    /// Messages now.
    pub messages: u64,
    /// Their bytes, before compression.
    pub bytes: u64,
    /// The most messages at one time.
    pub peak_messages: u64,
    /// The most bytes at one time.
    pub peak_bytes: u64,
}

/// Makes a publisher wait until its topic has capacity.
pub(super) struct Backlog {
    limit: BacklogLimit,
    topic: String,
    /// Fetches the group's offsets; it joins no group.
    offset_client: Arc<BaseConsumer>,
    /// When the offsets were last fetched. Who waits for capacity holds the lock, and it is given in the
    /// order of requests, so that messages stay in order.
    last_poll: tokio::sync::Mutex<Option<Instant>>,
    held: Mutex<HeldMessages>,
}

/// The messages that are not stored yet.
#[derive(Debug, Default)]
struct HeldMessages {
    /// Bytes of the acknowledged messages by offset, per partition.
    acknowledged: BTreeMap<i32, BTreeMap<i64, u64>>,
    size: BacklogSize,
}

impl HeldMessages {
    fn try_add(&mut self, bytes: u64, limit: &BacklogLimit) -> bool {
        let BacklogSize { messages, bytes: held_bytes, .. } = self.size;
        let fits = messages < limit.max_messages && held_bytes + bytes <= limit.max_bytes;
        if messages > 0 && !fits {
            return false;
        }
        self.size.messages += 1;
        self.size.bytes += bytes;
        self.size.peak_messages = self.size.peak_messages.max(self.size.messages);
        self.size.peak_bytes = self.size.peak_bytes.max(self.size.bytes);
        true
    }

    fn remove(&mut self, messages: u64, bytes: u64) {
        self.size.messages -= messages;
        self.size.bytes -= bytes;
    }

    /// Removes the messages below `next_offset`, which are stored.
    fn remove_stored(&mut self, partition: i32, next_offset: i64) {
        let Some(offsets) = self.acknowledged.get_mut(&partition) else { return };
        let waiting = offsets.split_off(&next_offset);
        let stored = std::mem::replace(offsets, waiting);
        self.remove(stored.len() as u64, stored.values().sum());
    }
}

/// The place of one message in the topic; given back when it is dropped, unless the message was
/// acknowledged.
pub(super) struct Reservation<'a> {
    backlog: &'a Backlog,
    bytes: u64,
    acknowledged: bool,
}

impl Reservation<'_> {
    /// Keeps the place until the offset is stored.
    pub(super) fn acknowledge(mut self, partition: i32, offset: i64) {
        self.acknowledged = true;
        let mut held = self.backlog.lock_held();
        held.acknowledged.entry(partition).or_default().insert(offset, self.bytes);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.acknowledged {
            self.backlog.lock_held().remove(1, self.bytes);
        }
    }
}

impl Backlog {
    /// Creates the client that fetches offsets; opens no connection yet.
    pub(super) fn new(
        options: &KafkaOptions,
        topic: &str,
        limit: BacklogLimit,
    ) -> Result<Self, KafkaError> {
        let mut config = options.client_config();
        config.set("group.id", &limit.group).set("enable.auto.commit", "false");
        // The returned error reports unreachable brokers; librdkafka must not log them too.
        config.set("log_level", "0");
        Ok(Self {
            limit,
            topic: topic.to_owned(),
            offset_client: Arc::new(config.create()?),
            last_poll: tokio::sync::Mutex::default(),
            held: Mutex::default(),
        })
    }

    pub(super) fn size(&self) -> BacklogSize {
        self.lock_held().size
    }

    /// Waits until the topic has capacity for a message whose key, value and headers have `content_bytes`.
    pub(super) async fn reserve(
        &self,
        content_bytes: usize,
    ) -> Result<Reservation<'_>, KafkaError> {
        let bytes = (content_bytes + RECORD_OVERHEAD_BYTES) as u64;
        let mut last_poll = self.last_poll.lock().await;
        let mut failing_since = None;
        loop {
            if self.lock_held().try_add(bytes, &self.limit) {
                return Ok(Reservation { backlog: self, bytes, acknowledged: false });
            }
            if let Some(time) = *last_poll {
                tokio::time::sleep_until(time + POLL_INTERVAL).await;
            }
            let fetched = self.fetch_committed_offsets().await;
            let now = Instant::now();
            *last_poll = Some(now);
            match fetched {
                Ok(offsets) => {
                    failing_since = None;
                    let mut held = self.lock_held();
                    for (partition, offset) in offsets {
                        held.remove_stored(partition, offset);
                    }
                }
                Err(error) => {
                    let failing = now - *failing_since.get_or_insert(now);
                    let may_pass = kafka::classify_error(&error) == Disposition::Retry;
                    if !may_pass || failing > MAX_POLL_FAILURE {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Returns the offset that the group has committed, by partition; none if it has committed nothing.
    async fn fetch_committed_offsets(&self) -> Result<Vec<(i32, i64)>, KafkaError> {
        let mut partitions = TopicPartitionList::new();
        for number in self.lock_held().acknowledged.keys() {
            partitions.add_partition(&self.topic, *number);
        }
        if partitions.count() == 0 {
            return Ok(Vec::new()); // no message has been acknowledged yet
        }
        let client = self.offset_client.clone();
        let fetch = move || client.committed_offsets(partitions, MAX_POLL_FAILURE);
        let fetched = match tokio::task::spawn_blocking(fetch).await {
            Ok(fetched) => fetched?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let offset = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
            element.error()?;
            match element.offset() {
                Offset::Offset(offset) => Ok(Some((element.partition(), offset))),
                _ => Ok(None),
            }
        };
        fetched.elements().iter().filter_map(|element| offset(element).transpose()).collect()
    }

    fn lock_held(&self) -> MutexGuard<'_, HeldMessages> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_held_up_to_either_limit_until_their_offsets_are_stored() {
        let limit = BacklogLimit { group: "g".into(), max_messages: 3, max_bytes: 100 };
        let mut held = HeldMessages::default();
        assert!(held.try_add(40, &limit) && held.try_add(40, &limit));
        assert!(!held.try_add(40, &limit), "120 bytes");
        assert!(held.try_add(10, &limit));
        assert!(!held.try_add(1, &limit), "4 messages");
        // Acknowledged in another order than sent.
        for (partition, offset, bytes) in [(0, 8, 40), (0, 7, 40), (1, 7, 10)] {
            held.acknowledged.entry(partition).or_default().insert(offset, bytes);
        }
        held.remove_stored(0, 8);
        assert_eq!((held.size.messages, held.size.bytes), (2, 50));
        held.remove_stored(0, 9);
        held.remove_stored(1, 8);
        held.remove_stored(2, 8);
        let peaks = (held.size.peak_messages, held.size.peak_bytes);
        assert_eq!((held.size.messages, held.size.bytes, peaks), (0, 0, (3, 90)));
        assert!(held.try_add(900, &limit), "a large message is sent alone");
        assert!(!held.try_add(1, &limit));
    }
}
