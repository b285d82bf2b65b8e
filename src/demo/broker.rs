//! A Kafka broker in this process: librdkafka's mock cluster. Groups, rebalances, commits and
//! headers work as in Kafka. Nothing is written to disk, and a partition holds at most 5 MiB.

use rdkafka::error::KafkaResult;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

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
}
