//! Following the table: everything at first, then each commit as it comes.

use std::time::{Duration, Instant};

use deltalake_core::kernel::Action;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use super::log::{Log, object_path};
use super::state::Generation;
use super::{TableError, schema};
use crate::record::Row;
use crate::store::Store;

/// Files read at one time by a fresh reader.
const CONCURRENT_FILES: usize = 8;
/// A reader that sees no next commit for this long asks whether the log was cleaned up behind it.
const RESYNC_AFTER: Duration = Duration::from_secs(60);

/// What came since the last look.
#[derive(Debug)]
pub struct Changes {
    /// Version of the table that these rows lead to.
    pub version: u64,
    /// Whether `rows` are the whole table instead of what is new.
    pub whole: bool,
    /// Rows in no particular order: versions decide.
    pub rows: Vec<Row>,
}

/// Reads the table of one generation, from the beginning on.
pub struct Follower {
    log: Log,
    /// Version up to which everything was handed out.
    seen: Option<u64>,
    last_commit: Instant,
}

impl Follower {
    /// Opens the table of `generation`; `Missing` where no worker has made it yet.
    pub async fn open(catalogue: &Store, generation: &Generation) -> Result<Self, TableError> {
        Ok(Self {
            log: Log::open(catalogue, generation).await?,
            seen: None,
            last_commit: Instant::now(),
        })
    }

    /// The changes since the last call: the whole table at first, then one commit a call, then
    /// `None` until there is another. `progress` hears of files read and files in all.
    pub async fn next(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<Changes>, TableError> {
        let Some(seen) = self.seen else {
            return self.whole(progress).await.map(Some);
        };
        let version = seen + 1;
        let Some(actions) = self.log.commit(version).await? else {
            return self.behind(seen, progress).await;
        };
        let mut rows = Vec::new();
        for action in actions {
            match action {
                Action::Add(add) if add.data_change => {
                    let path =
                        object_path(&add).map_err(|e| self.corrupt(&add.path, e.to_string()))?;
                    rows.extend(self.read(&path).await?);
                }
                _ => {}
            }
        }
        self.advance(version);
        Ok(Some(Changes { version, whole: false, rows }))
    }

    /// There is no next commit: either nothing is new, or the log was cleaned up past this reader.
    async fn behind(
        &mut self,
        seen: u64,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<Changes>, TableError> {
        if self.last_commit.elapsed() < RESYNC_AFTER {
            return Ok(None);
        }
        self.last_commit = Instant::now();
        let updated = self.log.table.update_state().await;
        updated.map_err(|e| self.log.error(e))?;
        // A commit may have come between the two looks: then it can be read.
        if self.log.version() == seen || self.log.commit(seen + 1).await?.is_some() {
            return Ok(None);
        }
        self.whole(progress).await.map(Some)
    }

    async fn whole(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Changes, TableError> {
        let updated = self.log.table.update_state().await;
        updated.map_err(|e| self.log.error(e))?;
        let version = self.log.version();
        let state = self.log.table.snapshot().map_err(|e| self.log.error(e))?;
        let files: Vec<Path> = state.log_data().iter().map(|f| f.object_store_path()).collect();
        let total = files.len();
        let this = &*self;
        let mut reads = stream::iter(files)
            .map(|path| async move { this.read(&path).await })
            .buffer_unordered(CONCURRENT_FILES);
        let (mut rows, mut done) = (Vec::new(), 0);
        while let Some(more) = reads.try_next().await? {
            rows.extend(more);
            done += 1;
            progress(done, total);
        }
        drop(reads);
        self.advance(version);
        Ok(Changes { version, whole: true, rows })
    }

    fn advance(&mut self, version: u64) {
        self.seen = Some(version);
        self.last_commit = Instant::now();
    }

    /// All rows of one data file. Parquet's own checks catch a truncated or overwritten one.
    async fn read(&self, path: &Path) -> Result<Vec<Row>, TableError> {
        let corrupt = |reason: String| self.corrupt(path.as_ref(), reason);
        let objects = self.log.store().object_store(None);
        let bytes = match objects.get(path).await {
            Ok(found) => found.bytes().await,
            Err(error) => Err(error),
        }
        .map_err(|error| match error {
            object_store::Error::NotFound { .. } => corrupt("the file is missing".into()),
            error => self.log.error(error.into()),
        })?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)
            .and_then(|builder| builder.build())
            .map_err(|e| corrupt(e.to_string()))?;
        let mut rows = Vec::new();
        for batch in reader {
            let batch = batch.map_err(|e| corrupt(e.to_string()))?;
            rows.extend(schema::from_batch(&batch).map_err(corrupt)?);
        }
        Ok(rows)
    }

    fn corrupt(&self, file: &str, reason: String) -> TableError {
        TableError::Corrupt { file: format!("{}/{file}", self.log.place), reason }
    }
}
