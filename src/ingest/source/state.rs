//! What the consumer thread, the pipeline and metrics all see: the assigned partitions with their
//! offsets, and when Kafka was last polled.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rdkafka::statistics::{Partition as PartitionStatistics, Topic as TopicStatistics};

use super::health::{SourceProblem, SourceState};
use crate::record::{KafkaMessage, LogAnchor, StoredPosition, TopicPartition};

/// State shared by the consumer thread, the pipeline and metrics.
#[derive(Default)]
pub(super) struct ConsumerState {
    /// When Kafka was last polled, in milliseconds since 1970; 0 before the first poll.
    last_poll_unix_ms: AtomicI64,
    /// Whether the consumer is a member of its group whose partitions, perhaps none, are decided.
    has_joined: AtomicBool,
    /// Whether an offset was out of range, so that the log check must compare positions too.
    is_range_check_due: AtomicBool,
    partition_offsets: Mutex<PartitionOffsets>,
    problems: Mutex<SourceProblems>,
}

/// What prevents consuming, by who found it.
#[derive(Default)]
struct SourceProblems {
    /// Found by the requests of the log check.
    checked: Option<SourceProblem>,
    /// Reported by the consumer, for which the checks need not fail: it also needs rights on its group.
    reported: Option<SourceProblem>,
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
    /// Number and last known end of the log of each partition that this worker has consumed, as of the last
    /// check that recognised the log.
    confirmed_ends: BTreeMap<TopicPartition, (u64, i64)>,
    /// Partitions that must be read from another position, because their log is another one or its beginning
    /// was removed.
    to_restart: BTreeSet<TopicPartition>,
}

/// A partition between its assignment and its revocation. Both offsets begin where reading started.
struct AssignedPartition {
    /// The offset after the last message that the table has stored.
    stored_position: i64,
    /// The offset after the last message that librdkafka returned from a poll.
    polled_position: i64,
    /// Number of the partition's log.
    log_number: u64,
    /// A message by which the log was recognised, at the start or by the last check: messages from before it are
    /// from this log.
    anchor: Option<LogAnchor>,
    /// The last message that was polled. It becomes the anchor when the log is recognised again: then it was
    /// read while the log was this one.
    last_polled: Option<LogAnchor>,
}

/// Where reading a partition starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartitionStart {
    pub partition: TopicPartition,
    pub offset: i64,
    pub log_number: u64,
    /// A message of this log, if one is stored.
    pub anchor: Option<LogAnchor>,
}

