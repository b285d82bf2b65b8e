//! Topics that are deleted and created again, grow or lose messages, and tables that go back: nothing is lost in
//! silence.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::table::Follower;
use rdkafka::producer::Producer;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::broker::{Cluster, copy_folder};
use crate::fixture::{Fixture, TOPIC, WorkerProcess};

pub const STORE_TIMEOUT: Duration = Duration::from_secs(120);
/// Checks that find a new log come often, so that the scenarios are quick.
pub const FREQUENT_CHECKS: [(&str, &str); 2] =
    [("SOURCE__LOG_CHECK_SECONDS", "1"), ("INGEST__HEARTBEAT_SECONDS", "1")];

impl Fixture {
    /// Sends one event for each of `count` new images, whose ids begin with `prefix`.
    pub async fn send_images(&self, prefix: &str, count: usize) {
        let picture = self.folder.path().join("pictures/one.jpg");
        if !picture.exists() {
            let image = render_jpeg(&Scene::sample(7, 1, PhotoStyle::Studio), 64).unwrap();
            std::fs::write(&picture, image).unwrap();
        }
        let uri = url::Url::from_file_path(&picture).unwrap();
        for i in 0..count {
            let id = format!("{prefix}-{i}");
            let event = json!({"image_id": id, "sequence": 1, "uri": uri.as_str()});
            self.send_message(&id, &event.to_string()).await;
        }
    }

    pub async fn stored_ids(&self) -> BTreeSet<String> {
        let mut ids = BTreeSet::new();
        // The first worker creates the table.
        let follower = Follower::open(&self.store(), &self.generation).await;
        let Ok(mut follower) = follower else { return ids };
        while let Some(changes) = follower.next(&|_, _| {}).await.unwrap() {
            ids.extend(changes.rows.iter().map(|row| row.image_id.to_string()));
        }
        ids
    }

