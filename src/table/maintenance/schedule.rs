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

use super::compact::{Compacted, Compactor, Depth};
use super::lease::Lease;
use super::upkeep::{self, Options, Vacuumed};
use crate::catalogue::Generation;
use crate::store::Store;
use crate::table::TableError;
use crate::telemetry::event;

/// The upkeep of one table.
pub struct Upkeep {
    /// The catalogue.
    pub store: Store,
    /// Whose table.
    pub generation: Generation,
    /// When and how.
    pub options: Options,
    /// How often a commit is tried.
    pub attempts: u32,
}

impl Upkeep {
    /// Tidies now and then until `token` is cancelled. A failure is logged and tried again at the
    /// next turn: ingestion does not depend on it.
    pub async fn run(self, token: CancellationToken) {
        if self.options.every_seconds == 0 {
            return;
        }
        let holder = format!("{:016x}", rand::random::<u64>());
        loop {
            // Workers that were started together do not ask together.
            let share = rand::rng().random_range(0.5..1.5);
            let wait = Duration::from_secs(self.options.every_seconds).mul_f64(share);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = token.cancelled() => return,
            }
            let error = match AssertUnwindSafe(self.turn(&holder, &token)).catch_unwind().await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it panicked; standard error says where".to_owned(),
            };
            warn!(
                event = event::UPKEEP_FAILED,
                error, "the table was not tidied; the next turn tries again"
            );
        }
    }

    async fn turn(&self, holder: &str, token: &CancellationToken) -> Result<(), TableError> {
        let time = upkeep::lease_time(&self.options);
        let Some(mut lease) = Lease::take(&self.store, holder, time).await? else {
            return Ok(());
        };
        let mut work = pin!(self.tidy(token));
        let mut held = true;
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                () = tokio::time::sleep(time / 2), if held => {
                    // A fault that may pass is no reason to break off what is being done.
                    held = !matches!(lease.renew(time).await, Ok(false));
                }
            }
        };
        let given_back = lease.give_back().await;
        done.and(given_back)
    }

    async fn tidy(&self, token: &CancellationToken) -> Result<(), TableError> {
        let (store, generation, options) = (&self.store, &self.generation, &self.options);
        let mut compactor = Compactor::open(store, generation, options, self.attempts).await?;
        let between = TimeDelta::hours(options.erase_hours.into());
        let is_due = |last: Option<DateTime<Utc>>| last.is_none_or(|at| Utc::now() - at >= between);
        let depth = if is_due(compactor.last_deep().await?) { Depth::Deep } else { Depth::Merge };
        let started = Instant::now();
        let done = compactor.run(depth, Utc::now(), &|_, _| {}, token).await?;
        if done != Compacted::default() {
            log_compaction(&done, started.elapsed());
        }
        // Noted apart from the look at every row: one that failed is due again at the next turn.
        if !token.is_cancelled() && is_due(compactor.last_vacuum().await?) {
            let removed = upkeep::vacuum(store, generation, options, Utc::now(), false).await?;
            compactor.vacuumed(Utc::now()).await?;
            log_vacuum(&removed);
        }
        Ok(())
    }
}

/// Logs what a compaction came to.
pub fn log_compaction(done: &Compacted, took: Duration) {
    info!(
        event = event::COMPACTION,
        jobs = done.jobs,
        lost = done.lost,
        files_in = done.files_in,
        files_out = done.files_out,
        bytes_in = done.bytes_in,
        bytes_out = done.bytes_out,
        superseded = done.superseded,
        tombstones = done.tombstones,
        folded = done.folded,
        ms = took.as_millis() as u64,
        "files were merged"
    );
}

/// Logs what vacuum came to.
pub fn log_vacuum(done: &Vacuumed) {
    info!(
        event = event::VACUUM,
        files = done.files.len(),
        log_files = done.log_files,
        "files that nobody needs any more were removed"
    );
}
