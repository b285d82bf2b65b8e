//! Statistics of every stored row for another prompt set, from stored embeddings.
//!
//! The work is cut into units, a data file each; any number of processes share them, and what was
//! committed stays done when one is killed. New rows carry the set's statistics by themselves from
//! the moment that the workers have taken it up from the state, so the reindex ends when no file is
//! left that was written before.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::runtime::Handle;
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::ReindexError;
use super::claim::Claims;
use crate::catalogue::{CatalogueState, Change, Generation, StateStore};
use crate::prompts::EmbeddedSet;
use crate::store::Store;
use crate::table::{self, Coverage, Pending, StagedUnit, StatisticsTable, Stored};
use crate::telemetry::event;

/// Units that are committed together, at most: a commit costs some requests however small it is.
const TOGETHER: usize = 64;
/// Computed units wait at most so long for others before they are committed.
const COMMIT_EVERY: Duration = Duration::from_secs(2);
/// How often is looked again where others hold what is left, or new files may come.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How often the log tells how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Makes `set` known to the catalogue for `generation`, the live one or the one beside it: workers that
/// fill it take the set up within `table.state_poll_ms`, and from then on new rows carry its statistics.
pub async fn add_set(
    catalogue: &Store,
    generation: &Generation,
    set: &EmbeddedSet,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let changed = states.change(by, |mut state| {
        let is_beside = state.is_beside(generation);
        let sets = match &mut state.beside {
            Some(beside) if is_beside => &mut beside.prompt_sets,
            _ => {
                state.live.expect(generation)?;
                &mut state.prompt_sets
            }
        };
        if sets.iter().any(|known| known.key == set.key) {
            return Ok(None);
        }
        sets.push(set.record());
        state.change = Change::PromptSets {
            keys: vec![set.key.to_string()],
            generation: is_beside.then(|| generation.id.clone()),
        };
        Ok::<_, ReindexError>(Some(state))
    });
    changed.await
}

/// Forgets a prompt set: new rows no longer carry it, and what was backfilled is dropped. Refused
/// while it is served, or a candidate's. `name` is a stored key, name or name@version. Returns its
/// key and how many files of backfilled statistics were dropped.
pub async fn retire(
    catalogue: &Store,
    name: &str,
    attempts: u32,
    by: &str,
) -> Result<(String, usize), ReindexError> {
    let states = StateStore::new(catalogue);
    let newest = states.newest().await?;
    let key = newest.as_ref().and_then(|state| state.prompt_set(name)).map(|set| set.key.clone());
    let Some(key) = key else {
        let known = newest.map(|state| {
            state.prompt_sets.iter().map(|set| set.key.to_string()).collect::<Vec<_>>().join(", ")
        });
        return Err(ReindexError::Refused(format!(
            "{name:?} is not a stored prompt set; stored are {}",
            known.unwrap_or_default()
        )));
    };
    let state = states
        .change(by, |mut state| {
            let refused = |why: &str| Err(ReindexError::Refused(format!("{key} {why}")));
            if state.serving.prompt_set == key {
                return refused("is served; promote another configuration first");
            }
            if let Some(candidate) = &state.candidate
                && candidate.serving.prompt_set == key
            {
                return refused("is the candidate's; `bsap candidate withdraw` first");
            }
            state.prompt_sets.retain(|set| set.key != key);
            state.change = Change::PromptSets { keys: vec![key.to_string()], generation: None };
            Ok(Some(state))
        })
        .await?;
    let dropped = match StatisticsTable::open(catalogue, &state.live, attempts).await? {
        Some(mut table) => table.drop_set(&key).await?,
        None => 0,
    };
    Ok((key.to_string(), dropped))
}

/// What a reindex did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Files measured by this process.
    pub files: usize,
    /// Rows in them that got statistics.
    pub rows: usize,
    /// Whether nothing is left to do.
    pub complete: bool,
}

/// A reindex of the statistics of one prompt set.
pub struct Job {
    /// The catalogue.
    pub catalogue: Store,
    /// Which tables.
    pub generation: Generation,
    /// The set.
    pub set: Arc<EmbeddedSet>,
    /// How often a commit is tried.
    pub attempts: u32,
    /// Files measured at one time.
    pub lanes: usize,
    /// How long after the set was made known workers may still write rows without it.
    pub settle: Duration,
}

/// A measured file.
struct Measured {
    unit: String,
    rows: usize,
    add: Option<StagedUnit>,
}

