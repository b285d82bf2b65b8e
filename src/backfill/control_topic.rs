//! The control topic: other systems ask for a reindex with an event.
//!
//! Workers of the live generation share the topic in a consumer group of their own, so that one of
//! them takes a request up; those of another model could not embed the prompts. The offset is committed
//! when the request is done: one that a worker could not finish is taken up again, and goes on where it
//! was. A request that cannot be used is told in the log and passed over.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::ReindexError;
use super::statistics::{StatisticsBackfill, add_prompt_set};
use crate::catalogue::{CatalogueState, StateStore};
use crate::clip::Encoders;
use crate::kafka;
use crate::prompts::PromptSet;
use crate::retry::{Backoff, Classify, Disposition};
use crate::store::Store;
use crate::table::{Generation, TableError};
use crate::telemetry::event;

/// A request may take this long before its group thinks that its worker hangs: the most that Kafka
/// allows, a day.
const MAX_POLL_INTERVAL_MS: &str = "86400000";

/// How often a worker looks whether its generation is live (still): others wait for its share of the topic.
const LIVE_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A request on the control topic, JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRequest {
    /// Makes a prompt set known and computes its statistics for every stored row.
    ReindexStatistics {
        /// The name of a shipped set, or a set as its file has it.
        prompt_set: PromptSetSelector,
        /// How many of an image's largest scores `nnn` averages; `prompts.top_k` unless given.
        #[serde(default)]
        top_k: Option<usize>,
        /// Who asks, for the history.
        #[serde(default)]
        requested_by: Option<String>,
    },
}

/// Which prompt set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum PromptSetSelector {
    /// A shipped set by name.
    Name(String),
    /// A set with its texts.
    Set(PromptSet),
}

impl PromptSetSelector {
    fn into_prompt_set(self) -> Result<PromptSet, String> {
        match self {
            Self::Name(name) => PromptSet::load_builtin(&name).ok_or_else(|| {
                format!(
                    "prompt_set: {name:?} is not shipped; shipped are {}; give others with their texts",
                    PromptSet::builtin_names().join(", ")
                )
            }),
            Self::Set(set) => {
                set.validate().map(|()| set).map_err(|reason| format!("prompt_set: {reason}"))
            }
        }
    }
}

/// Takes up requests.
pub struct ControlConsumer {
    /// How to reach Kafka.
    pub kafka: kafka::KafkaOptions,
    /// The control topic.
    pub topic: String,
    /// The consumer group.
    pub group: String,
    /// The catalogue.
    pub catalogue: Store,
    /// Which tables.
    pub generation: Generation,
    /// The model, for the prompts.
    pub encoders: Arc<dyn Encoders>,
    /// `prompts.top_k`.
    pub default_top_k: usize,
    /// How often a commit is tried.
    pub max_commit_attempts: u32,
    /// Files measured at one time.
    pub max_concurrent_files: usize,
    /// See [`Job::settle`].
    pub propagation_delay: Duration,
}

