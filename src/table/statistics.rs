//! Backfilled statistics: the `statistics` table beside `images`, partitioned by prompt set.
//!
//! New rows carry their statistics themselves. Here are those that were computed later, from stored
//! embeddings, for rows that were there before the prompt set was. A file of this table belongs to
//! one file of `images` and one prompt set, its unit: its name begins with the unit's identifier,
//! so that the snapshot alone says what is done, whoever did it, and a unit that two processes
//! computed at once stands once. Compaction folds a unit into the rows when it rewrites their file,
//! and removes it here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

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
use tracing::info;

use super::error::TableError;
use super::file::{self, DataFileWriter, FileReadError};
use super::generation::Generation;
use super::log::{DeltaLog, TableKind};
use super::schema::PROMPT_SET_COLUMN;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::{ImageRow, SequenceKey, to_hex};
use crate::retry::{Backoff, Classify, Disposition};
use crate::store::Store;
use crate::telemetry::event;

/// Digits of a unit's identifier.
const UNIT_ID_DIGITS: usize = 16;

/// Statistics of one version of one image, computed after its row was stored.
#[derive(Debug, Clone, PartialEq)]
pub struct BackfilledStatistics {
    /// Which image.
    pub image_id: String,
    /// Its version …
    pub sequence: SequenceKey,
    /// … and when that row was made: together they name one row.
    pub embedded_at: DateTime<Utc>,
    /// [`embedding_hash`] of the embedding that was measured.
    pub embedding_hash: String,
    /// The statistics.
    pub statistics: ScoreStatistics,
}

/// The first 16 hexadecimal digits of the SHA-256 of an embedding's values as f16, little-endian.
pub fn embedding_hash(values: &[f32]) -> String {
    let mut hasher = Sha256::new();
    let mut bytes = [0u8; 128];
    for piece in values.chunks(bytes.len() / 2) {
        for (two, value) in bytes.chunks_exact_mut(2).zip(piece) {
            two.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
        }
        hasher.update(&bytes[..piece.len() * 2]);
    }
    to_hex(&hasher.finalize()[..8])
}

/// The identifier of a unit: the file `images` of the `images` table, measured with the set `key`.
pub fn backfill_unit_id(key: &StatisticsKey, data_file: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(key.as_str().as_bytes());
    hasher.update([0]);
    hasher.update(data_file.as_bytes());
    to_hex(&hasher.finalize()[..UNIT_ID_DIGITS / 2])
}

/// Backfilled statistics by image, sequence and the time at which the row was made.
pub type BackfilledByVersion = HashMap<(String, SequenceKey, DateTime<Utc>), BackfilledStatistics>;

/// Backfilled statistics by the row that they name.
pub fn index_by_version(found: Vec<BackfilledStatistics>) -> BackfilledByVersion {
    let keyed =
        |b: BackfilledStatistics| ((b.image_id.clone(), b.sequence.clone(), b.embedded_at), b);
    found.into_iter().map(keyed).collect()
}

/// Gives rows the backfilled statistics of exactly their version and embedding. Returns how many.
pub fn attach_statistics(
    rows: &mut [ImageRow],
    key: &StatisticsKey,
    found: &BackfilledByVersion,
) -> usize {
    let mut attached = 0;
    for row in rows {
        let Some(image) = &mut row.image else { continue };
        let version = (row.image_id.to_string(), row.sequence.clone(), row.embedded_at);
        if let Some(found) = found.get(&version)
            && !image.statistics.contains_key(key)
            && found.embedding_hash == embedding_hash(image.embedding.values())
        {
            image.statistics.insert(key.clone(), found.statistics);
            attached += 1;
        }
    }
    attached
}

/// A file of the table.
#[derive(Debug, Clone)]
pub struct StatisticsFile {
    /// Its path.
    pub path: String,
    /// Its prompt set.
    pub key: StatisticsKey,
    /// Rows in it, where the log says so.
    pub rows: usize,
    remove_action: Remove,
}

/// The statistics of a unit, written to a file that no commit names yet.
#[derive(Debug, Clone)]
pub struct StagedStatisticsFile(Add);

