//! Logs and metrics are interfaces: the real program runs, and what it tells is as declared.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "ops/fixture.rs"]
mod fixture;

use std::collections::BTreeSet;
use std::time::Duration;

use bsap::telemetry::{event, metrics};
use fixture::{BsapProcess, Fixture, LogLine, free_port, is_event, read_log_lines, sum_field};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_as_the_catalogue_of_events_declares_it() {
    let mut world = Fixture::with_partitions(2);
    let port = free_port();
    world.set_option("HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    world.set_option("SEARCH__WATCH_SECONDS", "1");
    let mut query_worker = world.start_process("serve", &["serve"]);
    let mut worker = world.start_process("ingest", &["ingest"]);
    for i in 0..20 {
        let uri = world.write_image(&format!("{i}.jpg"), i);
        world.send_upsert(&format!("i{i}"), &uri, 1).await;
    }
    world
        .send_upsert("broken", &world.write_file("broken.jpg", b"\xff\xd8\xff\xe0 no picture"), 1)
        .await;
    world.send_upsert("outside", "file:///etc/passwd", 1).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("00-{trace}-00f067aa0ba902b7-01");
    world.send_traced("x", "this is no event", &traceparent).await;
    let never = world.write_file("never.jpg", b"");
    std::fs::remove_file(world.folder.path().join("pictures/never.jpg")).unwrap();
    world.send_upsert("gone", &never, 1).await;
    world
        .send_message(
            "i1",
            &json!({"image_id": "i1", "operation": "delete", "sequence": 2}).to_string(),
        )
        .await;
    worker.wait_for_line("a batch is stored", |line| is_event(line, event::COMMIT_SUCCEEDED)).await;
    worker.wait_for_line("an image is gone", |line| is_event(line, event::IMAGE_NOT_FOUND)).await;
    worker.wait_for_line("a message is put aside", |line| is_event(line, event::DEAD_LETTER)).await;
    worker.wait_for_line("it says that it is alive", |line| is_event(line, event::HEARTBEAT)).await;
    query_worker
        .wait_for_line("the table is in memory", |line| is_event(line, event::SNAPSHOT_READY))
        .await;
    let filled = |line: &LogLine| {
        is_event(line, event::TABLE_REFRESHED) && line["images"].as_u64() > Some(0)
    };
    query_worker.wait_for_line("images are in memory", filled).await;
    let secret = "a text that nobody else may read";
    let answer = reqwest::Client::new()
        .post(format!("http://127.0.0.1:{port}/v1/search"))
        .header("content-type", "application/json")
        .header("traceparent", &traceparent)
        .body(json!({"text": secret}).to_string())
        .send()
        .await
        .unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    let line = query_worker
        .wait_for_line("a query is answered", |line| is_event(line, event::SEARCH))
        .await;
    assert_eq!(line["trace_id"], trace, "the trace of the request");
    let watched = |line: &LogLine| is_event(line, event::BALANCE_DRIFT) && line["queries"] == 1;
    let line = query_worker.wait_for_line("how far balancing goes", watched).await;
    assert_eq!((&line["calibrated"], line.get("first_moved_then")), (&json!(false), None));
    let put_aside =
        |line: &LogLine| is_event(line, event::DEAD_LETTER) && line["stage"] == "decode_event";
    let line = worker.wait_for_line("the message that is no event is put aside", put_aside).await;
    assert_eq!(line["trace_id"], trace, "the trace of the message");
    worker
        .wait_for_line("how far it is behind", |line| {
            is_event(line, event::LAG) && line["known"] == true
        })
        .await;
    let settled = |lines: &[LogLine]| {
        ["ok", "dead_lettered", "skipped"].map(|f| sum_field(lines, event::COMMIT_SUCCEEDED, f))
    };
    for _ in 0..200 {
        if settled(&worker.log_lines()) == [21, 3, 1] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(settled(&worker.log_lines()), [21, 3, 1], "what became of every event");
    check_metrics_agree_with_log(&worker, &query_worker).await;
    let (worker_log, query_log) = (worker.log.clone(), query_worker.log.clone());
    assert!(worker.stop_gracefully() && query_worker.stop_gracefully());

    world.set_option("LOG__LEVEL", "info");
    let (published, publish_log) = world.run_command(
        "publish",
        &["publish", world.folder.path().join("pictures").to_str().unwrap()],
    );
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    world.set_option("TABLE__URL", "/dev/null/nowhere");
    let (failed, failed_log) = world.run_command("failed", &["ingest"]);
    assert!(!failed.status.success());

    let all: Vec<LogLine> =
        [read_log_lines(&worker_log), read_log_lines(&query_log), publish_log, failed_log]
            .into_iter()
            .flatten()
            .collect();
    let problems: BTreeSet<String> = all.iter().flat_map(event::validate_line).collect();
    assert!(problems.is_empty(), "{problems:#?}");
    let seen: BTreeSet<&str> = all.iter().filter_map(|line| line.get("event")?.as_str()).collect();
    for name in [
        event::START,
        event::STOP,
        event::FATAL,
        event::HEARTBEAT,
        event::COMMIT_SUCCEEDED,
        event::DEAD_LETTER,
        event::IMAGE_NOT_FOUND,
        event::REBALANCE,
        event::SNAPSHOT_READY,
        event::SEARCH,
        event::BALANCE_DRIFT,
        event::PUBLISH,
        event::LAG,
    ] {
        assert!(seen.contains(name), "{name} was not seen, only {seen:?}");
    }
    // What is asked is nobody's business.
    let text = std::fs::read_to_string(query_log).unwrap();
    assert!(!text.contains("nobody else may read"), "{text}");
}

/// What the log told, the metrics tell too, by names that are declared.
async fn check_metrics_agree_with_log(worker: &BsapProcess, query_worker: &BsapProcess) {
    for (process, path, status) in [
        (worker, "/livez", 200),
        (worker, "/readyz", 200),
        (query_worker, "/livez", 200),
        (query_worker, "/readyz", 200),
        (worker, "/other", 404),
    ] {
        assert_eq!(process.http_get(path).await.0, status, "{path}");
    }
    // Where the logs end is told every 5 s; until then the lag is not known.
    let mut of_worker = String::new();
    for _ in 0..200 {
        of_worker = worker.http_get("/metrics").await.1;
        if of_worker.lines().any(|line| line == "bsap_lag_messages 0") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, of_queries) = query_worker.http_get("/metrics").await;
    let has = |text: &str, line: &str| {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in {text}");
    };
    has(&of_worker, "bsap_build_info{version=");
    has(&of_worker, "bsap_ingest_events_total{outcome=\"embedded\"} 20");
    has(&of_worker, "bsap_ingest_events_total{outcome=\"deleted\"} 1");
    has(&of_worker, "bsap_ingest_events_total{outcome=\"gone\"} 1");
    has(&of_worker, "bsap_ingest_events_total{outcome=\"dead_lettered\"} 3");
    has(&of_worker, "bsap_dead_letters_total{stage=\"decode_image\",code=\"image_damaged\"} 1");
    has(&of_worker, "bsap_log_events_total{event=\"dead_letter\",level=\"warn\"} 3");
    has(&of_worker, "bsap_rows_stored_total 21");
    has(&of_worker, "bsap_lag_messages 0");
    has(&of_worker, "bsap_partitions 2");
    has(&of_worker, "bsap_stage_seconds_count{stage=\"embed\"} 20");
    has(&of_queries, "bsap_snapshot_ready 1");
    for part in ["text", "wait", "scan", "rank"] {
        has(&of_queries, &format!("bsap_search_seconds_count{{part=\"{part}\"}} 1"));
    }
    has(&of_queries, "bsap_http_requests_total{route=\"/v1/search\",status=\"200\"} 1");
    for line in of_worker.lines().chain(of_queries.lines()).filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let known =
            |name: &str| metrics::METRIC_DESCRIPTIONS.iter().any(|metric| metric.name == name);
        assert!(known(name) || base.is_some_and(known), "{name} is not declared");
    }
}
