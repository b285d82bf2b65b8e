//! Data files: Parquet, named after what they hold.
//!
//! The name of a file ends with the SHA-256 of its bytes. Whoever reads it can tell a damaged or
//! exchanged file from a whole one without asking anything else; Parquet itself would give wrong
//! numbers for a flipped bit in an embedding. Files that another tool has written, and named
//! otherwise, are read without this check.

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

use super::TableError;
use super::log::Log;
use super::schema::{self, INDEXED};
use crate::record::hex;

/// Digits of the checksum at the end of a name.
const DIGITS: usize = 64;
/// Rows of a row group: bounds what a writer holds before it can compress it, 128 MiB at 1024
/// dimensions.
const ROW_GROUP: usize = 32_768;

/// Bytes read from the end of a file before it is known how long its footer is: most fit.
const FOOTER: usize = 64 << 10;

/// Tag of a file in the log: the prompt sets whose statistics every image in it carries, by their
/// keys, separated by spaces; `*` where no row has an image.
const CARRIED: &str = "bsap.statistics";

/// Collects rows into one data file in memory.
pub struct FileWriter {
    parquet: ArrowWriter<Vec<u8>>,
    rows: usize,
    /// Indexed columns that the file has.
    ranges: Vec<(&'static str, Range)>,
    /// Prompt sets that every image so far carries; none before the first image.
    carried: Option<BTreeSet<String>>,
    images: bool,
}

/// Least, greatest and missing values of one indexed column.
#[derive(Default)]
struct Range {
    least: Option<String>,
    greatest: Option<String>,
    nulls: usize,
}

impl FileWriter {
    /// An empty file.
    pub fn new(schema: SchemaRef) -> Result<Self, ParquetError> {
        let has = |name: &&str| schema.column_with_name(name).is_some();
        let ranges = INDEXED.into_iter().filter(has).map(|n| (n, Range::default())).collect();
        let images = has(&"embedding");
        let parquet = ArrowWriter::try_new(Vec::new(), schema, Some(properties()))?;
        Ok(Self { parquet, rows: 0, ranges, carried: None, images })
    }

    /// Adds rows.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), ParquetError> {
        for (column, range) in &mut self.ranges {
            if let Some(values) = batch.column_by_name(column) {
                range.take(values);
            }
        }
        if let Some(found) = schema::carried(batch) {
            self.carried = Some(match self.carried.take() {
                None => found,
                Some(known) => known.intersection(&found).cloned().collect(),
            });
        }
        self.rows += batch.num_rows();
        self.parquet.write(batch)
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Ends the file and puts it where `log` keeps its data. No commit names it yet.
    pub async fn put(self, log: &Log) -> Result<Add, TableError> {
        self.put_as(log, &format!("{:016x}", rand::random::<u64>())).await
    }

    /// The same; the file's name begins with `prefix`.
    pub async fn put_as(self, log: &Log, prefix: &str) -> Result<Add, TableError> {
        let stats = self.stats();
        let tags = self.images.then(|| {
            let carried = self.carried.as_ref().map_or_else(
                || "*".to_owned(),
                |keys| keys.iter().map(String::as_str).collect::<Vec<_>>().join(" "),
            );
            HashMap::from([(CARRIED.to_owned(), Some(carried))])
        });
        let bytes = self.parquet.into_inner().map_err(|e| log.error(e.into()))?;
        let checksum = hex(&Sha256::digest(&bytes));
        let name = format!("{prefix}-{checksum}.parquet");
        let size = bytes.len() as i64;
        let put = log.objects().put(&Path::from(name.as_str()), PutPayload::from(bytes)).await;
        put.map_err(|e| log.error(e.into()))?;
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

    /// What the log says of the file's contents, for readers that look for few rows ("Per-file
    /// Statistics", Delta protocol).
    fn stats(&self) -> String {
        let columns = || self.ranges.iter().map(|(name, range)| (name, range));
        let pick = |value: fn(&Range) -> Option<&String>| -> Map<String, Value> {
            columns()
                .filter_map(|(name, range)| Some(((*name).into(), value(range)?.clone().into())))
                .collect()
        };
        let nulls: Map<String, Value> =
            columns().map(|(name, range)| ((*name).into(), range.nulls.into())).collect();
        json!({
            "numRecords": self.rows,
            "minValues": pick(|range| range.least.as_ref()),
            "maxValues": pick(|range| range.greatest.as_ref()),
            "nullCount": nulls,
        })
        .to_string()
    }
}

impl Range {
    fn take(&mut self, values: &dyn Array) {
        self.nulls += values.null_count();
        if let Some(texts) = values.as_string_opt::<i32>() {
            self.widen(texts.iter().flatten().min(), texts.iter().flatten().max());
        } else if let Some(times) = values.as_primitive_opt::<TimestampMicrosecondType>() {
            // Times of this form compare as their text does.
            let text = |micros: Option<i64>| {
                let time = DateTime::from_timestamp_micros(micros?)?;
                Some(time.to_rfc3339_opts(SecondsFormat::Micros, true))
            };
            let (least, greatest) =
                (text(times.iter().flatten().min()), text(times.iter().flatten().max()));
            self.widen(least.as_deref(), greatest.as_deref());
        }
    }

