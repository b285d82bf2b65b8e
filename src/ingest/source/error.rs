//! Why consuming ended.

use rdkafka::error::KafkaError;

use crate::diagnosis::describe;
use crate::kafka;
use crate::record::TopicPartition;
use crate::retry::{Classify, Disposition};

/// Why consuming ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Kafka rejected a request, or a client could not be created.
    #[error("Kafka at {brokers}: {}", describe(.source))]
    Kafka {
        /// The configured brokers.
        brokers: String,
        /// The error of librdkafka.
        source: KafkaError,
    },
    /// The offset to resume from could not be read from the table.
    #[error("{partition}: the offset to resume from cannot be read from the table: {reason}")]
    PositionUnreadable {
        /// The partition that was assigned.
        partition: TopicPartition,
        /// The error of the table.
        reason: String,
    },
    /// The next offset was removed from the log while this worker consumed it.
    #[error(
        "{topics}: the next offset to read is no longer in the log: messages were removed before they were processed, or the topic was re-created. Restart the worker to find out which (`source.data_loss`)"
    )]
    OffsetOutOfRange {
        /// The topics that are consumed, separated by commas.
        topics: String,
    },
    /// The table is ahead of the topic.
    #[error(
        "{partition}: the table has consumed up to offset {resume}, but the log ends at {end}; the topic was re-created. Use a topic of a new name, or a new catalogue"
    )]
    OffsetBeyondEnd {
        /// The partition that was assigned.
        partition: TopicPartition,
        /// The offset to resume from.
        resume: i64,
        /// The end of the log.
        end: i64,
    },
}

impl Classify for SourceError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Kafka { source, .. } => kafka::classify_error(source),
            Self::PositionUnreadable { .. }
            | Self::OffsetOutOfRange { .. }
            | Self::OffsetBeyondEnd { .. } => Disposition::Fatal,
        }
    }
}
