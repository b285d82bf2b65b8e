//! Tidying the table on a schedule: merging files, dropping superseded rows, removing what nobody
//! reads any more. Every worker runs this; a lease lets one of them do it at a time.

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
use crate::table::options::MaintenanceOptions;
use crate::table::{Generation, TableError};
use crate::telemetry::event;

/// The upkeep of one table.
pub struct TableMaintenance {
    /// The catalogue.
    pub store: Store,
    /// Whose table.
    pub generation: Generation,
    /// When and how.
    pub options: MaintenanceOptions,
    /// How often a commit is tried.
    pub max_commit_attempts: u32,
}

impl TableMaintenance {
    /// Tidies now and then until `token` is cancelled. A failure is logged and tried again at the
    /// next turn: ingestion does not depend on it.
    pub async fn run(self, token: CancellationToken) {
        if self.options.interval_seconds == 0 {
            return;
        }
        let holder = format!("{:016x}", rand::random::<u64>());
        loop {
            // Workers that were started together do not ask together.
            let jitter = rand::rng().random_range(0.5..1.5);
            let wait = Duration::from_secs(self.options.interval_seconds).mul_f64(jitter);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = token.cancelled() => return,
            }
            let error = match AssertUnwindSafe(self.run_under_lease(&holder, &token))
                .catch_unwind()
                .await
            {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it panicked; standard error says where".to_owned(),
            };
            warn!(
                event = event::MAINTENANCE_FAILED,
                error, "the table was not tidied; the next turn tries again"
            );
        }
    }

    async fn run_under_lease(
        &self,
        holder: &str,
        token: &CancellationToken,
    ) -> Result<(), TableError> {
        let lease_duration = vacuum::lease_duration(&self.options);
        let Some(mut lease) =
            MaintenanceLease::acquire(&self.store, holder, lease_duration).await?
        else {
            return Ok(());
        };
        let mut work = pin!(self.compact_and_vacuum(token));
        let mut held = true;
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                () = tokio::time::sleep(lease_duration / 2), if held => {
                    // A fault that may pass is no reason to break off what is being done.
                    held = !matches!(lease.renew(lease_duration).await, Ok(false));
                }
            }
        };
        let released = lease.release().await;
        done.and(released)
    }

    async fn compact_and_vacuum(&self, token: &CancellationToken) -> Result<(), TableError> {
        let (store, generation, options) = (&self.store, &self.generation, &self.options);
        let mut compactor =
            Compactor::open(store, generation, options, self.max_commit_attempts).await?;
        let interval = TimeDelta::hours(options.erase_deleted_after_hours.into());
        let is_due =
            |last: Option<DateTime<Utc>>| last.is_none_or(|at| Utc::now() - at >= interval);
        let depth = if is_due(compactor.last_deep_compaction().await?) {
            CompactionMode::Deep
        } else {
            CompactionMode::Merge
        };
        let started = Instant::now();
        let done = compactor.run(depth, Utc::now(), &|_, _| {}, token).await?;
        if done != CompactionSummary::default() {
            log_compaction(&done, started.elapsed());
        }
        // Noted apart from the look at every row: one that failed is due again at the next turn.
        if !token.is_cancelled() && is_due(compactor.last_vacuum().await?) {
            let removed = vacuum::vacuum(store, generation, options, Utc::now(), false).await?;
            compactor.record_vacuum(Utc::now()).await?;
            log_vacuum(&removed);
        }
        Ok(())
    }
}

/// Logs what a compaction came to.
pub fn log_compaction(done: &CompactionSummary, took: Duration) {
    info!(
        event = event::COMPACTION,
        jobs = done.committed_jobs,
        conflicts = done.conflicting_jobs,
        files_in = done.files_in,
        files_out = done.files_out,
        bytes_in = done.bytes_in,
        bytes_out = done.bytes_out,
        superseded_rows = done.dropped_superseded_rows,
        tombstones = done.dropped_tombstones,
        merged_statistics = done.folded_statistics,
        duration_ms = took.as_millis() as u64,
        "files were merged"
    );
}

/// Logs what vacuum came to.
pub fn log_vacuum(done: &VacuumSummary) {
    info!(
        event = event::VACUUM,
        files = done.removed_files.len(),
        log_files = done.removed_log_files,
        "files that nobody needs any more were removed"
    );
}
