//! Following the table: what commits bring is taken in while queries are answered.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::Engine;
use super::traffic::Route;
use crate::retry::{Backoff, Decide, Verdict};
use crate::search::query::milliseconds;
use crate::search::snapshot::memory::OverMemory;
use crate::table::{Changes, Follower, TableError};
use crate::telemetry::{event, metrics};

/// A table that was not read for so long is no longer followed; the alert BsapAnswersStale waits as long.
const BEHIND: Duration = Duration::from_secs(60);

/// The table cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// It does not fit into memory.
    #[error(transparent)]
    Memory(#[from] OverMemory),
}

impl Engine {
    /// Follows the table until `token` is cancelled. A fault is logged and tried again: what was
    /// taken in is served meanwhile. `progress` hears of files read and files in all.
    pub async fn follow(
        &self,
        mut follower: Follower,
        token: CancellationToken,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), FollowError> {
        let backoff = Backoff { base: Duration::from_millis(200), ..Backoff::times(u32::MAX) };
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
            self.tidy();
            if changes.is_ok() {
                *self.followed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                if self.served().stands_as == Route::Live {
                    metrics::get().last_follow.set(&[], metrics::now());
                }
            }
            let pause = match changes {
                Ok(Some(changes)) => {
                    failures = 0;
                    begun = begun.filter(|_| !changes.part.ends());
                    match self.take_in(changes, started).await {
                        Ok(()) => continue,
                        Err(refused) if !self.snapshots.ready() => return Err(refused.into()),
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
                Err(error) if error.verdict() == Verdict::Fatal && !self.snapshots.ready() => {
                    return Err(error.into());
                }
                Err(error) => {
                    error!(event = event::FOLLOW_FAILED, %error, attempt = failures, "the table cannot be followed; what is in memory is served");
                    failures += 1;
                    backoff.pause(failures) + poll
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
    pub fn is_behind(&self) -> bool {
        let poll = Duration::from_millis(self.options.poll_ms);
        let followed = *self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        self.snapshots.ready() && followed.elapsed() > BEHIND.max(3 * poll)
    }

    /// Applies what commits brought since the last time, which began to be read at `started`.
    async fn take_in(&self, changes: Changes, started: Instant) -> Result<(), OverMemory> {
        let (version, rows, whole) = (changes.version, changes.rows.len(), changes.whole);
        let ends = changes.part.ends();
        if let Err(refused) = self.snapshots.apply(changes).await {
            error!(event = event::SNAPSHOT_MEMORY, error = %refused, version, "the snapshot does not grow");
            return Err(refused);
        }
        if !ends {
            return Ok(());
        }
        let images = self.snapshots.newest().len();
        let ms = milliseconds(started.elapsed());
        if self.served().stands_as == Route::Live {
            metrics::get().images.set(&[], images as f64);
            metrics::get().table_version.set(&[], version as f64);
        }
        if whole {
            info!(
                event = event::SNAPSHOT_READY,
                version, images, ms, "the whole table is in memory"
            );
        } else {
            debug!(event = event::FOLLOW, version, rows, images, ms, "a commit was taken in");
        }
        Ok(())
    }
}
