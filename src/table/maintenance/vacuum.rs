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
use crate::record::RowVersion;
use crate::store::Store;
use crate::table::TableError;
use crate::table::log::{DELETED_FILE_RETENTION_PROPERTY, DeltaLog, TableKind, retention_interval};
use crate::validate;

/// Size below which files are all alike: no merge is worth telling them apart.
const SMALLEST_TIER_BYTES: u64 = 64 << 10;

/// How the table is tidied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MaintenanceOptions {
    /// How often workers tidy the table, in seconds, one of them at a time. 0: never; run
    /// `bsap compact` and `bsap vacuum` on a schedule of your own.
    pub interval_seconds: u64,
    /// Size up to which files are merged, in MiB. Workers hold about twice as much in memory while
    /// they write one.
    pub target_file_mib: u64,
    /// Files of similar size that are merged into one. A row is rewritten about as often as this
    /// number has to be multiplied by itself to get from a commit's file to the largest.
    pub files_per_merge: usize,
    /// Share of superseded rows, in percent, from which on a file is rewritten without them.
    pub max_superseded_percent: u32,
    /// After how many hours the embeddings of a deleted image are rewritten out of their files,
    /// whatever the share. All keys are read that often, which costs about 200 bytes of memory an
    /// image.
    pub erase_deleted_after_hours: u32,
    /// For how many days a deleted image is remembered. An event that is older is refused as
    /// `too_old`, since nothing could tell any more that the image was deleted after it. 0: for ever.
    pub tombstone_retention_days: u32,
    /// For how many hours a file that is no longer part of the table stays readable, for those who
    /// are still reading an older version. Also for how long a file may wait for its commit.
    pub deleted_file_retention_hours: u32,
    /// For how many hours the log of single commits stays. A query worker that was away for longer
    /// reads the whole table anew.
    pub log_retention_hours: u32,
}

impl Default for MaintenanceOptions {
    fn default() -> Self {
        Self {
            interval_seconds: 600,
            target_file_mib: 128,
            files_per_merge: 8,
            max_superseded_percent: 20,
            erase_deleted_after_hours: 24,
            tombstone_retention_days: 0,
            deleted_file_retention_hours: 24,
            log_retention_hours: 72,
        }
    }
}

impl MaintenanceOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(p, "interval_seconds", self.interval_seconds, 0, 7 * 86_400);
        validate::check_range(p, "target_file_mib", self.target_file_mib, 1, 4_096);
        validate::check_range(p, "files_per_merge", self.files_per_merge as u64, 2, 1_000);
        validate::check_range(
            p,
            "max_superseded_percent",
            self.max_superseded_percent.into(),
            1,
            100,
        );
        validate::check_range(
            p,
            "erase_deleted_after_hours",
            self.erase_deleted_after_hours.into(),
            1,
            24 * 365,
        );
        validate::check_range(
            p,
            "tombstone_retention_days",
            self.tombstone_retention_days.into(),
            0,
            36_500,
        );
        validate::check_range(
            p,
            "deleted_file_retention_hours",
            self.deleted_file_retention_hours.into(),
            1,
            24 * 365,
        );
        validate::check_range(
            p,
            "log_retention_hours",
            self.log_retention_hours.into(),
            1,
            24 * 365,
        );
        if self.tombstone_retention_days > 0
            && self.tombstone_retention_days * 24 < self.erase_deleted_after_hours
        {
            problems.push(
                "tombstone_days: is less than erase_hours; a deleted image must be remembered until its embedding is gone".into(),
            );
        }
        problems
    }

    /// The tier of a file of `size` bytes: files of one tier are similar. None where it is as large
    /// as a merge would make it.
    pub(crate) fn size_tier(&self, size: u64) -> Option<u32> {
        let target = self.target_file_mib << 20;
        let factor = self.files_per_merge as u64;
        let (mut tier, mut limit) = (0, SMALLEST_TIER_BYTES.min(target / factor));
        while size > limit {
            (tier, limit) = (tier + 1, limit.saturating_mul(factor));
        }
        // Two of them would not fit into one.
        (size <= target / 2).then_some(tier)
    }

    /// Whether the image was deleted long enough ago that its embeddings must go.
    pub(crate) fn is_erasure_due(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        newest.deleted
            && now - newest.embedded_at >= TimeDelta::hours(self.erase_deleted_after_hours.into())
    }

    /// Whether a tombstone has been remembered for long enough.
    pub(crate) fn may_drop_tombstone(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        // An hour more than events are refused after: clocks differ, and one may be on its way.
        let days = TimeDelta::days(self.tombstone_retention_days.into()) + TimeDelta::hours(1);
        newest.deleted && self.tombstone_retention_days > 0 && now - newest.embedded_at >= days
    }
}

