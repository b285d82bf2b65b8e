//! Reads what is known of every image except its embedding and statistics: to compare the table with
//! a listing or another generation, or to announce its images again.

use chrono::{DateTime, Utc};
use deltalake_core::arrow::array::{Array, AsArray, RecordBatch};
use deltalake_core::arrow::datatypes::{Int64Type, TimestampMicrosecondType};
use deltalake_core::parquet::arrow::ProjectionMask;
use deltalake_core::parquet::errors::ParquetError;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::error::TableError;
use super::generation::Generation;
use super::log::DeltaLog;
use super::{file, schema};
use crate::record::{Attributes, RowVersion};
use crate::store::Store;

/// Files that are read at the same time.
const MAX_CONCURRENT_FILES: usize = 4;
/// Columns that are read; all others stay in the store.
const INVENTORY_COLUMNS: [&str; 8] =
    ["image_id", "sequence", "deleted", "embedded_at", "event_time", "uri", "bytes", "attributes"];

/// A row without its embedding and statistics. It may be superseded by another row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InventoryEntry {
    /// Id of the image.
    pub image_id: String,
    /// Version of the image; the row with the greatest one is current.
    pub version: RowVersion,
    /// When the change happened; `None` if the event did not say.
    pub event_time: Option<DateTime<Utc>>,
    /// URI that the image was fetched from; `None` if it is deleted or its bytes came in the event.
    pub uri: Option<String>,
    /// Size of the encoded image; `None` if it is deleted.
    pub bytes: Option<u64>,
    /// Declared attributes of the image.
    pub attributes: Attributes,
}

/// Reads all rows of the newest version of a table, some thousand at a time, in no particular order.
pub async fn read_inventory(
    catalogue: &Store,
    generation: &Generation,
) -> Result<BoxStream<'static, Result<Vec<InventoryEntry>, TableError>>, TableError> {
    let mut log = DeltaLog::open_images(catalogue, generation).await?;
    log.load_newest_snapshot().await?;
    let files: Vec<(Path, u64)> = {
        let files = log.snapshot()?.log_data();
        files.iter().map(|f| (f.object_store_path(), f.size().unsigned_abs())).collect()
    };
    let log = std::sync::Arc::new(log);
    let reads = stream::iter(files).map(move |(path, size)| {
        let log = log.clone();
        stream::once(async move { read_file_entries(&log, path, size).await }).try_flatten().boxed()
    });
    Ok(reads.flatten_unordered(MAX_CONCURRENT_FILES).boxed())
}

/// Reads the rows of one file, some thousand at a time.
async fn read_file_entries(
    log: &DeltaLog,
    path: Path,
    size: u64,
) -> Result<BoxStream<'static, Result<Vec<InventoryEntry>, TableError>>, TableError> {
    let location = log.location.clone();
    let name = format!("{location}/{path}");
    let failed = move |e: ParquetError| TableError::Delta {
        location: location.clone(),
        source: Box::new(e.into()),
    };
    let builder = file::open_column_reader(log, path.as_ref(), size).await.map_err(&failed)?;
    let mask = ProjectionMask::columns(builder.parquet_schema(), INVENTORY_COLUMNS);
    let batches = builder.with_batch_size(4096).with_projection(mask).build().map_err(&failed)?;
    let entries = batches.map(move |batch| {
        let batch = batch.map_err(&failed)?;
        entries_from_batch(&batch)
            .map_err(|reason| TableError::Corrupt { file: name.clone(), reason })
    });
    Ok(entries.boxed())
}

fn entries_from_batch(batch: &RecordBatch) -> Result<Vec<InventoryEntry>, String> {
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| format!("column {name} is missing"));
    let times = column("event_time")?
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or("column event_time is not a timestamp in microseconds")?;
    let uris = column("uri")?.as_string_opt::<i32>().ok_or("column uri is not text")?;
    let bytes = column("bytes")?
        .as_primitive_opt::<Int64Type>()
        .ok_or("column bytes is not a 64-bit integer")?;
    let attributes = column("attributes")?.as_map_opt().ok_or("column attributes is not a map")?;
    let keys = schema::keys_from_batch(batch)?.into_iter().enumerate();
    keys.map(|(i, (image_id, version))| {
        let time = (!times.is_null(i)).then(|| times.value(i));
        Ok(InventoryEntry {
            image_id,
            version,
            event_time: time.and_then(DateTime::from_timestamp_micros),
            uri: (!uris.is_null(i)).then(|| uris.value(i).to_owned()),
            bytes: (!bytes.is_null(i)).then(|| bytes.value(i) as u64),
            attributes: schema::attributes_at(attributes, i)?,
        })
    })
    .collect()
}
