//! The Delta log of one table of a generation: creates, opens and updates it, commits to it, and reads
//! single commits.

use std::sync::Arc;
use std::time::Duration;

use deltalake_core::arrow::datatypes::SchemaRef;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoArrow as _;
use deltalake_core::kernel::transaction::{CommitBuilder, CommitProperties};
use deltalake_core::kernel::{Action, Add, Transaction};
use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore, get_actions};
use deltalake_core::operations::create::CreateBuilder;
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use deltalake_core::table::state::DeltaTableState;
use deltalake_core::{DeltaTable, DeltaTableError};
use futures::StreamExt;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{DynObjectStore, ObjectStoreExt};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::info;
use url::Url;

use super::error::{TableError, classify_delta_error};
use super::generation::Generation;
use super::options::MaintenanceOptions;
use super::schema::{self, IMAGES_INDEXED_COLUMNS};
use crate::retry::{Backoff, Classify, Disposition, retry};
use crate::store::Store;
use crate::telemetry::event;

/// Commits between two checkpoints. Whoever opens the table or looks up a position reads every commit
/// since the last checkpoint, one request each.
const CHECKPOINT_INTERVAL_COMMITS: u64 = 20;

/// Number of checkpoint entries, of some hundred bytes each, for which the distance between checkpoints
/// grows by one interval: what is written per commit stays bounded, however many files the log
/// remembers.
const CHECKPOINT_ENTRIES_PER_INTERVAL: u64 = 10_000;

/// Largest number of intervals between two checkpoints.
const MAX_CHECKPOINT_INTERVALS: u64 = 10;

/// Versions by which a snapshot is updated incrementally before it is loaded from a checkpoint again.
const MAX_INCREMENTAL_VERSIONS: u64 = 200;

/// What to do after a table was replaced by an older copy.
pub const TABLE_WENT_BACK: &str = "The table went back, as if it had been restored; start the workers again, and they read again what it lacks";

/// Longest pause between two attempts to commit.
const MAX_COMMIT_PAUSE: Duration = Duration::from_secs(2);

/// Property of a table: how long its log remembers removed files. Every checkpoint repeats all of them,
/// at some hundred bytes each, and compaction removes files as often as workers commit.
pub const DELETED_FILE_RETENTION_PROPERTY: &str = "delta.deletedFileRetentionDuration";

/// Returns the value of [`DELETED_FILE_RETENTION_PROPERTY`] for `hours`.
pub fn format_retention_interval(hours: u32) -> String {
    format!("interval {hours} hours")
}

/// Returns the pauses between attempts to commit.
pub fn commit_backoff(max_attempts: u32) -> Backoff {
    Backoff { cap: MAX_COMMIT_PAUSE, ..Backoff::with_max_attempts(max_attempts) }
}

/// Application id under which the Delta log keeps when files were last merged. Its version is a time in
/// milliseconds since 1970, as are those of `DEEP_COMPACTION_APP_ID` and `VACUUM_APP_ID`.
pub const COMPACTION_APP_ID: &str = "bsap:compact";
/// Application id of the last compaction that read the keys of all rows.
pub const DEEP_COMPACTION_APP_ID: &str = "bsap:compact:full";
/// Application id of the last removal of files that no reader needs any more.
pub const VACUUM_APP_ID: &str = "bsap:vacuum";

/// The tables of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// One row per accepted event.
    Images,
    /// Statistics that were computed after their rows were stored, partitioned by prompt set.
    Statistics,
}

impl TableKind {
    fn folder_name(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Statistics => "statistics",
        }
    }
}

/// One table of a generation.
pub struct DeltaLog {
    /// The Delta table with its newest loaded snapshot.
    pub table: DeltaTable,
    /// URL of the table's folder, for messages.
    pub location: String,
    /// Version that was loaded in one piece; the snapshot was updated incrementally since. `None` before
    /// the first update.
    fully_loaded_version: Option<u64>,
}

impl DeltaLog {
    /// Opens the `images` table of `generation`. Fails with [`TableError::NotFound`] if there is none.
    pub async fn open_images(
        catalogue: &Store,
        generation: &Generation,
    ) -> Result<Self, TableError> {
        Self::open_table(catalogue, generation, TableKind::Images).await
    }

