//! Backfilled statistics: the `statistics` table next to `images`, partitioned by prompt set.
//!
//! New rows carry their statistics themselves. This table holds those that were computed later, from
//! stored embeddings, for rows that are older than the prompt set. Each of its files belongs to one unit
//! of work, which is one file of `images` and one prompt set, and its name begins with the unit's id. So
//! the snapshot alone says which units are done, whoever did them, and a unit that two processes
//! computed at the same time is committed once. When compaction rewrites a file of `images`, it moves
//! the statistics of its units into the rows and removes their files here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use deltalake_core::arrow::array::{
    ArrayRef, AsArray, Float32Array, Int32Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use deltalake_core::arrow::datatypes::{
    Float32Type, Int32Type, Schema as ArrowSchema, TimestampMicrosecondType,
};
use deltalake_core::kernel::{Action, Add, Remove};
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use half::f16;
use object_store::path::Path;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::error::TableError;
use super::file::{self, DataFileWriter, FileReadError};
use super::generation::Generation;
use super::log::{DeltaLog, TableKind, commit_backoff};
use super::schema::PROMPT_SET_COLUMN;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::{ImageRow, SequenceKey, to_hex};
use crate::retry::{Classify, Disposition};
use crate::store::Store;

/// Hexadecimal digits of a unit's id.
const UNIT_ID_DIGITS: usize = 16;

/// Statistics of one version of one image, computed after its row was stored.
#[derive(Debug, Clone, PartialEq)]
pub struct BackfilledStatistics {
    /// Id of the image.
    pub image_id: String,
    /// Version of the image.
    pub sequence: SequenceKey,
    /// When the row was created: names one row, together with the two fields above.
    pub embedded_at: DateTime<Utc>,
    /// [`embedding_hash`] of the embedding that was measured.
    pub embedding_hash: String,
    /// The statistics of the row's scores.
    pub statistics: ScoreStatistics,
}

/// Returns the first 16 hexadecimal digits of the SHA-256 of an embedding's values as f16,
/// little-endian.
pub fn embedding_hash(values: &[f32]) -> String {
    let mut hasher = Sha256::new();
    let mut buffer = [0u8; 128];
    for chunk in values.chunks(buffer.len() / 2) {
        for (bytes, value) in buffer.chunks_exact_mut(2).zip(chunk) {
            bytes.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
        }
        hasher.update(&buffer[..chunk.len() * 2]);
    }
    to_hex(&hasher.finalize()[..8])
}

/// Returns the id of a unit: the file `data_file` of the `images` table, measured with the prompt set
/// `key`.
pub fn backfill_unit_id(key: &StatisticsKey, data_file: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(key.as_str().as_bytes());
    hasher.update([0]);
    hasher.update(data_file.as_bytes());
    to_hex(&hasher.finalize()[..UNIT_ID_DIGITS / 2])
}

/// Backfilled statistics by the row that they belong to: image id, sequence, and when it was created.
pub type BackfilledByVersion = HashMap<(String, SequenceKey, DateTime<Utc>), BackfilledStatistics>;

/// Indexes backfilled statistics by the row that they belong to.
pub fn index_by_version(backfilled: Vec<BackfilledStatistics>) -> BackfilledByVersion {
    let keyed =
        |b: BackfilledStatistics| ((b.image_id.clone(), b.sequence.clone(), b.embedded_at), b);
    backfilled.into_iter().map(keyed).collect()
}

/// Adds backfilled statistics to the rows whose version and embedding they were computed from. Returns
/// how many rows got some.
pub fn attach_statistics(
    rows: &mut [ImageRow],
    key: &StatisticsKey,
    backfilled: &BackfilledByVersion,
) -> usize {
    let mut attached = 0;
    for row in rows {
        let Some(image) = &mut row.image else { continue };
        let version = (row.image_id.to_string(), row.sequence.clone(), row.embedded_at);
        if let Some(measured) = backfilled.get(&version)
            && !image.statistics.contains_key(key)
            && measured.embedding_hash == embedding_hash(image.embedding.values())
        {
            image.statistics.insert(key.clone(), measured.statistics);
            attached += 1;
        }
    }
    attached
}

