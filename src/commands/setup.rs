//! The parts that several commands are made of, from configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backfill::{self, ControlConsumer};
use crate::catalogue::{CatalogueState, Generation, ServingConfig, StandbyGeneration, StateStore};
use crate::clip::{self, ClipModel, Encoders};
use crate::config::Config;
use crate::ingest::dead_letter::DeadLetterWriter;
use crate::ingest::fetch::Fetcher;
use crate::ingest::source::{self, Decoder};
use crate::ingest::{Progress, Worker};
use crate::kafka;
use crate::prompts::{self, ActivePromptSets, EmbeddedPromptSet};
use crate::search::{self, Engine, Engines, ServingSnapshot};
use crate::serve::CatalogueFollower;
use crate::serve::feedback::{self, FeedbackQueue, FeedbackWriter};
use crate::serve::http::{ServerContext, Substitute};
use crate::store::Store;
use crate::table::maintenance::schedule::TableMaintenance;
use crate::table::{Follower, TableError, TableWriter};
use crate::telemetry::event;

/// How long the store may take to answer at the start. Later faults are waited out.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);
/// The setting that names the model of another generation.
pub const CANDIDATE_CHECKPOINT_KEY: &str = "search.standby_checkpoint";

/// Loads the model. Blocks for as long as reading the weights takes.
pub fn load_encoders(config: &Config) -> anyhow::Result<Arc<dyn Encoders>> {
    let clip = ClipModel::load(&config.model).context("model.checkpoint")?;
    Ok(Arc::new(clip))
}

/// Opens the catalogue's folder and makes sure that the store answers.
pub async fn open_store(config: &Config) -> anyhow::Result<Store> {
    let store = Store::open(&config.table.url, &config.table.store_options).context("table.url")?;
    store.check_reachable(STORE_TIMEOUT).await.context("table.url")?;
    Ok(store)
}

/// The catalogue's folder and its state; `Missing` where no worker has made it yet.
pub async fn open_catalogue(config: &Config) -> anyhow::Result<(Store, CatalogueState)> {
    let store = open_store(config).await?;
    let state = StateStore::new(&store).read_newest().await.context("table.url")?;
    let state = state.ok_or_else(|| TableError::NotFound { location: store.url().to_string() })?;
    Ok((store, state))
}

/// The generation that this configuration fills and reads.
pub fn configured_generation(config: &Config, encoders: &dyn Encoders) -> Generation {
    let card = encoders.card();
    Generation::new(
        &card.name,
        &card.fingerprint,
        card.dimension,
        card.logit_scale,
        config.source.ordering,
    )
}

/// The upkeep of the table that a worker fills.
pub async fn build_maintenance(
    config: &Config,
    encoders: &dyn Encoders,
) -> anyhow::Result<TableMaintenance> {
    Ok(TableMaintenance {
        store: open_store(config).await?,
        generation: configured_generation(config, encoders),
        options: config.maintenance.clone(),
        max_commit_attempts: config.table.max_commit_attempts,
    })
}

/// Who changes the catalogue: `BSAP_ACTOR`, or the user of this process.
pub fn actor(command: &str) -> String {
    let named = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let who = named("BSAP_ACTOR").or_else(|| named("USER")).unwrap_or_else(|| "unknown".into());
    format!("{who} ({command})")
}

/// Files that a reindex measures at one time.
pub fn reindex_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How long after a set was made known workers may still write rows without it: they look every
/// `table.state_poll_ms`, embed the prompts, and commit what they have.
pub fn set_propagation_delay(config: &Config) -> Duration {
    Duration::from_millis(2 * config.table.state_poll_ms + config.ingest.commit_ms + 1_000)
}

/// What a worker does beside ingesting: it follows the state, and hears the control topic.
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
            kafka: config.kafka.clone(),
            topic: config.source.control_topic.clone(),
            group: format!("{}.control", config.source.group),
            catalogue: store.clone(),
            generation,
            encoders: worker.encoders.clone(),
            default_top_k: config.prompts.top_k,
            max_commit_attempts: config.table.max_commit_attempts,
            max_concurrent_files: reindex_parallelism(),
            propagation_delay: set_propagation_delay(config),
        };
        tasks.spawn(control.run(token.clone()));
    }
    tasks
}

/// What a worker reads, and how.
struct WorkerSource {
    source: source::SourceOptions,
    decoder: Decoder,
}

