//! Builds a worker from the configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::catalogue::{backfill_parallelism, open_store, prompt_set_propagation_delay};
use super::models::configured_generation;
use super::runtime::log_worker_start;
use crate::backfill::{self, ControlConsumer};
use crate::catalogue::{ServingConfig, StateStore};
use crate::clip::Encoders;
use crate::config::Config;
use crate::ingest::dead_letter::DeadLetterWriter;
use crate::ingest::fetch::Fetcher;
use crate::ingest::source::{self, Decoder};
use crate::ingest::{Progress, Worker};
use crate::kafka;
use crate::prompts::{self, ActivePromptSets};
use crate::store::Store;
use crate::table::maintenance::schedule::TableMaintenance;
use crate::table::{Generation, TableWriter};
use crate::telemetry::event;

/// Builds a worker. Creates the catalogue if there is none; otherwise adds the configured prompt sets
/// to it, unless the worker fills the standby generation, which has prompt sets of its own.
pub async fn build_ingest_worker(
    config: &Config,
    encoders: Arc<dyn Encoders>,
    progress: Arc<Progress>,
) -> anyhow::Result<Worker> {
    let store = open_store(config).await?;
    let states = StateStore::new(&store);
    let FilledGeneration { generation, is_standby, active_sets } =
        FilledGeneration::open(config, &store, &*encoders, "bsap ingest").await?;
    let worker_source =
        WorkerSource::for_generation(config, &states, &generation, is_standby).await?;
    let mut topics = vec![config.source.topic.as_str(), config.dead_letter.topic.as_str()];
    topics.extend(worker_source.decoder.reembed_topic_name());
    kafka::fetch_partition_counts(&config.kafka, &topics).await?;
    let writer = TableWriter::open(&store, &generation, config.table.max_commit_attempts)
        .await
        .context("table.url")?
        .with_replay_name(&config.source.replay_name);
    let limits = format!(
        "ingest.max_in_flight_messages={} ingest.batch_images={} ingest.commit_rows={} ingest.commit_ms={} fetch.budget_mib={} decode.budget_mib={}",
        config.ingest.max_in_flight_messages,
        config.ingest.batch_images,
        config.ingest.commit_rows,
        config.ingest.commit_ms,
        config.fetch.budget_mib,
        config.decode.budget_mib,
    );
    log_worker_start("worker", &*encoders, &generation, &store, &limits);
    Ok(Worker {
        kafka_options: config.kafka.clone(),
        source_options: worker_source.source_options,
        decoder: worker_source.decoder,
        dead_letter_writer: DeadLetterWriter::new(&config.kafka, &config.dead_letter)?,
        fetcher: Fetcher::new(&config.fetch)?,
        decode_options: config.decode.clone(),
        encoders,
        prompt_sets: active_sets,
        table_writer: writer,
        ingest_options: config.ingest.clone(),
        progress,
    })
}

/// The generation that rows of a model are written to.
pub struct FilledGeneration {
    /// The generation: the live one, or the standby.
    pub generation: Generation,
    /// Whether it is the standby, which has prompt sets of its own.
    pub is_standby: bool,
    /// Prompt sets whose statistics new rows carry.
    pub active_sets: ActivePromptSets,
}

impl FilledGeneration {
    /// Opens the generation of a model. Creates the catalogue if there is none; otherwise adds the configured
    /// prompt sets to it, unless the model is that of the standby generation. `author` is named in the history.
    pub async fn open(
        config: &Config,
        store: &Store,
        encoders: &dyn Encoders,
        author: &str,
    ) -> anyhow::Result<Self> {
        let sets =
            prompts::load_configured_sets(&config.prompts, encoders).context("prompts.sets")?;
        for set in &sets {
            if let Some(warning) = set.prompt_set.script_warning(encoders) {
                warn!(event = event::PROMPTS_UNSUPPORTED_SCRIPT, prompt_set = %set.statistics_key, warning, "a prompt set does not fit the model");
            }
        }
        let first = sets.first().context("prompts.sets: is empty")?;
        let search = &config.search;
        let serving =
            ServingConfig::new(first.statistics_key.clone(), search.normaliser, search.weight);
        let serving = ServingConfig { lambda: search.lambda, ..serving };
        let generation = configured_generation(config, encoders);
        let records: Vec<_> = sets.iter().map(|set| set.to_record()).collect();
        let states = StateStore::new(store);
        let standby_state = states.read_newest().await.context("table.url")?;
        let standby_state = standby_state.filter(|state| state.is_standby(&generation));
        let is_standby = standby_state.is_some();
        let state = match standby_state {
            Some(state) => state,
            None => states
                .initialise_or_extend(&generation, &records, &serving, author)
                .await
                .context("table.url")?,
        };
        // Prompt sets that were added to the catalogue by others are active as well.
        let active_sets = ActivePromptSets::new(sets);
        let stored_sets = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
        active_sets.replace(active_sets.resolve_records(stored_sets, encoders)?);
        Ok(Self { generation, is_standby, active_sets })
    }
}