/// What vacuum did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VacuumSummary {
    /// Data files removed, or with a dry run to be removed.
    pub removed_files: Vec<String>,
    /// Files of the log removed.
    pub removed_log_files: usize,
}

/// Removes data files that have not been part of the table for `retention_hours`, files that no
/// commit ever named and that are as old, and commits in the log older than `log_hours`.
pub async fn vacuum(
    catalogue: &Store,
    generation: &Generation,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<VacuumSummary, TableError> {
    let images = DeltaLog::open_images(catalogue, generation).await?;
    let mut done = vacuum_table(images, options, now, dry_run).await?;
    match DeltaLog::open_table(catalogue, generation, TableKind::Statistics).await {
        Ok(statistics) => {
            let more = vacuum_table(statistics, options, now, dry_run).await?;
            done.removed_files
                .extend(more.removed_files.into_iter().map(|file| format!("statistics/{file}")));
            done.removed_log_files += more.removed_log_files;
        }
        Err(TableError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(done)
}

async fn vacuum_table(
    mut log: DeltaLog,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<VacuumSummary, TableError> {
    let there: BTreeSet<String> = log
        .object_store()
        .list(None)
        .map_ok(|object| object.location.to_string())
        .try_collect()
        .await
        .map_err(|e| log.wrap_error(e.into()))?;
    // The library names every file that the log remembers as taken away, removed already or not.
    let mut files = delete_expired_files(&log, options, now, true).await?;
    files.retain(|file| there.contains(file));
    let mut done = VacuumSummary { removed_files: files, removed_log_files: 0 };
    if !dry_run {
        if !done.removed_files.is_empty() {
            delete_expired_files(&log, options, now, false).await?;
        }
        log.update().await?;
        set_retention_property(&mut log, options).await?;
        checkpoints::create_checkpoint(&log.table, None).await.map_err(|e| log.wrap_error(e))?;
        let before = now - TimeDelta::hours(options.log_retention_hours.into());
        done.removed_log_files = checkpoints::cleanup_expired_logs_for(
            log.version(),
            log.log_store().as_ref(),
            before.timestamp_millis(),
            None,
        )
        .await
        .map_err(|e| log.wrap_error(e))?;
    }
    Ok(done)
}

/// Has the log remember files that were taken away for as long as they stay, and no longer.
async fn set_retention_property(
    log: &mut DeltaLog,
    options: &MaintenanceOptions,
) -> Result<(), TableError> {
    let wanted = retention_interval(options.deleted_file_retention_hours);
    let known =
        log.snapshot()?.metadata().configuration().get(DELETED_FILE_RETENTION_PROPERTY).cloned();
    if known.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let commit = CommitProperties::default().with_cleanup_expired_logs(Some(false));
    let set = log.table.clone().set_tbl_properties().with_commit_properties(commit);
    let set =
        set.with_properties(HashMap::from([(DELETED_FILE_RETENTION_PROPERTY.to_owned(), wanted)]));
    set.await.map_err(|e| log.wrap_error(e))?;
    log.update().await
}

async fn delete_expired_files(
    log: &DeltaLog,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vec<String>, TableError> {
    let removed = log
        .table
        .clone()
        .vacuum()
        .with_mode(VacuumMode::Full)
        .with_retention_period(TimeDelta::hours(options.deleted_file_retention_hours.into()))
        .with_enforce_retention_duration(false)
        .with_clock(Arc::new(FixedClock(now)))
        .with_dry_run(dry_run)
        .await;
    Ok(removed.map_err(|e| log.wrap_error(e))?.1.files_deleted)
}

/// A clock that stands still.
#[derive(Debug)]
struct FixedClock(DateTime<Utc>);

impl deltalake_core::operations::vacuum::Clock for FixedClock {
    fn current_timestamp_millis(&self) -> i64 {
        self.0.timestamp_millis()
    }
}

/// For how long a worker may keep the others from tidying: one that dies leaves its lease behind.
pub fn lease_duration(options: &MaintenanceOptions) -> Duration {
    Duration::from_secs(options.interval_seconds.clamp(60, 3_600))
}
