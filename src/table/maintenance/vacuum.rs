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

use crate::store::Store;
use crate::table::log::{DELETED_FILE_RETENTION_PROPERTY, DeltaLog, TableKind, retention_interval};
use crate::table::options::MaintenanceOptions;
use crate::table::{Generation, TableError};

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
