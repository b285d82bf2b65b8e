//! When and how thoroughly the table is tidied, and removing the files that nobody needs any more.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use deltalake_core::kernel::transaction::CommitProperties;
use deltalake_core::operations::vacuum::VacuumMode;
use deltalake_core::protocol::checkpoints;
use futures::TryStreamExt;
use object_store::ObjectStore;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalogue::Generation;
use crate::record::Version;
use crate::store::Store;
use crate::table::TableError;
use crate::table::log::{Kind, Log, REMEMBERED, remembered};
use crate::validate;

/// Size below which files are all alike: no merge is worth telling them apart.
const SMALLEST_TIER: u64 = 64 << 10;

/// How the table is tidied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// How often workers tidy the table, in seconds, one of them at a time. 0: never; run
    /// `bsap compact` and `bsap vacuum` on a schedule of your own.
    pub every_seconds: u64,
    /// Size up to which files are merged, in MiB. Workers hold about twice as much in memory while
    /// they write one.
    pub file_mib: u64,
    /// Files of similar size that are merged into one. A row is rewritten about as often as this
    /// number has to be multiplied by itself to get from a commit's file to the largest.
    pub merge_files: usize,
    /// Share of superseded rows, in percent, from which on a file is rewritten without them.
    pub superseded_percent: u32,
    /// After how many hours the embeddings of a deleted image are rewritten out of their files,
    /// whatever the share. All keys are read that often, which costs about 200 bytes of memory an
    /// image.
    pub erase_hours: u32,
    /// For how many days a deleted image is remembered. An event that is older is refused as
    /// `too_old`, since nothing could tell any more that the image was deleted after it. 0: for ever.
    pub tombstone_days: u32,
    /// For how many hours a file that is no longer part of the table stays readable, for those who
    /// are still reading an older version. Also for how long a file may wait for its commit.
    pub retention_hours: u32,
    /// For how many hours the log of single commits stays. A query worker that was away for longer
    /// reads the whole table anew.
    pub log_hours: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            every_seconds: 600,
            file_mib: 128,
            merge_files: 8,
            superseded_percent: 20,
            erase_hours: 24,
            tombstone_days: 0,
            retention_hours: 24,
            log_hours: 72,
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::range(p, "every_seconds", self.every_seconds, 0, 7 * 86_400);
        validate::range(p, "file_mib", self.file_mib, 1, 4_096);
        validate::range(p, "merge_files", self.merge_files as u64, 2, 1_000);
        validate::range(p, "superseded_percent", self.superseded_percent.into(), 1, 100);
        validate::range(p, "erase_hours", self.erase_hours.into(), 1, 24 * 365);
        validate::range(p, "tombstone_days", self.tombstone_days.into(), 0, 36_500);
        validate::range(p, "retention_hours", self.retention_hours.into(), 1, 24 * 365);
        validate::range(p, "log_hours", self.log_hours.into(), 1, 24 * 365);
        if self.tombstone_days > 0 && self.tombstone_days * 24 < self.erase_hours {
            problems.push(
                "tombstone_days: is less than erase_hours; a deleted image must be remembered until its embedding is gone".into(),
            );
        }
        problems
    }

    /// The tier of a file of `size` bytes: files of one tier are similar. None where it is as large
    /// as a merge would make it.
    pub(crate) fn tier(&self, size: u64) -> Option<u32> {
        let target = self.file_mib << 20;
        let factor = self.merge_files as u64;
        let (mut tier, mut limit) = (0, SMALLEST_TIER.min(target / factor));
        while size > limit {
            (tier, limit) = (tier + 1, limit.saturating_mul(factor));
        }
        // Two of them would not fit into one.
        (size <= target / 2).then_some(tier)
    }

    /// Whether the image was deleted long enough ago that its embeddings must go.
    pub(crate) fn is_erased(&self, newest: &Version, now: DateTime<Utc>) -> bool {
        newest.deleted && now - newest.embedded_at >= TimeDelta::hours(self.erase_hours.into())
    }

    /// Whether a tombstone has been remembered for long enough.
    pub(crate) fn may_drop(&self, newest: &Version, now: DateTime<Utc>) -> bool {
        // An hour more than events are refused after: clocks differ, and one may be on its way.
        let days = TimeDelta::days(self.tombstone_days.into()) + TimeDelta::hours(1);
        newest.deleted && self.tombstone_days > 0 && now - newest.embedded_at >= days
    }
}

