//! The parts that several commands are made of, from configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backfill::{self, Control};
use crate::catalogue::{Beside, CatalogueState, Generation, Serving, StateStore};
use crate::clip::{self, Clip, Towers};
use crate::config::Config;
use crate::ingest::dead_letter::DeadLetters;
use crate::ingest::fetch::Fetcher;
use crate::ingest::source::{self, Decoder};
use crate::ingest::{Progress, Worker};
use crate::kafka;
use crate::prompts::{self, ActiveSets, EmbeddedSet};
use crate::search::{self, Engine, Engines, Served};
use crate::serve::Reader;
use crate::serve::feedback::{self, FeedbackWriter, Inbox};
use crate::serve::http::{App, StandIn};
use crate::store::Store;
use crate::table::maintenance::schedule::Upkeep;
use crate::table::{Follower, TableError, Writer};
use crate::telemetry::event;

/// How long the store may take to answer at the start. Later faults are waited out.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);
/// The setting that names the model of another generation.
pub const CANDIDATE_CHECKPOINT: &str = "search.candidate_checkpoint";

/// Loads the model. Blocks for as long as reading the weights takes.
pub fn towers(config: &Config) -> anyhow::Result<Arc<dyn Towers>> {
    let clip = Clip::load(&config.model).context("model.checkpoint")?;
    Ok(Arc::new(clip))
}

/// Opens the catalogue's folder and makes sure that the store answers.
pub async fn store(config: &Config) -> anyhow::Result<Store> {
    let store = Store::open(&config.table.url, &config.table.store_options).context("table.url")?;
    store.reach(STORE_TIMEOUT).await.context("table.url")?;
    Ok(store)
}

/// The catalogue's folder and its state; `Missing` where no worker has made it yet.
pub async fn catalogue(config: &Config) -> anyhow::Result<(Store, CatalogueState)> {
    let store = store(config).await?;
    let state = StateStore::new(&store).newest().await.context("table.url")?;
    let state = state.ok_or_else(|| TableError::Missing { place: store.url().to_string() })?;
    Ok((store, state))
}

/// The generation that this configuration fills and reads.
pub fn generation(config: &Config, towers: &dyn Towers) -> Generation {
    let card = towers.card();
    Generation::new(
        &card.name,
        &card.fingerprint,
        card.dimension,
        card.logit_scale,
        config.source.ordering,
    )
}

/// The upkeep of the table that a worker fills.
pub async fn upkeep(config: &Config, towers: &dyn Towers) -> anyhow::Result<Upkeep> {
    Ok(Upkeep {
        store: store(config).await?,
        generation: generation(config, towers),
        options: config.upkeep.clone(),
        attempts: config.table.commit_attempts,
    })
}

/// Who changes the catalogue: `BSAP_ACTOR`, or the user of this process.
pub fn actor(command: &str) -> String {
    let named = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let who = named("BSAP_ACTOR").or_else(|| named("USER")).unwrap_or_else(|| "unknown".into());
    format!("{who} ({command})")
}

/// Files that a reindex measures at one time.
pub fn lanes() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How long after a set was made known workers may still write rows without it: they look every
/// `table.state_poll_ms`, embed the prompts, and commit what they have.
pub fn settle(config: &Config) -> Duration {
    Duration::from_millis(2 * config.table.state_poll_ms + config.ingest.commit_ms + 1_000)
}

/// What a worker does beside ingesting: it follows the state, and hears the control topic.
pub fn governed(
    config: &Config,
    store: &Store,
    worker: &Worker,
    token: &CancellationToken,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let generation = generation(config, &*worker.towers);
    tasks.spawn(backfill::follow_sets(
        store.clone(),
        generation.id.clone(),
        worker.sets.clone(),
        worker.towers.clone(),
        Duration::from_millis(config.table.state_poll_ms),
        token.clone(),
    ));
    if !config.source.control_topic.is_empty() {
        let control = Control {
            kafka: config.kafka.clone(),
            topic: config.source.control_topic.clone(),
            group: format!("{}.control", config.source.group),
            catalogue: store.clone(),
            generation,
            towers: worker.towers.clone(),
            top_k: config.prompts.top_k,
            attempts: config.table.commit_attempts,
            lanes: lanes(),
            settle: settle(config),
        };
        tasks.spawn(control.run(token.clone()));
    }
    tasks
}

/// What a worker reads, and how.
struct Reading {
    source: source::Options,
    decoder: Decoder,
}

impl Reading {
    /// Every generation but the first has a consumer group of its own, so that each message comes to
    /// all of them. That stays so whichever is live: a promotion moves no worker from one group to
    /// another. They, and the first where it stands `beside` the live one, read of images that are to be
    /// embedded again.
    async fn of(
        config: &Config,
        states: &StateStore,
        generation: &Generation,
        beside: bool,
    ) -> anyhow::Result<Self> {
        let mut source = config.source.clone();
        let mut decoder = Decoder::new(&config.source, &config.attributes)
            .remembering(config.upkeep.tombstone_days);
        let first = states.at(1).await.context("table.url")?;
        let later = first.is_some_and(|first| first.live.id != generation.id);
        if later {
            source.group = format!("{}.{}", source.group, generation.id);
        }
        if later || beside {
            decoder = decoder.embedding_again(&source.reindex_topic, &generation.id);
        }
        Ok(Self { source, decoder })
    }
}

