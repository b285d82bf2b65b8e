//! The Delta log of one table of a generation: making it, opening it, reading single commits.

use std::sync::Arc;

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
use url::Url;

use super::error::{TableError, classify_delta_error};
use super::generation::Generation;
use super::options::MaintenanceOptions;
use super::schema::{self, IMAGES_INDEXED_COLUMNS};
use crate::retry::Disposition;
use crate::store::Store;

/// Commits between two checkpoints. Whoever opens the table or asks for a position reads every commit
/// since the last one, a request each, so a long tail costs money and, on a store that fails now and
/// then, patience.
const CHECKPOINT_INTERVAL_COMMITS: u64 = 20;

/// Entries of a checkpoint, each some hundred bytes, for every one of which it is written that many intervals
/// apart: what is written for one commit stays bounded, however many files are remembered.
const CHECKPOINT_ENTRIES_PER_INTERVAL: u64 = 10_000;

/// Most intervals between two checkpoints.
const MAX_CHECKPOINT_INTERVALS: u64 = 10;

/// Versions over which a snapshot is carried on before it is loaded anew.
const MAX_INCREMENTAL_VERSIONS: u64 = 200;

/// Property of a table: how long its log remembers files that were taken away. Every checkpoint writes
/// all of these anew, some hundred bytes each, and compaction takes files away as often as workers
/// commit.
pub const DELETED_FILE_RETENTION_PROPERTY: &str = "delta.deletedFileRetentionDuration";

/// Its value.
pub fn retention_interval(hours: u32) -> String {
    format!("interval {hours} hours")
}

/// Application id under which the log keeps when files were last merged. Its version is a time in
/// milliseconds since 1970, as with the two below.
pub const COMPACTION_APP_ID: &str = "bsap:compact";
/// Application id of the last compaction that read the keys of all rows.
pub const DEEP_COMPACTION_APP_ID: &str = "bsap:compact:full";
/// Application id of the last removal of files that no reader needs any more.
pub const VACUUM_APP_ID: &str = "bsap:vacuum";

/// The tables of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// One row an accepted event.
    Images,
    /// Statistics computed after the rows were stored, partitioned by prompt set.
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

/// One table of a generation, opened.
pub struct DeltaLog {
    /// The Delta table with its newest loaded snapshot.
    pub table: DeltaTable,
    /// Where it is, for messages.
    pub location: String,
    /// Version from which on the snapshot was carried on; none where it was just loaded.
    loaded_version: Option<u64>,
}

impl DeltaLog {
    /// Opens the `images` table of `generation` below `catalogue`; `Missing` where there is none.
    pub async fn open_images(
        catalogue: &Store,
        generation: &Generation,
    ) -> Result<Self, TableError> {
        Self::open_table(catalogue, generation, TableKind::Images).await
    }

    /// Opens the table of that kind; `Missing` where there is none.
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

