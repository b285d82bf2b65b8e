//! Why consuming ended.

use rdkafka::error::KafkaError;

use crate::diagnosis::describe;
use crate::kafka::{self, KafkaFailure};
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
    /// The offset to resume from could not be read from the table, or a new log not recorded there.
    #[error(
        "{partition}: the offset to resume from cannot be read from the table, or written there: {reason}"
    )]
    PositionUnreadable {
        /// The partition that was assigned.
        partition: TopicPartition,
        /// The error of the table.
        reason: String,
    },
    /// A request for an assigned partition failed.
    #[error(transparent)]
    Request(#[from] KafkaFailure),
}

impl Classify for SourceError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Kafka { source, .. } => kafka::classify_error(source),
            Self::PositionUnreadable { .. } | Self::Request(_) => Disposition::Fatal,
        }
    }
}