/// A file of the `statistics` table.
#[derive(Debug, Clone)]
pub struct StatisticsFile {
    /// Path in the table.
    pub path: String,
    /// Key of its prompt set.
    pub prompt_set_key: StatisticsKey,
    /// Number of rows; 0 if the Delta log does not say.
    pub row_count: usize,
    remove_action: Remove,
}

/// An uploaded file with the statistics of a unit, which no commit names yet.
#[derive(Debug, Clone)]
pub struct StagedStatisticsFile(Add);

/// The `statistics` table of one generation.
pub struct StatisticsTable {
    log: DeltaLog,
    max_attempts: u32,
}

impl StatisticsTable {
    /// Opens the table. Returns `None` if nothing was ever backfilled. A commit that fails is tried
    /// `max_attempts` times.
    pub async fn open_if_exists(
        catalogue: &Store,
        generation: &Generation,
        max_attempts: u32,
    ) -> Result<Option<Self>, TableError> {
        match DeltaLog::open_table(catalogue, generation, TableKind::Statistics).await {
            Ok(log) => Ok(Some(Self { log, max_attempts })),
            Err(TableError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens the table and creates it if there is none.
    pub async fn open_or_create(
        catalogue: &Store,
        generation: &Generation,
        max_attempts: u32,
    ) -> Result<Self, TableError> {
        let log = DeltaLog::open_or_create(catalogue, generation, TableKind::Statistics).await?;
        Ok(Self { log, max_attempts })
    }

    /// Returns the files of the newest snapshot, by unit.
    pub async fn files_by_unit(&mut self) -> Result<HashMap<String, StatisticsFile>, TableError> {
        self.log.load_newest_snapshot().await?;
        files_by_unit(&self.log)
    }

    /// Reads the rows of a file. Returns none if the file was removed since.
    pub async fn read_file_or_empty(
        &self,
        path: &str,
    ) -> Result<Vec<BackfilledStatistics>, TableError> {
        read_file_or_empty(&self.log, path).await
    }

    /// Reads the rows of a file. Returns `None` if there is no such file.
    pub async fn read_file_if_exists(
        &self,
        path: &str,
    ) -> Result<Option<Vec<BackfilledStatistics>>, TableError> {
        read_file_if_exists(&self.log, path).await
    }

    /// Uploads the statistics of a unit as a file that no commit names yet. `backfilled` may be empty:
    /// the file then says that the unit is done. Retries transient errors until `cancel` is cancelled.
    pub async fn stage_file(
        &self,
        key: &StatisticsKey,
        data_file: &str,
        backfilled: &[BackfilledStatistics],
        cancel: &CancellationToken,
    ) -> Result<StagedStatisticsFile, TableError> {
        let failed =
            |e: deltalake_core::parquet::errors::ParquetError| self.log.wrap_error(e.into());
        let batch = statistics_to_batch(&self.log, backfilled)?;
        let unit_id = backfill_unit_id(key, data_file);
        let upload = || async {
            let mut file = DataFileWriter::new(batch.schema()).map_err(failed)?;
            file.write_batch(&batch).map_err(failed)?;
            file.upload_with_prefix(&self.log, &unit_id).await
        };
        let mut add = self.log.retry_upload(self.max_attempts, cancel, upload).await?;
        add.partition_values =
            HashMap::from([(PROMPT_SET_COLUMN.to_owned(), Some(key.to_string()))]);
        Ok(StagedStatisticsFile(add))
    }

    /// Commits staged files. Leaves out units that another process has committed since.
    pub async fn commit_staged(
        &mut self,
        staged: Vec<StagedStatisticsFile>,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        let adds = staged.into_iter().map(|unit| unit.0).collect();
        self.commit_with_retries(adds, Vec::new(), cancel).await
    }

    /// Removes files from the table.
    pub async fn remove_files(
        &mut self,
        files: Vec<StatisticsFile>,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        self.commit_with_retries(Vec::new(), files, cancel).await
    }

    /// Removes all files of a prompt set from the table. Returns how many there were.
    pub async fn remove_prompt_set(
        &mut self,
        key: &StatisticsKey,
        cancel: &CancellationToken,
    ) -> Result<usize, TableError> {
        let units = self.files_by_unit().await?;
        let files: Vec<StatisticsFile> =
            units.into_values().filter(|file| file.prompt_set_key == *key).collect();
        let count = files.len();
        self.remove_files(files, cancel).await?;
        Ok(count)
    }

    /// Commits in the same way as the `images` table: without the library's own retries, so that each
    /// attempt checks the very snapshot that it commits against. An attempt that landed without an
    /// answer shows in the snapshot of the next one. Retries conflicts and transient errors until
    /// `cancel` is cancelled.
    async fn commit_with_retries(
        &mut self,
        adds: Vec<Add>,
        removes: Vec<StatisticsFile>,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        let backoff = commit_backoff(self.max_attempts);
        let mut attempt = 0;
        loop {
            let error = match self.try_commit(&adds, &removes).await {
                Err(error) if error.disposition() == Disposition::Retry => error,
                result => return result,
            };
            if attempt + 1 >= self.max_attempts {
                return Err(self.log.attempts_exhausted_error(self.max_attempts, &error));
            }
            error.log_commit_retry(attempt, "statistics were not committed");
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
            attempt += 1;
        }
    }

    /// Makes one attempt to commit what the newest snapshot does not show yet.
    async fn try_commit(
        &mut self,
        adds: &[Add],
        removes: &[StatisticsFile],
    ) -> Result<(), TableError> {
        let committed = self.files_by_unit().await?;
        let paths: HashSet<&str> = committed.values().map(|file| file.path.as_str()).collect();
        let new = adds.iter().filter(|add| !committed.contains_key(&add.path[..UNIT_ID_DIGITS]));
        let present = removes.iter().filter(|file| paths.contains(file.path.as_str()));
        let actions: Vec<Action> = new
            .cloned()
            .map(Action::Add)
            .chain(present.map(|file| Action::Remove(file.remove_action.clone())))
            .collect();
        if actions.is_empty() {
            return Ok(());
        }
        let partition_by = Some(vec![PROMPT_SET_COLUMN.to_owned()]);
        let operation =
            DeltaOperation::Write { mode: SaveMode::Append, partition_by, predicate: None };
        self.log.write_commit(actions, Vec::new(), operation).await.map(|_| ())
    }
}

/// Returns the files of the loaded snapshot, by unit.
pub fn files_by_unit(log: &DeltaLog) -> Result<HashMap<String, StatisticsFile>, TableError> {
    let mut units = HashMap::new();
    for file in log.snapshot()?.log_data().iter() {
        let path = file.path().into_owned();
        let key = file.partition_values_map().remove(PROMPT_SET_COLUMN).flatten();
        let (Some(unit), Some(key)) = (path.get(..UNIT_ID_DIGITS), key) else { continue };
        let unit = unit.to_owned();
        let statistics_file = StatisticsFile {
            prompt_set_key: StatisticsKey::from_stored(&key),
            row_count: file.num_records().unwrap_or_default(),
            remove_action: file.remove_action(true),
            path,
        };
        units.insert(unit, statistics_file);
    }
    Ok(units)
}

/// Reads the rows of a file of the table. Returns none if the file was removed since.
pub async fn read_file_or_empty(
    log: &DeltaLog,
    path: &str,
) -> Result<Vec<BackfilledStatistics>, TableError> {
    Ok(read_file_if_exists(log, path).await?.unwrap_or_default())
}

async fn read_file_if_exists(
    log: &DeltaLog,
    path: &str,
) -> Result<Option<Vec<BackfilledStatistics>>, TableError> {
    let bytes = match file::read_and_verify_checksum(log, &Path::from(path)).await {
        Ok(bytes) => bytes,
        Err(FileReadError::NotFound) => return Ok(None),
        Err(error) => return Err(error.into_table_error(log, path)),
    };
    let corrupt =
        |reason: String| TableError::Corrupt { file: format!("{}/{path}", log.location), reason };
    let mut backfilled = Vec::new();
    for batch in file::read_batches(bytes).map_err(|e| corrupt(e.to_string()))? {
        let batch = batch.map_err(|e| corrupt(e.to_string()))?;
        backfilled.extend(statistics_from_batch(&batch).map_err(corrupt)?);
    }
    Ok(Some(backfilled))
}

fn statistics_to_batch(
    log: &DeltaLog,
    backfilled: &[BackfilledStatistics],
) -> Result<RecordBatch, TableError> {
    let corrupt = |reason: String| TableError::Corrupt { file: log.location.clone(), reason };
    // The partition column is in the log, not in the files.
    let fields = log.arrow_schema()?;
    let fields: Vec<_> = fields.fields().iter().filter(|f| f.name() != PROMPT_SET_COLUMN).collect();
    let schema = Arc::new(ArrowSchema::new(fields.into_iter().cloned().collect::<Vec<_>>()));
    let text = |value: fn(&BackfilledStatistics) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(backfilled.iter().map(value)))
    };
    let float = |value: fn(&ScoreStatistics) -> f32| -> ArrayRef {
        Arc::new(Float32Array::from_iter_values(backfilled.iter().map(|b| value(&b.statistics))))
    };
    let times = backfilled.iter().map(|b| b.embedded_at.timestamp_micros());
    let columns: BTreeMap<&str, ArrayRef> = BTreeMap::from([
        ("image_id", text(|b| &b.image_id)),
        ("sequence", text(|b| b.sequence.as_str())),
        (
            "embedded_at",
            Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC"))
                as ArrayRef,
        ),
        ("embedding_hash", text(|b| &b.embedding_hash)),
        (
            "n",
            Arc::new(Int32Array::from_iter_values(
                backfilled.iter().map(|b| b.statistics.n as i32),
            )),
        ),
        ("mean", float(|s| s.mean)),
        ("std", float(|s| s.std)),
        ("min", float(|s| s.min)),
        ("max", float(|s| s.max)),
        ("lse", float(|s| s.lse)),
        ("topk_mean", float(|s| s.topk_mean)),
    ]);
    let ordered = schema.fields().iter().map(|field| {
        columns.get(field.name().as_str()).cloned().ok_or_else(|| {
            corrupt(format!(
                "the table has a column {} that this version does not know; update bsap",
                field.name()
            ))
        })
    });
    let ordered = ordered.collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new(schema, ordered).map_err(|e| corrupt(e.to_string()))
}

fn statistics_from_batch(batch: &RecordBatch) -> Result<Vec<BackfilledStatistics>, String> {
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| format!("column {name} is missing"));
    let text = |name: &str| -> Result<&StringArray, String> {
        column(name)?.as_string_opt::<i32>().ok_or_else(|| format!("column {name} is not text"))
    };
    let float = |name: &str| -> Result<&Float32Array, String> {
        column(name)?
            .as_primitive_opt::<Float32Type>()
            .ok_or_else(|| format!("column {name} is not a 32-bit float"))
    };
    let (ids, sequences, hashes) = (text("image_id")?, text("sequence")?, text("embedding_hash")?);
    let times = column("embedded_at")?
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or("column embedded_at is not a timestamp in microseconds")?;
    let n =
        column("n")?.as_primitive_opt::<Int32Type>().ok_or("column n is not a 32-bit integer")?;
    let (mean, std, min) = (float("mean")?, float("std")?, float("min")?);
    let (max, lse, topk) = (float("max")?, float("lse")?, float("topk_mean")?);
    (0..batch.num_rows())
        .map(|i| {
            Ok(BackfilledStatistics {
                image_id: ids.value(i).to_owned(),
                sequence: SequenceKey::from_stored(sequences.value(i)),
                embedded_at: DateTime::from_timestamp_micros(times.value(i))
                    .ok_or("embedded_at is not a time")?,
                embedding_hash: hashes.value(i).to_owned(),
                statistics: ScoreStatistics {
                    n: n.value(i) as u32,
                    mean: mean.value(i),
                    std: std.value(i),
                    min: min.value(i),
                    max: max.value(i),
                    lse: lse.value(i),
                    topk_mean: topk.value(i),
                },
            })
        })
        .collect()
}
