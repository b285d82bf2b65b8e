//! Following the table: what commits bring is taken in while queries are answered.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::generation_engine::Engine;
use crate::retry::{Backoff, Classify, Disposition};
use crate::search::snapshot::{MemoryLimitExceeded, Route};
use crate::search::timings::to_milliseconds;
use crate::table::{Follower, TableChanges, TableError};
use crate::telemetry::{event, metrics};

/// A table that was not read for so long is no longer followed; the alert BsapAnswersStale waits as long.
const STALE_TIMEOUT: Duration = Duration::from_secs(60);

/// The table cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// It does not fit into memory.
    #[error(transparent)]
    Memory(#[from] MemoryLimitExceeded),
}

impl Engine {
    /// Follows the table until `token` is cancelled. A fault is logged and tried again: what was
    /// taken in is served meanwhile. `progress` hears of files read and files in all.
    pub async fn follow_table(
        &self,
        mut follower: Follower,
        token: CancellationToken,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), FollowError> {
        let backoff =
            Backoff { base: Duration::from_millis(200), ..Backoff::with_max_attempts(u32::MAX) };
        let poll = Duration::from_millis(self.options.poll_ms);
        let mut failures = 0;
        // When the first part of what is being taken in began to be read.
        let mut begun = None;
        loop {
            let started = *begun.get_or_insert_with(Instant::now);
            let changes = tokio::select! {
                changes = follower.next_part(progress) => changes,
                () = token.cancelled() => return Ok(()),
            };
            self.evict_pinned_snapshots();
            if changes.is_ok() {
                *self.last_refreshed_at.lock().unwrap_or_else(PoisonError::into_inner) =
                    Instant::now();
                if self.serving_snapshot().role == Route::Live {
                    metrics::global().last_table_refresh.set(&[], metrics::unix_seconds());
                }
            }
            let pause = match changes {
                Ok(Some(changes)) => {
                    failures = 0;
                    begun = begun.filter(|_| !changes.part.is_last());
                    match self.apply_changes(changes, started).await {
                        Ok(()) => continue,
                        Err(refused) if !self.snapshots.is_ready() => return Err(refused.into()),
                        Err(_) => {
                            // What is in memory is served; only another limit helps.
                            token.cancelled().await;
                            return Ok(());
                        }
                    }
                }
                Ok(None) => {
                    (failures, begun) = (0, None);
                    poll
                }
                Err(error)
                    if error.disposition() == Disposition::Fatal && !self.snapshots.is_ready() =>
                {
                    return Err(error.into());
                }
                Err(error) => {
                    error!(event = event::TABLE_REFRESH_FAILED, %error, attempt = failures, "the table cannot be followed; what is in memory is served");
                    failures += 1;
                    backoff.random_delay(failures) + poll
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = token.cancelled() => return Ok(()),
            }
        }
    }

    /// Whether answers come from a table that was whole once and is not followed any more: the store
    /// fails, or there is no memory for what came.
    pub fn is_stale(&self) -> bool {
        let poll = Duration::from_millis(self.options.poll_ms);
        let followed = *self.last_refreshed_at.lock().unwrap_or_else(PoisonError::into_inner);
        self.snapshots.is_ready() && followed.elapsed() > STALE_TIMEOUT.max(3 * poll)
    }

    /// Applies what commits brought since the last time, which began to be read at `started`.
    async fn apply_changes(
        &self,
        changes: TableChanges,
        started: Instant,
    ) -> Result<(), MemoryLimitExceeded> {
        let (version, rows, whole) =
            (changes.version, changes.rows.len(), changes.is_full_snapshot);
        let ends = changes.part.is_last();
        if let Err(refused) = self.snapshots.apply_changes(changes).await {
            error!(event = event::SNAPSHOT_MEMORY_EXCEEDED, error = %refused, table_version = version, "the snapshot does not grow");
            return Err(refused);
        }
        if !ends {
            return Ok(());
        }
        let images = self.snapshots.newest().len();
        let ms = to_milliseconds(started.elapsed());
        if self.serving_snapshot().role == Route::Live {
            metrics::global().snapshot_images.set(&[], images as f64);
            metrics::global().table_version.set(&[], version as f64);
        }
        if whole {
            info!(
                event = event::SNAPSHOT_READY,
                table_version = version,
                images,
                duration_ms = ms,
                "the whole table is in memory"
            );
        } else {
            debug!(
                event = event::TABLE_REFRESHED,
                table_version = version,
                rows,
                images,
                duration_ms = ms,
                "a commit was taken in"
            );
        }
        Ok(())
    }
}
