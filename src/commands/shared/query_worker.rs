//! Builds a query worker, or an engine that reads the table once, from the configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::catalogue::open_catalogue;
use super::models::{configured_generation, find_live_model, standby_model_options};
use super::runtime::log_worker_start;
use crate::catalogue::CatalogueState;
use crate::clip::Encoders;
use crate::config::Config;
use crate::ingest::fetch::Fetcher;
use crate::prompts::EmbeddedPromptSet;
use crate::search::{self, Engine, Engines, ServingSnapshot};
use crate::serve::CatalogueFollower;
use crate::serve::feedback::{self, FeedbackQueue, FeedbackWriter};
use crate::serve::http::{ServerContext, Substitute};
use crate::table::Follower;

/// The parts of a query worker, to be run by the caller.
pub struct QueryWorker {
    /// Answer queries, as soon as the table has been read completely.
    pub engines: Arc<Engines>,
    /// Follows the catalogue state and the tables, and updates the engines.
    pub catalogue_follower: CatalogueFollower,
    /// Accepts the feedback of users.
    pub feedback_queue: FeedbackQueue,
    /// Stores the accepted feedback.
    pub feedback_writer: FeedbackWriter,
}

/// Builds a query worker; `TableError::NotFound` if there is no catalogue yet.
pub async fn build_query_worker(
    config: &Config,
    models: &[(&'static str, Arc<dyn Encoders>)],
) -> anyhow::Result<QueryWorker> {
    let (store, state) = open_catalogue(config).await?;
    let encoders = find_live_model(config, &state, models)?;
    let limits = format!(
        "http.max_concurrent_requests={} http.timeout_ms={} search.poll_ms={} search.max_k={}",
        config.http.max_concurrent_requests,
        config.http.timeout_ms,
        config.search.poll_ms,
        config.search.max_k,
    );
    log_worker_start("query worker", &*encoders, &state.live, &store, &limits);
    let options = search::SearchOptions {
        memory_mib: generation_memory_limit_mib(config),
        ..config.search.clone()
    };
    let engine = build_engine(config, &state, encoders, options)?;
    let engines = Arc::new(Engines::new(Arc::new(engine)));
    let (feedback_sender, feedback_writer) = feedback::feedback_channel(&store);
    Ok(QueryWorker {
        feedback_queue: feedback_sender,
        feedback_writer,
        catalogue_follower: CatalogueFollower {
            catalogue: store,
            engines: engines.clone(),
            models: models.iter().map(|(_, encoders)| encoders.clone()).collect(),
            state,
            poll_interval: Duration::from_millis(config.table.state_poll_ms),
        },
        engines,
    })
}

fn build_engine(
    config: &Config,
    state: &CatalogueState,
    encoders: Arc<dyn Encoders>,
    options: search::SearchOptions,
) -> anyhow::Result<Engine> {
    let embed = |record| EmbeddedPromptSet::from_record(record, &*encoders).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    Ok(Engine::new(encoders, ServingSnapshot::from_state(state, sets), options)
        .with_attributes_and_decoding(config.attributes.clone(), config.decode.clone()))
}

/// Returns an engine with the current version of the live table in memory; `None` if `token` was
/// cancelled before all of it was read.
pub async fn load_live_engine(
    config: &Config,
    encoders: Arc<dyn Encoders>,
    token: &CancellationToken,
) -> anyhow::Result<Option<Arc<Engine>>> {
    let (store, state) = open_catalogue(config).await?;
    state.live.ensure_compatible(&configured_generation(config, &*encoders))?;
    let engine = build_engine(config, &state, encoders, config.search.clone())?;
    let mut follower = Follower::open(&store, &state.live).await.context("table.url")?;
    while let Some(changes) = follower.next_part(&|_, _| {}).await? {
        engine.snapshots().apply_changes(changes).await?;
        if token.is_cancelled() {
            return Ok(None);
        }
    }
    Ok(Some(Arc::new(engine)))
}

/// Returns what the HTTP server needs to answer requests.
pub fn build_server_context(
    config: &Config,
    worker: &QueryWorker,
    substitutes: Vec<Substitute>,
) -> anyhow::Result<ServerContext> {
    Ok(ServerContext {
        engines: worker.engines.clone(),
        feedback_queue: worker.feedback_queue.clone(),
        fetcher: Fetcher::new(&config.fetch)?,
        decode_options: config.decode.clone(),
        substitutes,
        judge: None,
        options: config.http.clone(),
    })
}

/// Returns the memory limit of one generation in a query worker, in MiB. If no limit is configured and
/// there may be a standby generation, each gets half of the default.
pub fn generation_memory_limit_mib(config: &Config) -> u64 {
    match (config.search.memory_mib, standby_model_options(config)) {
        (0, Some(_)) => (search::memory_limit_bytes(0) >> 21).max(1),
        (configured, _) => configured,
    }
}