/// What vacuum did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vacuumed {
    /// Data files removed, or with a dry run to be removed.
    pub files: Vec<String>,
    /// Files of the log removed.
    pub log_files: usize,
}

/// Removes data files that have not been part of the table for `retention_hours`, files that no
/// commit ever named and that are as old, and commits in the log older than `log_hours`.
pub async fn vacuum(
    catalogue: &Store,
    generation: &Generation,
    options: &Options,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vacuumed, TableError> {
    let images = Log::open(catalogue, generation).await?;
    let mut done = clean(images, options, now, dry_run).await?;
    match Log::open_kind(catalogue, generation, Kind::Statistics).await {
        Ok(statistics) => {
            let more = clean(statistics, options, now, dry_run).await?;
            done.files.extend(more.files.into_iter().map(|file| format!("statistics/{file}")));
            done.log_files += more.log_files;
        }
        Err(TableError::Missing { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(done)
}

async fn clean(
    mut log: Log,
    options: &Options,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vacuumed, TableError> {
    let there: BTreeSet<String> = log
        .objects()
        .list(None)
        .map_ok(|object| object.location.to_string())
        .try_collect()
        .await
        .map_err(|e| log.error(e.into()))?;
    // The library names every file that the log remembers as taken away, removed already or not.
    let mut files = remove(&log, options, now, true).await?;
    files.retain(|file| there.contains(file));
    let mut done = Vacuumed { files, log_files: 0 };
    if !dry_run {
        if !done.files.is_empty() {
            remove(&log, options, now, false).await?;
        }
        log.update().await?;
        remember(&mut log, options).await?;
        checkpoints::create_checkpoint(&log.table, None).await.map_err(|e| log.error(e))?;
        let before = now - TimeDelta::hours(options.log_hours.into());
        done.log_files = checkpoints::cleanup_expired_logs_for(
            log.version(),
            log.store().as_ref(),
            before.timestamp_millis(),
            None,
        )
        .await
        .map_err(|e| log.error(e))?;
    }
    Ok(done)
}

/// Has the log remember files that were taken away for as long as they stay, and no longer.
async fn remember(log: &mut Log, options: &Options) -> Result<(), TableError> {
    let wanted = remembered(options.retention_hours);
    let known = log.snapshot()?.metadata().configuration().get(REMEMBERED).cloned();
    if known.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let commit = CommitProperties::default().with_cleanup_expired_logs(Some(false));
    let set = log.table.clone().set_tbl_properties().with_commit_properties(commit);
    let set = set.with_properties(HashMap::from([(REMEMBERED.to_owned(), wanted)]));
    set.await.map_err(|e| log.error(e))?;
    log.update().await
}

async fn remove(
    log: &Log,
    options: &Options,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vec<String>, TableError> {
    let removed = log
        .table
        .clone()
        .vacuum()
        .with_mode(VacuumMode::Full)
        .with_retention_period(TimeDelta::hours(options.retention_hours.into()))
        .with_enforce_retention_duration(false)
        .with_clock(Arc::new(At(now)))
        .with_dry_run(dry_run)
        .await;
    Ok(removed.map_err(|e| log.error(e))?.1.files_deleted)
}

/// A clock that stands still.
#[derive(Debug)]
struct At(DateTime<Utc>);

impl deltalake_core::operations::vacuum::Clock for At {
    fn current_timestamp_millis(&self) -> i64 {
        self.0.timestamp_millis()
    }
}

/// For how long a worker may keep the others from tidying: one that dies leaves its lease behind.
pub fn lease_time(options: &Options) -> Duration {
    Duration::from_secs(options.every_seconds.clamp(60, 3_600))
}
