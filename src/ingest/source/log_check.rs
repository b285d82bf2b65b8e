//! Checks, while messages are consumed, that this is still possible and that the logs are still the same.
//!
//! If a topic is deleted and created again, librdkafka goes on at the same offsets of the new log, in silence if it is
//! longer than the old one. So a thread reads one message of each partition again every `source.log_check_seconds`:
//! the anchor, which was read before. If it is not there any more, the consumer thread restarts the partition
//! ([`super::rebalance`]). What was polled between two checks may come from the new log, but what is stored
//! as the anchor never does: it was read before a check that recognised the log. A worker that ends between the
//! two leaves an anchor in the table by which the next one finds out.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use tracing::{info, warn};

use super::health::{SourceProblem, SourceState};
use super::state::{ConsumerState, LogCheckpoint};
use crate::kafka::{FailureKind, KafkaFailure, KafkaProbe, LogIdentity, identify_log};
use crate::record::LogAnchor;
use crate::telemetry::event;

/// State of the thread.
pub(super) struct LogCheck {
    pub probe: KafkaProbe,
    pub state: Arc<ConsumerState>,
    pub topics: Vec<String>,
    pub dead_letter_topic: String,
    pub interval: Duration,
    /// A message asks for a check now. The thread ends when the other side is gone.
    pub wake: Receiver<()>,
}