    /// Opens a table of `generation`. Fails with [`TableError::NotFound`] if there is none.
    pub async fn open_table(
        catalogue: &Store,
        generation: &Generation,
        kind: TableKind,
    ) -> Result<Self, TableError> {
        let mut log = Self::handle(catalogue, generation, kind);
        match log.table.load().await {
            Ok(()) => Ok(log),
            Err(DeltaTableError::NotATable(_) | DeltaTableError::InvalidTableLocation(_)) => {
                Err(TableError::NotFound { location: log.location })
            }
            Err(error) => Err(log.wrap_error(error)),
        }
    }

    /// Opens a table of `generation` and creates it if there is none. Two processes may do so at the
    /// same time: one creates it, both open it.
    pub async fn open_or_create(
        catalogue: &Store,
        generation: &Generation,
        kind: TableKind,
    ) -> Result<Self, TableError> {
        let log = Self::handle(catalogue, generation, kind);
        let exists = log.table.verify_deltatable_existence().await;
        if !exists.map_err(|e| log.wrap_error(e))? {
            let (columns, indexed, partitions) = match kind {
                TableKind::Images => {
                    (schema::images_columns(), IMAGES_INDEXED_COLUMNS.join(","), Vec::new())
                }
                TableKind::Statistics => (
                    schema::statistics_columns(),
                    schema::STATISTICS_INDEXED_COLUMNS.join(","),
                    vec![schema::PROMPT_SET_COLUMN],
                ),
            };
            let interval = CHECKPOINT_INTERVAL_COMMITS.to_string();
            let retention = format_retention_interval(
                MaintenanceOptions::default().deleted_file_retention_hours,
            );
            let created = CreateBuilder::new()
                .with_log_store(log.table.log_store())
                .with_save_mode(SaveMode::Ignore)
                .with_columns(columns)
                .with_partition_columns(partitions)
                .with_raise_if_key_not_exists(false)
                .with_configuration([
                    ("delta.dataSkippingStatsColumns", Some(indexed.as_str())),
                    ("delta.checkpointInterval", Some(interval.as_str())),
                    (DELETED_FILE_RETENTION_PROPERTY, Some(retention.as_str())),
                    ("bsap.generation", Some(generation.id.as_str())),
                    ("bsap.model_fingerprint", Some(generation.model_fingerprint.as_str())),
                    ("bsap.ordering", Some(generation.ordering.as_str())),
                ])
                .await;
            match created {
                Ok(_) => {}
                // Another process was first. Any other error shows when the table is opened.
                Err(error) if classify_delta_error(&error) == Disposition::Retry => {}
                Err(error) => return Err(log.wrap_error(error)),
            }
        }
        Self::open_table(catalogue, generation, kind).await
    }

    /// Returns a table of `generation` without loading a snapshot, whether it exists or not: only single
    /// commits can be read.
    pub fn handle(catalogue: &Store, generation: &Generation, kind: TableKind) -> Self {
        let folder = format!("generations/{}/{}", generation.id, kind.folder_name());
        // The log store wants a root store and a URL whose path leads from that root to the table.
        // The catalogue's folder serves as the root, so that the scheme of the real URL and its
        // credentials never matter to the Delta library. Its host is named like an S3 directory
        // bucket, because the library sorts listings before it relies on them only for those and
        // for `file:` URLs, and local folders list in no order either.
        let location = Url::parse(&format!("bsap://unordered--x-s3/{folder}/"))
            .unwrap_or_else(|_| unreachable!("a generation's id is hexadecimal"));
        let root = catalogue.object_store().clone();
        let prefixed = Arc::new(PrefixStore::new(root.clone(), Path::from(folder.as_str())));
        let log_store = default_logstore(prefixed, root, &location, &StorageConfig::default());
        Self {
            table: DeltaTable::new(log_store),
            location: format!("{}/{folder}", catalogue.url().as_str().trim_end_matches('/')),
            fully_loaded_version: None,
        }
    }

    /// Adds the location of the table to an error.
    pub fn wrap_error(&self, source: DeltaTableError) -> TableError {
        TableError::Delta { location: self.location.clone(), source: Box::new(source) }
    }

    /// Returns the version of the loaded snapshot; 0 if none is loaded.
    pub fn version(&self) -> u64 {
        self.table.version().unwrap_or_default()
    }

    pub fn log_store(&self) -> LogStoreRef {
        self.table.log_store()
    }

    /// Returns the table's folder, which holds the data files and the log.
    pub fn object_store(&self) -> Arc<DynObjectStore> {
        self.log_store().object_store(None)
    }

