//! Data files in Parquet: writes and reads them, and checks that they are undamaged.
//!
//! The name of a file ends with the SHA-256 of its bytes, so that every reader recognises a damaged or
//! exchanged file; Parquet itself would return wrong numbers for a flipped bit in an embedding. Files
//! that another tool has written, under other names, are read without this check.

use std::collections::{BTreeSet, HashMap};
use std::ops;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use deltalake_core::arrow::array::{Array, AsArray, RecordBatch};
use deltalake_core::arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use deltalake_core::kernel::Add;
use deltalake_core::parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use deltalake_core::parquet::arrow::async_reader::AsyncFileReader;
use deltalake_core::parquet::arrow::{ArrowWriter, ParquetRecordBatchStreamBuilder};
use deltalake_core::parquet::basic::{Compression, Encoding, ZstdLevel};
use deltalake_core::parquet::errors::ParquetError;
use deltalake_core::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use deltalake_core::parquet::file::properties::WriterProperties;
use deltalake_core::parquet::schema::types::ColumnPath;
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use object_store::path::Path;
use object_store::{DynObjectStore, ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::error::TableError;
use super::log::DeltaLog;
use super::schema::{self, IMAGES_INDEXED_COLUMNS};
use crate::record::{ImageRow, to_hex};

/// Hexadecimal digits of the checksum at the end of a name.
const CHECKSUM_DIGITS: usize = 64;
/// Rows of a row group. Bounds what a writer holds uncompressed: 128 MiB at 1024 dimensions.
const MAX_ROW_GROUP_ROWS: usize = 32_768;

/// Bytes that are read from the end of a file before the length of its footer is known: most footers
/// fit.
const FOOTER_PREFETCH_BYTES: usize = 64 << 10;

/// Tag of a file in the log: the keys of the prompt sets whose statistics every image in it carries,
/// separated by spaces; `*` if no row has an image.
const STATISTICS_KEYS_TAG: &str = "bsap.statistics_keys";

/// Collects rows into one data file in memory.
pub struct DataFileWriter {
    parquet_writer: ArrowWriter<Vec<u8>>,
    row_count: usize,
    /// Values of the indexed columns that the file has.
    column_ranges: Vec<(&'static str, ColumnRange)>,
    /// Keys of the prompt sets whose statistics every image so far carries; `None` before the first image.
    statistics_keys: Option<BTreeSet<String>>,
    is_images_table: bool,
}

/// Minimum, maximum and number of nulls of one indexed column.
#[derive(Default)]
struct ColumnRange {
    min: Option<String>,
    max: Option<String>,
    null_count: usize,
}

impl DataFileWriter {
    /// Starts an empty file.
    pub fn new(schema: SchemaRef) -> Result<Self, ParquetError> {
        let has_column = |name: &&str| schema.column_with_name(name).is_some();
        let column_ranges = IMAGES_INDEXED_COLUMNS
            .into_iter()
            .filter(has_column)
            .map(|name| (name, ColumnRange::default()))
            .collect();
        let is_images_table = has_column(&"embedding");
        let parquet_writer = ArrowWriter::try_new(Vec::new(), schema, Some(parquet_properties()))?;
        Ok(Self {
            parquet_writer,
            row_count: 0,
            column_ranges,
            statistics_keys: None,
            is_images_table,
        })
    }

    /// Adds rows.
    pub fn write_batch(&mut self, batch: &RecordBatch) -> Result<(), ParquetError> {
        for (column, range) in &mut self.column_ranges {
            if let Some(values) = batch.column_by_name(column) {
                range.add_values(values);
            }
        }
        if let Some(keys) = schema::common_statistics_keys(batch) {
            self.statistics_keys = Some(match self.statistics_keys.take() {
                None => keys,
                Some(known) => known.intersection(&keys).cloned().collect(),
            });
        }
        self.row_count += batch.num_rows();
        self.parquet_writer.write(batch)
    }

    /// Returns the number of rows so far.
    pub fn row_count(&self) -> usize {
        self.row_count
    }

    /// Completes the file and uploads it to the folder of `log`. The caller commits the returned action.
    pub async fn upload(self, log: &DeltaLog) -> Result<Add, TableError> {
        self.upload_with_prefix(log, &format!("{:016x}", rand::random::<u64>())).await
    }

    /// Does the same as [`Self::upload`]; the file's name begins with `prefix`.
    pub async fn upload_with_prefix(self, log: &DeltaLog, prefix: &str) -> Result<Add, TableError> {
        let stats = self.stats_json();
        let tags = self.is_images_table.then(|| {
            let keys = self.statistics_keys.as_ref().map_or_else(
                || "*".to_owned(),
                |keys| keys.iter().map(String::as_str).collect::<Vec<_>>().join(" "),
            );
            HashMap::from([(STATISTICS_KEYS_TAG.to_owned(), Some(keys))])
        });
        let bytes = self.parquet_writer.into_inner().map_err(|e| log.wrap_error(e.into()))?;
        let checksum = to_hex(&Sha256::digest(&bytes));
        let name = format!("{prefix}-{checksum}.parquet");
        let size = bytes.len() as i64;
        let put = log.object_store().put(&Path::from(name.as_str()), PutPayload::from(bytes)).await;
        put.map_err(|e| log.wrap_error(e.into()))?;
        Ok(Add {
            path: name,
            partition_values: HashMap::new(),
            size,
            modification_time: Utc::now().timestamp_millis(),
            data_change: true,
            stats: Some(stats),
            tags,
            deletion_vector: None,
            base_row_id: None,
            default_row_commit_version: None,
            clustering_provider: None,
        })
    }

    /// Returns what the log says of the file's contents, for readers that need few rows ("Per-file
    /// Statistics", Delta protocol).
    fn stats_json(&self) -> String {
        let columns = || self.column_ranges.iter().map(|(name, range)| (name, range));
        let pick = |value: fn(&ColumnRange) -> Option<&String>| -> Map<String, Value> {
            columns()
                .filter_map(|(name, range)| Some(((*name).into(), value(range)?.clone().into())))
                .collect()
        };
        let nulls: Map<String, Value> =
            columns().map(|(name, range)| ((*name).into(), range.null_count.into())).collect();
        json!({
            "numRecords": self.row_count,
            "minValues": pick(|range| range.min.as_ref()),
            "maxValues": pick(|range| range.max.as_ref()),
            "nullCount": nulls,
        })
        .to_string()
    }
}

impl ColumnRange {
    fn add_values(&mut self, values: &dyn Array) {
        self.null_count += values.null_count();
        if let Some(texts) = values.as_string_opt::<i32>() {
            self.extend_to(texts.iter().flatten().min(), texts.iter().flatten().max());
        } else if let Some(times) = values.as_primitive_opt::<TimestampMicrosecondType>() {
            // Times in this format compare in the same order as their texts.
            let text = |micros: Option<i64>| {
                let time = DateTime::from_timestamp_micros(micros?)?;
                Some(time.to_rfc3339_opts(SecondsFormat::Micros, true))
            };
            let (min, max) =
                (text(times.iter().flatten().min()), text(times.iter().flatten().max()));
            self.extend_to(min.as_deref(), max.as_deref());
        }
    }

    fn extend_to(&mut self, min: Option<&str>, max: Option<&str>) {
        if let Some(min) = min
            && self.min.as_deref().is_none_or(|known| min < known)
        {
            self.min = Some(min.to_owned());
        }
        if let Some(max) = max
            && self.max.as_deref().is_none_or(|known| max > known)
        {
            self.max = Some(max.to_owned());
        }
    }
}

/// Why a data file was not read.
#[derive(Debug)]
pub enum FileReadError {
    /// The store has no such file.
    NotFound,
    /// The file does not hold what was written; the text says why.
    Corrupt(String),
    /// The store failed.
    Store(object_store::Error),
}

impl FileReadError {
    /// Converts this into an error that names the file `path` of the table of `log`.
    pub fn into_table_error(self, log: &DeltaLog, path: &str) -> TableError {
        let corrupt =
            |reason| TableError::Corrupt { file: format!("{}/{path}", log.location), reason };
        match self {
            Self::NotFound => corrupt("the file is missing".into()),
            Self::Corrupt(reason) => corrupt(reason),
            Self::Store(error) => log.wrap_error(error.into()),
        }
    }
}

/// Reads a data file and compares its checksum with its name.
pub async fn read_and_verify_checksum(log: &DeltaLog, path: &Path) -> Result<Bytes, FileReadError> {
    let bytes = match log.object_store().get(path).await {
        Ok(object) => object.bytes().await,
        Err(error) => Err(error),
    };
    let bytes = bytes.map_err(|error| match error {
        object_store::Error::NotFound { .. } => FileReadError::NotFound,
        error => FileReadError::Store(error),
    })?;
    match checksum_in_name(path) {
        Some(expected) if to_hex(&Sha256::digest(&bytes)) != expected => {
            Err(FileReadError::Corrupt(format!(
                "the checksum of its {} bytes is not the one in its name",
                bytes.len()
            )))
        }
        _ => Ok(bytes),
    }
}

/// Reads the rows of a file. Fails unless it has the `size` in bytes and the number of `rows` that the
/// log says.
pub async fn read_and_check_rows(
    log: &DeltaLog,
    path: &Path,
    size: u64,
    rows: Option<usize>,
) -> Result<Vec<ImageRow>, FileReadError> {
    let bytes = read_and_verify_checksum(log, path).await?;
    if bytes.len() as u64 != size {
        return Err(FileReadError::Corrupt(format!(
            "has {} bytes, the log says {size}",
            bytes.len()
        )));
    }
    let read = rows_from_parquet(bytes)?;
    match rows {
        Some(expected) if expected != read.len() => {
            Err(FileReadError::Corrupt(format!("has {} rows, the log says {expected}", read.len())))
        }
        _ => Ok(read),
    }
}

/// Decodes all rows of a data file.
pub fn rows_from_parquet(bytes: Bytes) -> Result<Vec<ImageRow>, FileReadError> {
    let corrupt = |e: &dyn std::fmt::Display| FileReadError::Corrupt(e.to_string());
    let mut rows = Vec::new();
    for batch in read_batches(bytes).map_err(|e| corrupt(&e))? {
        let batch = batch.map_err(|e| corrupt(&e))?;
        rows.extend(schema::rows_from_batch(&batch).map_err(FileReadError::Corrupt)?);
    }
    Ok(rows)
}

/// Whether the log says that every image in a file carries the statistics of the prompt set `key`.
pub fn has_statistics(add: &Add, key: &str) -> bool {
    let tag =
        add.tags.as_ref().and_then(|tags| tags.get(STATISTICS_KEYS_TAG)).and_then(Option::as_deref);
    tag.is_some_and(|keys| keys == "*" || keys.split(' ').any(|known| known == key))
}

/// Returns the checksum that a file's name ends with; `None` if another tool has written the file.
pub fn checksum_in_name(path: &Path) -> Option<&str> {
    let (_, digits) = path.filename()?.strip_suffix(".parquet")?.rsplit_once('-')?;
    (digits.len() == CHECKSUM_DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit()))
        .then_some(digits)
}

/// Reads ranges of a data file from the store, for a Parquet reader that needs only some columns.
pub struct ObjectRangeReader {
    object_store: Arc<DynObjectStore>,
    path: Path,
    size: u64,
}

impl AsyncFileReader for ObjectRangeReader {
    fn get_bytes(&mut self, range: ops::Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        let read = self.object_store.get_range(&self.path, range);
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<ops::Range<u64>>,
    ) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        let read = async move { self.object_store.get_ranges(&self.path, &ranges).await };
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let reader =
                ParquetMetaDataReader::new().with_prefetch_hint(Some(FOOTER_PREFETCH_BYTES));
            reader.load_and_finish(self, size).await.map(Arc::new)
        }
        .boxed()
    }
}