impl WorkerSource {
    /// Every generation but the first has a consumer group of its own, so that each message comes to
    /// all of them. That stays so whichever is live: a promotion moves no worker from one group to
    /// another. They, and the first where it stands `beside` the live one, read of images that are to be
    /// embedded again.
    async fn for_generation(
        config: &Config,
        states: &StateStore,
        generation: &Generation,
        is_standby: bool,
    ) -> anyhow::Result<Self> {
        let mut source = config.source.clone();
        let mut decoder = Decoder::new(&config.source, &config.attributes)
            .with_tombstone_days(config.maintenance.tombstone_retention_days);
        let first = states.read_revision(1).await.context("table.url")?;
        let is_later_generation = first.is_some_and(|first| first.live.id != generation.id);
        if is_later_generation {
            source.group = format!("{}.{}", source.group, generation.id);
        }
        if is_later_generation || is_standby {
            decoder = decoder.with_reembed_topic(&source.reindex_topic, &generation.id);
        }
        Ok(Self { source, decoder })
    }
}

/// A worker, with the catalogue made or joined.
pub async fn build_worker(
    config: &Config,
    encoders: Arc<dyn Encoders>,
    progress: Arc<Progress>,
) -> anyhow::Result<Worker> {
    let sets =
        prompts::load_configured_sets(&config.prompts, &*encoders).context("prompts.sets")?;
    for set in &sets {
        if let Some(warning) = set.prompt_set.script_warning(&*encoders) {
            warn!(event = event::PROMPTS_UNSUPPORTED_SCRIPT, prompt_set = %set.statistics_key, warning, "a prompt set does not fit the model");
        }
    }
    let first = sets.first().context("prompts.sets: is empty")?;
    let search = &config.search;
    let serving =
        ServingConfig::new(first.statistics_key.clone(), search.normaliser, search.weight);
    let serving = ServingConfig { lambda: search.lambda, ..serving };
    let store = open_store(config).await?;
    let generation = configured_generation(config, &*encoders);
    let records: Vec<_> = sets.iter().map(|set| set.to_record()).collect();
    let states = StateStore::new(&store);
    let standby_state = states.read_newest().await.context("table.url")?;
    let standby_state = standby_state.filter(|state| state.is_standby(&generation));
    let state = match standby_state {
        Some(state) => state,
        None => states
            .initialise_or_extend(&generation, &records, &serving, "bsap ingest")
            .await
            .context("table.url")?,
    };
    let is_standby = state.is_standby(&generation);
    let worker_source =
        WorkerSource::for_generation(config, &states, &generation, is_standby).await?;
    let mut topics = vec![config.source.topic.as_str(), config.dead_letter.topic.as_str()];
    topics.extend(worker_source.decoder.reembed.as_ref().map(|again| again.topic.as_str()));
    kafka::fetch_partition_counts(&config.kafka, &topics).await?;
    // What others have added to the catalogue counts as well as what is configured here.
    let active = ActivePromptSets::new(sets);
    let known = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    active.replace(active.resolve_records(known, &*encoders)?);
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
    log_start("worker", &*encoders, &generation, &store, &limits);
    Ok(Worker {
        kafka: config.kafka.clone(),
        source_options: worker_source.source,
        decoder: worker_source.decoder,
        dead_letter_writer: DeadLetterWriter::new(&config.kafka, &config.dead_letter)?,
        fetcher: Fetcher::new(&config.fetch)?,
        decode_options: config.decode.clone(),
        encoders,
        prompt_sets: active,
        writer,
        options: config.ingest.clone(),
        progress,
    })
}

/// The models of a query worker, of promotions and of checks, each with the setting that names it.
pub fn load_models(config: &Config) -> anyhow::Result<Vec<(&'static str, Arc<dyn Encoders>)>> {
    let mut models = vec![("model.checkpoint", load_encoders(config)?)];
    if let Some(candidate) = candidate_model_options(config) {
        let clip = ClipModel::load(&candidate).context(CANDIDATE_CHECKPOINT_KEY)?;
        models.push((CANDIDATE_CHECKPOINT_KEY, Arc::new(clip)));
    }
    Ok(models)
}

/// Where the model of another generation is, if one is named.
pub fn candidate_model_options(config: &Config) -> Option<clip::ModelOptions> {
    let checkpoint = config.search.standby_checkpoint.clone();
    let revision = config.search.standby_revision.clone();
    (!checkpoint.is_empty()).then(|| clip::ModelOptions {
        checkpoint,
        revision,
        ..config.model.clone()
    })
}

/// The model that fills the generation beside the live one, by the checkpoint that it was set up with
/// and `search.candidate_revision`. Refused where that is another model now.
pub fn load_standby_model(
    config: &Config,
    standby: &StandbyGeneration,
) -> anyhow::Result<Arc<dyn Encoders>> {
    let mut config = config.clone();
    config.model.checkpoint.clone_from(&standby.checkpoint);
    config.model.revision.clone_from(&config.search.standby_revision);
    let encoders =
        load_encoders(&config).context("the model of the generation beside the live one")?;
    standby.generation.ensure_compatible(&configured_generation(&config, &*encoders))?;
    Ok(encoders)
}