    /// Uploads a data file by `upload`, which is repeated after transient errors, up to `max_attempts`
    /// times in all and until `cancel` is cancelled.
    pub async fn retry_upload<T, F>(
        &self,
        max_attempts: u32,
        cancel: &CancellationToken,
        upload: impl Fn() -> F,
    ) -> Result<T, TableError>
    where
        F: Future<Output = Result<T, TableError>>,
    {
        let log_retry = |failed: u32, error: &TableError| {
            let attempt = failed - 1;
            info!(event = event::RETRY, stage = "table", attempt, %error, "a file was not written; trying again");
        };
        let backoff = Backoff::with_max_attempts(max_attempts);
        retry(backoff, cancel, log_retry, upload).await.map_err(|error| {
            let was_cancelled = cancel.is_cancelled() && error.disposition() == Disposition::Retry;
            if was_cancelled { self.cancelled_error(&error) } else { error }
        })
    }

    /// Returns the error of work that was given up because its token was cancelled.
    pub fn cancelled_error(&self, last_error: &TableError) -> TableError {
        let (location, last_error) = (self.location.clone(), last_error.to_string());
        TableError::Cancelled { location, last_error }
    }

    /// Returns the error of work that failed in `attempts` attempts.
    pub fn attempts_exhausted_error(&self, attempts: u32, last_error: &TableError) -> TableError {
        let (location, last_error) = (self.location.clone(), last_error.to_string());
        TableError::AttemptsExhausted { location, attempts, last_error }
    }

    /// Loads the newest snapshot. If that fails, the next commits may still be loaded one by one, so
    /// that another call has less to load, however far behind the snapshot was.
    pub async fn load_newest_snapshot(&mut self) -> Result<(), TableError> {
        let updated = match self.table.update_state().await {
            // The log was cleaned up past the snapshot that this one would build on.
            Err(DeltaTableError::InvalidVersion(_)) => {
                self.table.state = None;
                self.table.load().await
            }
            Err(error) => {
                let mut failures = 0;
                while failures < 2 {
                    let before = self.version();
                    // The first error is returned; another one adds nothing.
                    let _ = self.table.update_incremental(Some(before + 1)).await;
                    failures += usize::from(self.version() == before);
                }
                Err(error)
            }
            Ok(()) => Ok(()),
        };
        if let Err(error) = updated {
            return Err(self.find_regression().await.unwrap_or_else(|| self.wrap_error(error)));
        }
        self.reload_if_due().await;
        Ok(())
    }

    /// Returns an error if the log ends before the loaded snapshot: the table was replaced by an older copy, and
    /// no attempt to read it from this snapshot will succeed.
    async fn find_regression(&self) -> Option<TableError> {
        let loaded = self.version();
        let newest = self.commit_versions().await.ok()?.max().unwrap_or_default();
        (newest < loaded).then(|| TableError::Mismatch {
            property: "version",
            stored: format!("{newest} of {}", self.location),
            configured: format!("{loaded} by what this process has read before"),
            remedy: TABLE_WENT_BACK,
        })
    }

    /// Commits on top of the loaded snapshot, in one attempt, and returns the new version. Retries of
    /// the library would commit against a snapshot that the caller has not checked.
    pub async fn write_commit(
        &mut self,
        actions: Vec<Action>,
        transactions: Vec<Transaction>,
        operation: DeltaOperation,
    ) -> Result<u64, TableError> {
        let properties = CommitProperties::default()
            .with_max_retries(0)
            .with_create_checkpoint(self.is_checkpoint_due().await)
            .with_cleanup_expired_logs(Some(false))
            .with_application_transactions(transactions);
        let committed = CommitBuilder::from(properties)
            .with_actions(actions)
            .build(Some(self.snapshot()?), self.log_store(), operation)
            .await
            .map_err(|e| self.wrap_error(e))?;
        self.table.state = Some(committed.snapshot());
        Ok(committed.version())
    }

    /// Whether the next commit also writes a checkpoint: once per interval, and less often if the last
    /// checkpoint was large.
    async fn is_checkpoint_due(&self) -> bool {
        let next = self.version() + 1;
        if !(next + 1).is_multiple_of(CHECKPOINT_INTERVAL_COMMITS) {
            return false;
        }
        let entries = self.last_checkpoint_entry_count().await.unwrap_or_default();
        let intervals =
            (entries / CHECKPOINT_ENTRIES_PER_INTERVAL).clamp(1, MAX_CHECKPOINT_INTERVALS);
        ((next + 1) / CHECKPOINT_INTERVAL_COMMITS).is_multiple_of(intervals)
    }

