//! Logs that are not as a worker left them: restored from a backup, copied to another cluster, shortened by
//! retention. Everything in them is consumed, and what is lost is reported.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::json;
use tokio::time::sleep;

use crate::broker::Cluster;
use crate::fixture::{Fixture, TOPIC};
use crate::topics::{FREQUENT_CHECKS, STORE_TIMEOUT, wait_for_state};

/// No check comes between the first message and the last one.
const RARE_CHECKS: [(&str, &str); 1] = [("SOURCE__LOG_CHECK_SECONDS", "3600")];

impl Fixture {
    /// Puts the backup of the broker's data back. Its clients do not know that sequence numbers went back.
    fn restore_cluster(&mut self) {
        self.cluster.stop_broker(0, "KILL");
        self.cluster.restore(0);
        self.cluster.launch_broker(0);
        self.cluster.wait_until_ready();
        self.producer = self.cluster.client_config().create().unwrap();
    }

    /// Expects that `bsap status` finds another log, with `lag` messages to consume.
    fn assert_log_replaced(&self, lag: i64) {
        let (code, status) = self.status();
        let found = (code, &status["state"], &status["lag_messages"]);
        assert_eq!(found, (5, &json!("log_replaced"), &json!(lag)), "{}", status["partitions"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_restored_from_a_backup_is_consumed_from_its_beginning() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("a cluster is restored", cluster, 1).await;
    let worker = fixture.start_worker_with(&RARE_CHECKS);
    fixture.send_images("first", 5).await;
    fixture.wait_until_stored("first", 5, &worker).await;
    fixture.cluster.stop_broker(0, "TERM");
    fixture.cluster.back_up(0);
    fixture.cluster.launch_broker(0);
    fixture.cluster.wait_until_ready();
    fixture.send_images("second", 5).await;
    fixture.wait_until_stored("second", 5, &worker).await;
    worker.stop();

    // The backup has the first messages, by which alone the log would be the same, and grows beyond what was stored.
    fixture.restore_cluster();
    fixture.send_images("third", 12).await;
    fixture.assert_log_replaced(5 + 12);
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_stored("third", 12, &worker).await;
    assert_eq!(worker.last_logged_event("source.log_replaced").unwrap()["log_number"], 1);

    // Under a worker, which goes on without being restarted.
    fixture.restore_cluster();
    let started = Instant::now();
    let event = loop {
        match worker.last_logged_event("source.log_replaced") {
            Some(event) if event["log_number"] == 2 => break event,
            _ => assert!(started.elapsed() < STORE_TIMEOUT, "{}", worker.log_head()),
        }
        sleep(Duration::from_millis(200)).await;
    };
    println!("{}: {event}", fixture.scenario);
    fixture.send_images("fourth", 20).await;
    fixture.wait_until_stored("fourth", 20, &worker).await;
    wait_for_state(&fixture, "consuming").await;
    worker.stop();
    assert_eq!(fixture.stored_ids().await.len(), 5 + 5 + 12 + 20);
}

/// Copies all messages of the topic but those whose offset is divisible by three to another cluster, as a mirror does
/// with a topic that was compacted or has transactions: the offsets are others.
async fn mirror(from: &Fixture, to: &Cluster) {
    let consumer: BaseConsumer =
        from.cluster.client_config().set("group.id", "mirror").create().unwrap();
    let producer: FutureProducer = to.client_config().create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(TOPIC, 0, Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    for _ in 0..from.end_offsets()[&0] {
        let message = consumer.poll(STORE_TIMEOUT).unwrap().unwrap();
        if message.offset() % 3 != 1 {
            let copy = FutureRecord::to(TOPIC)
                .key(message.key().unwrap())
                .payload(message.payload().unwrap())
                .timestamp(message.timestamp().to_millis().unwrap());
            producer.send(copy, STORE_TIMEOUT).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a second cluster; `just kafka long` runs it"]
async fn a_mirror_with_other_offsets_is_consumed_from_its_beginning() {
    let (cluster, mirror_cluster) = (Cluster::start(1), Cluster::start(1));
    let mut fixture = Fixture::with_cluster("a mirror is consumed", cluster, 1).await;
    mirror_cluster.create_topic(TOPIC, 1, 1_000_000).await;
    mirror_cluster.create_topic(crate::fixture::DEAD_LETTER_TOPIC, 1, 2_000_000).await;
    let worker = fixture.start_worker_with(&RARE_CHECKS);
    fixture.send_images("original", 12).await;
    fixture.wait_until_stored("original", 12, &worker).await;
    worker.stop();
    // Offset 0 is the same message in both, and the mirror is the longer one.
    mirror(&fixture, &mirror_cluster).await;
    let original = std::mem::replace(&mut fixture.cluster, mirror_cluster);
    fixture.producer = fixture.cluster.client_config().create().unwrap();
    fixture.send_images("failed-over", 8).await;
    fixture.assert_log_replaced(8 + 8);
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_stored("failed-over", 8, &worker).await;
    println!("{}: {}", fixture.scenario, worker.last_logged_event("source.log_replaced").unwrap());
    worker.stop();

    // Back to the original, which has got messages of its own in the meantime.
    fixture.cluster = original;
    fixture.producer = fixture.cluster.client_config().create().unwrap();
    fixture.send_images("failed-back", 6).await;
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_stored("failed-back", 6, &worker).await;
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_removes_is_lost_only_if_it_was_not_consumed() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("retention", cluster, 1).await;
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.send_images("first", 5).await;
    fixture.wait_until_stored("first", 5, &worker).await;
    fixture.remove_by_retention(5).await;
    fixture.send_images("second", 2).await;
    fixture.wait_until_stored("second", 2, &worker).await;
    assert_eq!(worker.count_logged_events("source.data_loss"), 0, "everything was consumed");
    worker.stop();

    // Out of range while no worker runs.
    fixture.send_images("lost", 7).await;
    fixture.remove_by_retention(5 + 2 + 7).await;
    let (_, status) = fixture.status();
    assert_eq!(status["partitions"][0]["lost"], 7, "{}", status["partitions"]);
    let metrics = "127.0.0.1:29466";
    let options = [&FREQUENT_CHECKS[..], &[("METRICS__LISTEN", metrics)]].concat();
    let worker = fixture.start_worker_with(&options);
    fixture.send_images("third", 3).await;
    fixture.wait_until_stored("third", 3, &worker).await;
    let loss = worker.last_logged_event("source.data_loss").unwrap();
    println!("{}: {loss}", fixture.scenario);
    assert_eq!((&loss["lost_messages"], &loss["requested_offset"]), (&json!(7), &json!(7)));
    let counted = reqwest::get(format!("http://{metrics}/metrics")).await.unwrap();
    let counted = counted.text().await.unwrap();
    let counter = "bsap_lost_messages_total{reason=\"retention\"} 7";
    assert!(counted.lines().any(|line| line == counter), "{counted}");
    worker.stop();
}

impl Fixture {
    /// Waits until retention has removed everything before offset `end`.
    async fn remove_by_retention(&self, end: i64) {
        self.cluster.set_topic_config(TOPIC, "retention.ms", "1").await;
        let consumer: BaseConsumer = self.cluster.client_config().create().unwrap();
        let started = Instant::now();
        while consumer.fetch_watermarks(TOPIC, 0, STORE_TIMEOUT).unwrap().0 < end {
            assert!(started.elapsed() < STORE_TIMEOUT, "retention removes nothing");
            sleep(Duration::from_millis(200)).await;
        }
        self.cluster.set_topic_config(TOPIC, "retention.ms", "-1").await;
    }
}