impl LogCheck {
    pub(super) fn run(self) {
        let mut last_logged = SourceState::Starting;
        loop {
            self.state.set_checked_problem(self.find_problem());
            let current = self.state.source_state();
            if current.state != last_logged {
                log_state_change(last_logged, &current);
                last_logged = current.state;
            }
            match self.wake.recv_timeout(self.interval) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Checks topics and logs. Returns the gravest problem.
    fn find_problem(&self) -> Option<SourceProblem> {
        let checked_topics =
            self.topics.iter().try_for_each(|topic| self.probe.count_partitions(topic).map(|_| ()));
        let compare_ranges = self.state.take_range_check_request();
        let checked = checked_topics.and_then(|()| self.check_logs(compare_ranges));
        if compare_ranges && checked.is_err() {
            self.state.request_range_check();
        }
        match checked {
            Ok(()) => self.find_dead_letter_problem(),
            Err(failure) => {
                let problem = SourceProblem::from_failure(&failure);
                if problem.is_none() {
                    warn!(event = event::SOURCE_ERROR, error = %failure, "topics and logs could not be checked");
                }
                problem
            }
        }
    }

    fn find_dead_letter_problem(&self) -> Option<SourceProblem> {
        let failure = self.probe.count_partitions(&self.dead_letter_topic).err()?;
        let mut problem = SourceProblem::from_failure(&failure)?;
        if failure.kind == FailureKind::TopicMissing {
            problem.state = SourceState::DeadLetterTopicMissing;
        }
        Some(problem)
    }

    /// Recognises the log of each assigned partition; asks for a restart of those that are to be read from
    /// another position. `compare_ranges` compares positions even if the anchor is still there.
    fn check_logs(&self, compare_ranges: bool) -> Result<(), KafkaFailure> {
        let checkpoints = self.state.log_checkpoints();
        let anchors: Vec<_> = checkpoints
            .iter()
            .filter_map(|one| Some((one.partition.clone(), one.read.anchor?.offset)))
            .collect();
        let found = self.probe.read_messages_at(&anchors)?;
        for checkpoint in &checkpoints {
            let found = found.get(&checkpoint.partition).copied();
            if found.is_some() && found == checkpoint.read.anchor && !compare_ranges {
                self.state.confirm_log(checkpoint);
            } else if checkpoint.read.anchor.is_some() || compare_ranges {
                let range = self.probe.fetch_watermarks(&checkpoint.partition)?;
                self.apply_verdict(checkpoint, range, found);
            }
        }
        if self.state.has_reported_problem() {
            self.retry_reading(&checkpoints)?;
        }
        Ok(())
    }

    fn apply_verdict(
        &self,
        checkpoint: &LogCheckpoint,
        range: (i64, i64),
        found: Option<LogAnchor>,
    ) {
        match check_log(checkpoint, range, found) {
            LogVerdict::Restart(reason) => {
                let error = format!("{}: {reason}", checkpoint.partition);
                warn!(
                    event = event::SOURCE_ERROR,
                    error, "the partition is read again from the position that fits its log"
                );
                self.state.request_restart(&checkpoint.partition);
            }
            LogVerdict::Confirmed => self.state.confirm_log(checkpoint),
            LogVerdict::NotRead => {}
        }
    }

    /// Tries to read a partition after the consumer was denied that: librdkafka reports it only once.
    fn retry_reading(&self, checkpoints: &[LogCheckpoint]) -> Result<(), KafkaFailure> {
        let Some(LogCheckpoint { partition, .. }) = checkpoints.first() else { return Ok(()) };
        let (earliest, _) = self.probe.fetch_watermarks(partition)?;
        self.probe.try_reading(partition, earliest)?;
        self.state.clear_reported_problem();
        Ok(())
    }
}

/// What follows from comparing a log with what was read of it.
#[derive(Debug, PartialEq, Eq)]
enum LogVerdict {
    /// The partition must be read from another position.
    Restart(String),
    /// It is the same log, or one in which nothing differs from it: the next check compares a newer message.
    Confirmed,
    /// The message was not read in time: the next check looks for the same one.
    NotRead,
}

fn check_log(
    checkpoint: &LogCheckpoint,
    (earliest, end): (i64, i64),
    found: Option<LogAnchor>,
) -> LogVerdict {
    let read = &checkpoint.read;
    let identity = identify_log(read, (earliest, end), [found, None]);
    if let LogIdentity::Other(reason) = identity {
        return LogVerdict::Restart(reason);
    }
    if let Some(position) = read.next_offset.filter(|position| *position < earliest) {
        return LogVerdict::Restart(format!(
            "the log begins at offset {earliest}, and the next one to be read is {position}"
        ));
    }
    let is_removed = read.anchor.is_some_and(|anchor| {
        anchor.offset < earliest || found.is_some_and(|found| found.offset > anchor.offset)
    });
    if identity == LogIdentity::Same || is_removed {
        LogVerdict::Confirmed
    } else {
        LogVerdict::NotRead
    }
}

fn log_state_change(previous: SourceState, current: &SourceProblem) {
    let (state, detail) = (current.state.as_str(), current.detail.as_str());
    let previous_state = previous.as_str();
    if current.state == SourceState::Consuming {
        info!(event = event::SOURCE_STATE, state, previous_state, detail, "messages are consumed");
    } else {
        warn!(
            event = event::SOURCE_STATE,
            state, previous_state, detail, "the state of the source has changed"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::source::state::PartitionStart;
    use crate::record::{KafkaMessage, TopicPartition};

    fn message(offset: i64, value: &'static str) -> KafkaMessage {
        KafkaMessage {
            partition: TopicPartition { topic: "images".into(), number: 0 },
            log_number: 0,
            offset,
            key: None,
            payload: Some(value.into()),
            headers: Vec::new(),
            timestamp_ms: Some(1),
        }
    }

    fn anchor(message: &KafkaMessage) -> LogAnchor {
        LogAnchor { offset: message.offset, fingerprint: message.fingerprint() }
    }

    /// A consumer that has started at offset 5, after `stored`.
    fn state_after(stored: &KafkaMessage) -> ConsumerState {
        let state = ConsumerState::default();
        state.add_partitions(&[PartitionStart {
            partition: stored.partition.clone(),
            offset: stored.offset + 1,
            log_number: 0,
            anchor: Some(anchor(stored)),
        }]);
        state
    }

    #[test]
    fn messages_of_a_new_log_never_become_the_anchor_before_it_is_found() {
        let (stored, new) = (message(4, "old 4"), message(5, "new 5"));
        let state = state_after(&stored);
        // The topic was created again and is longer: librdkafka returns its messages from offset 5 on.
        state.record_polled_message(&new);
        assert_eq!(state.anchor(&stored.partition, 0), Some(anchor(&stored)), "for a commit");
        let [checkpoint] = &state.log_checkpoints()[..] else { panic!() };
        let verdict = check_log(checkpoint, (0, 12), Some(anchor(&message(4, "new 4"))));
        assert!(matches!(verdict, LogVerdict::Restart(_)), "{verdict:?}");
    }

    #[test]
    fn what_was_polled_before_a_check_becomes_the_anchor_after_it() {
        let (stored, polled) = (message(4, "4"), message(5, "5"));
        let state = state_after(&stored);
        state.record_polled_message(&polled);
        let [checkpoint] = &state.log_checkpoints()[..] else { panic!() };
        // Polled during the check: whether it is of the same log is not known.
        state.record_polled_message(&message(6, "6"));
        assert_eq!(check_log(checkpoint, (0, 7), Some(anchor(&stored))), LogVerdict::Confirmed);
        state.confirm_log(checkpoint);
        assert_eq!(state.anchor(&stored.partition, 0), Some(anchor(&polled)));
        assert_eq!(state.anchor(&stored.partition, 1), None, "of another log");
    }

    #[test]
    fn positions_outside_of_the_log_restart_the_partition() {
        let stored = message(4, "4");
        let state = state_after(&stored);
        let [checkpoint] = &state.log_checkpoints()[..] else { panic!() };
        for (range, found, expected) in [
            // Retention has removed the next message, the end was lost, just the anchor was removed.
            ((9, 12), None, "Restart"),
            ((0, 3), None, "Restart"),
            ((5, 12), None, "Confirmed"),
            ((0, 12), Some(anchor(&message(7, "7"))), "Confirmed"),
            ((0, 12), None, "NotRead"),
        ] {
            let verdict = format!("{:?}", check_log(checkpoint, range, found));
            assert!(verdict.starts_with(expected), "{range:?} {found:?}: {verdict}");
        }
    }

    #[test]
    fn lag_is_unknown_whenever_nothing_is_consumed() {
        let state = Arc::new(ConsumerState::default());
        let status = || crate::ingest::source::ConsumerStatusHandle(state.clone()).status();
        assert_eq!((status().state, status().lag_messages), (SourceState::Starting, None));
        state.record_joined(true);
        assert_eq!(status().state, SourceState::NoPartitionsAssigned);
        assert_eq!(status().lag_messages, None, "no partition is not no lag");
        let start = PartitionStart {
            partition: message(0, "").partition,
            offset: 5,
            log_number: 0,
            anchor: None,
        };
        state.add_partitions(&[start]);
        state.set_end_offset(&message(0, "").partition, 12);
        assert_eq!((status().state, status().lag_messages), (SourceState::Consuming, Some(7)));
        for state_name in [
            SourceState::TopicMissing,
            SourceState::NotAuthorised,
            SourceState::AuthenticationFailed,
            SourceState::BrokersUnreachable,
        ] {
            let detail = String::new();
            state.set_checked_problem(Some(SourceProblem { state: state_name, detail }));
            assert_eq!((status().state, status().lag_messages), (state_name, None));
        }
        let missing = SourceState::DeadLetterTopicMissing;
        state.set_checked_problem(Some(SourceProblem { state: missing, detail: String::new() }));
        assert_eq!((status().state, status().lag_messages), (missing, Some(7)));
    }
}
