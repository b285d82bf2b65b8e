//! Follows the table and applies new commits while queries are answered.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::generation_engine::Engine;
use crate::retry::{Backoff, Classify, Disposition};
use crate::search::snapshot::{MemoryLimitExceeded, ServingRole};
use crate::search::timings::to_milliseconds;
use crate::table::{Follower, TableChanges, TableError};
use crate::telemetry::{event, metrics};

/// Answers are stale if the table was not read for this long. The alert BsapAnswersStale uses the same
/// time.
const STALE_TIMEOUT: Duration = Duration::from_secs(60);

/// The reasons for which the table cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The table does not fit into memory.
    #[error(transparent)]
    Memory(#[from] MemoryLimitExceeded),
}

impl Engine {
    /// Follows the table until `token` is cancelled. After the whole table has been loaded once, errors
    /// are logged and retried, and the last snapshot is served in the meantime. `progress` is called
    /// with the number of files read and of all files.
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
        // When reading of the first part of the current changes started.
        let mut read_started_at = None;
        loop {
            let started_at = *read_started_at.get_or_insert_with(Instant::now);
            let changes = tokio::select! {
                changes = follower.next_part(progress) => changes,
                () = token.cancelled() => return Ok(()),
            };
            self.evict_pinned_snapshots();
            if changes.is_ok() {
                *self.last_polled_at.lock().unwrap_or_else(PoisonError::into_inner) =
                    Instant::now();
                if self.serving_snapshot().role == ServingRole::Live {
                    metrics::global().last_table_refresh.set(&[], metrics::unix_seconds_now());
                }
            }
            let pause = match changes {
                Ok(Some(changes)) => {
                    failures = 0;
                    read_started_at = read_started_at.filter(|_| !changes.part.is_last());
                    match self.apply_changes(changes, started_at).await {
                        Ok(()) => continue,
                        Err(error) if !self.snapshots.is_ready() => return Err(error.into()),
                        Err(_) => {
                            // The last snapshot is served. Only a restart with another limit helps.
                            token.cancelled().await;
                            return Ok(());
                        }
                    }
                }
                Ok(None) => {
                    (failures, read_started_at) = (0, None);
                    poll
                }
                Err(error)
                    if error.disposition() == Disposition::Fatal && !self.snapshots.is_ready() =>
                {
                    return Err(error.into());
                }
                Err(error) => {
                    error!(event = event::TABLE_REFRESH_FAILED, %error, attempt = failures, "the table cannot be read; the last snapshot is served");
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

    /// Returns whether answers are outdated: the whole table was loaded once, but is no longer followed,
    /// because the store fails or because the changes do not fit into memory.
    pub fn is_stale(&self) -> bool {
        let poll = Duration::from_millis(self.options.poll_ms);
        let last_refreshed_at = *self.last_polled_at.lock().unwrap_or_else(PoisonError::into_inner);
        self.snapshots.is_ready() && last_refreshed_at.elapsed() > STALE_TIMEOUT.max(3 * poll)
    }

    /// Applies the changes, and logs how long that took since `started_at`, when reading them started.
    async fn apply_changes(
        &self,
        changes: TableChanges,
        started_at: Instant,
    ) -> Result<(), MemoryLimitExceeded> {
        let (table_version, rows, is_full_snapshot) =
            (changes.table_version, changes.rows.len(), changes.is_full_snapshot);
        let is_last_part = changes.part.is_last();
        if let Err(error) = self.snapshots.apply_changes(changes).await {
            error!(event = event::SNAPSHOT_MEMORY_EXCEEDED, %error, table_version, "the changes are not applied; the last snapshot is served");
            return Err(error);
        }
        if !is_last_part {
            return Ok(());
        }
        let images = self.snapshots.newest().len();
        let duration_ms = to_milliseconds(started_at.elapsed());
        if self.serving_snapshot().role == ServingRole::Live {
            metrics::global().snapshot_images.set(&[], images as f64);
            metrics::global().table_version.set(&[], table_version as f64);
        }
        if is_full_snapshot {
            info!(
                event = event::SNAPSHOT_READY,
                table_version, images, duration_ms, "the whole table is loaded"
            );
        } else {
            debug!(
                event = event::TABLE_REFRESHED,
                table_version, rows, images, duration_ms, "new commits are applied"
            );
        }
        Ok(())
    }
}
