//! Delivery guarantees against a real Apache Kafka: whatever fails, every live image is stored exactly once
//! with its newest content, and the dead letters are exactly the poison messages.
//!
//!     tests/run kafka                      2,000 messages and 3 kills per scenario
//!     BSAP_KAFKA_LONG=1 tests/run kafka    20,000 messages and 20 kills
//!     just chaos [rounds] [seed]           hundreds of rounds of random faults
//!     just soak [minutes]                  steady load, to find out what grows
//!
//! Workers are processes of `bsap ingest` with the demo model. Only if faults are injected into the store
//! do they run inside of the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod broker;
mod chaos;
mod compare;
mod events;
mod faulty_store;
mod fixture;
mod minio;
mod other_logs;
mod promotion;
mod soak;
mod states;
mod topics;

use std::time::{Duration, Instant};

use bsap::catalogue::StateStore;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::record::to_hex;
use fixture::{DEAD_LETTER_TOPIC, Fixture, REEMBED_TOPIC, TOPIC, scenario_size};
use rand::RngExt;
use rdkafka::producer::{FutureProducer, Producer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

/// Long enough for a worker to join the group and to process messages.
const JOIN_WAIT: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn workers_join_and_leave() {
    let (count, _) = scenario_size();
    let mut fixture = Fixture::build("workers join and leave", 1).await;
    fixture.send_events(count / 2).await;
    let first = fixture.start_worker();
    sleep(JOIN_WAIT).await;
    let second = fixture.start_worker();
    sleep(JOIN_WAIT).await;
    let mut third = fixture.start_worker();
    fixture.send_events(count / 4).await;
    first.stop();
    let mut fourth = fixture.start_worker();
    sleep(JOIN_WAIT).await;
    second.stop();
    fixture.send_events(count / 4).await;
    fixture.wait_until_caught_up(&mut [&mut third, &mut fourth]).await;
    third.stop();
    fourth.stop();
    fixture.assert_table_matches_events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_killed() {
    let (count, kills) = scenario_size();
    let mut fixture = Fixture::build("kill -9", 1).await;
    fixture.send_events(count / 2).await;
    // The shortest interval of maintenance, so that some workers are killed during it.
    let frequent_maintenance =
        [("MAINTENANCE__INTERVAL_SECONDS", "2"), ("MAINTENANCE__FILES_PER_MERGE", "3")];
    let mut steady = fixture.start_worker_with(&frequent_maintenance);
    let mut victim = fixture.start_worker_with(&frequent_maintenance);
    let mut kills_before_offset_commit = 0;
    for _ in 0..kills {
        fixture.send_events(count / 2 / u64::from(kills)).await;
        sleep(Duration::from_millis(rand::rng().random_range(2_000..6_000))).await;
        // The steady worker becomes the next victim, so that each victim has work in progress.
        std::mem::replace(
            &mut victim,
            std::mem::replace(&mut steady, fixture.start_worker_with(&frequent_maintenance)),
        )
        .kill();
        let (committed, positions) = (fixture.committed_offsets(), fixture.table_positions().await);
        let is_behind = committed.iter().any(|(partition, offset)| *offset < positions[partition]);
        kills_before_offset_commit += u32::from(is_behind);
    }
    println!(
        "kill -9: {kills_before_offset_commit} of {kills} kills left Kafka's offsets behind the table's"
    );
    fixture.wait_until_caught_up(&mut [&mut steady, &mut victim]).await;
    let compactions = fixture.count_logged_events("compaction");
    println!("kill -9: {compactions} compactions in the meantime");
    assert!(compactions > 0);
    steady.stop();
    victim.stop();
    fixture.assert_table_matches_events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_brokers_restart_one_by_one() {
    let (count, _) = scenario_size();
    let mut fixture = Fixture::build("three brokers restart", 3).await;
    let (mut first, mut second) = (fixture.start_worker(), fixture.start_worker());
    for i in 0..3 {
        fixture.send_events(count / 3).await;
        fixture.cluster.stop_broker(i, if i == 0 { "KILL" } else { "TERM" });
        sleep(JOIN_WAIT).await;
        fixture.cluster.launch_broker(i);
        fixture.cluster.wait_until_ready();
    }
    fixture.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    first.stop();
    second.stop();
    fixture.assert_table_matches_events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_broker_restarts_and_freezes() {
    let (count, kills) = scenario_size();
    let freeze_time = Duration::from_secs(if kills > 3 { 60 } else { 15 });
    let mut fixture = Fixture::build("the broker restarts and freezes", 1).await;
    let (mut first, mut second) = (fixture.start_worker(), fixture.start_worker());
    fixture.send_events(count / 2).await;
    sleep(JOIN_WAIT).await;
    fixture.cluster.stop_broker(0, "KILL");
    sleep(JOIN_WAIT).await;
    fixture.cluster.launch_broker(0);
    fixture.cluster.wait_until_ready();
    fixture.send_events(count / 2).await;
    fixture.cluster.set_frozen(0, true);
    sleep(freeze_time).await;
    fixture.cluster.set_frozen(0, false);
    fixture.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    first.stop();
    second.stop();
    fixture.assert_table_matches_events(1).await;
    // A worker ends even if its broker does not answer.
    let last = fixture.start_worker();
    fixture.send_events(200).await;
    sleep(JOIN_WAIT).await;
    fixture.cluster.stop_broker(0, "KILL");
    last.send_signal("TERM");
    let signalled_at = Instant::now();
    let (success, log) = last.wait_until_ended();
    let seconds = signalled_at.elapsed().as_secs();
    println!("the broker restarts and freezes: without it a worker ends within {seconds} s");
    // ingest.drain_seconds, and 15 s for leaving the group.
    assert!(success && seconds < 20 + 15 + 10, "{seconds} s: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_suspended_past_its_session_and_resumes() {
    let (count, kills) = scenario_size();
    let mut fixture = Fixture::build("a worker is suspended", 1).await;
    fixture.send_events(count).await;
    let (mut first, mut second) = (fixture.start_worker(), fixture.start_worker());
    let (mut fenced, suspensions) = (0, kills.div_ceil(4).max(2));
    for _ in 0..suspensions {
        sleep(JOIN_WAIT).await;
        first.send_signal("STOP");
        // Its session expires after 6 s, and the other worker gets its partitions.
        sleep(Duration::from_secs(9)).await;
        fixture.send_events(50).await;
        first.send_signal("CONT");
        std::mem::swap(&mut first, &mut second);
    }
    fixture.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    for worker in [first, second] {
        fenced += worker.count_logged_events("commit.fenced");
        worker.stop();
    }
    println!("a worker is suspended {suspensions} times: {fenced} commits fenced");
    fixture.assert_table_matches_events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_topic_is_replayed() {
    let (count, _) = scenario_size();
    let mut fixture = Fixture::build("replay from offset zero", 1).await;
    fixture.send_events(count).await;
    let mut worker = fixture.start_worker();
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    fixture.assert_table_matches_events(1).await;

    // Kafka's offsets do not matter.
    fixture.reset_group_offsets();
    let mut worker = fixture.start_worker();
    fixture.send_events(50).await;
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    fixture.assert_table_matches_events(1).await;

    // A deliberate replay commits every message once more, and changes no image.
    let replay = [("SOURCE__REPLAY_NAME", "once-more")];
    let mut worker = fixture.start_worker_with(&replay);
    fixture.wait_until_replayed("once-more", &mut [&mut worker]).await;
    worker.stop();
    fixture.assert_table_matches_events(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_removed_before_they_were_read_are_reported() {
    let mut fixture = Fixture::build("messages are removed", 1).await;
    fixture.send_events(200).await;
    let mut worker = fixture.start_worker();
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    // Suspended for less than its session, so that it keeps its partitions.
    worker.send_signal("STOP");
    fixture.send_events(500).await;
    fixture.cluster.delete_records_before(TOPIC, &fixture.end_offsets()).await;
    // It goes on where the log begins now, without being restarted.
    worker.send_signal("CONT");
    fixture.send_events(200).await;
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    let partitions = worker.count_logged_events("source.data_loss");
    println!("messages are removed: {partitions} partitions lost some");
    assert!(partitions > 0);
    let lost = worker.last_logged_event("source.data_loss").unwrap();
    assert!(lost["lost_messages"].as_i64().unwrap() > 0, "{lost}");
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_models_generation_is_complete_after_worker_kills() {
    let (count, kills) = scenario_size();
    let mut fixture = Fixture::build("another model", 1).await;
    fixture.cluster.create_topic(REEMBED_TOPIC, 3, 1 << 20).await;
    fixture.send_events(count / 2).await;
    let mut live = fixture.start_worker();
    fixture.wait_until_caught_up(&mut [&mut live]).await;
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip-gelu");
    let reindex = ["reindex", "model", "--checkpoint", other];
    let (_, help) = fixture.run_command(&["ingest", "--help"]);
    assert!(help.contains("reindex_topic"));
    // A worker whose model the catalogue does not know reports what to do.
    let (code, output) = fixture.run_worker_to_exit(&[("MODEL__CHECKPOINT", other)]);
    assert!(code == Some(1) && output.contains("bsap reindex model"), "{output}");
    let (code, output) = fixture.run_command(&reindex);
    // Most events contain the image itself, which cannot be fetched again.
    assert!(code == Some(1) && output.contains("were sent inline"), "{output}");
    assert!(output.contains("is the standby from revision"), "{output}");
    let state = StateStore::new(&fixture.store()).read_newest().await.unwrap().unwrap();
    let standby = state.standby.unwrap().generation;

    let before = fixture.newest_versions(&fixture.generation).await;
    let model = [("MODEL__CHECKPOINT", other)];
    let mut victim = fixture.start_worker_with(&model);
    let mut steady = fixture.start_worker_with(&model);
    for _ in 0..kills {
        fixture.send_events(count / 2 / u64::from(kills)).await;
        sleep(Duration::from_millis(rand::rng().random_range(2_000..6_000))).await;
        std::mem::replace(
            &mut victim,
            std::mem::replace(&mut steady, fixture.start_worker_with(&model)),
        )
        .kill();
    }
    fixture.wait_until_caught_up(&mut [&mut live]).await;
    fixture.wait_until_standby_caught_up(&standby, &mut [&mut victim, &mut steady]).await;
    let (_, status) = fixture.run_command(&["status"]);
    assert!(
        status.contains("0 live events and 0 images to be embedded again are not stored yet"),
        "{status}"
    );
    let (_, output) = fixture.run_command(&reindex);
    assert!(output.contains("0 are to be embedded again, 0 to be deleted"), "{output}");
    for worker in [live, victim, steady] {
        worker.stop();
    }
    let live_versions = fixture.newest_versions(&fixture.generation).await;
    let standby_versions = fixture.newest_versions(&standby).await;
    let mut inline = 0;
    for (id, version) in &live_versions {
        // Only images from before whose event contained the image may be missing.
        if standby_versions.get(id) != Some(version) {
            assert_eq!(before.get(id), Some(version), "{id} came later and is missing");
            inline += 1;
        }
    }
    assert!(output.contains(&format!("{inline} images were sent inline")), "{inline}: {output}");
    println!(
        "another model: {} images and deletes, {} in the new generation, {inline} were sent inline before",
        live_versions.len(),
        standby_versions.len()
    );
    assert!(standby_versions.len() > live_versions.len() / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_shown_and_sent_again() {
    let mut fixture = Fixture::build("dead letters", 1).await;
    let picture = fixture.folder.path().join("pictures/late.jpg");
    std::fs::write(&picture, "no picture").unwrap();
    let uri = url::Url::from_file_path(&picture).unwrap();
    let good = json!({"image_id": "late", "sequence": 1, "uri": uri.as_str()}).to_string();
    // A notification has a sequencer, but this catalogue needs a sequence.
    let object = |key: &str| {
        json!({"eventName": "ObjectRemoved:Delete", "eventSource": "aws:s3",
        "s3": {"bucket": {"name": "b"}, "object": {"key": key, "sequencer": "00"}}})
    };
    let two = json!({"Records": [object("a.jpg"), object("b.jpg")]}).to_string();
    fixture.send_message("late", &good).await;
    fixture.send_message("two", &two).await;
    // With the headers of a dead letter it is larger than clients send by default.
    fixture.send_message("large", &"x".repeat(999_400)).await;
    // Larger than the dead-letter topic takes, however it is compressed.
    fixture.cluster.set_topic_config(DEAD_LETTER_TOPIC, "max.message.bytes", "50000").await;
    let mut random = vec![0_u8; 75_000];
    rand::rng().fill(&mut random[..]);
    let huge = format!("no event: {}", to_hex(&random));
    fixture.send_message("huge", &huge).await;
    let mut worker = fixture.start_worker();
    fixture.wait_until_caught_up(&mut [&mut worker]).await;

    // All other settings are the defaults again.
    fixture.cluster.set_topic_config(DEAD_LETTER_TOPIC, "retention.ms", "-1").await;
    let checked = fixture.run_command_ok(&["check"]);
    assert!(checked.contains("ok      kafka.brokers"), "{checked}");
    assert!(!checked.contains("FAILED  dead_letter"), "{checked}");
    let table = fixture.run_command_ok(&["dead-letters", "list"]);
    for text in ["unknown_image_format", "4  in total"] {
        assert!(table.contains(text), "{table}");
    }
    let listed = fixture.run_command_ok(&["dead-letters", "list", "--json"]);
    let letters: Vec<Value> = listed.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let letter = |key: &str| letters.iter().find(|letter| letter["key"] == key).unwrap();
    assert_eq!(letter("two")["record_index"], 0, "{letters:?}");
    let origin = letter("late")["origin"].as_str().unwrap();
    let shown = fixture.run_command_ok(&["dead-letters", "show", origin]);
    assert!(shown.contains("unknown_image_format") && shown.contains(&good), "{shown}");
    assert_eq!(fixture.run_command_ok(&["dead-letters", "show", origin, "--value"]), good);
    // Without its value, by whose hash it is found in its own topic; a replay would send a tombstone.
    let hash = to_hex(&Sha256::digest(&huge));
    let found = letter("huge");
    assert_eq!(
        (&found["bytes"], &found["omitted_sha256"]),
        (&json!(huge.len()), &json!(hash)),
        "{found}"
    );
    let origin = found["origin"].as_str().unwrap();
    let shown = fixture.run_command_ok(&["dead-letters", "show", origin]);
    assert!(shown.contains(&hash) && !shown.contains("(null)"), "{shown}");
    let (code, refused) = fixture.run_command(&["dead-letters", "show", origin, "--value"]);
    assert!(code == Some(1) && refused.contains("too large"), "{refused}");
    let (code, skipped) = fixture.run_command(&["dead-letters", "replay", "--origin", origin]);
    assert!(code == Some(0) && skipped.contains("not sent again"), "{skipped}");
    assert!(skipped.contains("nothing to replay"), "{skipped}");

    // After the cause is fixed, the message is replayed and its image is stored.
    std::fs::write(&picture, render_jpeg(&Scene::sample(7, 1, PhotoStyle::Studio), 64).unwrap())
        .unwrap();
    let replay = ["dead-letters", "replay", "--code", "unknown_image_format"];
    let dry_run = fixture.run_command_ok(&[&replay[..], &["--dry-run"]].concat());
    assert!(dry_run.contains("1 messages would be sent again"), "{dry_run}");
    let replayed = fixture.run_command_ok(&replay);
    assert!(replayed.contains("1 messages sent again to images"), "{replayed}");
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    let (code, status) = fixture.status();
    assert_eq!(code, 3, "no worker runs: {status}");
    assert_eq!(status["table"]["rows"], 1, "{status}");
    let lag: i64 =
        status["partitions"].as_array().unwrap().iter().map(|p| p["lag"].as_i64().unwrap()).sum();
    assert_eq!(lag, 0, "{status}");
    assert!(fixture.run_command_ok(&["verify"]).contains("1 images"));
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_markers_are_not_lag() {
    let mut fixture = Fixture::build("transactions", 1).await;
    let producer: FutureProducer =
        fixture.cluster.client_config().set("transactional.id", "shop").create().unwrap();
    producer.init_transactions(Duration::from_secs(30)).unwrap();
    producer.begin_transaction().unwrap();
    fixture.events.send(&producer, TOPIC, 200).await;
    producer.commit_transaction(Duration::from_secs(30)).unwrap();
    let markers = fixture.partitions().count() as i64;
    let frequent_heartbeats = [("INGEST__HEARTBEAT_SECONDS", "1")];
    // The second worker finds only markers to read.
    for _ in 0..2 {
        let worker = fixture.start_worker_with(&frequent_heartbeats);
        let started = Instant::now();
        // Wait until all messages are stored; each partition ends with the marker of the commit.
        while fixture.lag().await > markers
            || worker.last_logged_event("lag").is_none_or(|l| l["lag_messages"] != 0)
        {
            assert!(
                started.elapsed() < Duration::from_secs(90),
                "{:?}",
                worker.last_logged_event("lag")
            );
            sleep(Duration::from_millis(200)).await;
        }
        sleep(Duration::from_secs(8)).await;
        let lag = worker.last_logged_event("lag").unwrap();
        assert_eq!(
            (&lag["end_offsets_known"], &lag["lag_messages"]),
            (&json!(true), &json!(0)),
            "{lag}"
        );
        worker.stop();
    }
    println!("transactions: {} offsets behind the last messages are markers", fixture.lag().await);
    assert_eq!(fixture.lag().await, markers);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_fails_one_call_in_five_and_is_slow() {
    let (count, _) = scenario_size();
    let mut fixture = Fixture::build("the store fails and is slow", 1).await;
    fixture.send_events(count).await;
    let calls = faulty_store::run_workers(&fixture).await;
    println!("the store fails and is slow: {calls}");
    fixture.assert_table_matches_events(1).await;
}

/// `BSAP_CHAOS_ROUNDS` and `BSAP_CHAOS_SEED` set the rounds and the seed. Uses an S3 server if `tests/run`
/// could build one, otherwise a folder.
#[tokio::test(flavor = "multi_thread")]
async fn anything_fails_at_any_time() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("BSAP_CHAOS_ROUNDS").unwrap_or(if scenario_size().1 > 3 { 50 } else { 6 });
    let seed = number("BSAP_CHAOS_SEED").unwrap_or_else(rand::random);
    println!("anything fails at any time: {rounds} rounds, seed {seed}");
    let mut fixture = Fixture::build("anything fails at any time", 1).await.with_catalogue_on_s3();
    let faults = chaos::run_rounds(&mut fixture, rounds as u32, seed).await;
    println!("anything fails at any time: {rounds} rounds, seed {seed}: {faults}");
}

/// Uses an S3 server if `tests/run` could build one, otherwise a folder.
#[tokio::test(flavor = "multi_thread")]
async fn prompt_sets_and_models_are_promoted_and_rolled_back_while_everything_is_killed() {
    let mut fixture = Fixture::build("models and prompt sets", 1).await.with_catalogue_on_s3();
    let (images, rounds, pause) = if scenario_size().1 > 3 { (400, 5, 40) } else { (60, 1, 120) };
    promotion::run(&mut fixture, images, rounds, Duration::from_millis(pause)).await;
}

/// Runs for `BSAP_SOAK_MINUTES`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as many minutes as `just soak` sets"]
async fn steady_load_makes_nothing_grow() {
    let minutes = std::env::var("BSAP_SOAK_MINUTES").map_or(4, |text| text.parse().unwrap());
    let mut fixture = Fixture::build("steady load", 1).await;
    soak::run(&mut fixture, minutes).await;
}