/// What a check of a partition's log compares, as of its beginning.
#[derive(Debug, Clone)]
pub(super) struct LogCheckpoint {
    pub partition: TopicPartition,
    /// The position up to which messages were polled, and the anchor.
    pub read: StoredPosition,
    last_polled: Option<LogAnchor>,
    end_offset: Option<i64>,
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
    pub(super) fn add_partitions(&self, starts: &[PartitionStart]) {
        let assigned = starts.iter().map(|start| {
            let state = AssignedPartition {
                stored_position: start.offset,
                polled_position: start.offset,
                log_number: start.log_number,
                anchor: start.anchor,
                last_polled: None,
            };
            (start.partition.clone(), state)
        });
        {
            let mut table = self.lock_partitions();
            // Those that are known may be of the log before.
            for start in starts {
                table.end_offsets.remove(&start.partition);
            }
            table.assigned_partitions.extend(assigned);
        }
        if !starts.is_empty() {
            // Only a member of the group that may read it gets partitions.
            self.clear_reported_problem();
        }
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

    /// Records that a poll returned `message`. Returns the number of its log.
    pub(super) fn record_polled_message(&self, message: &KafkaMessage) -> u64 {
        let polled = message.anchor();
        let mut partitions = self.lock_partitions();
        let assigned = partitions.assigned_partitions.get_mut(&message.partition);
        assigned.map_or(0, |assigned| {
            assigned.polled_position = message.offset + 1;
            assigned.last_polled = Some(polled);
            assigned.anchor.get_or_insert(polled);
            assigned.log_number
        })
    }

    /// Returns a message by which log `log_number` of a partition is recognised.
    pub(super) fn anchor(&self, partition: &TopicPartition, log_number: u64) -> Option<LogAnchor> {
        let partitions = self.lock_partitions();
        let assigned = partitions.assigned_partitions.get(partition)?;
        assigned.anchor.filter(|_| assigned.log_number == log_number)
    }

    /// Returns what a check of the logs compares now.
    pub(super) fn log_checkpoints(&self) -> Vec<LogCheckpoint> {
        let table = self.lock_partitions();
        let checkpoint =
            |(partition, state): (&TopicPartition, &AssignedPartition)| LogCheckpoint {
                partition: partition.clone(),
                read: StoredPosition {
                    log_number: state.log_number,
                    next_offset: Some(state.polled_position),
                    anchor: state.anchor,
                    last_message: None,
                },
                last_polled: state.last_polled,
                end_offset: table.end_offsets.get(partition).copied(),
            };
        table.assigned_partitions.iter().map(checkpoint).collect()
    }

    /// Records that the log of a partition is still the same one: what was polled before the check is from it.
    pub(super) fn confirm_log(&self, checkpoint: &LogCheckpoint) {
        let LogCheckpoint { partition, read, last_polled, end_offset } = checkpoint;
        let mut table = self.lock_partitions();
        if let Some(assigned) = table.assigned_partitions.get_mut(partition)
            && assigned.log_number == read.log_number
        {
            assigned.anchor = last_polled.or(assigned.anchor);
        }
        if let Some(end) = end_offset {
            table.confirmed_ends.insert(partition.clone(), (read.log_number, *end));
        }
    }

    /// Returns how many messages of a log that is gone were never stored; `None` if its end is not known.
    pub(super) fn count_unstored_messages(
        &self,
        partition: &TopicPartition,
        stored: &StoredPosition,
    ) -> Option<i64> {
        let table = self.lock_partitions();
        let (log_number, end) = table.confirmed_ends.get(partition)?;
        // A position behind that end may already be one of the new log.
        let unstored = end - stored.next_offset.unwrap_or_default();
        (*log_number == stored.log_number && unstored >= 0).then_some(unstored)
    }

    /// Has the consumer thread read a partition again from the position that is right for its log.
    pub(super) fn request_restart(&self, partition: &TopicPartition) {
        self.lock_partitions().to_restart.insert(partition.clone());
    }

    /// Removes and returns the assigned partitions that must be read from another position.
    pub(super) fn take_partitions_to_restart(&self) -> Vec<TopicPartition> {
        let mut table = self.lock_partitions();
        let mut requested = std::mem::take(&mut table.to_restart);
        requested.retain(|partition| table.assigned_partitions.contains_key(partition));
        requested.into_iter().collect()
    }

    pub(super) fn request_range_check(&self) {
        self.is_range_check_due.store(true, Ordering::Relaxed);
    }

    /// Returns whether positions must be compared with the logs. A later request asks for another comparison.
    pub(super) fn take_range_check_request(&self) -> bool {
        self.is_range_check_due.swap(false, Ordering::Relaxed)
    }

    /// Records whether the group has decided which partitions this consumer gets.
    pub(super) fn record_joined(&self, has_joined: bool) {
        self.has_joined.store(has_joined, Ordering::Relaxed);
    }

    /// Records what the requests of the log check found.
    pub(super) fn set_checked_problem(&self, problem: Option<SourceProblem>) {
        lock_ignoring_poison(&self.problems).checked = problem;
    }

    /// Records a problem that the consumer reports.
    pub(super) fn report_problem(&self, problem: SourceProblem) {
        lock_ignoring_poison(&self.problems).reported = Some(problem);
    }

    /// Whether the consumer has reported a problem that was not resolved since.
    pub(super) fn has_reported_problem(&self) -> bool {
        lock_ignoring_poison(&self.problems).reported.is_some()
    }

    /// Forgets what the consumer has reported: its requests succeed again.
    pub(super) fn clear_reported_problem(&self) {
        lock_ignoring_poison(&self.problems).reported = None;
    }

    /// Returns the state of the source, with an explanation if it is not consuming.
    pub(super) fn source_state(&self) -> SourceProblem {
        let problems = lock_ignoring_poison(&self.problems);
        // The gravest: without a connection nothing else is known.
        if let Some(problem) =
            problems.checked.iter().chain(&problems.reported).max_by_key(|p| p.state)
        {
            return problem.clone();
        }
        drop(problems);
        let has_partitions = !self.lock_partitions().assigned_partitions.is_empty();
        let state = match (has_partitions, self.has_joined.load(Ordering::Relaxed)) {
            (true, _) => SourceState::Consuming,
            (false, true) => SourceState::NoPartitionsAssigned,
            (false, false) => SourceState::Starting,
        };
        SourceProblem { state, detail: state.description().to_owned() }
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

    #[cfg(test)]
    pub(super) fn set_end_offset(&self, partition: &TopicPartition, end: i64) {
        self.lock_partitions().end_offsets.insert(partition.clone(), end);
    }

    /// Forgets the ends of the logs: they may grow unnoticed while no broker is connected.
    pub(super) fn clear_end_offsets(&self) {
        self.lock_partitions().end_offsets.clear();
    }

    fn status(&self) -> ConsumerStatus {
        let state = self.source_state().state;
        let last_poll_ms = self.last_poll_unix_ms.load(Ordering::Relaxed);
        let now = chrono::Utc::now().timestamp_millis();
        let table = self.lock_partitions();
        let lag = |(partition, state): (&TopicPartition, &AssignedPartition)| {
            table.end_offsets.get(partition).map(|end| (end - state.stored_position).max(0))
        };
        // The sum over no partitions would be 0, which is not known to be true.
        let is_lag_known = state.is_consuming() && !table.assigned_partitions.is_empty();
        let lag_messages: Option<i64> = table.assigned_partitions.iter().map(lag).sum();
        ConsumerStatus {
            state,
            poll_age_ms: (last_poll_ms > 0).then_some(now - last_poll_ms),
            assigned_partition_count: table.assigned_partitions.len(),
            lag_messages: lag_messages.filter(|_| is_lag_known),
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
    /// Whether it consumes, and otherwise why not.
    pub state: SourceState,
    /// Milliseconds since Kafka was last polled; `None` before the first poll.
    pub poll_age_ms: Option<i64>,
    /// Number of partitions assigned to this worker.
    pub assigned_partition_count: usize,
    /// Messages of these partitions that are not stored yet; `None` if the end of the log of one of
    /// them is not known, if there are none, or if nothing can be consumed.
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

    /// Returns the state of the source with an explanation.
    pub fn source_state(&self) -> SourceProblem {
        self.0.source_state()
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
    fn a_range_check_that_is_requested_during_one_is_due_afterwards() {
        let state = ConsumerState::default();
        assert!(!state.take_range_check_request());
        state.request_range_check();
        assert!(state.take_range_check_request());
        state.request_range_check();
        assert!(state.take_range_check_request());
        assert!(!state.take_range_check_request());
    }

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
