//! Logs and metrics are documented interfaces: runs the real program and checks its events and
//! metrics against their definitions.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "ops/fixture.rs"]
mod fixture;

use std::collections::BTreeSet;
use std::time::Duration;

use bsap::telemetry::{event, event_reference, metrics};
use fixture::{BsapProcess, Fixture, LogLine, free_port, is_event, read_log_lines, sum_field};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn every_log_line_matches_the_definition_of_its_event() {
    let mut fixture = Fixture::with_partitions(2);
    let port = free_port();
    fixture.set_option("HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    fixture.set_option("SEARCH__DRIFT_INTERVAL_SECONDS", "1");
    fixture.set_option("SEARCH__FIT_INTERVAL_SECONDS", "1");
    let mut query_worker = fixture.start_process("serve", &["serve"]);
    let mut worker = fixture.start_process("ingest", &["ingest"]);
    for i in 0..20 {
        let uri = fixture.write_image(&format!("{i}.jpg"), i);
        fixture.send_upsert(&format!("i{i}"), &uri, 1).await;
    }
    fixture
        .send_upsert("broken", &fixture.write_file("broken.jpg", b"\xff\xd8\xff\xe0 no picture"), 1)
        .await;
    fixture.send_upsert("outside", "file:///etc/passwd", 1).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("00-{trace}-00f067aa0ba902b7-01");
    fixture.send_traced("x", "this is no event", &traceparent).await;
    let removed = fixture.write_file("removed.jpg", b"");
    std::fs::remove_file(fixture.folder.path().join("pictures/removed.jpg")).unwrap();
    fixture.send_upsert("removed", &removed, 1).await;
    fixture
        .send_message(
            "i1",
            &json!({"image_id": "i1", "operation": "delete", "sequence": 2}).to_string(),
        )
        .await;
    worker.wait_for_line("a commit succeeds", |line| is_event(line, event::COMMIT_SUCCEEDED)).await;
    worker.wait_for_line("a file is missing", |line| is_event(line, event::IMAGE_NOT_FOUND)).await;
    worker
        .wait_for_line("a message is dead-lettered", |line| is_event(line, event::DEAD_LETTER))
        .await;
    worker
        .wait_for_line("the worker logs a heartbeat", |line| is_event(line, event::HEARTBEAT))
        .await;
    query_worker
        .wait_for_line("the table is in memory", |line| is_event(line, event::SNAPSHOT_READY))
        .await;
    let has_images = |line: &LogLine| {
        is_event(line, event::TABLE_REFRESHED) && line["images"].as_u64() > Some(0)
    };
    query_worker.wait_for_line("images are in memory", has_images).await;
    let secret = "a text that must not be logged";
    let response = reqwest::Client::new()
        .post(format!("http://127.0.0.1:{port}/v1/search"))
        .header("content-type", "application/json")
        .header("traceparent", &traceparent)
        .body(json!({"text": secret}).to_string())
        .send()
        .await
        .unwrap();
    assert!(response.status().is_success(), "{}", response.text().await.unwrap());
    let line = query_worker
        .wait_for_line("a query is answered", |line| is_event(line, event::SEARCH))
        .await;
    assert_eq!(line["trace_id"], trace, "the trace of the request");
    let has_query = |line: &LogLine| is_event(line, event::BALANCE_DRIFT) && line["queries"] == 1;
    let line = query_worker.wait_for_line("drift is measured", has_query).await;
    assert_eq!((&line["calibrated"], line.get("top_hit_changed_baseline")), (&json!(false), None));
    let has_query = |line: &LogLine| is_event(line, event::BALANCE_FIT) && line["queries"] == 1;
    let line = query_worker.wait_for_line("the fit is not known yet", has_query).await;
    assert_eq!(
        (&line["role"], &line["images"], line.get("fit")),
        (&json!("live"), &json!(0), None)
    );
    let is_invalid_event =
        |line: &LogLine| is_event(line, event::DEAD_LETTER) && line["stage"] == "decode_event";
    let line = worker.wait_for_line("the invalid event is dead-lettered", is_invalid_event).await;
    assert_eq!(line["trace_id"], trace, "the trace of the message");
    worker
        .wait_for_line("the lag is known", |line| {
            is_event(line, event::LAG) && line["end_offsets_known"] == true
        })
        .await;
    let outcomes = |lines: &[LogLine]| {
        ["succeeded", "dead_lettered", "not_found"]
            .map(|field| sum_field(lines, event::COMMIT_SUCCEEDED, field))
    };
    for _ in 0..200 {
        if outcomes(&worker.log_lines()) == [21, 3, 1] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(outcomes(&worker.log_lines()), [21, 3, 1], "every event has one outcome");
    check_metrics_agree_with_log(&worker, &query_worker).await;
    let (worker_log, query_log) = (worker.log.clone(), query_worker.log.clone());
    assert!(worker.stop_gracefully() && query_worker.stop_gracefully());

    fixture.set_option("LOG__LEVEL", "info");
    let (published, publish_log) = fixture.run_command(
        "publish",
        &["publish", fixture.folder.path().join("pictures").to_str().unwrap()],
    );
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    fixture.set_option("TABLE__URL", "/dev/null/nowhere");
    let (failed, failed_log) = fixture.run_command("failed", &["ingest"]);
    assert!(!failed.status.success());

    let all: Vec<LogLine> =
        [read_log_lines(&worker_log), read_log_lines(&query_log), publish_log, failed_log]
            .into_iter()
            .flatten()
            .collect();
    let problems: BTreeSet<String> =
        all.iter().flat_map(event_reference::validate_log_line).collect();
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
        event::BALANCE_FIT,
        event::PUBLISH,
        event::LAG,
    ] {
        assert!(seen.contains(name), "{name} was not seen, only {seen:?}");
    }
    // By default, texts of queries are not logged.
    let text = std::fs::read_to_string(query_log).unwrap();
    assert!(!text.contains("must not be logged"), "{text}");
}

/// Checks that the metrics agree with the log, and that all of them are declared.
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
    // Kafka reports the end offsets every 5 s; until then the lag is not known.
    let mut worker_metrics = String::new();
    for _ in 0..200 {
        worker_metrics = worker.http_get("/metrics").await.1;
        if worker_metrics.lines().any(|line| line == "bsap_lag_messages 0") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, query_worker_metrics) = query_worker.http_get("/metrics").await;
    let assert_has = |text: &str, line: &str| {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in {text}");
    };
    assert_has(&worker_metrics, "bsap_build_info{version=");
    assert_has(&worker_metrics, "bsap_ingest_events_total{outcome=\"embedded\"} 20");
    assert_has(&worker_metrics, "bsap_ingest_events_total{outcome=\"deleted\"} 1");
    assert_has(&worker_metrics, "bsap_ingest_events_total{outcome=\"not_found\"} 1");
    assert_has(&worker_metrics, "bsap_ingest_events_total{outcome=\"dead_lettered\"} 3");
    assert_has(
        &worker_metrics,
        "bsap_dead_letters_total{stage=\"decode_image\",code=\"image_damaged\"} 1",
    );
    assert_has(&worker_metrics, "bsap_log_events_total{event=\"dead_letter\",level=\"warn\"} 3");
    assert_has(&worker_metrics, "bsap_rows_stored_total 21");
    assert_has(&worker_metrics, "bsap_lag_messages 0");
    assert_has(&worker_metrics, "bsap_assigned_partitions 2");
    assert_has(&worker_metrics, "bsap_ingest_stage_seconds_count{stage=\"embed\"} 20");
    assert_has(&query_worker_metrics, "bsap_snapshot_ready 1");
    for phase in ["embed", "wait", "scan", "rank"] {
        assert_has(
            &query_worker_metrics,
            &format!("bsap_search_seconds_count{{phase=\"{phase}\"}} 1"),
        );
    }
    assert_has(
        &query_worker_metrics,
        "bsap_http_requests_total{route=\"/v1/search\",status=\"200\"} 1",
    );
    for line in worker_metrics
        .lines()
        .chain(query_worker_metrics.lines())
        .filter(|line| !line.starts_with('#'))
    {
        let name = line.split(['{', ' ']).next().unwrap();
        let base_name =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let is_declared =
            |name: &str| metrics::METRIC_DESCRIPTIONS.iter().any(|metric| metric.name == name);
        assert!(is_declared(name) || base_name.is_some_and(is_declared), "{name} is not declared");
    }
}

