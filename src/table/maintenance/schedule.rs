//! Maintenance on a schedule: merges files, drops superseded rows, and removes files that no reader
//! needs any more. Every worker runs it; a lease lets one worker at a time do the work.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use futures::FutureExt;
use rand::RngExt;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::compact::{CompactionMode, CompactionSummary, Compactor};
use super::lease::MaintenanceLease;
use super::vacuum::{self, VacuumSummary};
use crate::store::Store;
use crate::table::error::TableError;
use crate::table::generation::Generation;
use crate::table::options::MaintenanceOptions;
use crate::telemetry::event;

/// The maintenance of the tables of one generation.
pub struct TableMaintenance {
    /// The catalogue's folder.
    pub store: Store,
    /// The generation.
    pub generation: Generation,
    /// When maintenance runs, and what it merges and keeps.
    pub options: MaintenanceOptions,
    /// Number of attempts to commit, at least 1.
    pub max_commit_attempts: u32,
}

impl TableMaintenance {
    /// Runs maintenance about once per interval until `cancel` is cancelled; then the job in progress is
    /// finished. A failure is logged, and the next run tries again: ingestion does not depend on it.
    pub async fn run(self, cancel: CancellationToken) {
        if self.options.interval_seconds == 0 {
            return;
        }
        let holder = format!("{:016x}", rand::random::<u64>());
        loop {
            // Workers that were started together do not compete for the lease.
            let jitter = rand::rng().random_range(0.5..1.5);
            let wait = Duration::from_secs(self.options.interval_seconds).mul_f64(jitter);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = cancel.cancelled() => return,
            }
            let error =
                match AssertUnwindSafe(self.run_under_lease(&holder, &cancel)).catch_unwind().await
                {
                    Ok(Ok(()) | Err(TableError::Cancelled { .. })) => continue,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "it panicked; standard error says where".to_owned(),
                };
            warn!(
                event = event::MAINTENANCE_FAILED,
                error, "maintenance of the table failed; the next run tries again"
            );
        }
    }

    async fn run_under_lease(
        &self,
        holder: &str,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        let lease_duration = vacuum::lease_duration(&self.options);
        let Some(mut lease) =
            MaintenanceLease::acquire(&self.store, holder, lease_duration).await?
        else {
            return Ok(());
        };
        let mut work = pin!(self.compact_and_vacuum(cancel));
        let mut is_held = true;
        let result = loop {
            tokio::select! {
                result = &mut work => break result,
                () = tokio::time::sleep(lease_duration / 2), if is_held => {
                    // An error that may pass is no reason to interrupt the work.
                    is_held = !matches!(lease.renew(lease_duration).await, Ok(false));
                }
            }
        };
        let released = lease.release().await;
        result.and(released)
    }

    async fn compact_and_vacuum(&self, cancel: &CancellationToken) -> Result<(), TableError> {
        let (store, generation, options) = (&self.store, &self.generation, &self.options);
        let mut compactor =
            Compactor::open(store, generation, options, self.max_commit_attempts).await?;
        let interval = TimeDelta::hours(options.erase_deleted_after_hours.into());
        let is_due =
            |last: Option<DateTime<Utc>>| last.is_none_or(|at| Utc::now() - at >= interval);
        let mode = if is_due(compactor.last_deep_compaction_time().await?) {
            CompactionMode::Deep
        } else {
            CompactionMode::Merge
        };
        let started = Instant::now();
        let summary = compactor.run(mode, Utc::now(), &|_, _| {}, cancel).await?;
        if summary != CompactionSummary::default() {
            log_compaction(&summary, started.elapsed());
        }
        // Recorded apart from the compaction: a vacuum that failed is due again at the next run.
        if !cancel.is_cancelled() && is_due(compactor.last_vacuum_time().await?) {
            let removed = vacuum::vacuum(store, generation, options, Utc::now(), false).await?;
            compactor.record_vacuum_time(Utc::now(), cancel).await?;
            log_vacuum(&removed);
        }
        Ok(())
    }
}

/// Logs the result of a compaction.
pub fn log_compaction(summary: &CompactionSummary, elapsed: Duration) {
    info!(
        event = event::COMPACTION,
        jobs = summary.committed_job_count,
        conflicts = summary.conflicting_job_count,
        files_in = summary.removed_file_count,
        files_out = summary.written_file_count,
        bytes_in = summary.bytes_in,
        bytes_out = summary.bytes_out,
        superseded_rows = summary.dropped_superseded_row_count,
        tombstones = summary.dropped_tombstone_count,
        merged_statistics = summary.folded_statistics_count,
        duration_ms = elapsed.as_millis() as u64,
        "files were merged"
    );
}

/// Logs the result of a vacuum.
pub fn log_vacuum(summary: &VacuumSummary) {
    info!(
        event = event::VACUUM,
        files = summary.removed_file_paths.len(),
        log_files = summary.removed_log_file_count,
        "files that no reader needs any more were removed"
    );
}