/// The statistics table of one generation.
pub struct StatisticsTable {
    log: DeltaLog,
    max_attempts: u32,
}

impl StatisticsTable {
    /// Opens the table; `None` where nothing was ever backfilled. A commit is tried `attempts` times.
    pub async fn open(
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

    /// Opens the table, making it where it is missing.
    pub async fn open_or_create(
        catalogue: &Store,
        generation: &Generation,
        max_attempts: u32,
    ) -> Result<Self, TableError> {
        let log = DeltaLog::open_or_create(catalogue, generation, TableKind::Statistics).await?;
        Ok(Self { log, max_attempts })
    }

    /// The files of the newest snapshot, by unit.
    pub async fn files_by_unit(&mut self) -> Result<HashMap<String, StatisticsFile>, TableError> {
        self.log.update().await?;
        files_by_unit(&self.log)
    }

    /// The rows of a file; none where the file was removed meanwhile.
    pub async fn read_file_or_empty(
        &self,
        path: &str,
    ) -> Result<Vec<BackfilledStatistics>, TableError> {
        read_file_or_empty(&self.log, path).await
    }

    /// The same; `None` where the file is not there.
    pub async fn read_file_if_exists(
        &self,
        path: &str,
    ) -> Result<Option<Vec<BackfilledStatistics>>, TableError> {
        read_file_if_exists(&self.log, path).await
    }

    /// Writes the statistics of a unit to a file that no commit names yet. There may be none: the
    /// file then says that the unit is done.
    pub async fn stage_file(
        &self,
        key: &StatisticsKey,
        data_file: &str,
        found: &[BackfilledStatistics],
    ) -> Result<StagedStatisticsFile, TableError> {
        let failed =
            |e: deltalake_core::parquet::errors::ParquetError| self.log.wrap_error(e.into());
        let batch = statistics_to_batch(&self.log, found)?;
        let backoff = Backoff::with_max_attempts(self.max_attempts);
        let mut attempt = 0;
        loop {
            let mut file = DataFileWriter::new(batch.schema()).map_err(failed)?;
            file.write_batch(&batch).map_err(failed)?;
            match file.upload_with_prefix(&self.log, &backfill_unit_id(key, data_file)).await {
                Ok(mut add) => {
                    add.partition_values =
                        HashMap::from([(PROMPT_SET_COLUMN.to_owned(), Some(key.to_string()))]);
                    return Ok(StagedStatisticsFile(add));
                }
                Err(error)
                    if error.disposition() == Disposition::Retry
                        && attempt + 1 < self.max_attempts =>
                {
                    info!(event = event::RETRY, stage = "table", attempt, %error, "a file was not written; trying again");
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Commits staged files. Units that somebody else has committed meanwhile are left out.
    pub async fn commit_staged(
        &mut self,
        staged: Vec<StagedStatisticsFile>,
    ) -> Result<(), TableError> {
        self.commit_with_retries(staged.into_iter().map(|unit| unit.0).collect(), Vec::new()).await
    }

    /// Takes files out of the table.
    pub async fn remove_files(&mut self, files: Vec<StatisticsFile>) -> Result<(), TableError> {
        self.commit_with_retries(Vec::new(), files).await
    }

    /// Takes all files of a prompt set out of the table; returns how many.
    pub async fn remove_prompt_set(&mut self, key: &StatisticsKey) -> Result<usize, TableError> {
        let units = self.files_by_unit().await?;
        let files: Vec<StatisticsFile> =
            units.into_values().filter(|file| file.key == *key).collect();
        let count = files.len();
        self.remove_files(files).await?;
        Ok(count)
    }

    /// As the `images` table is committed: without the library's own retries, each attempt looking
    /// at the very snapshot that it commits against. An attempt that landed without an answer shows
    /// in the next one's snapshot.
    async fn commit_with_retries(
        &mut self,
        adds: Vec<Add>,
        removes: Vec<StatisticsFile>,
    ) -> Result<(), TableError> {
        let backoff = Backoff {
            cap: Duration::from_secs(2),
            ..Backoff::with_max_attempts(self.max_attempts)
        };
        let mut last = String::new();
        for attempt in 0..self.max_attempts {
            let result = async {
                let live = self.files_by_unit().await?;
                let paths: HashSet<&str> = live.values().map(|file| file.path.as_str()).collect();
                let new = adds.iter().filter(|add| !live.contains_key(&add.path[..UNIT_ID_DIGITS]));
                let gone = removes.iter().filter(|file| paths.contains(file.path.as_str()));
                let actions: Vec<Action> = new
                    .cloned()
                    .map(Action::Add)
                    .chain(gone.map(|file| Action::Remove(file.remove_action.clone())))
                    .collect();
                if actions.is_empty() { Ok(()) } else { self.commit_once(actions).await }
            };
            match result.await {
                Err(error) if error.disposition() == Disposition::Retry => {
                    last = error.to_string();
                    info!(event = event::COMMIT_CONFLICT, attempt, reason = %last, "statistics were not committed; looking again");
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                }
                other => return other,
            }
        }
        Err(TableError::AttemptsExhausted {
            location: self.log.location.clone(),
            attempts: self.max_attempts,
            last_error: last,
        })
    }

    async fn commit_once(&mut self, actions: Vec<Action>) -> Result<(), TableError> {
        let partition_by = Some(vec![PROMPT_SET_COLUMN.to_owned()]);
        let operation =
            DeltaOperation::Write { mode: SaveMode::Append, partition_by, predicate: None };
        self.log.write_commit(actions, Vec::new(), operation).await.map(|_| ())
    }
}

/// The files of the loaded snapshot, by unit.
pub fn files_by_unit(log: &DeltaLog) -> Result<HashMap<String, StatisticsFile>, TableError> {
    let mut units = HashMap::new();
    for file in log.snapshot()?.log_data().iter() {
        let path = file.path().into_owned();
        let key = file.partition_values_map().remove(PROMPT_SET_COLUMN).flatten();
        let (Some(unit), Some(key)) = (path.get(..UNIT_ID_DIGITS), key) else { continue };
        let unit = unit.to_owned();
        let found = StatisticsFile {
            key: StatisticsKey::from_stored(&key),
            rows: file.num_records().unwrap_or_default(),
            remove_action: file.remove_action(true),
            path,
        };
        units.insert(unit, found);
    }
    Ok(units)
}

/// The rows of a file of the table; none where it was removed meanwhile.
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
    let mut found = Vec::new();
    for batch in file::read_batches(bytes).map_err(|e| corrupt(e.to_string()))? {
        let batch = batch.map_err(|e| corrupt(e.to_string()))?;
        found.extend(statistics_from_batch(&batch).map_err(corrupt)?);
    }
    Ok(Some(found))
}

fn statistics_to_batch(
    log: &DeltaLog,
    found: &[BackfilledStatistics],
) -> Result<RecordBatch, TableError> {
    let corrupt = |reason: String| TableError::Corrupt { file: log.location.clone(), reason };
    // The partition column stands in the log, not in the files.
    let fields = log.arrow_schema()?;
    let fields: Vec<_> = fields.fields().iter().filter(|f| f.name() != PROMPT_SET_COLUMN).collect();
    let schema = Arc::new(ArrowSchema::new(fields.into_iter().cloned().collect::<Vec<_>>()));
    let text = |value: fn(&BackfilledStatistics) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(found.iter().map(value)))
    };
    let float = |value: fn(&ScoreStatistics) -> f32| -> ArrayRef {
        Arc::new(Float32Array::from_iter_values(found.iter().map(|b| value(&b.statistics))))
    };
    let times = found.iter().map(|b| b.embedded_at.timestamp_micros());
    let columns: BTreeMap<&str, ArrayRef> = BTreeMap::from([
        ("image_id", text(|b| &b.image_id)),
        ("sequence", text(|b| b.sequence.as_str())),
        (
            "embedded_at",
            Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC"))
                as ArrayRef,
        ),
        ("embedding_hash", text(|b| &b.embedding_hash)),
        ("n", Arc::new(Int32Array::from_iter_values(found.iter().map(|b| b.statistics.n as i32)))),
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
                    .ok_or("embedded_at is no time")?,
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
