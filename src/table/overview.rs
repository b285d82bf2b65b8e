//! A summary of a table from its log alone: no data file is read.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use super::error::TableError;
use super::generation::Generation;
use super::log::{COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, DeltaLog};
use super::maintenance::compact::Compactor;
use super::options::MaintenanceOptions;
use super::writer::TableWriter;
use crate::store::Store;

/// A summary of an `images` table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableOverview {
    /// Version of the table.
    pub version: u64,
    /// Oldest version whose commit is still in the Delta log. A reader that is further behind reads the whole
    /// table again.
    pub oldest_version: u64,
    /// Number of data files.
    pub files: usize,
    /// Bytes of the data files.
    pub bytes: u64,
    /// Number of rows, superseded ones included. `None` if the Delta log does not say it for every file.
    pub rows: Option<usize>,
    /// When the newest row was created.
    pub newest_row_at: Option<DateTime<Utc>>,
    /// Number of files that a merge would rewrite now.
    pub files_to_merge: usize,
    /// When files were last merged.
    pub compacted_at: Option<DateTime<Utc>>,
    /// When the keys of all rows were last checked.
    pub fully_compacted_at: Option<DateTime<Utc>>,
}

impl TableOverview {
    /// Summarises the table of `generation`.
    pub async fn from_log(
        catalogue: &Store,
        generation: &Generation,
        options: &MaintenanceOptions,
    ) -> Result<Self, TableError> {
        let mut log = DeltaLog::open_images(catalogue, generation).await?;
        log.load_newest_snapshot().await?;
        let (mut files, mut bytes, mut rows, mut newest_row_at) = (0, 0, Some(0), None);
        {
            let data_files = log.snapshot()?.log_data();
            for file in data_files.iter() {
                files += 1;
                bytes += file.size().unsigned_abs();
                rows = rows.zip(file.num_records()).map(|(a, b)| a + b);
                newest_row_at =
                    newest_row_at.max(file.stats().and_then(|stats| newest_embedded_at(&stats)));
            }
        }
        let time = |at: Option<i64>| at.and_then(DateTime::from_timestamp_millis);
        let mut compactor = Compactor::open(catalogue, generation, options, 1).await?;
        Ok(Self {
            version: log.version(),
            oldest_version: log.oldest_version().await?,
            files,
            bytes,
            rows,
            newest_row_at,
            files_to_merge: compactor.count_files_to_merge().await?,
            compacted_at: time(log.transaction_version(COMPACTION_APP_ID).await?),
            fully_compacted_at: time(log.transaction_version(DEEP_COMPACTION_APP_ID).await?),
        })
    }
}

/// Returns the greatest `embedded_at` of a file, from its statistics in the log.
fn newest_embedded_at(stats: &str) -> Option<DateTime<Utc>> {
    let stats: Value = serde_json::from_str(stats).ok()?;
    let text = stats["maxValues"]["embedded_at"].as_str()?;
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}

/// Opens a writer to read positions, without creating the table. Fails with [`TableError::NotFound`] if
/// there is none.
pub async fn open_existing_writer(
    catalogue: &Store,
    generation: &Generation,
    max_attempts: u32,
) -> Result<TableWriter, TableError> {
    DeltaLog::open_images(catalogue, generation).await?;
    TableWriter::open(catalogue, generation, max_attempts).await
}