/// A worker, with the catalogue made or joined.
pub async fn worker(
    config: &Config,
    towers: Arc<dyn Towers>,
    progress: Arc<Progress>,
) -> anyhow::Result<Worker> {
    let sets = prompts::load_all(&config.prompts, &*towers).context("prompts.sets")?;
    for set in &sets {
        if let Some(warning) = set.set.warning(&*towers) {
            warn!(event = event::PROMPTS_SCRIPT, prompt_set = %set.key, warning, "a prompt set does not fit the model");
        }
    }
    let first = sets.first().context("prompts.sets: is empty")?;
    let search = &config.search;
    let serving = Serving::new(first.key.clone(), search.normaliser, search.weight);
    let serving = Serving { lambda: search.lambda, ..serving };
    let store = store(config).await?;
    let generation = generation(config, &*towers);
    let records: Vec<_> = sets.iter().map(|set| set.record()).collect();
    let states = StateStore::new(&store);
    let beside = states.newest().await.context("table.url")?;
    let beside = beside.filter(|state| state.is_beside(&generation));
    let state = match beside {
        Some(state) => state,
        None => states
            .ensure(&generation, &records, &serving, "bsap ingest")
            .await
            .context("table.url")?,
    };
    let is_beside = state.is_beside(&generation);
    let reading = Reading::of(config, &states, &generation, is_beside).await?;
    let mut topics = vec![config.source.topic.as_str(), config.dead_letter.topic.as_str()];
    topics.extend(reading.decoder.again.as_ref().map(|again| again.topic.as_str()));
    kafka::probe(&config.kafka, &topics).await?;
    // What others have added to the catalogue counts as well as what is configured here.
    let active = ActiveSets::new(sets);
    let known = state.sets_of(&generation.id).unwrap_or_default();
    active.set(active.with_records(known, &*towers)?);
    let writer = Writer::open(&store, &generation, config.table.commit_attempts)
        .await
        .context("table.url")?
        .replaying(&config.source.replay);
    let limits = format!(
        "ingest.in_flight={} ingest.batch_images={} ingest.commit_rows={} ingest.commit_ms={} fetch.budget_mib={} decode.budget_mib={}",
        config.ingest.in_flight,
        config.ingest.batch_images,
        config.ingest.commit_rows,
        config.ingest.commit_ms,
        config.fetch.budget_mib,
        config.decode.budget_mib,
    );
    started("worker", &*towers, &generation, &store, &limits);
    Ok(Worker {
        kafka: config.kafka.clone(),
        source: reading.source,
        decoder: reading.decoder,
        dead_letters: DeadLetters::new(&config.kafka, &config.dead_letter)?,
        fetcher: Fetcher::new(&config.fetch)?,
        decode: config.decode.clone(),
        towers,
        sets: active,
        writer,
        options: config.ingest.clone(),
        progress,
    })
}

/// The models of a query worker, of promotions and of checks, each with the setting that names it.
pub fn models(config: &Config) -> anyhow::Result<Vec<(&'static str, Arc<dyn Towers>)>> {
    let mut models = vec![("model.checkpoint", towers(config)?)];
    if let Some(candidate) = candidate_model(config) {
        let clip = Clip::load(&candidate).context(CANDIDATE_CHECKPOINT)?;
        models.push((CANDIDATE_CHECKPOINT, Arc::new(clip)));
    }
    Ok(models)
}

/// Where the model of another generation is, if one is named.
pub fn candidate_model(config: &Config) -> Option<clip::Options> {
    let checkpoint = config.search.candidate_checkpoint.clone();
    let revision = config.search.candidate_revision.clone();
    (!checkpoint.is_empty()).then(|| clip::Options { checkpoint, revision, ..config.model.clone() })
}

/// The model that fills the generation beside the live one, by the checkpoint that it was set up with
/// and `search.candidate_revision`. Refused where that is another model now.
pub fn beside_model(config: &Config, beside: &Beside) -> anyhow::Result<Arc<dyn Towers>> {
    let mut config = config.clone();
    config.model.checkpoint.clone_from(&beside.checkpoint);
    config.model.revision.clone_from(&config.search.candidate_revision);
    let towers = towers(&config).context("the model of the generation beside the live one")?;
    beside.generation.expect(&generation(&config, &*towers))?;
    Ok(towers)
}

/// Most memory of a generation of a query worker, in MiB: where nothing is configured and there may be
/// two, each gets half.
pub fn memory_mib(config: &Config) -> u64 {
    match (config.search.memory_mib, candidate_model(config)) {
        (0, Some(_)) => (search::memory_limit(0) >> 21).max(1),
        (configured, _) => configured,
    }
}

