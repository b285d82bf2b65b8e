//! The control topic: other systems request a backfill of statistics by an event.
//!
//! The workers of the live generation share the topic in a consumer group of their own, so that one
//! of them executes a request; workers of another model could not embed the prompts. The offset is
//! committed after the request is complete: a request that a worker could not finish is executed
//! again, without the files that are committed. An invalid request is logged and skipped.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::error::BackfillError;
use super::prompt_sets::add_prompt_set;
use super::statistics_backfill::StatisticsBackfill;
use crate::balance::statistics::StatisticsSettings;
use crate::catalogue::{CatalogueState, StateStore};
use crate::clip::Encoders;
use crate::diagnosis::describe;
use crate::kafka;
use crate::prompts::PromptSet;
use crate::retry::{Backoff, Classify, Disposition};
use crate::store::Store;
use crate::table::{Generation, TableError};
use crate::telemetry::event;

/// How long a request may take before the consumer group takes its worker for hung: a day, the
/// maximum of librdkafka.
const MAX_POLL_INTERVAL_MS: &str = "86400000";

/// How often a worker checks whether its generation is live. Until it notices that it no longer is,
/// its partitions of the topic are not consumed.
const LIVE_GENERATION_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A message on the control topic, JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRequest {
    /// Adds a prompt set to the catalogue and computes its statistics for every stored row.
    ReindexStatistics {
        /// The name of a built-in set, or a set in the form of its file.
        prompt_set: PromptSetSelector,
        /// How many of an image's largest scores `nnn` averages; `prompts.top_k` if it is missing.
        #[serde(default)]
        top_k: Option<usize>,
        /// Temperature of `softmax`; `prompts.temperature` if it is missing.
        #[serde(default)]
        temperature: Option<f32>,
        /// Who requests it, for the history.
        #[serde(default)]
        requested_by: Option<String>,
    },
}

/// A prompt set by name or by content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum PromptSetSelector {
    /// The name of a built-in set.
    Name(String),
    /// A set with its texts.
    Set(PromptSet),
}

impl PromptSetSelector {
    fn into_prompt_set(self) -> Result<PromptSet, String> {
        match self {
            Self::Name(name) => PromptSet::load_builtin(&name).ok_or_else(|| {
                format!(
                    "prompt_set: {name:?} is not built in; built in are {}; send other sets with their texts",
                    PromptSet::builtin_names().join(", ")
                )
            }),
            Self::Set(set) => {
                set.validate().map(|()| set).map_err(|reason| format!("prompt_set: {reason}"))
            }
        }
    }
}

/// Consumes the control topic and executes its requests.
pub struct ControlConsumer {
    /// Connection to Kafka.
    pub kafka_options: kafka::KafkaOptions,
    /// Name of the control topic.
    pub topic: String,
    /// Consumer group of the control topic.
    pub group: String,
    /// Folder of the catalogue.
    pub catalogue: Store,
    /// Generation that this worker fills.
    pub generation: Generation,
    /// Model of that generation, which embeds the prompts.
    pub encoders: Arc<dyn Encoders>,
    /// `prompts.top_k` and `prompts.temperature`.
    pub default_settings: StatisticsSettings,
    /// As in [`StatisticsBackfill`].
    pub max_commit_attempts: u32,
    /// As in [`StatisticsBackfill`].
    pub max_concurrent_files: usize,
    /// As in [`StatisticsBackfill`].
    pub propagation_delay: Duration,
}

