//! Vacuum: removes data files and log entries that no reader needs any more.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use deltalake_core::kernel::transaction::CommitProperties;
use deltalake_core::operations::vacuum::VacuumMode;
use deltalake_core::protocol::checkpoints;
use futures::TryStreamExt;
use object_store::ObjectStore;

use crate::store::Store;
use crate::table::log::{
    DELETED_FILE_RETENTION_PROPERTY, DeltaLog, TableKind, format_retention_interval,
};
use crate::table::options::MaintenanceOptions;
use crate::table::{Generation, TableError};

/// The result of a vacuum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VacuumSummary {
    /// Paths of the data files that were removed, or would be in a dry run.
    pub removed_file_paths: Vec<String>,
    /// Number of log files that were removed.
    pub removed_log_file_count: usize,
}

/// Removes data files that have not been part of a table of `generation` for
/// `deleted_file_retention_hours`, files of that age that no commit ever named, and commits in the log
/// that are older than `log_retention_hours`. Ages are as of `now`. A `dry_run` removes nothing.
pub async fn vacuum(
    catalogue: &Store,
    generation: &Generation,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<VacuumSummary, TableError> {
    let images = DeltaLog::open_images(catalogue, generation).await?;
    let mut summary = vacuum_table(images, options, now, dry_run).await?;
    match DeltaLog::open_table(catalogue, generation, TableKind::Statistics).await {
        Ok(statistics) => {
            let more = vacuum_table(statistics, options, now, dry_run).await?;
            summary.removed_file_paths.extend(
                more.removed_file_paths.into_iter().map(|file| format!("statistics/{file}")),
            );
            summary.removed_log_file_count += more.removed_log_file_count;
        }
        Err(TableError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(summary)
}

async fn vacuum_table(
    mut log: DeltaLog,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<VacuumSummary, TableError> {
    let existing: BTreeSet<String> = log
        .object_store()
        .list(None)
        .map_ok(|object| object.location.to_string())
        .try_collect()
        .await
        .map_err(|e| log.wrap_error(e.into()))?;
    // The library names every file that the log remembers as removed, even if vacuum has deleted it.
    let mut files = delete_expired_files(&log, options, now, true).await?;
    files.retain(|file| existing.contains(file));
    let mut summary = VacuumSummary { removed_file_paths: files, removed_log_file_count: 0 };
    if !dry_run {
        if !summary.removed_file_paths.is_empty() {
            delete_expired_files(&log, options, now, false).await?;
        }
        log.load_newest_snapshot().await?;
        set_retention_property(&mut log, options).await?;
        checkpoints::create_checkpoint(&log.table, None).await.map_err(|e| log.wrap_error(e))?;
        let cutoff = now - TimeDelta::hours(options.log_retention_hours.into());
        summary.removed_log_file_count = checkpoints::cleanup_expired_logs_for(
            log.version(),
            log.log_store().as_ref(),
            cutoff.timestamp_millis(),
            None,
        )
        .await
        .map_err(|e| log.wrap_error(e))?;
    }
    Ok(summary)
}

/// Makes the log remember removed files for as long as they are kept, and no longer.
async fn set_retention_property(
    log: &mut DeltaLog,
    options: &MaintenanceOptions,
) -> Result<(), TableError> {
    let configured = format_retention_interval(options.deleted_file_retention_hours);
    let stored =
        log.snapshot()?.metadata().configuration().get(DELETED_FILE_RETENTION_PROPERTY).cloned();
    if stored.as_ref() == Some(&configured) {
        return Ok(());
    }
    let properties = HashMap::from([(DELETED_FILE_RETENTION_PROPERTY.to_owned(), configured)]);
    let commit = CommitProperties::default().with_cleanup_expired_logs(Some(false));
    let update = log.table.clone().set_tbl_properties().with_commit_properties(commit);
    update.with_properties(properties).await.map_err(|e| log.wrap_error(e))?;
    log.load_newest_snapshot().await
}

/// Deletes the files whose retention is over as of `now`, and returns their paths. A `dry_run` deletes
/// nothing.
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

/// A clock that always shows the same time.
#[derive(Debug)]
struct FixedClock(DateTime<Utc>);

impl deltalake_core::operations::vacuum::Clock for FixedClock {
    fn current_timestamp_millis(&self) -> i64 {
        self.0.timestamp_millis()
    }
}

/// Returns how long a maintenance lease is valid. After a crash of its holder, no other worker maintains
/// the table for so long.
pub fn lease_duration(options: &MaintenanceOptions) -> Duration {
    Duration::from_secs(options.interval_seconds.clamp(60, 3_600))
}
