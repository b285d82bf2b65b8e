//! What the log alone tells of a table: nothing is read but that.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use super::TableError;
use super::log::Log;
use super::maintenance::compact::{COMPACTED, COMPACTED_DEEP, Compactor};
use super::maintenance::upkeep::Options;
use super::write::Writer;
use crate::catalogue::Generation;
use crate::store::Store;

/// A table as its log shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Overview {
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
    pub newest_row: Option<DateTime<Utc>>,
    /// Files that a merge would take now.
    pub pending_files: usize,
    /// When files were last merged.
    pub compacted: Option<DateTime<Utc>>,
    /// When every row was last looked at.
    pub compacted_deep: Option<DateTime<Utc>>,
}

impl Overview {
    /// Of the table of `generation`.
    pub async fn of(
        catalogue: &Store,
        generation: &Generation,
        options: &Options,
    ) -> Result<Self, TableError> {
        let mut log = Log::open(catalogue, generation).await?;
        log.update().await?;
        let (mut files, mut bytes, mut rows, mut newest) = (0, 0, Some(0), None);
        {
            let all = log.snapshot()?.log_data();
            for file in all.iter() {
                files += 1;
                bytes += file.size().unsigned_abs();
                rows = rows.zip(file.num_records()).map(|(a, b)| a + b);
                newest = newest.max(file.stats().and_then(|stats| newest_row(&stats)));
            }
        }
        let time = |at: Option<i64>| at.and_then(DateTime::from_timestamp_millis);
        let mut compactor = Compactor::open(catalogue, generation, options, 1).await?;
        Ok(Self {
            version: log.version(),
            oldest_version: log.oldest().await?,
            files,
            bytes,
            rows,
            newest_row: newest,
            pending_files: compactor.pending().await?,
            compacted: time(log.transaction(COMPACTED).await?),
            compacted_deep: time(log.transaction(COMPACTED_DEEP).await?),
        })
    }
}

/// The greatest `embedded_at` of a file, from its statistics in the log.
fn newest_row(stats: &str) -> Option<DateTime<Utc>> {
    let stats: Value = serde_json::from_str(stats).ok()?;
    let text = stats["maxValues"]["embedded_at"].as_str()?;
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}

/// A writer that reads positions, where there is a table already.
pub async fn positions(
    catalogue: &Store,
    generation: &Generation,
    attempts: u32,
) -> Result<Writer, TableError> {
    Log::open(catalogue, generation).await?;
    Writer::open(catalogue, generation, attempts).await
}
