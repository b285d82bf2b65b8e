//! Whether messages can be consumed, and otherwise why not: each cause has a state of its own in `bsap status`,
//! `bsap check`, the log, the metrics and the readiness probe.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep;

use crate::broker::{ACCOUNT, Cluster, Operation, Resource};
use crate::fixture::{DEAD_LETTER_TOPIC, Fixture, GROUP, TOPIC, WorkerProcess};
use crate::topics::wait_for_state;

const STATE_TIMEOUT: Duration = Duration::from_secs(60);
const METRICS: &str = "127.0.0.1:29464";

/// Waits until a worker logs `state`, and its probe and its metrics agree.
async fn wait_for_worker_state(worker: &WorkerProcess, state: &str) {
    let get = async |path: &str| {
        let response = reqwest::get(format!("http://{METRICS}/{path}")).await?;
        let status = response.status().as_u16();
        response.text().await.map(|text| (status, text))
    };
    let is_consuming = ["consuming", "dead_letter_topic_missing"].contains(&state);
    let started = Instant::now();
    loop {
        let logged = worker.last_logged_event("source.state");
        let (metrics, ready) = (get("metrics").await, get("readyz").await);
        let gauge = format!("bsap_source_state{{state=\"{state}\"}} 1");
        if logged.as_ref().is_some_and(|event| event["state"] == state)
            && let (Ok((_, metrics)), Ok((status, text))) = (&metrics, &ready)
            && metrics.lines().any(|line| line.starts_with(&gauge))
            && (is_consuming || metrics.contains("bsap_lag_messages NaN"))
            && match state {
                "consuming" => (*status, text.as_str()) == (200, "ready\n"),
                _ => *status == 503 && text.starts_with(state),
            }
        {
            println!("{state}: {}", logged.unwrap()["detail"]);
            return;
        }
        assert!(started.elapsed() < STATE_TIMEOUT, "not {state}: {logged:?} {ready:?}");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_topics_partitions_and_brokers_are_states() {
    let mut fixture = Fixture::with_cluster("states", Cluster::start(1), 1).await;
    let options = [("SOURCE__LOG_CHECK_SECONDS", "1"), ("METRICS__LISTEN", METRICS)];
    let worker = fixture.start_worker_with(&options);
    wait_for_worker_state(&worker, "consuming").await;
    wait_for_state(&fixture, "consuming").await;

    fixture.cluster.delete_topic(DEAD_LETTER_TOPIC).await;
    wait_for_worker_state(&worker, "dead_letter_topic_missing").await;
    assert_eq!(fixture.status().0, 4);
    let (_, checked) = fixture.run_command(&["check"]);
    assert!(checked.contains("FAILED  dead_letter.topic"), "{checked}");
    fixture.cluster.create_topic(DEAD_LETTER_TOPIC, 1, 2_000_000).await;
    wait_for_worker_state(&worker, "consuming").await;

    fixture.cluster.delete_topic(TOPIC).await;
    wait_for_worker_state(&worker, "topic_missing").await;
    let (code, status) = fixture.status();
    let found = (code, &status["state"], &status["lag_messages"], &status["partitions"]);
    assert_eq!(found, (6, &json!("topic_missing"), &json!(null), &json!(null)), "{status}");
    fixture.cluster.create_topic(TOPIC, 1, 1_000_000).await;
    wait_for_worker_state(&worker, "consuming").await;

    worker.stop();
    let (code, status) = fixture.status();
    assert_eq!((code, &status["state"]), (3, &json!("no_partitions_assigned")), "{status}");

    let worker = fixture.start_worker_with(&options);
    wait_for_worker_state(&worker, "consuming").await;
    fixture.cluster.stop_broker(0, "KILL");
    wait_for_worker_state(&worker, "brokers_unreachable").await;
    let (code, status) = fixture.status();
    let found = (code, &status["state"], &status["lag_messages"]);
    assert_eq!(found, (9, &json!("brokers_unreachable"), &json!(null)), "{status}");
    fixture.cluster.launch_broker(0);
    fixture.cluster.wait_until_ready();
    wait_for_worker_state(&worker, "consuming").await;
    worker.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_missing_rights_are_states() {
    let mut fixture = Fixture::with_cluster("rights", Cluster::start_secured(), 1).await;
    // The catalogue exists before anything is refused.
    let worker = fixture.start_worker();
    wait_for_state(&fixture, "consuming").await;
    worker.stop();

    let (account, password) = ACCOUNT;
    fixture.set_option("KAFKA__BROKERS", &fixture.cluster.sasl_bootstrap_server());
    fixture.set_option("SOURCE__LOG_CHECK_SECONDS", "1");
    fixture.set_option("METRICS__LISTEN", METRICS);
    for (property, value) in [
        ("SECURITY_PROTOCOL", "SASL_PLAINTEXT"),
        ("SASL_MECHANISM", "PLAIN"),
        ("SASL_USERNAME", account),
        ("SASL_PASSWORD", "wrong-password"),
    ] {
        fixture.set_option(&format!("KAFKA__PROPERTIES__{property}"), value);
    }
    let (code, status) = fixture.status();
    assert_eq!((code, &status["state"]), (8, &json!("authentication_failed")), "{status}");
    let (code, output) = fixture.run_worker_to_exit(&[]);
    assert!(code == Some(1) && output.contains("refuse the connection"), "{output}");
    assert!(
        !output.contains("no broker answers") && !output.contains("wrong-password"),
        "{output}"
    );
    let (_, checked) = fixture.run_command(&["check"]);
    assert!(checked.contains("FAILED  kafka.brokers: kafka.properties: the brokers"), "{checked}");

    // Without any right.
    fixture.set_option("KAFKA__PROPERTIES__SASL_PASSWORD", password);
    let (code, status) = fixture.status();
    assert_eq!((code, &status["state"]), (7, &json!("not_authorised")), "{status}");
    let (_, checked) = fixture.run_command(&["check"]);
    for key in ["source.topic", "dead_letter.topic"] {
        let line = checked.lines().find(|line| line.starts_with(&format!("FAILED  {key}")));
        let line = line.unwrap_or_else(|| panic!("{key}: {checked}"));
        assert!(line.contains("lack a right") && !line.contains("does not exist"), "{line}");
    }
    let worker = fixture.start_worker();
    wait_for_worker_state(&worker, "not_authorised").await;

    // One right after the other; `bsap check` names what is missing.
    fixture.cluster.grant(Resource::Topic(TOPIC), Operation::Describe);
    fixture.cluster.grant(Resource::Topic(DEAD_LETTER_TOPIC), Operation::Describe);
    let failed = |fixture: &Fixture| {
        let (_, checked) = fixture.run_command(&["check"]);
        let failed: Vec<String> = checked
            .lines()
            .filter_map(|line| Some(line.strip_prefix("FAILED  ")?.split(':').next()?.to_owned()))
            .filter(|key| {
                key.starts_with("source") || key.starts_with("dead") || key.starts_with("kafka")
            })
            .collect();
        (failed, checked)
    };
    let (keys, checked) = failed(&fixture);
    assert_eq!(keys, ["source.group", "dead_letter.topic"], "{checked}");
    fixture.cluster.grant(Resource::Group(GROUP), Operation::Read);
    let (keys, checked) = failed(&fixture);
    assert_eq!(keys, ["source.group", "dead_letter.topic"], "the topic cannot be read: {checked}");
    wait_for_worker_state(&worker, "not_authorised").await;
    fixture.cluster.grant(Resource::Topic(TOPIC), Operation::Read);
    let (keys, checked) = failed(&fixture);
    assert_eq!(keys, ["dead_letter.topic"], "{checked}");
    assert!(checked.contains("unused  source.topic"), "{checked}");
    fixture.cluster.grant(Resource::Topic(DEAD_LETTER_TOPIC), Operation::Write);
    let (keys, checked) = failed(&fixture);
    assert!(keys.is_empty(), "{checked}");
    // `bsap check` has written nothing.
    assert_eq!(fixture.end_offsets()[&0], 0);

    // The worker was not restarted.
    wait_for_worker_state(&worker, "consuming").await;
    wait_for_state(&fixture, "consuming").await;
    worker.stop();

    // The same account by SCRAM.
    fixture.set_option("KAFKA__PROPERTIES__SASL_MECHANISM", "SCRAM-SHA-512");
    let worker = fixture.start_worker();
    wait_for_worker_state(&worker, "consuming").await;
    worker.stop();
    fixture.set_option("KAFKA__PROPERTIES__SASL_PASSWORD", "wrong-password");
    let (code, status) = fixture.status();
    assert_eq!((code, &status["state"]), (8, &json!("authentication_failed")), "{status}");
}