/// People search, the query worker measures how the prompt set fits their queries, and its log becomes a
/// candidate by one command.
#[tokio::test(flavor = "multi_thread")]
async fn the_fit_to_queries_is_measured_and_their_log_becomes_a_candidate() {
    let mut fixture = Fixture::with_partitions(1);
    let port = free_port();
    fixture.set_option("HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    fixture.set_option("SEARCH__FIT_INTERVAL_SECONDS", "1");
    fixture.set_option("LOG__QUERY_TEXT", "true");
    let mut worker = fixture.start_process("ingest", &["ingest"]);
    let mut query_worker = fixture.start_process("serve", &["serve"]);
    for i in 0..40 {
        let uri = fixture.write_image(&format!("{i}.jpg"), i);
        fixture.send_upsert(&format!("i{i}"), &uri, 1).await;
    }
    let is_loaded = |line: &LogLine| {
        (is_event(line, event::TABLE_REFRESHED) || is_event(line, event::SNAPSHOT_READY))
            && line["images"].as_u64() == Some(40)
    };
    query_worker.wait_for_line("all images are in memory", is_loaded).await;
    let client = reqwest::Client::new();
    let post = |text: String| {
        let url = format!("http://127.0.0.1:{port}/v1/search");
        client.post(url).header("content-type", "application/json").body(text).send()
    };
    for colour in
        ["red", "blue", "green", "yellow", "black", "white", "pink", "grey", "brown", "orange"]
    {
        for thing in [
            "mug", "shirt", "hat", "lamp", "chair", "shoe", "bag", "clock", "vase", "book", "cup",
            "table",
        ] {
            for _ in 0..2 {
                let body = json!({"text": format!("a {colour} {thing}"), "k": 1}).to_string();
                assert!(post(body).await.unwrap().status().is_success());
            }
        }
    }
    let is_measured = |line: &LogLine| is_event(line, event::BALANCE_FIT) && line["queries"] == 120;
    let line = query_worker.wait_for_line("the fit is measured", is_measured).await;
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let fit = number(&line["fit"]);
    assert!(number(&line["fit_low"]) <= fit && fit <= number(&line["fit_high"]), "{line:?}");
    assert_eq!((&line["images"], &line["weight"]), (&json!(40), &json!(0.25)));
    assert!(line["concentration"].is_f64() && line["proposed_weight"].is_f64());
    let state = reqwest::get(format!("http://127.0.0.1:{port}/v1/state")).await.unwrap();
    let state: serde_json::Value = serde_json::from_str(&state.text().await.unwrap()).unwrap();
    let bank = &state["prompt_sets"][0]["bank"];
    assert!((number(&bank["fit"]["value"]) - fit).abs() < 1e-9, "{bank} {line:?}");
    assert_eq!((&bank["queries"], &bank["fit"]["queries"]), (&json!(120), &json!(120)));
    let (_, metrics) = query_worker.http_get("/metrics").await;
    let metric = |name: &str| -> f64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} is not in {metrics}")).trim().parse().unwrap()
    };
    let live_fit = metric("bsap_balance_fit{role=\"live\",bound=\"value\"}");
    assert!((live_fit - fit).abs() < 1e-9, "{live_fit} {fit}");
    assert_eq!(metric("bsap_balance_fit_queries{role=\"live\"}"), 120.0);
    assert_eq!(metric("bsap_balance_weight{role=\"live\",kind=\"served\"}"), 0.25);
    assert!(metric("bsap_balance_fit{role=\"candidate\",bound=\"value\"}").is_nan());

    let arguments = ["prompts", "suggest", "--query-log", "serve.log", "--name", "recent"];
    let arguments = [&arguments[..], &["--out", "recent.toml", "--candidate", "recent"]].concat();
    let (output, _) = fixture.run_command("suggest", &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for words in
        ["56 texts in the pool, 64 held out", "everyday-nouns", "demo@1, served now", "Fit "]
    {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    let file = std::fs::read_to_string(fixture.folder.path().join("recent.toml")).unwrap();
    assert!(file.contains("without judged queries") && file.contains("\"a "), "{file}");
    assert!(text.contains("recent is the candidate"), "{text}");

    // The query worker loads the candidate and measures it too.
    let is_candidate =
        |line: &LogLine| is_event(line, event::BALANCE_FIT) && line["role"] == "candidate";
    let line = query_worker.wait_for_line("the candidate is measured", is_candidate).await;
    assert_eq!((&line["configuration"], &line["texts"]), (&json!("recent"), &json!(56)));
    let mut shown = String::new();
    for _ in 0..100 {
        let (output, _) = fixture.run_command("show", &["candidate", "show"]);
        shown = String::from_utf8(output.stdout).unwrap();
        if shown.contains("fit         fit ") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(shown.contains("for 120 recent queries; proposed weight"), "{shown}");
    let problems: BTreeSet<String> =
        query_worker.log_lines().iter().flat_map(event_reference::validate_log_line).collect();
    assert!(problems.is_empty(), "{problems:#?}");
    assert!(worker.child.try_wait().unwrap().is_none(), "the worker still runs");
}

/// Part of every planted secret.
const PLANT: &str = "pl4nted";

/// Returns the lines of `text` that have a planted secret.
fn leaks<'a>(name: &'a str, text: &'a str) -> impl Iterator<Item = String> + 'a {
    text.lines().filter(|line| line.contains(PLANT)).map(move |line| format!("{name}: {line}"))
}

/// Secrets are planted in every place that takes them; no output, log, metric or answer has one.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_leaves_the_program() {
    let mut fixture = Fixture::with_partitions(1);
    let pictures = start_picture_host().await;
    let collector = Collector::start().await;
    let port = free_port();
    for (option, value) in [
        ("HTTP__LISTEN", format!("127.0.0.1:{port}").as_str()),
        ("KAFKA__PROPERTIES__SASL_PASSWORD", "sasl-pl4nted"),
        ("TABLE__STORE_OPTIONS__AWS_SECRET_ACCESS_KEY", "table-pl4nted"),
        ("FETCH__STORE_OPTIONS__AWS_SESSION_TOKEN", "fetch-pl4nted"),
        ("FETCH__ALLOWED_PRIVATE_URL_PREFIXES", &pictures),
        ("OTLP__ENDPOINT", &format!("http://otlp:otlp-pl4nted@{}", collector.address)),
        ("OTLP__INTERVAL_SECONDS", "1"),
        ("LOG__QUERY_TEXT", "true"),
        ("HTTP__WORKER_METRICS_URLS", "http://me:metrics-pl4nted@127.0.0.1:9/metrics"),
        ("ATTRIBUTES__LINK", "text"),
        ("ATTRIBUTES__PRICE", "number"),
    ] {
        fixture.set_option(option, value);
    }
    let mut worker = fixture.start_process("ingest", &["ingest"]);
    let mut query_worker = fixture.start_process("serve", &["serve"]);
    let secret_link = "https://me:link-pl4nted@host/?token=link-pl4nted";
    let event = |id: &str, uri: &str, price: &serde_json::Value| {
        let attributes = json!({"link": secret_link, "price": price});
        json!({"image_id": id, "uri": uri, "sequence": 1, "attributes": attributes}).to_string()
    };
    let signed =
        "X-Amz-Signature=signed-pl4nted&X-Goog-Signature=signed-pl4nted&sig=signed-pl4nted";
    let stored = format!("{pictures}a.jpg?{signed}");
    fixture.send_message("stored", &event("stored", &stored, &json!(1))).await;
    let refused = [
        format!("{pictures}missing.jpg?{signed}"),
        format!("{pictures}broken.jpg?{signed}"),
        format!("{pictures}error.jpg?{signed}"),
        "http://me:user-pl4nted@127.0.0.1:9/a.jpg".to_owned(),
        "http://me:sl/ash-pl4nted@127.0.0.1:9/a.jpg".to_owned(),
        format!("s3://bucket/a.jpg?{signed}"),
        format!("ftp://me:ftp-pl4nted@host/a?{signed}"),
        "s3://id:key-pl4nted@bucket/../a.jpg".to_owned(),
    ];
    for (i, uri) in refused.iter().enumerate() {
        let id = format!("refused-{i}");
        fixture.send_message(&id, &event(&id, uri, &json!(1))).await;
    }
    fixture.send_message("typed", &event("typed", &stored, &json!(secret_link))).await;
    let signed_header = ("authorization", "Bearer header-pl4nted");
    let poison = format!("no event: {secret_link}");
    fixture.send_with_header("https://me:id-pl4nted@host/", &poison, signed_header).await;
    let processed = |lines: &[LogLine]| {
        ["succeeded", "dead_lettered", "not_found"]
            .map(|field| sum_field(lines, event::COMMIT_SUCCEEDED, field))
            .iter()
            .sum::<u64>()
    };
    worker.wait_for_line("a commit succeeds", |line| is_event(line, event::COMMIT_SUCCEEDED)).await;
    for _ in 0..600 {
        if processed(&worker.log_lines()) == 11 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(processed(&worker.log_lines()), 11, "every event has an outcome");
    let has_image = |line: &LogLine| line["images"].as_u64() == Some(1);
    let is_loaded = |line: &LogLine| {
        is_event(line, event::SNAPSHOT_READY) || is_event(line, event::TABLE_REFRESHED)
    };
    query_worker
        .wait_for_line("the image is in memory", |line| is_loaded(line) && has_image(line))
        .await;
    worker.wait_for_line("the collector fails", |line| is_event(line, event::OTLP_FAILED)).await;

    let mut leaked: Vec<String> = Vec::new();
    let base = format!("http://127.0.0.1:{port}");
    let client = reqwest::Client::new();
    let search = |body: serde_json::Value| {
        client
            .post(format!("{base}/v1/search"))
            .header("content-type", "application/json")
            .body(body.to_string())
    };
    let get = |path: &str| client.get(format!("{base}{path}"));
    for (name, request, is_success) in [
        ("search", search(json!({"text": "a mug"})), true),
        ("state", get("/v1/state"), true),
        ("image", get("/v1/images?id=stored"), true),
        ("picture", get("/v1/images/picture?id=stored"), true),
        (
            "facets",
            search(json!({"text": "a mug", "filter": {"eq": {"link": "https://me:x-pl4nted@h/"}}})),
            true,
        ),
        (
            "query",
            search(json!({"text": "me:x https://me:text-pl4nted@h/?sig=text-pl4nted"})),
            true,
        ),
        ("unknown path", get("/v1/https://me:x-pl4nted@h/?token=x-pl4nted"), false),
        ("unknown parameter", get("/v1/images/newest?limit=https://me:x-pl4nted@h/"), false),
        (
            "headers",
            search(json!({"text": 7}))
                .header("authorization", "Bearer sent-pl4nted")
                .header("cookie", "bsap_session=sent-pl4nted")
                .header("traceparent", "00-https://me:x-pl4nted@h/-1")
                .header("x-forwarded-prefix", "https://me:x-pl4nted@h/"),
            false,
        ),
        ("no json", search(json!("https://me:x-pl4nted@h/")), false),
        ("unknown field", search(json!({"text": "a mug", "https://me:x-pl4nted@h/": 1})), false),
        ("unknown image", get("/v1/images?id=https:%2F%2Fme:x-pl4nted@h%2F"), false),
        ("metrics", client.get(format!("http://{}/metrics", worker.metrics_address)), true),
        ("metrics", client.get(format!("http://{}/metrics", query_worker.metrics_address)), true),
    ] {
        let response = request.send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status.is_success(), is_success, "{name}: {text}");
        if name == "search" || name == "image" {
            assert!(text.contains("(hidden)"), "{name}: {text}");
        }
        leaked.extend(leaks(name, &text));
    }
    let folder = fixture.folder.path().to_owned();
    let files = [
        ("typo.toml", "[kafka.properties]\n'sasl.pasword' = 'file-pl4nted'\n'ssl.key.pem' = 7\n"),
        ("type.toml", "[kafka]\nproperties = 'sasl.password=file-pl4nted'\n"),
        ("number.toml", "[table.store_options]\naws_secret_acces_key = 'file-pl4nted'\n"),
        ("syntax.toml", "[kafka.properties]\n'sasl.password' = file-pl4nted\n"),
    ];
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let server = format!("http://me:server-pl4nted@127.0.0.1:{port}");
    let pictures_folder = folder.join("pictures");
    let pictures_folder = pictures_folder.to_str().unwrap();
    for (name, arguments, is_success) in [
        // Its port is in use.
        ("check", &["check"][..], false),
        ("show", &["config", "show"], true),
        ("status", &["status"], true),
        ("status-json", &["status", "--json"], true),
        ("search", &["search", "--server", &server, "--json", "a mug"], false),
        ("search-table", &["search", "--json", "a mug"], true),
        ("unreachable", &["search", "--server", "http://me:x-pl4nted@127.0.0.1:9", "a mug"], false),
        ("letters", &["dead-letters", "list", "--limit", "100"], true),
        ("letters-json", &["dead-letters", "list", "--json"], true),
        ("letter", &["dead-letters", "show", "images[0]@10"], true),
        ("replay", &["dead-letters", "replay", "--all", "--dry-run"], true),
        ("reconcile", &["reconcile", pictures_folder, "--json"], true),
        ("bucket", &["reconcile", "s3://id:x-pl4nted@bucket//a"], false),
        ("publish", &["publish", "s3://id:x-pl4nted@bucket//a", "--dry-run"], false),
        ("typo", &["--config", "typo.toml", "config", "show"], false),
        ("type", &["--config", "type.toml", "check"], false),
        ("number", &["--config", "number.toml", "ingest"], false),
        ("syntax", &["--config", "syntax.toml", "serve"], false),
    ] {
        let (output, _) = fixture.run_command(name, arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), is_success, "{name}: {text}");
        leaked.extend(leaks(name, &text));
    }
    // What only the environment has, and what no file may say.
    let secret_variables = [
        ("HF_ENDPOINT", "http://me:hub-pl4nted@127.0.0.1:9"),
        ("HF_TOKEN", "hub-token-pl4nted"),
        ("HTTPS_PROXY", "http://me:proxy-pl4nted@127.0.0.1:9"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=otel-pl4nted,broken-pl4nted"),
        ("BSAP_OTLP__ENDPOINT", "otlp:otlp-pl4nted@127.0.0.1"),
        ("BSAP_TABLE__URL", "s3://id:url-pl4nted@bucket/a?sig=url-pl4nted"),
        ("AWS_ENDPOINT", "http://me:endpoint-pl4nted@127.0.0.1:9"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "worker"),
        ("AWS_SECRET_ACCESS_KEY", "aws-pl4nted"),
        ("BSAP_MODEL__CHECKPOINT", "someone/model"),
        ("BSAP_KAFKA__BROKERS", "SASL_SSL://me:brokers-pl4nted@127.0.0.1:9"),
        ("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "1000"),
        ("BSAP_FETCH__ALLOWED_PRIVATE_URL_PREFIXES", "http://me:prefix-pl4nted@h/,7"),
    ];
    let commands = [&["check"][..], &["status", "--json"], &["config", "show"]];
    let each = secret_variables.chunks(1).map(|one| (one, &commands[2..]));
    for (variables, commands) in each.chain([(&secret_variables[..], &commands[..])]) {
        for arguments in commands {
            let (output, _) = fixture.run_command_with_env("variables", arguments, variables);
            for text in [&output.stdout, &output.stderr] {
                leaked.extend(leaks(variables[0].0, &String::from_utf8_lossy(text)));
            }
        }
    }
    assert!(worker.stop_gracefully() && query_worker.stop_gracefully());
    let exported = collector.received();
    assert!(exported.contains("resourceSpans") && exported.contains("(hidden)"), "{exported}");
    leaked.extend(leaks("otlp", &exported));
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "log" || extension == "stderr") {
            let text = std::fs::read_to_string(&path).unwrap();
            leaked.extend(leaks(path.to_str().unwrap(), &text));
        }
    }
    assert!(leaked.is_empty(), "{leaked:#?}");
}

