//! Whether messages can be consumed, and otherwise why not.

use serde::Serialize;

use crate::kafka::{FailureKind, KafkaFailure};

/// Whether messages can be consumed. In the order of gravity: if several apply, the last one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// Partitions are assigned and consumed.
    Consuming,
    /// The consumer has not joined its group yet.
    Starting,
    /// The group has assigned no partition to this worker, or, for `bsap status`, to none.
    NoPartitionsAssigned,
    /// Messages are consumed, but none could be dead-lettered.
    DeadLetterTopicMissing,
    /// A log is not the one that was consumed; only `bsap status` reports it, a worker consumes the new log.
    LogReplaced,
    /// A topic does not exist.
    TopicMissing,
    /// The credentials lack a right.
    NotAuthorised,
    /// The brokers refuse the credentials.
    AuthenticationFailed,
    /// No broker answers.
    BrokersUnreachable,
}

impl SourceState {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::Consuming,
        Self::Starting,
        Self::NoPartitionsAssigned,
        Self::DeadLetterTopicMissing,
        Self::LogReplaced,
        Self::TopicMissing,
        Self::NotAuthorised,
        Self::AuthenticationFailed,
        Self::BrokersUnreachable,
    ];

    /// Returns the name in metrics, logs, probes and `bsap status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Consuming => "consuming",
            Self::Starting => "starting",
            Self::NoPartitionsAssigned => "no_partitions_assigned",
            Self::DeadLetterTopicMissing => "dead_letter_topic_missing",
            Self::LogReplaced => "log_replaced",
            Self::TopicMissing => "topic_missing",
            Self::NotAuthorised => "not_authorised",
            Self::AuthenticationFailed => "authentication_failed",
            Self::BrokersUnreachable => "brokers_unreachable",
        }
    }

    /// Returns what the state means.
    pub fn description(self) -> &'static str {
        match self {
            Self::Consuming => "messages are consumed",
            Self::Starting => "the consumer has not joined its group yet",
            Self::NoPartitionsAssigned => {
                "the group assigns no partition to this worker: it has more workers than the topic has partitions"
            }
            Self::DeadLetterTopicMissing => "the dead-letter topic does not exist",
            Self::LogReplaced => "a log is not the one that was consumed",
            Self::TopicMissing => "a topic does not exist",
            Self::NotAuthorised => "the credentials lack a right",
            Self::AuthenticationFailed => "the brokers refuse the credentials",
            Self::BrokersUnreachable => "no broker answers",
        }
    }

    /// Whether messages of assigned partitions are consumed.
    pub fn is_consuming(self) -> bool {
        matches!(self, Self::Consuming | Self::DeadLetterTopicMissing)
    }

    /// Returns the state that a failed request for a consumed topic shows; `None` if it may pass by itself.
    pub fn from_failure(kind: FailureKind) -> Option<Self> {
        match kind {
            FailureKind::BrokersUnreachable => Some(Self::BrokersUnreachable),
            FailureKind::AuthenticationFailed => Some(Self::AuthenticationFailed),
            FailureKind::NotAuthorised => Some(Self::NotAuthorised),
            FailureKind::TopicMissing => Some(Self::TopicMissing),
            FailureKind::Other => None,
        }
    }
}

/// A state with an explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceProblem {
    /// The state.
    pub state: SourceState,
    /// What exactly, and what to do.
    pub detail: String,
}

impl SourceProblem {
    /// Returns the problem that a failed request shows; `None` if it may pass by itself.
    pub fn from_failure(failure: &KafkaFailure) -> Option<Self> {
        let state = SourceState::from_failure(failure.kind)?;
        Some(Self { state, detail: failure.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_name_of_each_state_is_unique_and_the_one_in_json() {
        let names = SourceState::ALL.iter().map(|state| state.as_str());
        for state in SourceState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        assert_eq!(names.collect::<BTreeSet<_>>().len(), SourceState::ALL.len());
        assert!(SourceState::ALL.is_sorted());
    }
}
