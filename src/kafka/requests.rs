//! Requests from async code.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::error::KafkaError;

use super::connection::KafkaOptions;
use super::failure::{ErrorRecorder, FailureKind, KafkaFailure, failure_kind, kind_of_code};
use super::probe::KafkaProbe;
use crate::diagnosis::describe;
use crate::record::TopicPartition;

/// Group of clients that read single messages. It has no members and no offsets.
const PROBE_GROUP: &str = "bsap-probe";

/// Runs requests of a probe on a thread where they may block.
pub async fn run_probe<T: Send + 'static>(
    options: &KafkaOptions,
    group_id: &str,
    requests: impl FnOnce(&KafkaProbe) -> Result<T, KafkaFailure> + Send + 'static,
) -> Result<T, KafkaFailure> {
    let (options, group_id) = (options.clone(), group_id.to_owned());
    run_blocking(move || {
        let probe = KafkaProbe::new(&options, &group_id)?;
        requests(&probe)
    })
    .await
}

/// Runs `requests` on a thread where they may block.
pub(super) async fn run_blocking<T: Send + 'static>(
    requests: impl FnOnce() -> T + Send + 'static,
) -> T {
    match tokio::task::spawn_blocking(requests).await {
        Ok(answer) => answer,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Fetches the number of partitions of each of `topics`. Fails as a whole if no broker answers or the
/// credentials are refused; a topic that is missing or denied fails by itself.
pub async fn fetch_partition_counts(
    options: &KafkaOptions,
    topics: &[&str],
) -> Result<Vec<Result<usize, KafkaFailure>>, KafkaFailure> {
    let topics: Vec<String> = topics.iter().map(|topic| (*topic).to_owned()).collect();
    run_probe(options, PROBE_GROUP, move |probe| {
        let count = |topic: &String| match probe.count_partitions(topic) {
            Err(failure)
                if !matches!(
                    failure.kind,
                    FailureKind::TopicMissing | FailureKind::NotAuthorised
                ) =>
            {
                Err(failure)
            }
            answer => Ok(answer),
        };
        topics.iter().map(count).collect()
    })
    .await
}

/// Fetches the beginning and end offset of each partition of `topic`, by partition number; none if the topic
/// does not exist.
pub async fn fetch_watermarks(
    options: &KafkaOptions,
    topic: &str,
) -> Result<BTreeMap<i32, (i64, i64)>, KafkaFailure> {
    let topic = topic.to_owned();
    run_probe(options, PROBE_GROUP, move |probe| {
        let count = match probe.count_partitions(&topic) {
            Err(failure) if failure.kind == FailureKind::TopicMissing => 0,
            answer => answer?,
        };
        let watermarks = |number| {
            let partition = TopicPartition { topic: topic.as_str().into(), number };
            Ok((number, probe.fetch_watermarks(&partition)?))
        };
        (0..count as i32).map(watermarks).collect()
    })
    .await
}

/// Fetches the configuration of each of `topics`: values by name of the setting.
pub async fn fetch_topic_configs(
    options: &KafkaOptions,
    topics: &[&str],
) -> Result<Vec<BTreeMap<String, String>>, KafkaFailure> {
    let failure = |kind, reason: String| {
        KafkaFailure::new(kind, &options.brokers, "the settings of the topics", reason)
    };
    let from_error = |error: KafkaError| failure(failure_kind(&error), describe(&error));
    let mut config = options.client_config();
    config.set("log_level", "0");
    let admin: AdminClient<ErrorRecorder> =
        config.create_with_context(ErrorRecorder::default()).map_err(from_error)?;
    let timeout = Some(Duration::from_millis(options.request_timeout_ms));
    let admin_options = AdminOptions::new().request_timeout(timeout);
    let resources: Vec<_> = topics.iter().map(|topic| ResourceSpecifier::Topic(topic)).collect();
    let descriptions =
        admin.describe_configs(&resources, &admin_options).await.map_err(from_error)?;
    descriptions
        .into_iter()
        .map(|topic| {
            let topic = topic.map_err(|code| failure(kind_of_code(code), code.to_string()))?;
            let settings = topic.entries.into_iter();
            Ok(settings.filter_map(|entry| Some((entry.name, entry.value?))).collect())
        })
        .collect()
}
