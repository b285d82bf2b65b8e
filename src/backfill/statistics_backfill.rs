//! Computes the statistics of a new prompt set for stored rows, from their stored embeddings.
//!
//! A unit of work is a data file. Any number of processes share the units; committed units remain
//! if a process is killed. Workers that know the set from the state write new rows with its
//! statistics, so the backfill is complete when the statistics of all files without them are
//! committed.

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

use super::claims::ClaimStore;
use super::error::BackfillError;
use crate::catalogue::StateStore;
use crate::prompts::EmbeddedPromptSet;
use crate::store::Store;
use crate::table::{
    self, BackfillSource, Generation, PendingBackfillFile, StagedStatisticsFile,
    StatisticsCoverage, StatisticsTable, TableError,
};
use crate::telemetry::event;

/// Maximum number of units in a commit. Units share commits because each commit takes several
/// requests, however small it is.
const MAX_FILES_PER_COMMIT: usize = 64;
/// How long a computed unit may wait for others before it is committed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(2);
/// How often pending files are listed again if other processes hold all of them, or if workers may
/// still write files without the statistics.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How often progress is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Result of [`StatisticsBackfill::run`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatisticsBackfillResult {
    /// Number of files whose statistics this process computed.
    pub measured_file_count: usize,
    /// Number of rows for which this process computed statistics.
    pub measured_row_count: usize,
    /// Whether the statistics of all stored rows are committed, also those of other processes.
    pub is_complete: bool,
}

/// A backfill of the statistics of one prompt set.
pub struct StatisticsBackfill {
    /// Folder of the catalogue.
    pub catalogue: Store,
    /// Generation whose tables are read and extended.
    pub generation: Generation,
    /// The set, which the state must have; see [`add_prompt_set`](super::add_prompt_set).
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Maximum number of attempts of a commit.
    pub max_commit_attempts: u32,
    /// Maximum number of files whose statistics are computed at one time.
    pub max_concurrent_files: usize,
    /// How long after the set was added workers may still write rows without its statistics.
    pub propagation_delay: Duration,
}

/// A data file whose statistics this process has computed.
struct MeasuredFile {
    unit_id: String,
    /// Number of rows for which statistics were computed.
    measured_row_count: usize,
    /// The statistics file to commit; `None` if the data file was rewritten in the meantime.
    staged_file: Option<StagedStatisticsFile>,
}