    /// Returns the number of entries in the last checkpoint, which the log keeps as a hint.
    async fn last_checkpoint_entry_count(&self) -> Option<u64> {
        let hint =
            self.object_store().get(&Path::from("_delta_log/_last_checkpoint")).await.ok()?;
        let hint: Value = serde_json::from_slice(&hint.bytes().await.ok()?).ok()?;
        hint.get("size")?.as_u64()
    }

    /// Loads the snapshot from the newest checkpoint if it was updated incrementally for too long: it
    /// keeps some 50 KB of each version.
    async fn reload_if_due(&mut self) {
        let version = self.version();
        let since = *self.fully_loaded_version.get_or_insert(version);
        if version.saturating_sub(since) < MAX_INCREMENTAL_VERSIONS {
            return;
        }
        let mut reloaded = DeltaTable::new(self.log_store());
        // If it fails, the old snapshot still serves, and later versions bring another chance.
        if reloaded.load().await.is_ok() && reloaded.version() >= Some(version) {
            self.table = reloaded;
        }
        self.fully_loaded_version = Some(version);
    }

    /// Loads the newest snapshot, even if none was loaded before. Returns false if there is no table.
    pub async fn load_if_exists(&mut self) -> Result<bool, TableError> {
        if self.table.state.is_some() {
            return self.load_newest_snapshot().await.map(|()| true);
        }
        match self.table.load().await {
            Ok(()) => Ok(true),
            Err(DeltaTableError::NotATable(_) | DeltaTableError::InvalidTableLocation(_)) => {
                Ok(false)
            }
            Err(error) => Err(self.wrap_error(error)),
        }
    }

    /// Returns the loaded snapshot; an error if none is loaded.
    pub fn snapshot(&self) -> Result<&DeltaTableState, TableError> {
        self.table.snapshot().map_err(|e| self.wrap_error(e))
    }

    /// Returns the table's schema as an Arrow schema.
    pub fn arrow_schema(&self) -> Result<SchemaRef, TableError> {
        let metadata = self.snapshot()?.metadata();
        let schema = metadata.parse_schema().map_err(|e| self.wrap_error(e.into()))?;
        let arrow = (&schema).try_into_arrow().map_err(|e| self.wrap_error(e.into()))?;
        Ok(Arc::new(arrow))
    }

    /// Returns the version of the newest transaction of `application_id` in the loaded snapshot.
    pub async fn transaction_version(
        &self,
        application_id: &str,
    ) -> Result<Option<i64>, TableError> {
        let log_store = self.log_store();
        let version = self.snapshot()?.transaction_version(log_store.as_ref(), application_id);
        version.await.map_err(|e| self.wrap_error(e))
    }

    /// Returns the oldest version whose commit is still in the log.
    pub async fn oldest_version(&self) -> Result<u64, TableError> {
        let loaded = self.version();
        Ok(self.commit_versions().await?.min().map_or(loaded, |oldest| oldest.min(loaded)))
    }

    /// Lists the versions whose commits are in the log, in no order.
    async fn commit_versions(&self) -> Result<impl Iterator<Item = u64>, TableError> {
        let object_store = self.object_store();
        let folder = Path::from("_delta_log");
        let mut files = object_store.list(Some(&folder));
        let mut versions = Vec::new();
        while let Some(file) = files.next().await {
            let file = file.map_err(|e| self.wrap_error(e.into()))?;
            let name = file.location.filename().and_then(|name| name.strip_suffix(".json"));
            versions.extend(name.and_then(|digits| digits.parse::<u64>().ok()));
        }
        Ok(versions.into_iter())
    }

    /// Reads the actions of commit `version`. Returns `None` if there is no such commit yet, or no
    /// longer.
    pub async fn read_commit(&self, version: u64) -> Result<Option<Vec<Action>>, TableError> {
        let entry = self.log_store().read_commit_entry(version).await;
        match entry.map_err(|e| self.wrap_error(e))? {
            None => Ok(None),
            Some(bytes) => {
                get_actions(version, &bytes).map(Some).map_err(|error| TableError::Corrupt {
                    file: format!("{}/_delta_log/{version:020}.json", self.location),
                    reason: error.to_string(),
                })
            }
        }
    }
}

/// Returns the path of the data file that `add` names: the log URL-encodes it.
pub fn data_file_path(add: &Add) -> Result<Path, object_store::Error> {
    Path::from_url_path(&add.path).map_err(Into::into)
}