/// A collector of OpenTelemetry that keeps what it refuses.
struct Collector {
    address: std::net::SocketAddr,
    bodies: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
}

impl Collector {
    async fn start() -> Self {
        use axum::http::StatusCode;
        let bodies: std::sync::Arc<std::sync::Mutex<Vec<String>>> = std::sync::Arc::default();
        let kept = bodies.clone();
        let app = axum::Router::new().fallback(move |body: String| {
            kept.lock().unwrap().push(body);
            std::future::ready(StatusCode::BAD_REQUEST)
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, bodies }
    }

    fn received(&self) -> String {
        self.bodies.lock().unwrap().join("\n").replace(',', ",\n")
    }
}

/// Starts a host with one picture, a broken one and one that fails; returns its URL prefix.
async fn start_picture_host() -> String {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;
    use bsap::demo::catalogue::{PhotoStyle, Scene};
    let jpeg = bsap::demo::draw::render_jpeg(&Scene::sample(1, 1, PhotoStyle::Studio), 64).unwrap();
    let app = Router::new()
        .route("/a.jpg", get(move || std::future::ready(jpeg.clone())))
        .route("/broken.jpg", get(|| async { "no picture" }))
        .route("/error.jpg", get(|| async { StatusCode::INTERNAL_SERVER_ERROR }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}/")
}