impl StatisticsBackfill {
    /// Computes and commits missing statistics until there are none, or `cancel` is cancelled.
    /// Calls `progress` with the coverage of the table by all processes, and with the number of
    /// rows for which this process computed statistics.
    pub async fn run(
        &self,
        progress: &(dyn Fn(&StatisticsCoverage, usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<StatisticsBackfillResult, BackfillError> {
        let key = &self.prompt_set.statistics_key;
        let since = StateStore::new(&self.catalogue).read_newest().await?.and_then(|state| {
            let sets = state.prompt_sets_of_generation(&self.generation.id)?;
            sets.iter().find(|set| set.key == *key).map(|set| set.since)
        });
        let since = since.ok_or_else(|| {
            BackfillError::Refused(format!("{key} is not known to the catalogue; add it first"))
        })?;
        let claims = ClaimStore::new(&self.catalogue, format!("{:016x}", rand::random::<u64>()));
        let source = BackfillSource::open(&self.catalogue, &self.generation).await?;
        let source = Arc::new(RwLock::new(source));
        let mut table = StatisticsTable::open_or_create(
            &self.catalogue,
            &self.generation,
            self.max_commit_attempts,
        )
        .await?;
        let started = Instant::now();
        let mut last_logged: Option<Instant> = None;
        let mut result = StatisticsBackfillResult::default();
        loop {
            let (pending, coverage) =
                source.write().await.list_pending_files_and_coverage(key).await?;
            progress(&coverage, result.measured_row_count);
            if last_logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) || pending.is_empty() {
                log_progress(
                    if last_logged.is_none() { "started" } else { "running" },
                    &coverage,
                    &result,
                    started,
                );
                last_logged = Some(Instant::now());
            }
            let is_propagated = Utc::now() - since
                >= TimeDelta::from_std(self.propagation_delay).unwrap_or(TimeDelta::MAX);
            if pending.is_empty() && is_propagated {
                result.is_complete = true;
                log_progress("done", &coverage, &result, started);
                return Ok(result);
            }
            let measured_before = result.measured_file_count;
            let measured = self
                .measure_and_commit_pending_files(
                    pending,
                    coverage,
                    &source,
                    &claims,
                    &mut table,
                    &mut result,
                    progress,
                    cancel,
                )
                .await;
            match measured {
                // What was not committed is measured again by whoever continues.
                Err(BackfillError::Table(TableError::Cancelled { .. })) => return Ok(result),
                measured => measured?,
            }
            if cancel.is_cancelled() {
                return Ok(result);
            }
            if result.measured_file_count == measured_before {
                tokio::select! {
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                    () = cancel.cancelled() => return Ok(result),
                }
            }
        }
    }

    /// Computes and commits the statistics of those `pending` files that no other process holds.
    #[allow(clippy::too_many_arguments)]
    async fn measure_and_commit_pending_files(
        &self,
        pending: Vec<PendingBackfillFile>,
        mut coverage: StatisticsCoverage,
        source: &Arc<RwLock<BackfillSource>>,
        claims: &ClaimStore,
        table: &mut StatisticsTable,
        result: &mut StatisticsBackfillResult,
        progress: &(dyn Fn(&StatisticsCoverage, usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<(), BackfillError> {
        let mut waiting = pending.into_iter();
        let mut running = FuturesUnordered::new();
        let mut staged: Vec<MeasuredFile> = Vec::new();
        let mut rows_by_unit: HashMap<String, usize> = HashMap::new();
        let mut last_commit = Instant::now();
        loop {
            while running.len() < self.max_concurrent_files && !cancel.is_cancelled() {
                let Some(file) = waiting.next() else { break };
                let unit =
                    table::backfill_unit_id(&self.prompt_set.statistics_key, file.path.as_ref());
                if claims.try_acquire(&unit).await? {
                    rows_by_unit.insert(unit.clone(), file.row_count);
                    running.push(self.measure_file(unit, file, source.clone(), claims.clone()));
                }
            }
            let Some(measured) = running.next().await else { break };
            let (measured, statistics) = measured?;
            let measured = match statistics {
                // Files are staged one after another: they are small.
                Some((images_file, statistics)) => {
                    let staged = table
                        .stage_file(
                            &self.prompt_set.statistics_key,
                            &images_file,
                            &statistics,
                            cancel,
                        )
                        .await?;
                    MeasuredFile {
                        staged_file: Some(staged),
                        measured_row_count: statistics.len(),
                        ..measured
                    }
                }
                None => measured,
            };
            coverage.covered += rows_by_unit.get(&measured.unit_id).copied().unwrap_or_default();
            staged.push(measured);
            if staged.len() >= MAX_FILES_PER_COMMIT || last_commit.elapsed() >= COMMIT_INTERVAL {
                self.commit_measured_files(&mut staged, claims, table, result, cancel).await?;
                last_commit = Instant::now();
            }
            progress(&coverage, result.measured_row_count);
        }
        self.commit_measured_files(&mut staged, claims, table, result, cancel).await
    }

    /// Computes the statistics of the rows of `file`, and renews the claim on the unit in the
    /// meantime. Returns them with the path of the file; `None` in their place if the file was
    /// rewritten by then.
    async fn measure_file(
        &self,
        unit: String,
        file: PendingBackfillFile,
        source: Arc<RwLock<BackfillSource>>,
        claims: ClaimStore,
    ) -> Result<(MeasuredFile, Option<(String, Vec<table::BackfilledStatistics>)>), BackfillError>
    {
        let (set, images_file, runtime) =
            (self.prompt_set.clone(), file.path.to_string(), Handle::current());
        let mut computation = tokio::task::spawn_blocking(move || {
            runtime.block_on(async {
                let source = source.read().await;
                source
                    .compute_file_statistics(&file, &set.statistics_key, &|values| {
                        set.compute_statistics_of_values(values)
                    })
                    .await
            })
        });
        let statistics = loop {
            tokio::select! {
                result = &mut computation => {
                    break result.map_err(|panic| BackfillError::Panicked(panic.to_string()))??;
                }
                () = tokio::time::sleep(ClaimStore::renewal_interval()) => claims.renew(&unit).await?,
            }
        };
        Ok((
            MeasuredFile { unit_id: unit, measured_row_count: 0, staged_file: None },
            statistics.map(|statistics| (images_file, statistics)),
        ))
    }

    /// Commits the staged files in one commit and releases their claims.
    async fn commit_measured_files(
        &self,
        staged: &mut Vec<MeasuredFile>,
        claims: &ClaimStore,
        table: &mut StatisticsTable,
        result: &mut StatisticsBackfillResult,
        cancel: &CancellationToken,
    ) -> Result<(), BackfillError> {
        let files: Vec<_> =
            staged.iter().filter_map(|measured| measured.staged_file.clone()).collect();
        if !files.is_empty() {
            table.commit_staged(files, cancel).await?;
        }
        for measured in staged.drain(..) {
            result.measured_file_count += 1;
            result.measured_row_count += measured.measured_row_count;
            claims.release(&measured.unit_id).await;
        }
        Ok(())
    }
}

fn log_progress(
    phase: &str,
    coverage: &StatisticsCoverage,
    result: &StatisticsBackfillResult,
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
        measured_rows = result.measured_row_count,
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
        assert_eq!(result, StatisticsBackfillResult::default());
        faulty.is_armed.store(false, std::sync::atomic::Ordering::SeqCst);
        let result = backfill.run(&|_, _| {}, &CancellationToken::new()).await.unwrap();
        assert_eq!((result.measured_file_count, result.is_complete), (5, true));
    }
}