/// Decodes the columns of a data file, some thousand rows at a time.
pub fn read_batches(bytes: Bytes) -> Result<ParquetRecordBatchReader, ParquetError> {
    let opened = catch_unwind(|| ParquetRecordBatchReaderBuilder::try_new(bytes));
    opened.unwrap_or_else(|_| Err(invalid_schema_error()))?.with_batch_size(4096).build()
}

/// Opens a data file of `size` bytes in the store, to read some of its columns. Its checksum is not
/// compared.
pub async fn open_column_reader(
    log: &DeltaLog,
    path: &str,
    size: u64,
) -> Result<ParquetRecordBatchStreamBuilder<ObjectRangeReader>, ParquetError> {
    let reader =
        ObjectRangeReader { object_store: log.object_store(), path: Path::from(path), size };
    let opened = AssertUnwindSafe(ParquetRecordBatchStreamBuilder::new(reader)).catch_unwind();
    opened.await.unwrap_or_else(|_| Err(invalid_schema_error()))
}

/// Returns the error for a schema at which the library panics.
fn invalid_schema_error() -> ParquetError {
    ParquetError::General("its schema makes no sense".into())
}

/// Embeddings that are rounded to f16 leave at least 13 of 32 bits zero in every value. Split by byte
/// and compressed by zstd they take about 1.9 bytes per value, and are plain floats to every reader.
fn parquet_properties() -> WriterProperties {
    let embedding = ColumnPath::from(vec!["embedding".into(), "list".into(), "element".into()]);
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(MAX_ROW_GROUP_ROWS))
        .set_column_dictionary_enabled(embedding.clone(), false)
        .set_column_encoding(embedding, Encoding::BYTE_STREAM_SPLIT)
        .build()
}