impl Job {
    /// Measures what is left until nothing is, or `token` is cancelled. `progress` hears how far the
    /// table is, whoever did it, and how many rows this process has measured.
    pub async fn run(
        &self,
        progress: &(dyn Fn(&Coverage, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<Done, ReindexError> {
        let key = &self.set.key;
        let since = StateStore::new(&self.catalogue).newest().await?.and_then(|state| {
            let sets = state.sets_of(&self.generation.id)?;
            sets.iter().find(|set| set.key == *key).map(|set| set.since)
        });
        let since = since.ok_or_else(|| {
            ReindexError::Refused(format!("{key} is not known to the catalogue; add it first"))
        })?;
        let claims = Claims::new(&self.catalogue, format!("{:016x}", rand::random::<u64>()));
        let stored = Stored::open(&self.catalogue, &self.generation).await?;
        let stored = Arc::new(RwLock::new(stored));
        let mut table =
            StatisticsTable::open_or_create(&self.catalogue, &self.generation, self.attempts)
                .await?;
        let started = Instant::now();
        let mut told: Option<Instant> = None;
        let mut done = Done::default();
        loop {
            let (pending, coverage) = stored.write().await.pending(key).await?;
            progress(&coverage, done.rows);
            if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) || pending.is_empty() {
                tell(if told.is_none() { "started" } else { "running" }, &coverage, &done, started);
                told = Some(Instant::now());
            }
            let settled =
                Utc::now() - since >= TimeDelta::from_std(self.settle).unwrap_or(TimeDelta::MAX);
            if pending.is_empty() && settled {
                done.complete = true;
                tell("done", &coverage, &done, started);
                return Ok(done);
            }
            let before = done.files;
            self.work(pending, coverage, &stored, &claims, &mut table, &mut done, progress, token)
                .await?;
            if token.is_cancelled() {
                return Ok(done);
            }
            if done.files == before {
                tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                    () = token.cancelled() => return Ok(done),
                }
            }
        }
    }

    /// Measures those of `pending` that nobody else holds.
    #[allow(clippy::too_many_arguments)]
    async fn work(
        &self,
        pending: Vec<Pending>,
        mut coverage: Coverage,
        stored: &Arc<RwLock<Stored>>,
        claims: &Claims,
        table: &mut StatisticsTable,
        done: &mut Done,
        progress: &(dyn Fn(&Coverage, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<(), ReindexError> {
        let mut waiting = pending.into_iter();
        let mut running = FuturesUnordered::new();
        let mut staged: Vec<Measured> = Vec::new();
        let mut rows_of: HashMap<String, usize> = HashMap::new();
        let mut committed = Instant::now();
        loop {
            while running.len() < self.lanes && !token.is_cancelled() {
                let Some(file) = waiting.next() else { break };
                let unit = table::unit(&self.set.key, file.path.as_ref());
                if claims.take(&unit).await? {
                    rows_of.insert(unit.clone(), file.rows);
                    running.push(self.measure(unit, file, stored.clone(), claims.clone()));
                }
            }
            let Some(measured) = running.next().await else { break };
            let (measured, found) = measured?;
            let measured = match found {
                // Staged here, one after the other: the files are small.
                Some((images, found)) => {
                    let add = table.stage(&self.set.key, &images, &found).await?;
                    Measured { add: Some(add), rows: found.len(), ..measured }
                }
                None => measured,
            };
            coverage.covered += rows_of.get(&measured.unit).copied().unwrap_or_default();
            staged.push(measured);
            if staged.len() >= TOGETHER || committed.elapsed() >= COMMIT_EVERY {
                self.commit(&mut staged, claims, table, done).await?;
                committed = Instant::now();
            }
            progress(&coverage, done.rows);
        }
        self.commit(&mut staged, claims, table, done).await
    }

    async fn measure(
        &self,
        unit: String,
        file: Pending,
        stored: Arc<RwLock<Stored>>,
        claims: Claims,
    ) -> Result<(Measured, Option<(String, Vec<table::Backfilled>)>), ReindexError> {
        let (set, images, runtime) = (self.set.clone(), file.path.to_string(), Handle::current());
        let mut computing = tokio::task::spawn_blocking(move || {
            runtime.block_on(async {
                let stored = stored.read().await;
                stored.measure(&file, &set.key, &|values| set.measure(values)).await
            })
        });
        let found = loop {
            tokio::select! {
                found = &mut computing => {
                    break found.map_err(|panic| ReindexError::Broken(panic.to_string()))??;
                }
                () = tokio::time::sleep(Claims::renewal()) => claims.renew(&unit).await?,
            }
        };
        Ok((Measured { unit, rows: 0, add: None }, found.map(|found| (images, found))))
    }

    async fn commit(
        &self,
        staged: &mut Vec<Measured>,
        claims: &Claims,
        table: &mut StatisticsTable,
        done: &mut Done,
    ) -> Result<(), ReindexError> {
        let adds: Vec<_> = staged.iter().filter_map(|measured| measured.add.clone()).collect();
        if !adds.is_empty() {
            table.append(adds).await?;
        }
        for measured in staged.drain(..) {
            done.files += 1;
            done.rows += measured.rows;
            claims.release(&measured.unit).await;
        }
        Ok(())
    }
}

fn tell(phase: &str, coverage: &Coverage, done: &Done, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    info!(
        event = event::REINDEX,
        phase,
        prompt_set = %coverage.prompt_set,
        rows = coverage.rows,
        covered = coverage.covered,
        pending_files = coverage.pending_files,
        measured = done.rows,
        seconds,
        "statistics of stored rows"
    );
}
