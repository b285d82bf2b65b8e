//! What ingestion promises, against a real Apache Kafka: every live image is there exactly once with
//! its newest content, and the dead letters are exactly the poison, whatever happens meanwhile.
//!
//!     tests/run kafka                      2,000 messages and 3 kills a scenario
//!     BSAP_KAFKA_LONG=1 tests/run kafka    20,000 messages and 20 kills
//!     just chaos [rounds] [seed]           hundreds of rounds of faults drawn at random
//!     just soak [minutes]                  steady load, and what grows meanwhile
//!
//! Workers are processes of `bsap ingest` with the demo's model, except where faults are injected
//! into the store: there they run inside the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod broker;
mod chaos;
mod compare;
mod events;
mod faulty_store;
mod fixture;
mod minio;
mod promotion;
mod soak;

use std::time::{Duration, Instant};

use bsap::catalogue::StateStore;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use fixture::{Fixture, REEMBED_TOPIC, TOPIC, scenario_size};
use rand::RngExt;
use rdkafka::producer::{FutureProducer, Producer};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Long enough that a worker has joined the group and works.
const JOIN_WAIT: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn workers_join_and_leave() {
    let (count, _) = scenario_size();
    let mut world = Fixture::build("workers join and leave", 1).await;
    world.send_events(count / 2).await;
    let first = world.start_worker();
    sleep(JOIN_WAIT).await;
    let second = world.start_worker();
    sleep(JOIN_WAIT).await;
    let mut third = world.start_worker();
    world.send_events(count / 4).await;
    first.stop();
    let mut fourth = world.start_worker();
    sleep(JOIN_WAIT).await;
    second.stop();
    world.send_events(count / 4).await;
    world.wait_until_caught_up(&mut [&mut third, &mut fourth]).await;
    third.stop();
    fourth.stop();
    world.verify(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_killed() {
    let (count, kills) = scenario_size();
    let mut world = Fixture::build("kill -9", 1).await;
    world.send_events(count / 2).await;
    // They tidy as often as they may, so that some are killed at that.
    let tidy = [("UPKEEP__EVERY_SECONDS", "2"), ("UPKEEP__MERGE_FILES", "3")];
    let mut steady = world.start_worker_with(&tidy);
    let mut victim = world.start_worker_with(&tidy);
    let mut between = 0;
    for _ in 0..kills {
        world.send_events(count / 2 / u64::from(kills)).await;
        sleep(Duration::from_millis(rand::rng().random_range(2_000..6_000))).await;
        // The steady one changes, so that whoever is killed has work in hand.
        std::mem::replace(
            &mut victim,
            std::mem::replace(&mut steady, world.start_worker_with(&tidy)),
        )
        .kill();
        let (committed, positions) = (world.committed_offsets(), world.table_positions().await);
        let ahead = committed.iter().any(|(partition, offset)| *offset < positions[partition]);
        between += u32::from(ahead);
    }
    println!("kill -9: {between} of {kills} kills left Kafka's offsets behind the table's");
    world.wait_until_caught_up(&mut [&mut steady, &mut victim]).await;
    let tidied = world.count_logged_events("compaction");
    println!("kill -9: {tidied} compactions meanwhile");
    assert!(tidied > 0);
    steady.stop();
    victim.stop();
    world.verify(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_brokers_restart_one_by_one() {
    let (count, _) = scenario_size();
    let mut world = Fixture::build("three brokers restart", 3).await;
    let (mut first, mut second) = (world.start_worker(), world.start_worker());
    for i in 0..3 {
        world.send_events(count / 3).await;
        world.cluster.end(i, if i == 0 { "KILL" } else { "TERM" });
        sleep(JOIN_WAIT).await;
        world.cluster.launch(i);
        world.cluster.wait_until_ready();
    }
    world.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    first.stop();
    second.stop();
    world.verify(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_broker_restarts_and_falls_silent() {
    let (count, kills) = scenario_size();
    let silence = Duration::from_secs(if kills > 3 { 60 } else { 15 });
    let mut world = Fixture::build("the broker restarts and falls silent", 1).await;
    let (mut first, mut second) = (world.start_worker(), world.start_worker());
    world.send_events(count / 2).await;
    sleep(JOIN_WAIT).await;
    world.cluster.end(0, "KILL");
    sleep(JOIN_WAIT).await;
    world.cluster.launch(0);
    world.cluster.wait_until_ready();
    world.send_events(count / 2).await;
    world.cluster.freeze(0, true);
    sleep(silence).await;
    world.cluster.freeze(0, false);
    world.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    first.stop();
    second.stop();
    world.verify(1).await;
    // A worker that is told to end does so without its broker too.
    let last = world.start_worker();
    world.send_events(200).await;
    sleep(JOIN_WAIT).await;
    world.cluster.end(0, "KILL");
    last.send_signal("TERM");
    let told = Instant::now();
    let (well, words) = last.wait_until_ended();
    let seconds = told.elapsed().as_secs();
    println!("the broker restarts and falls silent: without it a worker ends within {seconds} s");
    // ingest.drain_seconds, and 15 s for a consumer that leaves.
    assert!(well && seconds < 20 + 15 + 10, "{seconds} s: {words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_sleeps_past_its_session_and_wakes() {
    let (count, kills) = scenario_size();
    let mut world = Fixture::build("a worker sleeps", 1).await;
    world.send_events(count).await;
    let (mut first, mut second) = (world.start_worker(), world.start_worker());
    let (mut fenced, naps) = (0, kills.div_ceil(4).max(2));
    for _ in 0..naps {
        sleep(JOIN_WAIT).await;
        first.send_signal("STOP");
        // Its session ends after 6 s, and the other takes its partitions.
        sleep(Duration::from_secs(9)).await;
        world.send_events(50).await;
        first.send_signal("CONT");
        std::mem::swap(&mut first, &mut second);
    }
    world.wait_until_caught_up(&mut [&mut first, &mut second]).await;
    for worker in [first, second] {
        fenced += worker.count_logged_events("commit.fenced");
        worker.stop();
    }
    println!("a worker sleeps: {naps} naps, {fenced} commits fenced");
    world.verify(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_topic_is_replayed() {
    let (count, _) = scenario_size();
    let mut world = Fixture::build("replay from offset zero", 1).await;
    world.send_events(count).await;
    let mut worker = world.start_worker();
    world.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    world.verify(1).await;

    // Kafka's offsets are not what counts.
    world.reset_group_offsets();
    let mut worker = world.start_worker();
    world.send_events(50).await;
    world.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    world.verify(1).await;

    // A deliberate replay commits every message once more, and changes no image.
    let again = [("SOURCE__REPLAY", "once-more")];
    let mut worker = world.start_worker_with(&again);
    world.wait_until_replayed("once-more", &mut [&mut worker]).await;
    worker.stop();
    world.verify(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_removed_before_they_were_read_are_reported() {
    let mut world = Fixture::build("messages are removed", 1).await;
    world.send_events(200).await;
    let mut worker = world.start_worker();
    world.wait_until_caught_up(&mut [&mut worker]).await;
    // Within its session, so that it comes back to the same partitions and positions.
    worker.send_signal("STOP");
    world.send_events(500).await;
    world.cluster.remove_before(TOPIC, &world.end_offsets()).await;
    worker.send_signal("CONT");
    let (well, words) = worker.wait_until_ended();
    assert!(!well && words.contains("not in the log any more"), "{words}");
    let mut worker = world.start_worker();
    world.send_events(200).await;
    world.wait_until_caught_up(&mut [&mut worker]).await;
    let gaps = worker.count_logged_events("source.gap");
    println!("messages are removed: {gaps} partitions lost some");
    assert!(gaps > 0);
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_models_generation_is_complete_after_worker_kills() {
    let (count, kills) = scenario_size();
    let mut world = Fixture::build("another model", 1).await;
    world.cluster.create(REEMBED_TOPIC, 3, 1 << 20).await;
    world.send_events(count / 2).await;
    let mut live = world.start_worker();
    world.wait_until_caught_up(&mut [&mut live]).await;
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip-gelu");
    let ask = ["reindex", "model", "--checkpoint", other];
    let (_, told) = world.run_command(&["ingest", "--help"]);
    assert!(told.contains("reindex_topic"));
    // A worker of a model that the catalogue does not know says what to do.
    let (code, told) = world.run_worker_to_exit(&[("MODEL__CHECKPOINT", other)]);
    assert!(code == Some(1) && told.contains("bsap reindex model"), "{told}");
    let (code, told) = world.run_command(&ask);
    // Most pictures came inline: nobody can fetch those again.
    assert!(code == Some(1) && told.contains("were sent inline"), "{told}");
    assert!(told.contains("is the standby from revision"), "{told}");
    let state = StateStore::new(&world.store()).read_newest().await.unwrap().unwrap();
    let new = state.standby.unwrap().generation;

    let before = world.newest(&world.generation).await;
    let model = [("MODEL__CHECKPOINT", other)];
    let mut victim = world.start_worker_with(&model);
    let mut steady = world.start_worker_with(&model);
    for _ in 0..kills {
        world.send_events(count / 2 / u64::from(kills)).await;
        sleep(Duration::from_millis(rand::rng().random_range(2_000..6_000))).await;
        std::mem::replace(
            &mut victim,
            std::mem::replace(&mut steady, world.start_worker_with(&model)),
        )
        .kill();
    }
    world.wait_until_caught_up(&mut [&mut live]).await;
    world.wait_until_standby_caught_up(&new, &mut [&mut victim, &mut steady]).await;
    let status = world.run_command_ok(&["status"]);
    assert!(status.contains("0 live events and 0 images to be embedded again are not stored yet"), "{status}");
    let (_, told) = world.run_command(&ask);
    assert!(told.contains("0 are to be embedded again, 0 to be deleted"), "{told}");
    for worker in [live, victim, steady] {
        worker.stop();
    }
    let (first, second) = (world.newest(&world.generation).await, world.newest(&new).await);
    let mut inline = 0;
    for (id, version) in &first {
        // The newest version of an image may have come inline before: of that, nothing can be had.
        if second.get(id) != Some(version) {
            assert_eq!(before.get(id), Some(version), "{id} came later and is missing");
            inline += 1;
        }
    }
    assert!(told.contains(&format!("{inline} images were sent inline")), "{inline}: {told}");
    println!(
        "another model: {} images and deletes, {} in the new generation, {inline} came inline before",
        first.len(),
        second.len()
    );
    assert!(second.len() > first.len() / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_shown_and_sent_again() {
    let mut world = Fixture::build("dead letters", 1).await;
    let picture = world.folder.path().join("pictures/late.jpg");
    std::fs::write(&picture, "no picture").unwrap();
    let uri = url::Url::from_file_path(&picture).unwrap();
    let good = json!({"image_id": "late", "sequence": 1, "uri": uri.as_str()}).to_string();
    // A notification has a sequencer, and this catalogue wants a sequence.
    let object = |key: &str| {
        json!({"eventName": "ObjectRemoved:Delete", "eventSource": "aws:s3",
        "s3": {"bucket": {"name": "b"}, "object": {"key": key, "sequencer": "00"}}})
    };
    let two = json!({"Records": [object("a.jpg"), object("b.jpg")]}).to_string();
    world.send_message("late", &good).await;
    world.send_message("two", &two).await;
    // With the headers of a dead letter it is larger than what clients send unless they are told to.
    world.send_message("large", &"x".repeat(999_400)).await;
    let mut worker = world.start_worker();
    world.wait_until_caught_up(&mut [&mut worker]).await;

    let checked = world.run_command_ok(&["check"]);
    assert!(checked.contains("ok      kafka.brokers"), "{checked}");
    assert!(!checked.contains("FAILED  dead_letter"), "{checked}");
    let table = world.run_command_ok(&["dead-letters", "list"]);
    for words in ["unknown_image_format", "3  in total"] {
        assert!(table.contains(words), "{table}");
    }
    let listed = world.run_command_ok(&["dead-letters", "list", "--json"]);
    let letters: Vec<Value> = listed.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |key: &str| letters.iter().find(|letter| letter["key"] == key).unwrap();
    assert_eq!(of("two")["record"], 0, "{letters:?}");
    let origin = of("late")["origin"].as_str().unwrap();
    let shown = world.run_command_ok(&["dead-letters", "show", origin]);
    assert!(shown.contains("unknown_image_format") && shown.contains(&good), "{shown}");
    assert_eq!(world.run_command_ok(&["dead-letters", "show", origin, "--value"]), good);

    // The cause mended, the message is sent again, and its image is there.
    std::fs::write(&picture, render_jpeg(&Scene::sample(7, 1, PhotoStyle::Studio), 64).unwrap())
        .unwrap();
    let replay = ["dead-letters", "replay", "--code", "unknown_image_format"];
    let dry = world.run_command_ok(&[&replay[..], &["--dry-run"]].concat());
    assert!(dry.contains("1 messages would be sent again"), "{dry}");
    let sent = world.run_command_ok(&replay);
    assert!(sent.contains("1 messages sent again to images"), "{sent}");
    world.wait_until_caught_up(&mut [&mut worker]).await;
    worker.stop();
    let status: Value = serde_json::from_str(&world.run_command_ok(&["status", "--json"])).unwrap();
    assert_eq!(status["table"]["rows"], 1, "{status}");
    let lag: i64 =
        status["partitions"].as_array().unwrap().iter().map(|p| p["lag"].as_i64().unwrap()).sum();
    assert_eq!(lag, 0, "{status}");
    assert!(world.run_command_ok(&["verify"]).contains("1 images"));
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_markers_are_not_lag() {
    let mut world = Fixture::build("transactions", 1).await;
    let producer: FutureProducer =
        world.cluster.client().set("transactional.id", "shop").create().unwrap();
    producer.init_transactions(Duration::from_secs(30)).unwrap();
    producer.begin_transaction().unwrap();
    world.events.send(&producer, TOPIC, 200).await;
    producer.commit_transaction(Duration::from_secs(30)).unwrap();
    let marks = world.partitions().count() as i64;
    let beats = [("INGEST__HEARTBEAT_SECONDS", "1")];
    // A worker that starts later finds nothing but the marks.
    for _ in 0..2 {
        let worker = world.start_worker_with(&beats);
        let started = Instant::now();
        // All that can be stored is stored: each partition ends with the mark of its commit.
        while world.lag().await > marks
            || worker.last_logged_event("lag").is_none_or(|l| l["durable"] != 0)
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
        assert_eq!((&lag["known"], &lag["durable"]), (&json!(true), &json!(0)), "{lag}");
        worker.stop();
    }
    println!("transactions: {} offsets behind the last messages are marks", world.lag().await);
    assert_eq!(world.lag().await, marks);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_fails_one_call_in_five_and_is_slow() {
    let (count, _) = scenario_size();
    let mut world = Fixture::build("the store fails and is slow", 1).await;
    world.send_events(count).await;
    let calls = faulty_store::run_workers(&world).await;
    println!("the store fails and is slow: {calls}");
    world.verify(1).await;
}

/// `BSAP_CHAOS_ROUNDS` and `BSAP_CHAOS_SEED` make it another run. On an S3 server where `tests/run`
/// could build one.
#[tokio::test(flavor = "multi_thread")]
async fn anything_fails_at_any_time() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("BSAP_CHAOS_ROUNDS").unwrap_or(if scenario_size().1 > 3 { 50 } else { 6 });
    let seed = number("BSAP_CHAOS_SEED").unwrap_or_else(rand::random);
    println!("anything fails at any time: {rounds} rounds, seed {seed}");
    let mut world = Fixture::build("anything fails at any time", 1).await.with_catalogue_on_s3();
    let faults = chaos::run_rounds(&mut world, rounds as u32, seed).await;
    println!("anything fails at any time: {rounds} rounds, seed {seed}: {faults}");
}

/// On an S3 server where `tests/run` could build one; else in a folder.
#[tokio::test(flavor = "multi_thread")]
async fn prompt_sets_and_models_are_switched_and_back_while_everything_is_killed() {
    let mut world = Fixture::build("models and prompt sets", 1).await.with_catalogue_on_s3();
    let (images, rounds, pause) = if scenario_size().1 > 3 { (400, 5, 40) } else { (60, 1, 120) };
    promotion::run(&mut world, images, rounds, Duration::from_millis(pause)).await;
}

/// Runs only when it is given its minutes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as long as `just soak` is told"]
async fn steady_load_makes_nothing_grow() {
    let minutes = std::env::var("BSAP_SOAK_MINUTES").map_or(4, |text| text.parse().unwrap());
    let mut world = Fixture::build("steady load", 1).await;
    soak::run(&mut world, minutes).await;
}