/// Why the control topic is not heard.
#[derive(Debug, thiserror::Error)]
enum ControlTopicError {
    #[error(transparent)]
    Kafka(#[from] rdkafka::error::KafkaError),
    #[error(transparent)]
    State(#[from] TableError),
}

impl ControlConsumer {
    /// Takes up requests until `token` is cancelled, as long as its generation is the live one.
    /// Ingestion does not depend on it: what fails is logged and tried again.
    pub async fn run(self, token: CancellationToken) {
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        let mut state = None;
        while !token.is_cancelled() {
            let pause = match self.consume_while_live(&mut state, &token).await {
                Ok(()) => LIVE_CHECK_INTERVAL,
                Err(error) => {
                    warn!(event = event::CONTROL_FAILED, %error, "the control topic is not heard; trying again");
                    attempt += 1;
                    backoff.random_delay(attempt)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = token.cancelled() => {}
            }
        }
    }

    /// Whether requests are for this worker: another model cannot embed the live one's prompts.
    /// `state` is the newest one that is known.
    async fn is_generation_live(
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

    /// Does requests until `token` is cancelled or its generation is not the live one; then its share of
    /// the topic goes to others.
    async fn consume_while_live(
        &self,
        state: &mut Option<CatalogueState>,
        token: &CancellationToken,
    ) -> Result<(), ControlTopicError> {
        let live = token.run_until_cancelled(self.is_generation_live(state)).await;
        if !live.transpose()?.unwrap_or(false) {
            return Ok(());
        }
        let mut config: ClientConfig = self.kafka.client_config();
        config
            .set("group.id", &self.group)
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.commit", "false")
            .set("session.timeout.ms", "10000")
            .set("max.poll.interval.ms", MAX_POLL_INTERVAL_MS);
        let consumer: StreamConsumer = config.create()?;
        consumer.subscribe(&[&self.topic])?;
        let consumed = self.consume_messages(&consumer, state, token).await;
        kafka::leave_group(move || drop(consumer)).await;
        consumed
    }

    /// The same, by a consumer that has subscribed.
    async fn consume_messages(
        &self,
        consumer: &StreamConsumer,
        state: &mut Option<CatalogueState>,
        token: &CancellationToken,
    ) -> Result<(), ControlTopicError> {
        loop {
            let message = tokio::select! {
                message = consumer.recv() => Some(message?),
                () = token.cancelled() => return Ok(()),
                () = tokio::time::sleep(LIVE_CHECK_INTERVAL) => None,
            };
            let live = token.run_until_cancelled(self.is_generation_live(state)).await;
            if !live.transpose()?.unwrap_or(false) {
                return Ok(());
            }
            let Some(message) = message else { continue };
            let payload = message.payload().unwrap_or_default().to_vec();
            if self.process_request(&payload, token).await {
                consumer.commit_message(&message, CommitMode::Sync)?;
            }
            if token.is_cancelled() {
                return Ok(());
            }
        }
    }

    /// Does one request; false where it is to be taken up again.
    async fn process_request(&self, payload: &[u8], token: &CancellationToken) -> bool {
        let request: ControlRequest = match serde_json::from_slice(payload) {
            Ok(request) => request,
            Err(error) => {
                error!(event = event::CONTROL_REJECTED, %error, "not a request of schemas/control-request.schema.json; it is passed over");
                return true;
            }
        };
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        loop {
            match self.execute_request(request.clone(), token).await {
                Ok(complete) => return complete,
                Err(error) if error.disposition() == Disposition::Retry => {
                    warn!(event = event::RETRY, stage = "control.accepted", attempt, %error, "a request was not finished; trying again");
                    if !backoff.wait(attempt, token).await {
                        return false;
                    }
                    attempt += 1;
                }
                Err(error) => {
                    error!(event = event::CONTROL_REJECTED, %error, "the request cannot be done; it is passed over");
                    return true;
                }
            }
        }
    }

    async fn execute_request(
        &self,
        request: ControlRequest,
        token: &CancellationToken,
    ) -> Result<bool, ReindexError> {
        let ControlRequest::ReindexStatistics { prompt_set, top_k, requested_by: by } = request;
        let set = prompt_set.into_prompt_set().map_err(ReindexError::Refused)?;
        let top_k = top_k.unwrap_or(self.default_top_k);
        let encoders = self.encoders.clone();
        let set = tokio::task::spawn_blocking(move || set.embed(&*encoders, top_k))
            .await
            .map_err(|panic| ReindexError::Panicked(panic.to_string()))??;
        let by = format!("{} (control topic)", by.as_deref().unwrap_or("unknown"));
        info!(event = event::CONTROL_ACCEPTED, request = "reindex_statistics", prompt_set = %set.statistics_key, requested_by = by, "a request was taken up");
        add_prompt_set(&self.catalogue, &self.generation, &set, &by).await?;
        let job = StatisticsBackfill {
            catalogue: self.catalogue.clone(),
            generation: self.generation.clone(),
            prompt_set: Arc::new(set),
            max_commit_attempts: self.max_commit_attempts,
            max_concurrent_files: self.max_concurrent_files,
            propagation_delay: self.propagation_delay,
        };
        Ok(job.run(&|_, _| {}, token).await?.complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_current() {
        let wanted =
            serde_json::to_string_pretty(&schemars::schema_for!(ControlRequest)).unwrap() + "\n";
        let stored = std::fs::read_to_string("schemas/control-request.schema.json").unwrap();
        assert_eq!(
            stored, wanted,
            "schemas/control-request.schema.json is stale; run `just generate`"
        );
    }

    #[test]
    fn requests_name_shipped_sets_or_bring_their_texts_and_read_no_file() {
        let parse = |text: &str| {
            let request: ControlRequest = serde_json::from_str(text).map_err(|e| e.to_string())?;
            let ControlRequest::ReindexStatistics { prompt_set, .. } = request;
            prompt_set.into_prompt_set().map(|set| set.texts.len())
        };
        let named = r#"{"request":"reindex_statistics","prompt_set":"photographs"}"#;
        assert!(parse(named).unwrap() > 10);
        let own = r#"{"request":"reindex_statistics","top_k":2,"prompt_set":{"name":"own","version":1,"language":"en","notes":"","texts":["a","b"]}}"#;
        assert_eq!(parse(own), Ok(2));
        for (wrong, named) in [
            (r#"{"request":"reindex_statistics","prompt_set":"/etc/passwd"}"#, "not shipped"),
            (&own.replace(r#"["a","b"]"#, r#"["a"]"#), "1 texts"),
            (r#"{"request":"drop_everything"}"#, "drop_everything"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