    /// Waits until all images are stored that [`Self::send_images`] has sent with these arguments.
    pub async fn wait_until_stored(&self, prefix: &str, count: usize, worker: &WorkerProcess) {
        let wanted: BTreeSet<String> = (0..count).map(|i| format!("{prefix}-{i}")).collect();
        let started = Instant::now();
        loop {
            let stored = self.stored_ids().await;
            let missing: Vec<_> = wanted.difference(&stored).collect();
            if missing.is_empty() {
                return;
            }
            assert!(
                started.elapsed() < STORE_TIMEOUT,
                "{}: {missing:?} are not stored: {}",
                self.scenario,
                worker.log_head(),
            );
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Returns the exit code and the object of `bsap status --json`.
    pub fn status(&self) -> (i32, Value) {
        let (code, output) = self.run_command(&["status", "--json"]);
        let line = output.lines().find(|line| line.starts_with('{'));
        let line = line.unwrap_or_else(|| panic!("no JSON: {output}"));
        (code.unwrap(), serde_json::from_str(line).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_created_again_is_consumed_from_its_beginning() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("a topic is created again", cluster, 1).await;
    let mut worker = Some(fixture.start_worker_with(&FREQUENT_CHECKS));
    let (mut before, mut replaced) = (5, 0);
    fixture.send_images("first", before).await;
    fixture.wait_until_stored("first", before, worker.as_ref().unwrap()).await;
    // Longer, shorter and just as long as before, while a worker runs and while none does.
    for (round, (is_running, count)) in
        [(true, 12), (true, 3), (true, 3), (false, 9), (false, 2), (false, 2)]
            .into_iter()
            .enumerate()
    {
        if !is_running && let Some(running) = worker.take() {
            running.stop();
        }
        let prefix = format!("round{round}");
        fixture.cluster.delete_topic(TOPIC).await;
        fixture.cluster.create_topic(TOPIC, 1, 1_000_000).await;
        fixture.send_images(&prefix, count).await;
        if !is_running {
            let (code, status) = fixture.status();
            let found = (code, status["state"].as_str().unwrap(), &status["lag_messages"]);
            assert_eq!(found, (5, "log_replaced", &json!(count)), "{status}");
        }
        let running = worker.get_or_insert_with(|| fixture.start_worker_with(&FREQUENT_CHECKS));
        fixture.wait_until_stored(&prefix, count, running).await;
        replaced += 1;
        let event = running.last_logged_event("source.log_replaced").unwrap();
        assert_eq!(event["log_number"], replaced, "{event}");
        println!(
            "{}: {before} messages before, {count} after it, {}: {event}",
            fixture.scenario,
            if is_running { "under a worker" } else { "without a worker" }
        );
        if !is_running {
            worker.take().unwrap().stop();
        }
        before = count;
    }
    let mut last = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_caught_up(&mut [&mut last]).await;
    assert_eq!(last.count_logged_events("source.log_replaced"), 0, "it is consumed already");
    wait_for_state(&fixture, "consuming").await;
    let (code, status) = fixture.status();
    assert_eq!((code, &status["lag_messages"]), (0, &json!(0)), "{status}");
    assert_eq!(status["partitions"][0]["log"], "same", "{status}");
    last.stop();
    assert_eq!(fixture.stored_ids().await.len(), 5 + 12 + 3 + 3 + 9 + 2 + 2);
}

/// Waits until `bsap status` reports a state.
pub async fn wait_for_state(fixture: &Fixture, state: &str) {
    let started = Instant::now();
    loop {
        let (_, status) = fixture.status();
        if status["state"] == state {
            return;
        }
        assert!(started.elapsed() < STORE_TIMEOUT, "not {state}: {status}");
        sleep(Duration::from_millis(500)).await;
    }
}

/// A worker that dies between the first messages of a new log and the next check leaves a trace.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_before_it_notices_loses_nothing() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("killed before it notices", cluster, 1).await;
    let worker = fixture.start_worker_with(&[("SOURCE__LOG_CHECK_SECONDS", "3600")]);
    fixture.send_images("old", 5).await;
    fixture.wait_until_stored("old", 5, &worker).await;
    fixture.cluster.delete_topic(TOPIC).await;
    fixture.cluster.create_topic(TOPIC, 1, 1_000_000).await;
    fixture.send_images("new", 12).await;
    // It stores the messages from offset 5 on; whether it does within this time does not matter.
    sleep(Duration::from_secs(10)).await;
    let stored = fixture.stored_ids().await;
    println!("{}: {} images are stored before kill -9", fixture.scenario, stored.len());
    worker.kill();
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_stored("new", 12, &worker).await;
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn added_partitions_are_consumed() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("partitions are added", cluster, 1).await;
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.send_images("before", 3).await;
    fixture.wait_until_stored("before", 3, &worker).await;
    fixture.cluster.add_partitions(TOPIC, 4).await;
    fixture.partitions = 4;
    // The producer learns of the new partitions when it asks for metadata again.
    fixture.producer.client().fetch_metadata(Some(TOPIC), STORE_TIMEOUT).unwrap();
    fixture.send_images("after", 40).await;
    let started = Instant::now();
    fixture.wait_until_stored("after", 40, &worker).await;
    println!("{}: consumed after {} s", fixture.scenario, started.elapsed().as_secs());
    assert!(fixture.end_offsets().values().filter(|end| **end > 0).count() > 1);
    assert_eq!(worker.count_logged_events("source.log_replaced"), 0);
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_restored_from_a_copy_is_replayed_or_its_loss_is_reported() {
    let cluster = Cluster::start(1);
    let mut fixture = Fixture::with_cluster("a table is restored", cluster, 1).await;
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.send_images("first", 5).await;
    fixture.wait_until_stored("first", 5, &worker).await;
    worker.stop();
    let catalogue = Path::new(&fixture.catalogue).to_owned();
    let copy = fixture.folder.path().join("copy");
    copy_folder(&catalogue, &copy);
    let restore = || {
        std::fs::remove_dir_all(&catalogue).unwrap();
        copy_folder(&copy, &catalogue);
    };

    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.send_images("second", 5).await;
    fixture.wait_until_stored("second", 5, &worker).await;
    worker.stop();
    restore();
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.wait_until_stored("second", 5, &worker).await;
    assert_eq!(worker.count_logged_events("source.log_replaced"), 0, "it is the same log");
    // Under a running worker: it ends at its next commit, and the next worker reads again what is missing.
    restore();
    fixture.send_images("third", 2).await;
    let (success, log) = worker.wait_until_ended();
    assert!(!success && log.contains("went back"), "{log}");
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    for (prefix, count) in [("second", 5), ("third", 2)] {
        fixture.wait_until_stored(prefix, count, &worker).await;
    }
    worker.stop();

    // What Kafka has removed since the copy was made cannot be replayed.
    restore();
    let ends = [(0, 9)].into();
    fixture.cluster.delete_records_before(TOPIC, &ends).await;
    let worker = fixture.start_worker_with(&FREQUENT_CHECKS);
    fixture.send_images("fourth", 2).await;
    fixture.wait_until_stored("fourth", 2, &worker).await;
    let loss = worker.last_logged_event("source.data_loss").unwrap();
    println!("{}: {loss}", fixture.scenario);
    assert_eq!(loss["lost_messages"], 4, "{loss}");
    worker.stop();
}
