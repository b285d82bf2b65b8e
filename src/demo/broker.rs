//! A Kafka broker in this process: librdkafka's mock cluster. Groups, rebalances, commits and headers work
//! as in Kafka.
//!
//! Nothing is written to disk, and a partition keeps at most 5 MiB: older messages are dropped, read or
//! not. [`MockBroker::new_publisher`] therefore waits for the consumer group, and with it
//!
//! - no message is dropped before the group has stored it, however slow the group is, as long as there is
//!   one publisher per topic;
//! - the broker holds at most [`MAX_BACKLOG_MESSAGES`] messages and [`MAX_BACKLOG_BYTES`] that are not
//!   stored, or one larger message, and at most 5 MiB per partition in all;
//! - what is stored is in the table, and nothing else outlives the process: after an end of any kind,
//!   publishing the same images again completes the table, and stores no version twice.

use rdkafka::error::KafkaResult;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

use crate::kafka::KafkaOptions;
use crate::publish::{BacklogLimit, PublishError, Publisher};

/// Messages that the broker holds for a group at most. Workers commit their offsets every second, so that
/// they can take this many per second or two.
pub const MAX_BACKLOG_MESSAGES: u64 = 10_000;
/// Bytes that the broker holds for a group at most. If all of them are in one partition, and in front of
/// them the part of a batch (at most 1 MB) that is stored already, the 5 MiB of a partition suffice.
pub const MAX_BACKLOG_BYTES: u64 = 3 << 20;

/// A running broker, which stops when it is dropped.
pub struct MockBroker {
    cluster: MockCluster<'static, DefaultProducerContext>,
}

impl MockBroker {
    /// Starts a broker with `topics`, each with its number of partitions.
    pub fn start(topics: &[(&str, i32)]) -> KafkaResult<Self> {
        let cluster = MockCluster::new(1)?;
        for (topic, partitions) in topics {
            cluster.create_topic(topic, *partitions, 1)?;
        }
        Ok(Self { cluster })
    }

    /// Makes the broker unreachable for all clients, or reachable; for tests of outages.
    pub fn set_reachable(&self, reachable: bool) -> KafkaResult<()> {
        if reachable { self.cluster.broker_up(-1) } else { self.cluster.broker_down(-1) }
    }

    /// Returns the address of the broker: `host:port`.
    pub fn bootstrap_servers(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// Returns a publisher to `topic` that waits while the broker holds all that it can for the consumer
    /// group `group`. `kafka` must name this broker.
    pub fn new_publisher(
        &self,
        kafka: &KafkaOptions,
        topic: &str,
        group: &str,
    ) -> Result<Publisher, PublishError> {
        let limit = BacklogLimit {
            group: group.to_owned(),
            max_messages: MAX_BACKLOG_MESSAGES,
            max_bytes: MAX_BACKLOG_BYTES,
        };
        Publisher::new(kafka, topic)?.with_backlog_limit(kafka, limit)
    }
}