/// The topics that a worker consumes, with its consumer group, and their decoder.
struct WorkerSource {
    source_options: source::SourceOptions,
    decoder: Decoder,
}

impl WorkerSource {
    /// Returns the source of a worker of `generation`. Every generation but the first has a consumer
    /// group of its own, so that all of them get each message. The group does not depend on which one
    /// is live: a promotion moves no worker to another group. Workers of a later generation, and of the
    /// first if it is standby, also consume the topic of images to be embedded again.
    async fn for_generation(
        config: &Config,
        states: &StateStore,
        generation: &Generation,
        is_standby: bool,
    ) -> anyhow::Result<Self> {
        let mut source = config.source.clone();
        let mut decoder = Decoder::new(&config.source, &config.attributes)
            .with_tombstone_retention_days(config.maintenance.tombstone_retention_days);
        source.group = generation_group(config, states, generation).await?;
        let is_later_generation = source.group != config.source.group;
        if is_later_generation || is_standby {
            decoder = decoder.with_reembed_topic(&source.reindex_topic, &generation.id);
        }
        Ok(Self { source_options: source, decoder })
    }
}

/// Returns the consumer group of workers of `generation`, without the name of a replay: every generation but the
/// first has one of its own.
pub async fn generation_group(
    config: &Config,
    states: &StateStore,
    generation: &Generation,
) -> anyhow::Result<String> {
    let first = states.read_revision(1).await.context("table.url")?;
    let is_later_generation = first.is_some_and(|first| first.live.id != generation.id);
    Ok(if is_later_generation {
        format!("{}.{}", config.source.group, generation.id)
    } else {
        config.source.group.clone()
    })
}

/// Starts the background tasks of a worker: following the prompt sets of the catalogue state, and
/// consuming the control topic if there is one.
pub fn spawn_background_tasks(
    config: &Config,
    store: &Store,
    worker: &Worker,
    token: &CancellationToken,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let generation = configured_generation(config, &*worker.encoders);
    tasks.spawn(backfill::follow_prompt_sets(
        store.clone(),
        generation.id.clone(),
        worker.prompt_sets.clone(),
        worker.encoders.clone(),
        Duration::from_millis(config.table.state_poll_ms),
        token.clone(),
    ));
    if !config.source.control_topic.is_empty() {
        let control = ControlConsumer {
            kafka_options: config.kafka.clone(),
            topic: config.source.control_topic.clone(),
            group: config.source.control_group_id(),
            catalogue: store.clone(),
            generation,
            encoders: worker.encoders.clone(),
            default_settings: config.prompts.statistics_settings(),
            max_commit_attempts: config.table.max_commit_attempts,
            max_concurrent_files: backfill_parallelism(),
            propagation_delay: prompt_set_propagation_delay(config),
        };
        tasks.spawn(control.run(token.clone()));
    }
    tasks
}

/// Starts the maintenance of the table that a worker fills. Once `token` is cancelled, a running merge is
/// finished, and no other one is started.
pub async fn spawn_table_maintenance(
    config: &Config,
    encoders: &dyn Encoders,
    token: CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let maintenance = TableMaintenance {
        store: open_store(config).await?,
        generation: configured_generation(config, encoders),
        options: config.maintenance.clone(),
        max_commit_attempts: config.table.max_commit_attempts,
    };
    // On a thread of its own, because merging files computes for seconds without yielding.
    let runtime = Handle::current();
    Ok(tokio::task::spawn_blocking(move || runtime.block_on(maintenance.run(token))))
}
