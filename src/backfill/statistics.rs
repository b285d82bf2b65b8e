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
use super::claims::ClaimStore;
use crate::catalogue::{CatalogueState, StateChange, StateStore};
use crate::prompts::EmbeddedPromptSet;
use crate::store::Store;
use crate::table::{
    self, BackfillSource, Generation, PendingFile, StagedStatisticsFile, StatisticsCoverage,
    StatisticsTable, TableError,
};
use crate::telemetry::event;

/// Units that are committed together, at most: a commit costs some requests however small it is.
const MAX_UNITS_PER_COMMIT: usize = 64;
/// Computed units wait at most so long for others before they are committed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(2);
/// How often is looked again where others hold what is left, or new files may come.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How often the log tells how far it is.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Makes `set` known to the catalogue for `generation`, the live one or the one beside it: workers that
/// fill it take the set up within `table.state_poll_ms`, and from then on new rows carry its statistics.
pub async fn add_prompt_set(
    catalogue: &Store,
    generation: &Generation,
    set: &EmbeddedPromptSet,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let changed = states.update(by, |mut state| {
        let is_beside = state.is_standby(generation);
        let sets = match &mut state.standby {
            Some(beside) if is_beside => &mut beside.prompt_sets,
            _ => {
                state.live.ensure_compatible(generation)?;
                &mut state.prompt_sets
            }
        };
        if sets.iter().any(|known| known.key == set.statistics_key) {
            return Ok(None);
        }
        sets.push(set.to_record());
        state.change = StateChange::PromptSets {
            keys: vec![set.statistics_key.to_string()],
            generation: is_beside.then(|| generation.id.clone()),
        };
        Ok::<_, ReindexError>(Some(state))
    });
    changed.await
}

/// Forgets a prompt set: new rows no longer carry it, and what was backfilled is dropped. Refused
/// while it is served, or a candidate's. `name` is a stored key, name or name@version. Returns its
/// key and how many files of backfilled statistics were dropped.
pub async fn retire_prompt_set(
    catalogue: &Store,
    name: &str,
    attempts: u32,
    by: &str,
    cancel: &CancellationToken,
) -> Result<(String, usize), ReindexError> {
    let states = StateStore::new(catalogue);
    let newest = states.read_newest().await?;
    let key =
        newest.as_ref().and_then(|state| state.find_prompt_set(name)).map(|set| set.key.clone());
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
        .update(by, |mut state| {
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
            state.change =
                StateChange::PromptSets { keys: vec![key.to_string()], generation: None };
            Ok(Some(state))
        })
        .await?;
    let dropped = match StatisticsTable::open(catalogue, &state.live, attempts).await? {
        Some(mut table) => table.remove_prompt_set(&key, cancel).await?,
        None => 0,
    };
    Ok((key.to_string(), dropped))
}

/// What a reindex did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackfillResult {
    /// Files measured by this process.
    pub measured_files: usize,
    /// Rows in them that got statistics.
    pub measured_rows: usize,
    /// Whether nothing is left to do.
    pub complete: bool,
}

/// A reindex of the statistics of one prompt set.
pub struct StatisticsBackfill {
    /// The catalogue.
    pub catalogue: Store,
    /// Which tables.
    pub generation: Generation,
    /// The set.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// How often a commit is tried.
    pub max_commit_attempts: u32,
    /// Files measured at one time.
    pub max_concurrent_files: usize,
    /// How long after the set was made known workers may still write rows without it.
    pub propagation_delay: Duration,
}

/// A measured file.
struct MeasuredFile {
    unit_id: String,
    rows: usize,
    staged_unit: Option<StagedStatisticsFile>,
}

