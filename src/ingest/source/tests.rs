//! The consumer against a broker in this process, with stored positions of its choice.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::types::RDKafkaRespErr;
use tokio_util::sync::CancellationToken;

use super::state::lock_ignoring_poison;
use super::*;
use crate::kafka::{KafkaOptions, KafkaProbe};
use crate::record::{KafkaMessage, LogAnchor, StoredPosition, TopicPartition};

const TIMEOUT: Duration = Duration::from_secs(30);
const DEAD_LETTERS: &str = "images.dead-letters";

/// What a table has stored.
struct FixedPosition(Mutex<StoredPosition>);

#[async_trait]
impl OffsetProvider for FixedPosition {
    async fn stored_position(&self, _: &TopicPartition) -> Result<StoredPosition, String> {
        Ok(*lock_ignoring_poison(&self.0))
    }

    async fn start_new_log(
        &self,
        _: &TopicPartition,
        replaced: u64,
    ) -> Result<StoredPosition, String> {
        let new = StoredPosition { log_number: replaced + 1, ..StoredPosition::default() };
        *lock_ignoring_poison(&self.0) = new;
        Ok(new)
    }
}

/// A broker whose topic has `count` messages, and the options to reach it.
fn start_broker(count: i64) -> (MockCluster<'static, DefaultProducerContext>, KafkaOptions) {
    let cluster = MockCluster::new(1).unwrap();
    for topic in ["images", DEAD_LETTERS] {
        cluster.create_topic(topic, 1, 1).unwrap();
    }
    let kafka = KafkaOptions {
        brokers: cluster.bootstrap_servers(),
        request_timeout_ms: 2_000,
        ..KafkaOptions::default()
    };
    let producer: BaseProducer = kafka.producer_config().create().unwrap();
    for i in 0..count {
        let value = format!("message {i}");
        producer.send(BaseRecord::to("images").key("k").payload(&value)).unwrap();
    }
    producer.flush(TIMEOUT).unwrap();
    (cluster, kafka)
}

fn start_source(kafka: &KafkaOptions, stored: StoredPosition) -> Source {
    let options = SourceOptions { log_check_seconds: 1, ..SourceOptions::default() };
    let provider = Arc::new(FixedPosition(Mutex::new(stored)));
    let token = CancellationToken::new();
    Source::start(kafka, &options, &["images"], DEAD_LETTERS, provider, token).unwrap()
}

/// Returns the next `count` messages, and the numbers of the logs that were assigned.
async fn receive(source: &mut Source, count: usize) -> (Vec<KafkaMessage>, Vec<u64>) {
    let (mut messages, mut logs) = (Vec::new(), Vec::new());
    while messages.len() < count {
        let event = tokio::time::timeout(TIMEOUT, source.next_event()).await;
        let state = source.status_handle().source_state();
        let event = event.unwrap_or_else(|_| {
            panic!("nothing after {messages:?} of logs {logs:?}: {state:?}, {:?}", source.status())
        });
        match event.unwrap() {
            ConsumerEvent::Message(message) => messages.push(message),
            ConsumerEvent::Assigned(assigned) => logs.extend(assigned.iter().map(|(_, log)| *log)),
            ConsumerEvent::Revoked(..) => {}
            ConsumerEvent::Failed(error) => panic!("{error}"),
        }
    }
    (messages, logs)
}

/// Returns the message of the topic at `offset`, as a table that has consumed it knows it.
async fn anchor_at(kafka: &KafkaOptions, offset: i64) -> LogAnchor {
    let partition = TopicPartition { topic: "images".into(), number: 0 };
    let read = crate::kafka::run_probe(kafka, "g", move |probe: &KafkaProbe| {
        probe.read_messages_at(&[(partition, offset)])
    });
    read.await.unwrap().into_values().next().unwrap()
}

/// Consumes a topic of 12 messages after `stored`, which is given the message at offset 4. Returns the first offset
/// and the number of the log.
async fn consume_after(stored: impl Fn(LogAnchor) -> StoredPosition) -> (i64, u64) {
    let (_cluster, kafka) = start_broker(12);
    let stored = stored(anchor_at(&kafka, 4).await);
    let mut source = start_source(&kafka, stored);
    let (first, logs) = receive(&mut source, 1).await;
    let (first, log) = (first[0].offset, first[0].log_number);
    assert_eq!(logs, [log], "{stored:?}");
    let (rest, _) = receive(&mut source, (11 - first) as usize).await;
    let offsets: Vec<i64> = rest.iter().map(|message| message.offset).collect();
    assert_eq!(offsets, (first + 1..12).collect::<Vec<_>>(), "{stored:?}");
    assert!(rest.iter().all(|message| message.log_number == log), "{stored:?}");
    source.close().await;
    (first, log)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_without_the_stored_message_is_consumed_from_its_beginning_as_a_new_one() {
    let stored = |next_offset, anchor| StoredPosition {
        next_offset: Some(next_offset),
        anchor,
        ..StoredPosition::default()
    };
    let found = tokio::join!(
        consume_after(|anchor| stored(5, Some(anchor))),
        consume_after(|anchor| stored(
            5,
            Some(LogAnchor { fingerprint: anchor.fingerprint ^ 1, ..anchor })
        )),
        consume_after(|_| stored(20, None)),
        consume_after(|anchor| stored(20, Some(LogAnchor { offset: 19, ..anchor }))),
        // A table of an earlier version: nothing says that it is another log.
        consume_after(|_| stored(5, None)),
    );
    assert_eq!(found, ((5, 0), (0, 1), (0, 1), (0, 1), (5, 0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_dead_letter_topic_and_a_missing_right_are_states_before_they_matter() {
    let (cluster, kafka) = start_broker(1);
    let mut source = start_source(&kafka, StoredPosition::default());
    let wait_for = async |source: &Source, state: SourceState| {
        let started = Instant::now();
        while source.status().state != state {
            let found = source.status_handle().source_state();
            assert!(started.elapsed() < TIMEOUT, "not {state:?} but {found:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    receive(&mut source, 1).await;
    wait_for(&source, SourceState::Consuming).await;
    let (missing, denied, none) = (
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR,
    );
    for (error, state) in
        [(missing, SourceState::DeadLetterTopicMissing), (denied, SourceState::NotAuthorised)]
    {
        cluster.topic_error(DEAD_LETTERS, error).unwrap();
        wait_for(&source, state).await;
        cluster.topic_error(DEAD_LETTERS, none).unwrap();
        wait_for(&source, SourceState::Consuming).await;
    }
    cluster.broker_down(-1).unwrap();
    wait_for(&source, SourceState::BrokersUnreachable).await;
    assert_eq!(source.status().lag_messages, None);
    cluster.broker_up(-1).unwrap();
    wait_for(&source, SourceState::Consuming).await;
    source.close().await;
}
