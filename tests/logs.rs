//! The log is an interface: the real program runs, and every line of its log is as declared.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "ops/world.rs"]
mod world;

use std::collections::BTreeSet;

use bsap::telemetry::event;
use serde_json::json;
use world::{Line, World, free_port, is, lines};

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_as_the_catalogue_of_events_declares_it() {
    let mut world = World::build(2);
    let port = free_port();
    world.set("HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    let mut query_worker = world.start("serve", &["serve"]);
    let mut worker = world.start("ingest", &["ingest"]);
    for i in 0..20 {
        let uri = world.picture(&format!("{i}.jpg"), i);
        world.upsert(&format!("i{i}"), &uri, 1).await;
    }
    world.upsert("broken", &world.file("broken.jpg", b"\xff\xd8\xff\xe0 no picture"), 1).await;
    world.upsert("outside", "file:///etc/passwd", 1).await;
    world.send("x", "this is no event").await;
    let never = world.file("never.jpg", b"");
    std::fs::remove_file(world.folder.path().join("pictures/never.jpg")).unwrap();
    world.upsert("gone", &never, 1).await;
    world
        .send("i1", &json!({"image_id": "i1", "operation": "delete", "sequence": 2}).to_string())
        .await;
    worker.until("a batch is stored", |line| is(line, event::BATCH_DONE)).await;
    worker.until("an image is gone", |line| is(line, event::GONE)).await;
    worker.until("a message is put aside", |line| is(line, event::DEAD_LETTER)).await;
    worker.until("it says that it is alive", |line| is(line, event::HEARTBEAT)).await;
    query_worker.until("the table is in memory", |line| is(line, event::SNAPSHOT_READY)).await;
    let secret = "a text that nobody else may read";
    let answer = reqwest::Client::new()
        .post(format!("http://127.0.0.1:{port}/v1/search"))
        .header("content-type", "application/json")
        .body(json!({"text": secret}).to_string())
        .send()
        .await
        .unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    query_worker.until("a query is answered", |line| is(line, event::SEARCH)).await;
    let (worker_log, query_log) = (worker.log.clone(), query_worker.log.clone());
    assert!(worker.stop() && query_worker.stop());

    world.set("LOG__LEVEL", "info");
    let (published, publish_log) =
        world.run("publish", &["publish", world.folder.path().join("pictures").to_str().unwrap()]);
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    world.set("TABLE__URL", "/dev/null/nowhere");
    let (failed, failed_log) = world.run("failed", &["ingest"]);
    assert!(!failed.status.success());

    let all: Vec<Line> = [lines(&worker_log), lines(&query_log), publish_log, failed_log]
        .into_iter()
        .flatten()
        .collect();
    let problems: BTreeSet<String> = all.iter().flat_map(event::problems).collect();
    assert!(problems.is_empty(), "{problems:#?}");
    let seen: BTreeSet<&str> = all.iter().filter_map(|line| line.get("event")?.as_str()).collect();
    for name in [
        event::START,
        event::STOP,
        event::FATAL,
        event::HEARTBEAT,
        event::BATCH_DONE,
        event::DEAD_LETTER,
        event::GONE,
        event::REBALANCE,
        event::SNAPSHOT_READY,
        event::SEARCH,
        event::PUBLISH,
    ] {
        assert!(seen.contains(name), "{name} was not seen, only {seen:?}");
    }
    // What is asked is nobody's business.
    let text = std::fs::read_to_string(query_log).unwrap();
    assert!(!text.contains("nobody else may read"), "{text}");
}