impl StatisticsBackfill {
    /// Measures what is left until nothing is, or `token` is cancelled. `progress` hears how far the
    /// table is, whoever did it, and how many rows this process has measured.
    pub async fn run(
        &self,
        progress: &(dyn Fn(&StatisticsCoverage, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<BackfillResult, ReindexError> {
        let key = &self.prompt_set.statistics_key;
        let since = StateStore::new(&self.catalogue).read_newest().await?.and_then(|state| {
            let sets = state.prompt_sets_of_generation(&self.generation.id)?;
            sets.iter().find(|set| set.key == *key).map(|set| set.since)
        });
        let since = since.ok_or_else(|| {
            ReindexError::Refused(format!("{key} is not known to the catalogue; add it first"))
        })?;
        let claims = ClaimStore::new(&self.catalogue, format!("{:016x}", rand::random::<u64>()));
        let stored = BackfillSource::open(&self.catalogue, &self.generation).await?;
        let stored = Arc::new(RwLock::new(stored));
        let mut table = StatisticsTable::open_or_create(
            &self.catalogue,
            &self.generation,
            self.max_commit_attempts,
        )
        .await?;
        let started = Instant::now();
        let mut last_logged: Option<Instant> = None;
        let mut done = BackfillResult::default();
        loop {
            let (pending, coverage) = stored.write().await.list_pending_files(key).await?;
            progress(&coverage, done.measured_rows);
            if last_logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) || pending.is_empty() {
                log_progress(
                    if last_logged.is_none() { "started" } else { "running" },
                    &coverage,
                    &done,
                    started,
                );
                last_logged = Some(Instant::now());
            }
            let settled = Utc::now() - since
                >= TimeDelta::from_std(self.propagation_delay).unwrap_or(TimeDelta::MAX);
            if pending.is_empty() && settled {
                done.complete = true;
                log_progress("done", &coverage, &done, started);
                return Ok(done);
            }
            let before = done.measured_files;
            let measured = self
                .measure_pending(
                    pending, coverage, &stored, &claims, &mut table, &mut done, progress, token,
                )
                .await;
            match measured {
                // What was not committed is measured again by whoever goes on.
                Err(ReindexError::Table(TableError::Cancelled { .. })) => return Ok(done),
                result => result?,
            }
            if token.is_cancelled() {
                return Ok(done);
            }
            if done.measured_files == before {
                tokio::select! {
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                    () = token.cancelled() => return Ok(done),
                }
            }
        }
    }

    /// Measures those of `pending` that nobody else holds.
    #[allow(clippy::too_many_arguments)]
    async fn measure_pending(
        &self,
        pending: Vec<PendingFile>,
        mut coverage: StatisticsCoverage,
        stored: &Arc<RwLock<BackfillSource>>,
        claims: &ClaimStore,
        table: &mut StatisticsTable,
        done: &mut BackfillResult,
        progress: &(dyn Fn(&StatisticsCoverage, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<(), ReindexError> {
        let mut waiting = pending.into_iter();
        let mut running = FuturesUnordered::new();
        let mut staged: Vec<MeasuredFile> = Vec::new();
        let mut rows_of: HashMap<String, usize> = HashMap::new();
        let mut committed = Instant::now();
        loop {
            while running.len() < self.max_concurrent_files && !token.is_cancelled() {
                let Some(file) = waiting.next() else { break };
                let unit =
                    table::backfill_unit_id(&self.prompt_set.statistics_key, file.path.as_ref());
                if claims.try_acquire(&unit).await? {
                    rows_of.insert(unit.clone(), file.rows);
                    running.push(self.measure_file(unit, file, stored.clone(), claims.clone()));
                }
            }
            let Some(measured) = running.next().await else { break };
            let (measured, found) = measured?;
            let measured = match found {
                // Staged here, one after the other: the files are small.
                Some((images, found)) => {
                    let key = &self.prompt_set.statistics_key;
                    let add = table.stage_file(key, &images, &found, token).await?;
                    MeasuredFile { staged_unit: Some(add), rows: found.len(), ..measured }
                }
                None => measured,
            };
            coverage.covered += rows_of.get(&measured.unit_id).copied().unwrap_or_default();
            staged.push(measured);
            if staged.len() >= MAX_UNITS_PER_COMMIT || committed.elapsed() >= COMMIT_INTERVAL {
                self.commit_measured(&mut staged, claims, table, done, token).await?;
                committed = Instant::now();
            }
            progress(&coverage, done.measured_rows);
        }
        self.commit_measured(&mut staged, claims, table, done, token).await
    }

    async fn measure_file(
        &self,
        unit: String,
        file: PendingFile,
        stored: Arc<RwLock<BackfillSource>>,
        claims: ClaimStore,
    ) -> Result<(MeasuredFile, Option<(String, Vec<table::BackfilledStatistics>)>), ReindexError>
    {
        let (set, images, runtime) =
            (self.prompt_set.clone(), file.path.to_string(), Handle::current());
        let mut computing = tokio::task::spawn_blocking(move || {
            runtime.block_on(async {
                let stored = stored.read().await;
                stored
                    .measure_file(&file, &set.statistics_key, &|values| {
                        set.statistics_of_values(values)
                    })
                    .await
            })
        });
        let found = loop {
            tokio::select! {
                found = &mut computing => {
                    break found.map_err(|panic| ReindexError::Panicked(panic.to_string()))??;
                }
                () = tokio::time::sleep(ClaimStore::renewal_interval()) => claims.renew(&unit).await?,
            }
        };
        Ok((
            MeasuredFile { unit_id: unit, rows: 0, staged_unit: None },
            found.map(|found| (images, found)),
        ))
    }

    async fn commit_measured(
        &self,
        staged: &mut Vec<MeasuredFile>,
        claims: &ClaimStore,
        table: &mut StatisticsTable,
        done: &mut BackfillResult,
        token: &CancellationToken,
    ) -> Result<(), ReindexError> {
        let adds: Vec<_> =
            staged.iter().filter_map(|measured| measured.staged_unit.clone()).collect();
        if !adds.is_empty() {
            table.commit_staged(adds, token).await?;
        }
        for measured in staged.drain(..) {
            done.measured_files += 1;
            done.measured_rows += measured.rows;
            claims.release(&measured.unit_id).await;
        }
        Ok(())
    }
}

fn log_progress(
    phase: &str,
    coverage: &StatisticsCoverage,
    done: &BackfillResult,
    started: Instant,
) {
    let seconds = started.elapsed().as_secs_f64();
    info!(
        event = event::REINDEX_PROGRESS,
        phase,
        prompt_set = %coverage.prompt_set,
        rows = coverage.rows,
        covered_rows = coverage.covered,
        pending_files = coverage.pending_files,
        measured_rows = done.measured_rows,
        elapsed_seconds = seconds,
        "statistics of stored rows"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::catalogue::ServingConfig;
    use crate::search::testing::sample_prompt_set;
    use crate::table::tests::cancellation::{MANY_ATTEMPTS, store_with_rows};
    use crate::table::tests::faulty::{FaultKind, stops_soon};
    use crate::table::tests::generation;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_backfill_whose_commits_fail_ends_with_its_token() {
        let (faulty, store, _) = store_with_rows(FaultKind::LogWrites).await;
        let set = sample_prompt_set("late", 4);
        let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Softmax, 0.25);
        let states = StateStore::new(&store);
        let records = [set.to_record()];
        states.initialise_or_extend(&generation(), &records, &serving, "test").await.unwrap();
        StatisticsTable::open_or_create(&store, &generation(), 1).await.unwrap();
        let backfill = StatisticsBackfill {
            catalogue: store,
            generation: generation(),
            prompt_set: set,
            max_commit_attempts: MANY_ATTEMPTS,
            max_concurrent_files: 2,
            propagation_delay: Duration::ZERO,
        };
        let cancel = faulty.arm_and_cancel();
        let result = stops_soon(backfill.run(&|_, _| {}, &cancel)).await.unwrap();
        assert_eq!(result, BackfillResult::default());
        faulty.is_armed.store(false, std::sync::atomic::Ordering::SeqCst);
        let result = backfill.run(&|_, _| {}, &CancellationToken::new()).await.unwrap();
        assert_eq!((result.measured_files, result.complete), (5, true));
    }
}