    /// Opens the table, making it where it is missing. Two that make it at once are fine: one
    /// wins, both open.
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
            let remembered =
                retention_interval(MaintenanceOptions::default().deleted_file_retention_hours);
            let created = CreateBuilder::new()
                .with_log_store(log.table.log_store())
                .with_save_mode(SaveMode::Ignore)
                .with_columns(columns)
                .with_partition_columns(partitions)
                .with_raise_if_key_not_exists(false)
                .with_configuration([
                    ("delta.dataSkippingStatsColumns", Some(indexed.as_str())),
                    ("delta.checkpointInterval", Some(interval.as_str())),
                    (DELETED_FILE_RETENTION_PROPERTY, Some(remembered.as_str())),
                    ("bsap.generation", Some(generation.id.as_str())),
                    ("bsap.model_fingerprint", Some(generation.model_fingerprint.as_str())),
                    ("bsap.ordering", Some(generation.ordering.as_str())),
                ])
                .await;
            match created {
                Ok(_) => {}
                // Somebody else was first; any other fault shows when the table is opened.
                Err(error) if classify_delta_error(&error) == Disposition::Retry => {}
                Err(error) => return Err(log.wrap_error(error)),
            }
        }
        Self::open_table(catalogue, generation, kind).await
    }

    /// The table without a snapshot, whether it is there or not: single commits can be read.
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
            loaded_version: None,
        }
    }

    /// Wraps an error with the table's place.
    pub fn wrap_error(&self, source: DeltaTableError) -> TableError {
        TableError::Delta { location: self.location.clone(), source: Box::new(source) }
    }

    /// Version of the loaded snapshot.
    pub fn version(&self) -> u64 {
        self.table.version().unwrap_or_default()
    }

    /// The log store.
    pub fn log_store(&self) -> LogStoreRef {
        self.table.log_store()
    }

    /// The table's folder, in which its data files are.
    pub fn object_store(&self) -> Arc<DynObjectStore> {
        self.log_store().object_store(None)
    }

    /// Loads the newest snapshot. Where that fails, the next commits may still be loaded one by one: who
    /// tries again has a shorter way then, however long it was.
    pub async fn update(&mut self) -> Result<(), TableError> {
        let updated = match self.table.update_state().await {
            // The log was cleaned up past the snapshot that this one would build on.
            Err(DeltaTableError::InvalidVersion(_)) => {
                self.table.state = None;
                self.table.load().await
            }
            Err(error) => {
                // One fault more says nothing new.
                let mut faults = 0;
                while faults < 2 {
                    let before = self.version();
                    let _ = self.table.update_incremental(Some(before + 1)).await;
                    faults += usize::from(self.version() == before);
                }
                Err(error)
            }
            Ok(()) => Ok(()),
        };
        updated.map_err(|e| self.wrap_error(e))?;
        self.reload_if_due().await;
        Ok(())
    }

    /// Commits on top of the loaded snapshot, in one attempt; the new version. Retries inside would
    /// commit against a snapshot that nobody checked.
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
        let done = CommitBuilder::from(properties)
            .with_actions(actions)
            .build(Some(self.snapshot()?), self.log_store(), operation)
            .await
            .map_err(|e| self.wrap_error(e))?;
        self.table.state = Some(done.snapshot());
        Ok(done.version())
    }

    /// Whether the next commit may bring a checkpoint: by the table's interval, and more seldom where the
    /// last one was large.
    async fn is_checkpoint_due(&self) -> bool {
        let next = self.version() + 1;
        if !(next + 1).is_multiple_of(CHECKPOINT_INTERVAL_COMMITS) {
            return false;
        }
        let entries = self.last_checkpoint_entries().await.unwrap_or_default();
        let apart = (entries / CHECKPOINT_ENTRIES_PER_INTERVAL).clamp(1, MAX_CHECKPOINT_INTERVALS);
        ((next + 1) / CHECKPOINT_INTERVAL_COMMITS).is_multiple_of(apart)
    }

    /// Entries of the last checkpoint, as the log's hint says.
    async fn last_checkpoint_entries(&self) -> Option<u64> {
        let hint =
            self.object_store().get(&Path::from("_delta_log/_last_checkpoint")).await.ok()?;
        let hint: Value = serde_json::from_slice(&hint.bytes().await.ok()?).ok()?;
        hint.get("size")?.as_u64()
    }

    /// Loads the snapshot from the newest checkpoint now and then: one that is carried on keeps some
    /// 50 KB of each version that it went through.
    async fn reload_if_due(&mut self) {
        let version = self.version();
        let since = *self.loaded_version.get_or_insert(version);
        if version.saturating_sub(since) < MAX_INCREMENTAL_VERSIONS {
            return;
        }
        let mut anew = DeltaTable::new(self.log_store());
        // Where it fails, the old one serves, and the next versions bring another chance.
        if anew.load().await.is_ok() && anew.version() >= Some(version) {
            self.table = anew;
        }
        self.loaded_version = Some(version);
    }

    /// Loads the newest snapshot, also where none was loaded before; false where there is no table.
    pub async fn load_if_exists(&mut self) -> Result<bool, TableError> {
        if self.table.state.is_some() {
            return self.update().await.map(|()| true);
        }
        match self.table.load().await {
            Ok(()) => Ok(true),
            Err(DeltaTableError::NotATable(_) | DeltaTableError::InvalidTableLocation(_)) => {
                Ok(false)
            }
            Err(error) => Err(self.wrap_error(error)),
        }
    }

    /// The loaded snapshot.
    pub fn snapshot(&self) -> Result<&DeltaTableState, TableError> {
        self.table.snapshot().map_err(|e| self.wrap_error(e))
    }

    /// The table's schema in Arrow's terms.
    pub fn arrow_schema(&self) -> Result<SchemaRef, TableError> {
        let metadata = self.snapshot()?.metadata();
        let schema = metadata.parse_schema().map_err(|e| self.wrap_error(e.into()))?;
        let arrow = (&schema).try_into_arrow().map_err(|e| self.wrap_error(e.into()))?;
        Ok(Arc::new(arrow))
    }

    /// Version of an application's newest transaction as of the loaded snapshot.
    pub async fn transaction_version(&self, application: &str) -> Result<Option<i64>, TableError> {
        let found =
            self.snapshot()?.transaction_version(self.log_store().as_ref(), application).await;
        found.map_err(|e| self.wrap_error(e))
    }

    /// Oldest version whose commit is still in the log.
    pub async fn oldest_version(&self) -> Result<u64, TableError> {
        let listed = self.object_store();
        let folder = Path::from("_delta_log");
        let mut files = listed.list(Some(&folder));
        let mut oldest = self.version();
        while let Some(file) = files.next().await {
            let file = file.map_err(|e| self.wrap_error(e.into()))?;
            let name = file.location.filename().and_then(|name| name.strip_suffix(".json"));
            if let Some(version) = name.and_then(|digits| digits.parse().ok()) {
                oldest = oldest.min(version);
            }
        }
        Ok(oldest)
    }

    /// The actions of commit `version`; `None` where it does not exist (yet, or any more).
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

/// The object that an `Add` names: its path is URL-encoded in the log.
pub fn data_file_path(add: &Add) -> Result<Path, object_store::Error> {
    Path::from_url_path(&add.path).map_err(Into::into)
}