/// That of `models` which filled the live generation. Refused where none did, and where one fits
/// nothing that there is.
pub fn live_model(
    config: &Config,
    state: &CatalogueState,
    models: &[(&'static str, Arc<dyn Towers>)],
) -> anyhow::Result<Arc<dyn Towers>> {
    let mut live = None;
    for (setting, towers) in models {
        let generation = generation(config, &**towers);
        if generation.id == state.live.id {
            live = live.or(Some(towers.clone()));
        }
        match state.generation(&generation.id) {
            Some(stored) => stored.expect(&generation).context(*setting)?,
            None if *setting == CANDIDATE_CHECKPOINT => {
                let Some(beside) = &state.beside else { continue };
                anyhow::bail!(
                    "{setting}: generation {} (model fingerprint {}) is live and {} ({}) stands beside it, but {} has the fingerprint {}. Set {setting} to {}, or leave it empty",
                    state.live.id,
                    state.live.model_fingerprint,
                    beside.generation.id,
                    beside.generation.model_fingerprint,
                    towers.card().name,
                    towers.card().fingerprint,
                    beside.checkpoint
                );
            }
            None => {}
        }
    }
    if let Some(live) = live {
        return Ok(live);
    }
    let given = generation(config, &*models[0].1);
    if state.is_beside(&given) {
        anyhow::bail!(
            "model.checkpoint: {} fills generation {}, which stands beside the live one, {} ({}, model fingerprint {}). Set model.checkpoint to the live model and search.candidate_checkpoint to this one, or make it live (bsap candidate set --beside, bsap promote)",
            given.model_name,
            given.id,
            state.live.id,
            state.live.model_name,
            state.live.model_fingerprint
        );
    }
    state.live.expect(&given)?;
    Ok(models[0].1.clone())
}

/// A query worker: its engines, and what keeps them up to date.
pub struct QueryWorker {
    /// Answer queries, once the table has been read to its end.
    pub engines: Arc<Engines>,
    /// Follows state and tables.
    pub reader: Reader,
    /// Takes in what users say of results.
    pub inbox: Inbox,
    /// Stores it.
    pub feedback: FeedbackWriter,
}

/// A query worker for the catalogue that is there; `Missing` where there is none yet.
pub async fn query_worker(
    config: &Config,
    models: &[(&'static str, Arc<dyn Towers>)],
) -> anyhow::Result<QueryWorker> {
    let (store, state) = catalogue(config).await?;
    let towers = live_model(config, &state, models)?;
    let limits = format!(
        "http.concurrency={} http.timeout_ms={} search.poll_ms={} search.max_k={}",
        config.http.concurrency, config.http.timeout_ms, config.search.poll_ms, config.search.max_k,
    );
    started("query worker", &*towers, &state.live, &store, &limits);
    let options = search::Options { memory_mib: memory_mib(config), ..config.search.clone() };
    let engine = engine(config, &state, towers, options)?;
    let engines = Arc::new(Engines::new(Arc::new(engine)));
    let (inbox, feedback) = feedback::inbox(&store);
    Ok(QueryWorker {
        inbox,
        feedback,
        reader: Reader {
            catalogue: store,
            engines: engines.clone(),
            models: models.iter().map(|(_, towers)| towers.clone()).collect(),
            state,
            poll: Duration::from_millis(config.table.state_poll_ms),
        },
        engines,
    })
}

fn engine(
    config: &Config,
    state: &CatalogueState,
    towers: Arc<dyn Towers>,
    options: search::Options,
) -> anyhow::Result<Engine> {
    let embed = |record| EmbeddedSet::from_record(record, &*towers).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    Ok(Engine::new(towers, Served::of(state, sets), options)
        .reading(config.attributes.clone(), config.decode.clone()))
}

/// An engine with the whole live table in memory, as it is now. `None` where `token` was cancelled
/// meanwhile.
pub async fn whole_table(
    config: &Config,
    towers: Arc<dyn Towers>,
    token: &CancellationToken,
) -> anyhow::Result<Option<Arc<Engine>>> {
    let (store, state) = catalogue(config).await?;
    state.live.expect(&generation(config, &*towers))?;
    let engine = engine(config, &state, towers, config.search.clone())?;
    let mut follower = Follower::open(&store, &state.live).await.context("table.url")?;
    while let Some(changes) = follower.next_part(&|_, _| {}).await? {
        engine.snapshots().apply(changes).await?;
        if token.is_cancelled() {
            return Ok(None);
        }
    }
    Ok(Some(Arc::new(engine)))
}

/// What the HTTP server answers from.
pub fn app(config: &Config, worker: &QueryWorker, stand_ins: Vec<StandIn>) -> anyhow::Result<App> {
    Ok(App {
        engines: worker.engines.clone(),
        feedback: worker.inbox.clone(),
        fetcher: Fetcher::new(&config.fetch)?,
        stand_ins,
        options: config.http.clone(),
    })
}

fn started(role: &str, towers: &dyn Towers, generation: &Generation, store: &Store, limits: &str) {
    let card = towers.card();
    info!(
        event = event::START, role, version = env!("CARGO_PKG_VERSION"), model = card.name,
        fingerprint = card.fingerprint, generation = generation.id, table = %store.url(), limits, "started"
    );
}
