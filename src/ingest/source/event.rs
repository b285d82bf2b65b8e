//! What the consumer thread queues for the pipeline.

use std::sync::mpsc::SyncSender;

use super::error::SourceError;
use crate::record::{KafkaMessage, TopicPartition};

/// What the consumer thread queues for the pipeline, in order.
#[derive(Debug)]
pub enum ConsumerEvent {
    /// A message to process.
    Message(KafkaMessage),
    /// Partitions were assigned to this worker, each with the number of its log.
    Assigned(Vec<(TopicPartition, u64)>),
    /// Partitions are about to be revoked. The pipeline stores what came before this event, then drops
    /// the [`RevokeAck`].
    Revoked(Vec<TopicPartition>, RevokeAck),
    /// Consuming cannot go on.
    Failed(SourceError),
}

/// Held by the pipeline while revoked partitions drain; dropping it lets the rebalance go on.
#[derive(Debug)]
pub struct RevokeAck(
    #[expect(dead_code, reason = "dropping it is the acknowledgement")] pub(super) SyncSender<()>,
);