/// Why the control topic is not consumed.
#[derive(Debug, thiserror::Error)]
enum ControlTopicError {
    #[error("{}", describe(.0))]
    Kafka(#[from] rdkafka::error::KafkaError),
    #[error(transparent)]
    State(#[from] TableError),
}

impl ControlConsumer {
    /// Executes requests while its generation is live, until `cancel` is cancelled. Errors are
    /// logged and retried: ingestion must not depend on the control topic.
    pub async fn run(self, cancel: CancellationToken) {
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        let mut state = None;
        while !cancel.is_cancelled() {
            let pause = match self.consume_while_live(&mut state, &cancel).await {
                Ok(()) => LIVE_GENERATION_CHECK_INTERVAL,
                Err(error) => {
                    warn!(event = event::CONTROL_FAILED, %error, "the control topic cannot be consumed; trying again");
                    attempt += 1;
                    backoff.random_delay(attempt)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = cancel.cancelled() => {}
            }
        }
    }

    /// Returns whether this worker's generation is live. `state` is the newest known revision,
    /// which is updated.
    async fn update_state_and_check_live(
        &self,
        state: &mut Option<CatalogueState>,
    ) -> Result<bool, TableError> {
        let states = StateStore::new(&self.catalogue);
        if state.is_none() {
            *state = states.read_newest().await?;
        }
        while let Some(known) = state.as_ref()
            && let Some(newer) = states.read_next(known.revision).await?
        {
            *state = Some(newer);
        }
        Ok(state.as_ref().is_some_and(|state| state.live.id == self.generation.id))
    }

    /// Executes requests until `cancel` is cancelled or its generation is not live; then leaves the
    /// consumer group, so that other workers get its partitions.
    async fn consume_while_live(
        &self,
        state: &mut Option<CatalogueState>,
        cancel: &CancellationToken,
    ) -> Result<(), ControlTopicError> {
        let live = cancel.run_until_cancelled(self.update_state_and_check_live(state)).await;
        if !live.transpose()?.unwrap_or(false) {
            return Ok(());
        }
        let mut config: ClientConfig = self.kafka_options.client_config();
        config
            .set("group.id", &self.group)
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.commit", "false")
            .set("session.timeout.ms", "10000")
            .set("max.poll.interval.ms", MAX_POLL_INTERVAL_MS);
        let consumer: StreamConsumer = config.create()?;
        consumer.subscribe(&[&self.topic])?;
        let result = self.consume_messages(&consumer, state, cancel).await;
        kafka::leave_group(move || drop(consumer)).await;
        result
    }

    async fn consume_messages(
        &self,
        consumer: &StreamConsumer,
        state: &mut Option<CatalogueState>,
        cancel: &CancellationToken,
    ) -> Result<(), ControlTopicError> {
        loop {
            let message = tokio::select! {
                message = consumer.recv() => Some(message?),
                () = cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(LIVE_GENERATION_CHECK_INTERVAL) => None,
            };
            let live = cancel.run_until_cancelled(self.update_state_and_check_live(state)).await;
            if !live.transpose()?.unwrap_or(false) {
                return Ok(());
            }
            let Some(message) = message else { continue };
            let payload = message.payload().unwrap_or_default().to_vec();
            if self.execute_request_until_committable(&payload, cancel).await {
                consumer.commit_message(&message, CommitMode::Sync)?;
            }
            if cancel.is_cancelled() {
                return Ok(());
            }
        }
    }

    /// Executes a request, with retries, and returns whether its offset may be committed: it is
    /// complete, or can never succeed.
    async fn execute_request_until_committable(
        &self,
        payload: &[u8],
        cancel: &CancellationToken,
    ) -> bool {
        let request: ControlRequest = match serde_json::from_slice(payload) {
            Ok(request) => request,
            Err(error) => {
                error!(event = event::CONTROL_REJECTED, %error, "the message does not match schemas/control-request.schema.json; it is skipped");
                return true;
            }
        };
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        loop {
            match self.try_complete_request(request.clone(), cancel).await {
                Ok(complete) => return complete,
                Err(error) if error.disposition() == Disposition::Retry => {
                    warn!(event = event::RETRY, stage = "control", attempt, %error, "the request is not complete; trying again");
                    tokio::select! {
                        () = tokio::time::sleep(backoff.random_delay(attempt)) => {}
                        () = cancel.cancelled() => return false,
                    }
                    attempt += 1;
                }
                Err(error) => {
                    error!(event = event::CONTROL_REJECTED, %error, "the request cannot be executed; it is skipped");
                    return true;
                }
            }
        }
    }

    /// Returns whether the request is complete; if not, `cancel` was cancelled.
    async fn try_complete_request(
        &self,
        request: ControlRequest,
        cancel: &CancellationToken,
    ) -> Result<bool, BackfillError> {
        let ControlRequest::ReindexStatistics { prompt_set, top_k, temperature, requested_by } =
            request;
        let set = prompt_set.into_prompt_set().map_err(BackfillError::Refused)?;
        let settings = StatisticsSettings {
            top_k: top_k.unwrap_or(self.default_settings.top_k),
            temperature: temperature.unwrap_or(self.default_settings.temperature),
        };
        if !StatisticsSettings::is_valid_temperature(settings.temperature) {
            let reason =
                format!("temperature: {} is not between 0.01 and 10", settings.temperature);
            return Err(BackfillError::Refused(reason));
        }
        let encoders = self.encoders.clone();
        let set = tokio::task::spawn_blocking(move || set.embed(&*encoders, settings))
            .await
            .map_err(|panic| BackfillError::Panicked(panic.to_string()))??;
        let actor = format!("{} (control topic)", requested_by.as_deref().unwrap_or("unknown"));
        info!(event = event::CONTROL_ACCEPTED, request = "reindex_statistics", prompt_set = %set.statistics_key, requested_by = actor, "a request is executed");
        add_prompt_set(&self.catalogue, &self.generation, &set, &actor).await?;
        let backfill = StatisticsBackfill {
            catalogue: self.catalogue.clone(),
            generation: self.generation.clone(),
            prompt_set: Arc::new(set),
            max_commit_attempts: self.max_commit_attempts,
            max_concurrent_files: self.max_concurrent_files,
            propagation_delay: self.propagation_delay,
        };
        Ok(backfill.run(&|_, _| {}, cancel).await?.is_complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_current() {
        let generated =
            serde_json::to_string_pretty(&schemars::schema_for!(ControlRequest)).unwrap() + "\n";
        let stored = std::fs::read_to_string("schemas/control-request.schema.json").unwrap();
        assert_eq!(
            stored, generated,
            "schemas/control-request.schema.json is stale; run `just generate`"
        );
    }

    #[test]
    fn requests_name_builtin_sets_or_have_texts_and_cannot_name_files() {
        let parse = |text: &str| {
            let request: ControlRequest = serde_json::from_str(text).map_err(|e| e.to_string())?;
            let ControlRequest::ReindexStatistics { prompt_set, .. } = request;
            prompt_set.into_prompt_set().map(|set| set.texts.len())
        };
        let by_name = r#"{"request":"reindex_statistics","prompt_set":"photographs"}"#;
        assert!(parse(by_name).unwrap() > 10);
        let with_texts = r#"{"request":"reindex_statistics","top_k":2,"prompt_set":{"name":"own","version":1,"language":"en","notes":"","texts":["a","b"]}}"#;
        assert_eq!(parse(with_texts), Ok(2));
        for (invalid, reason) in [
            (r#"{"request":"reindex_statistics","prompt_set":"/etc/passwd"}"#, "not built in"),
            (&with_texts.replace(r#"["a","b"]"#, r#"["a"]"#), "1 texts"),
            (r#"{"request":"drop_everything"}"#, "drop_everything"),
        ] {
            let error = parse(invalid).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