    fn widen(&mut self, least: Option<&str>, greatest: Option<&str>) {
        if let Some(least) = least
            && self.least.as_deref().is_none_or(|known| least < known)
        {
            self.least = Some(least.to_owned());
        }
        if let Some(greatest) = greatest
            && self.greatest.as_deref().is_none_or(|known| greatest > known)
        {
            self.greatest = Some(greatest.to_owned());
        }
    }
}

/// Why a data file was not read.
#[derive(Debug)]
pub enum Unread {
    /// It is not there.
    Missing,
    /// It does not hold what was written.
    Corrupt(String),
    /// The store failed.
    Store(object_store::Error),
}

impl Unread {
    /// As an error of the table.
    pub fn of(self, log: &Log, path: &str) -> TableError {
        let corrupt =
            |reason| TableError::Corrupt { file: format!("{}/{path}", log.place), reason };
        match self {
            Self::Missing => corrupt("the file is missing".into()),
            Self::Corrupt(reason) => corrupt(reason),
            Self::Store(error) => log.error(error.into()),
        }
    }
}

/// The bytes of a data file, after its checksum was compared.
pub async fn get(log: &Log, path: &Path) -> Result<Bytes, Unread> {
    let bytes = match log.objects().get(path).await {
        Ok(found) => found.bytes().await,
        Err(error) => Err(error),
    };
    let bytes = bytes.map_err(|error| match error {
        object_store::Error::NotFound { .. } => Unread::Missing,
        error => Unread::Store(error),
    })?;
    match checksum(path) {
        Some(wanted) if hex(&Sha256::digest(&bytes)) != wanted => Err(Unread::Corrupt(format!(
            "the checksum of its {} bytes is not the one in its name",
            bytes.len()
        ))),
        _ => Ok(bytes),
    }
}

/// Whether every image in a file carries the statistics of the set `key`, as far as the log says.
pub fn carries(add: &Add, key: &str) -> bool {
    let tag = add.tags.as_ref().and_then(|tags| tags.get(CARRIED)).and_then(Option::as_deref);
    tag.is_some_and(|keys| keys == "*" || keys.split(' ').any(|known| known == key))
}

/// The checksum that a file's name ends with.
pub fn checksum(path: &Path) -> Option<&str> {
    let (_, digits) = path.filename()?.strip_suffix(".parquet")?.rsplit_once('-')?;
    (digits.len() == DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit())).then_some(digits)
}

/// Reads parts of a data file from the store, without the rest.
pub struct RangeReader {
    objects: Arc<DynObjectStore>,
    path: Path,
    size: u64,
}

impl AsyncFileReader for RangeReader {
    fn get_bytes(&mut self, range: ops::Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        let read = self.objects.get_range(&self.path, range);
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<ops::Range<u64>>,
    ) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        let read = async move { self.objects.get_ranges(&self.path, &ranges).await };
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let reader = ParquetMetaDataReader::new().with_prefetch_hint(Some(FOOTER));
            reader.load_and_finish(self, size).await.map(Arc::new)
        }
        .boxed()
    }
}

/// The columns of a data file, some thousand rows at a time.
pub fn batches(bytes: Bytes) -> Result<ParquetRecordBatchReader, ParquetError> {
    let opened = catch_unwind(|| ParquetRecordBatchReaderBuilder::try_new(bytes));
    opened.unwrap_or_else(|_| Err(strange()))?.with_batch_size(4096).build()
}

/// A data file of `size` bytes in the store, of which single columns can be read. Its checksum is not
/// compared.
pub async fn columns(
    log: &Log,
    path: &str,
    size: u64,
) -> Result<ParquetRecordBatchStreamBuilder<RangeReader>, ParquetError> {
    let reader = RangeReader { objects: log.objects(), path: Path::from(path), size };
    let opened = AssertUnwindSafe(ParquetRecordBatchStreamBuilder::new(reader)).catch_unwind();
    opened.await.unwrap_or_else(|_| Err(strange()))
}

/// The library panics at a schema that it cannot make sense of.
fn strange() -> ParquetError {
    ParquetError::General("its schema makes no sense".into())
}

/// Embeddings rounded to f16 leave 16 of 32 bits zero in every value; split by byte and packed by
/// zstd they take about 1.9 bytes a value and stay plain floats to every reader.
fn properties() -> WriterProperties {
    let embedding = ColumnPath::from(vec!["embedding".into(), "list".into(), "element".into()]);
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(ROW_GROUP))
        .set_column_dictionary_enabled(embedding.clone(), false)
        .set_column_encoding(embedding, Encoding::BYTE_STREAM_SPLIT)
        .build()
}
