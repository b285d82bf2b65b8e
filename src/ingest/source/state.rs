//! What the consumer thread, the pipeline and metrics all see: the assigned partitions with their
//! offsets, and when Kafka was last polled.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rdkafka::statistics::{Partition as PartitionStatistics, Topic as TopicStatistics};

use crate::record::TopicPartition;

/// State shared by the consumer thread, the pipeline and metrics.
#[derive(Default)]
pub(super) struct ConsumerState {
    /// When Kafka was last polled, in milliseconds since 1970; 0 before the first poll.
    last_poll_unix_ms: AtomicI64,
    partition_offsets: Mutex<PartitionOffsets>,
}

/// The partitions of the consumed topics. The three maps have different keys: an offset can become
/// durable after its partition was revoked, and brokers report the ends of logs that other workers read.
#[derive(Default)]
struct PartitionOffsets {
    assigned_partitions: BTreeMap<TopicPartition, AssignedPartition>,
    /// Offsets after the last durable message that are not committed to Kafka yet.
    uncommitted_offsets: BTreeMap<TopicPartition, i64>,
    /// Ends of the logs as of librdkafka's last statistics; empty while no broker is connected.
    end_offsets: BTreeMap<TopicPartition, i64>,
}

/// A partition between its assignment and its revocation. Both offsets begin where reading started.
struct AssignedPartition {
    /// The offset after the last message that the table has stored.
    stored_position: i64,
    /// The offset after the last message that librdkafka returned from a poll.
    polled_position: i64,
}

impl ConsumerState {
    fn lock_partitions(&self) -> MutexGuard<'_, PartitionOffsets> {
        lock_ignoring_poison(&self.partition_offsets)
    }

    pub(super) fn record_poll_time(&self) {
        let now = chrono::Utc::now().timestamp_millis();
        self.last_poll_unix_ms.store(now, Ordering::Relaxed);
    }

    /// Adds partitions with the offsets from which they are read.
    pub(super) fn add_partitions(&self, start_offsets: &[(TopicPartition, i64)]) {
        let assigned = start_offsets.iter().map(|(partition, offset)| {
            let state = AssignedPartition { stored_position: *offset, polled_position: *offset };
            (partition.clone(), state)
        });
        self.lock_partitions().assigned_partitions.extend(assigned);
    }

    pub(super) fn remove_partitions(&self, revoked: &[TopicPartition]) {
        let mut partitions = self.lock_partitions();
        for partition in revoked {
            partitions.assigned_partitions.remove(partition);
            partitions.uncommitted_offsets.remove(partition);
        }
    }

    pub(super) fn is_assigned(&self, partition: &TopicPartition) -> bool {
        self.lock_partitions().assigned_partitions.contains_key(partition)
    }

    /// Records that a poll returned the message before `next_offset`.
    pub(super) fn record_polled_position(&self, partition: &TopicPartition, next_offset: i64) {
        if let Some(assigned) = self.lock_partitions().assigned_partitions.get_mut(partition) {
            assigned.polled_position = next_offset;
        }
    }

    /// Records that everything below `next_offset` is durable.
    pub(super) fn record_durable_position(&self, partition: TopicPartition, next_offset: i64) {
        let mut partitions = self.lock_partitions();
        if let Some(assigned) = partitions.assigned_partitions.get_mut(&partition) {
            assigned.stored_position = next_offset;
        }
        partitions.uncommitted_offsets.insert(partition, next_offset);
    }

    /// Removes and returns the offsets to be committed to Kafka.
    pub(super) fn take_uncommitted_offsets(&self) -> BTreeMap<TopicPartition, i64> {
        std::mem::take(&mut self.lock_partitions().uncommitted_offsets)
    }

    /// Updates the ends of the logs from librdkafka's statistics by topic name.
    pub(super) fn update_end_offsets(&self, topics: &HashMap<String, TopicStatistics>) {
        let mut table = self.lock_partitions();
        for (name, topic) in topics {
            for (number, statistics) in &topic.partitions {
                // Below zero: librdkafka does not know the end yet.
                if statistics.hi_offset >= 0 {
                    let partition = TopicPartition { topic: name.as_str().into(), number: *number };
                    let polled_offset =
                        table.assigned_partitions.get(&partition).map(|p| p.polled_position);
                    let end = readable_end_offset(statistics, polled_offset);
                    table.end_offsets.insert(partition, end);
                }
            }
        }
    }

    /// Forgets the ends of the logs: they may grow unnoticed while no broker is connected.
    pub(super) fn clear_end_offsets(&self) {
        self.lock_partitions().end_offsets.clear();
    }

    fn status(&self) -> ConsumerStatus {
        let last_poll_ms = self.last_poll_unix_ms.load(Ordering::Relaxed);
        let now = chrono::Utc::now().timestamp_millis();
        let table = self.lock_partitions();
        let lag = |(partition, state): (&TopicPartition, &AssignedPartition)| {
            table.end_offsets.get(partition).map(|end| (end - state.stored_position).max(0))
        };
        ConsumerStatus {
            poll_age_ms: (last_poll_ms > 0).then_some(now - last_poll_ms),
            assigned_partition_count: table.assigned_partitions.len(),
            lag_messages: table.assigned_partitions.iter().map(lag).sum(),
        }
    }
}

/// Returns the end of a log without trailing transaction markers, which no consumer receives. If
/// librdkafka has returned every message that it fetched up to the end, then the offsets from
/// `polled_offset` on are markers.
fn readable_end_offset(partition: &PartitionStatistics, polled_offset: Option<i64>) -> i64 {
    let end = partition.hi_offset;
    let is_drained =
        partition.fetchq_cnt == 0 && partition.next_offset >= end && partition.app_offset >= end;
    polled_offset.filter(|_| is_drained).map_or(end, |polled| polled.min(end))
}

/// How a consumer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Milliseconds since Kafka was last polled; `None` before the first poll.
    pub poll_age_ms: Option<i64>,
    /// Number of partitions assigned to this worker.
    pub assigned_partition_count: usize,
    /// Messages of these partitions that are not stored yet; `None` if the end of the log of one of
    /// them is not known.
    pub lag_messages: Option<i64>,
}

/// Reads the status of a consumer from another task, even while the pipeline is blocked.
#[derive(Clone)]
pub struct ConsumerStatusHandle(pub(super) Arc<ConsumerState>);

impl ConsumerStatusHandle {
    /// Returns how the consumer is doing.
    pub fn status(&self) -> ConsumerStatus {
        self.0.status()
    }
}

impl std::fmt::Debug for ConsumerStatusHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.status().fmt(f)
    }
}

/// Locks `mutex` even if it is poisoned: no code that holds these locks can panic between two
/// assignments that belong together.
pub(super) fn lock_ignoring_poison<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transaction_markers_are_not_counted_as_messages() {
        let statistics = |next_offset, app_offset, fetchq_cnt| PartitionStatistics {
            next_offset,
            app_offset,
            fetchq_cnt,
            hi_offset: 101,
            ..PartitionStatistics::default()
        };
        for (partition, polled, expected_end) in [
            (statistics(101, 101, 0), Some(100), 100),
            (statistics(101, 101, 0), Some(101), 101),
            // Not everything is fetched, or some of it was not returned by a poll yet.
            (statistics(95, 95, 0), Some(95), 101),
            (statistics(101, 95, 5), Some(95), 101),
            (statistics(101, 95, 0), Some(95), 101),
            (statistics(101, -1001, 0), Some(100), 101),
            (statistics(101, 101, 0), None, 101),
        ] {
            assert_eq!(readable_end_offset(&partition, polled), expected_end, "{partition:?}");
        }
    }
}
