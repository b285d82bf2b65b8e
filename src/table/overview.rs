//! What the log alone tells of a table: nothing is read but that.

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

/// A table as its log shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableOverview {
    /// Version of the table.
    pub version: u64,
    /// Oldest version whose commit can still be read: a reader further behind reads all anew.
    pub oldest_version: u64,
    /// Data files.
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Rows in them, superseded ones included. None where a file does not say.
    pub rows: Option<usize>,
    /// When the newest row was made.
    pub newest_row_at: Option<DateTime<Utc>>,
    /// Files that a merge would take now.
    pub files_to_merge: usize,
    /// When files were last merged.
    pub compacted_at: Option<DateTime<Utc>>,
    /// When every row was last looked at.
    pub fully_compacted_at: Option<DateTime<Utc>>,
}

impl TableOverview {
    /// Of the table of `generation`.
    pub async fn from_log(
        catalogue: &Store,
        generation: &Generation,
        options: &MaintenanceOptions,
    ) -> Result<Self, TableError> {
        let mut log = DeltaLog::open_images(catalogue, generation).await?;
        log.update().await?;
        let (mut files, mut bytes, mut rows, mut newest) = (0, 0, Some(0), None);
        {
            let all = log.snapshot()?.log_data();
            for file in all.iter() {
                files += 1;
                bytes += file.size().unsigned_abs();
                rows = rows.zip(file.num_records()).map(|(a, b)| a + b);
                newest = newest.max(file.stats().and_then(|stats| newest_embedded_at(&stats)));
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
            newest_row_at: newest,
            files_to_merge: compactor.count_pending_files().await?,
            compacted_at: time(log.transaction_version(COMPACTION_APP_ID).await?),
            fully_compacted_at: time(log.transaction_version(DEEP_COMPACTION_APP_ID).await?),
        })
    }
}

/// The greatest `embedded_at` of a file, from its statistics in the log.
fn newest_embedded_at(stats: &str) -> Option<DateTime<Utc>> {
    let stats: Value = serde_json::from_str(stats).ok()?;
    let text = stats["maxValues"]["embedded_at"].as_str()?;
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}

/// A writer that reads positions, where there is a table already.
pub async fn open_existing_writer(
    catalogue: &Store,
    generation: &Generation,
    max_attempts: u32,
) -> Result<TableWriter, TableError> {
    DeltaLog::open_images(catalogue, generation).await?;
    TableWriter::open(catalogue, generation, max_attempts).await
}