/// Most memory of a generation of a query worker, in MiB: where nothing is configured and there may be
/// two, each gets half.
pub fn generation_memory_mib(config: &Config) -> u64 {
    match (config.search.memory_mib, candidate_model_options(config)) {
        (0, Some(_)) => (search::memory_limit_bytes(0) >> 21).max(1),
        (configured, _) => configured,
    }
}

/// That of `models` which filled the live generation. Refused where none did, and where one fits
/// nothing that there is.
pub fn find_live_model(
    config: &Config,
    state: &CatalogueState,
    models: &[(&'static str, Arc<dyn Encoders>)],
) -> anyhow::Result<Arc<dyn Encoders>> {
    let mut live = None;
    for (setting, encoders) in models {
        let generation = configured_generation(config, &**encoders);
        if generation.id == state.live.id {
            live = live.or(Some(encoders.clone()));
        }
        match state.find_generation(&generation.id) {
            Some(stored) => stored.ensure_compatible(&generation).context(*setting)?,
            None if *setting == CANDIDATE_CHECKPOINT_KEY => {
                let Some(standby) = &state.standby else { continue };
                anyhow::bail!(
                    "{setting}: generation {} (model fingerprint {}) is live and {} ({}) stands beside it, but {} has the fingerprint {}. Set {setting} to {}, or leave it empty",
                    state.live.id,
                    state.live.model_fingerprint,
                    standby.generation.id,
                    standby.generation.model_fingerprint,
                    encoders.card().name,
                    encoders.card().fingerprint,
                    standby.checkpoint
                );
            }
            None => {}
        }
    }
    if let Some(live) = live {
        return Ok(live);
    }
    let configured = configured_generation(config, &*models[0].1);
    if state.is_standby(&configured) {
        anyhow::bail!(
            "model.checkpoint: {} fills generation {}, which stands beside the live one, {} ({}, model fingerprint {}). Set model.checkpoint to the live model and search.standby_checkpoint to this one, or make it live (bsap candidate set --beside, bsap promote)",
            configured.model_name,
            configured.id,
            state.live.id,
            state.live.model_name,
            state.live.model_fingerprint
        );
    }
    state.live.ensure_compatible(&configured)?;
    Ok(models[0].1.clone())
}

/// A query worker: its engines, and what keeps them up to date.
pub struct QueryWorker {
    /// Answer queries, once the table has been read to its end.
    pub engines: Arc<Engines>,
    /// Follows state and tables.
    pub catalogue_follower: CatalogueFollower,
    /// Takes in what users say of results.
    pub feedback_sender: FeedbackQueue,
    /// Stores it.
    pub feedback_writer: FeedbackWriter,
}

/// A query worker for the catalogue that is there; `Missing` where there is none yet.
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
    log_start("query worker", &*encoders, &state.live, &store, &limits);
    let options = search::SearchOptions {
        memory_mib: generation_memory_mib(config),
        ..config.search.clone()
    };
    let engine = build_engine(config, &state, encoders, options)?;
    let engines = Arc::new(Engines::new(Arc::new(engine)));
    let (inbox, feedback) = feedback::feedback_channel(&store);
    Ok(QueryWorker {
        feedback_sender: inbox,
        feedback_writer: feedback,
        catalogue_follower: CatalogueFollower {
            catalogue: store,
            engines: engines.clone(),
            models: models.iter().map(|(_, towers)| towers.clone()).collect(),
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

/// An engine with the whole live table in memory, as it is now. `None` where `token` was cancelled
/// meanwhile.
pub async fn load_table_engine(
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

/// What the HTTP server answers from.
pub fn build_app(
    config: &Config,
    worker: &QueryWorker,
    substitutes: Vec<Substitute>,
) -> anyhow::Result<ServerContext> {
    Ok(ServerContext {
        engines: worker.engines.clone(),
        feedback_queue: worker.feedback_sender.clone(),
        fetcher: Fetcher::new(&config.fetch)?,
        substitutes,
        options: config.http.clone(),
    })
}

fn log_start(
    role: &str,
    encoders: &dyn Encoders,
    generation: &Generation,
    store: &Store,
    limits: &str,
) {
    let card = encoders.card();
    info!(
        event = event::START, role, version = env!("CARGO_PKG_VERSION"), model_name = card.name,
        model_fingerprint = card.fingerprint, generation = generation.id, table = %store.url(), limits, "started"
    );
}
