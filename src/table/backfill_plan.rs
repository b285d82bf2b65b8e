//! Which stored rows still lack the statistics of a prompt set, and reading what is needed to compute
//! them.

use std::collections::HashMap;

use deltalake_core::arrow::array::{Array, AsArray};
use deltalake_core::arrow::datatypes::Float32Type;
use deltalake_core::parquet::arrow::ProjectionMask;
use deltalake_core::parquet::errors::ParquetError;
use futures::TryStreamExt;
use object_store::path::Path;
use serde::Serialize;

use super::error::TableError;
use super::generation::Generation;
use super::log::DeltaLog;
use super::statistics::{self, BackfilledStatistics, StatisticsFile, StatisticsTable};
use super::{file, schema};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::RowVersion;
use crate::store::Store;

/// Columns that are needed to measure a row; all others are not read.
const MEASUREMENT_COLUMNS: [&str; 6] =
    ["image_id", "sequence", "deleted", "embedded_at", "embedding", "statistics"];

/// How much of a table has the statistics of a prompt set, as far as the logs say: a file counts either
/// as a whole or not at all. Superseded rows and tombstones count too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StatisticsCoverage {
    /// Key of the prompt set.
    pub prompt_set: StatisticsKey,
    /// Number of rows of the table.
    pub rows: usize,
    /// Number of rows in files in which every row has the statistics, its own or backfilled ones.
    pub covered: usize,
    /// Number of files that are not measured yet.
    pub pending_files: usize,
}

impl StatisticsCoverage {
    /// Whether every file is measured.
    pub fn is_complete(&self) -> bool {
        self.pending_files == 0
    }
}

/// A data file that lacks the statistics of a prompt set.
#[derive(Debug, Clone)]
pub struct PendingBackfillFile {
    /// Path in the `images` table.
    pub path: Path,
    /// Size in bytes.
    pub byte_size: u64,
    /// Number of rows; 0 if the Delta log does not say.
    pub row_count: usize,
}

/// The statistics of the live images of a generation.
#[derive(Debug, Clone, Default)]
pub struct LiveStatistics {
    /// Number of images that are not deleted.
    pub live_image_count: usize,
    /// The stored statistics of the images that have them, in no particular order.
    pub statistics: Vec<ScoreStatistics>,
}

/// The stored rows of one generation that a backfill reads.
pub struct BackfillSource {
    log: DeltaLog,
    statistics_table: Option<StatisticsTable>,
    catalogue: Store,
    generation: Generation,
}

impl BackfillSource {
    /// Opens both tables of `generation`. Fails with [`TableError::NotFound`] if there is no `images`
    /// table.
    pub async fn open(catalogue: &Store, generation: &Generation) -> Result<Self, TableError> {
        Ok(Self {
            log: DeltaLog::open_images(catalogue, generation).await?,
            statistics_table: StatisticsTable::open_if_exists(catalogue, generation, 1).await?,
            catalogue: catalogue.clone(),
            generation: generation.clone(),
        })
    }

    /// Returns the files that lack the statistics of the prompt set `key`, the largest first, and how much
    /// of the table that is.
    pub async fn list_pending_files_and_coverage(
        &mut self,
        key: &StatisticsKey,
    ) -> Result<(Vec<PendingBackfillFile>, StatisticsCoverage), TableError> {
        self.log.load_newest_snapshot().await?;
        let units = self.statistics_files().await?;
        let mut coverage =
            StatisticsCoverage { prompt_set: key.clone(), rows: 0, covered: 0, pending_files: 0 };
        let mut pending = Vec::new();
        for file in self.log.snapshot()?.log_data().iter() {
            let rows = file.num_records().unwrap_or_default();
            coverage.rows += rows;
            let path = file.object_store_path();
            #[expect(deprecated, reason = "there is no other way to a file's tags")]
            let has_statistics = file::has_statistics(&file.add_action(), key.as_str());
            if has_statistics
                || units.contains_key(&statistics::backfill_unit_id(key, path.as_ref()))
            {
                coverage.covered += rows;
            } else {
                pending.push(PendingBackfillFile {
                    path,
                    byte_size: file.size().unsigned_abs(),
                    row_count: rows,
                });
            }
        }
        coverage.pending_files = pending.len();
        pending.sort_by_key(|file| std::cmp::Reverse(file.byte_size));
        Ok((pending, coverage))
    }

    async fn statistics_files(&mut self) -> Result<HashMap<String, StatisticsFile>, TableError> {
        if self.statistics_table.is_none() {
            self.statistics_table =
                StatisticsTable::open_if_exists(&self.catalogue, &self.generation, 1).await?;
        }
        match &mut self.statistics_table {
            None => Ok(HashMap::new()),
            Some(statistics) => statistics.files_by_unit().await,
        }
    }

    /// Computes the statistics of every image in a file that lacks those of the prompt set `key`, by
    /// `measure`. Returns `None` if the file was rewritten since. Computes for long: call it on a thread
    /// that may block.
    pub async fn compute_file_statistics(
        &self,
        file: &PendingBackfillFile,
        key: &StatisticsKey,
        measure: &(dyn Fn(&[f32]) -> Option<ScoreStatistics> + Sync),
    ) -> Result<Option<Vec<BackfilledStatistics>>, TableError> {
        let corrupt = |reason: String| TableError::Corrupt {
            file: format!("{}/{}", self.log.location, file.path),
            reason,
        };
        let failed = |e: ParquetError| self.log.wrap_error(e.into());
        let builder =
            match file::open_column_reader(&self.log, file.path.as_ref(), file.byte_size).await {
                Ok(builder) => builder,
                Err(error) if is_not_found(&error) => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
        let mask = ProjectionMask::columns(builder.parquet_schema(), MEASUREMENT_COLUMNS);
        let mut batches = builder.with_projection(mask).build().map_err(failed)?;
        let mut measured = Vec::new();
        loop {
            let batch = match batches.try_next().await {
                Ok(Some(batch)) => batch,
                Ok(None) => return Ok(Some(measured)),
                Err(error) if is_not_found(&error) => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            let versions = schema::keys_from_batch(&batch).map_err(corrupt)?;
            let embeddings = batch
                .column_by_name("embedding")
                .and_then(|c| c.as_list_opt::<i32>())
                .ok_or_else(|| corrupt("column embedding is not a list".into()))?;
            let values = embeddings
                .values()
                .as_primitive_opt::<Float32Type>()
                .ok_or_else(|| corrupt("column embedding is not a list of 32-bit floats".into()))?
                .values();
            let offsets = embeddings.value_offsets();
            let has_statistics =
                schema::has_statistics_by_row(&batch, key.as_str()).map_err(corrupt)?;
            for (i, (image_id, version)) in versions.into_iter().enumerate() {
                if version.deleted || has_statistics[i] {
                    continue;
                }
                let embedding = &values[offsets[i] as usize..offsets[i + 1] as usize];
                if embedding.len() != self.generation.dimension || embeddings.is_null(i) {
                    return Err(corrupt(format!(
                        "an embedding has {} values, the generation has {}",
                        embedding.len(),
                        self.generation.dimension
                    )));
                }
                if let Some(statistics) = measure(embedding) {
                    measured.push(BackfilledStatistics {
                        image_id,
                        sequence: version.sequence,
                        embedded_at: version.embedded_at,
                        embedding_hash: statistics::embedding_hash(embedding),
                        statistics,
                    });
                }
            }
        }
    }

    /// Reads the stored statistics of every live image for the prompt set `key`. Takes about 250 bytes of
    /// memory per image.
    pub async fn read_live_statistics(
        &mut self,
        key: &StatisticsKey,
    ) -> Result<LiveStatistics, TableError> {
        self.log.load_newest_snapshot().await?;
        let units = self.statistics_files().await?;
        let files: Vec<PendingBackfillFile> = self
            .log
            .snapshot()?
            .log_data()
            .iter()
            .map(|file| PendingBackfillFile {
                path: file.object_store_path(),
                byte_size: file.size().unsigned_abs(),
                row_count: file.num_records().unwrap_or_default(),
            })
            .collect();
        let mut newest: HashMap<String, (RowVersion, Option<ScoreStatistics>)> = HashMap::new();
        for file in files {
            let mut backfilled = statistics::BackfilledByVersion::new();
            if let (Some(table), Some(unit)) = (
                &self.statistics_table,
                units.get(&statistics::backfill_unit_id(key, file.path.as_ref())),
            ) {
                backfilled =
                    statistics::index_by_version(table.read_file_or_empty(&unit.path).await?);
            }
            let corrupt = |reason: String| TableError::Corrupt {
                file: format!("{}/{}", self.log.location, file.path),
                reason,
            };
            let failed = |e: ParquetError| self.log.wrap_error(e.into());
            let builder = file::open_column_reader(&self.log, file.path.as_ref(), file.byte_size);
            let builder = builder.await.map_err(failed)?;
            let columns = schema::KEY_COLUMNS.into_iter().chain(["statistics"]);
            let mask = ProjectionMask::columns(builder.parquet_schema(), columns);
            let mut batches = builder.with_projection(mask).build().map_err(failed)?;
            while let Some(batch) = batches.try_next().await.map_err(failed)? {
                let own_statistics = schema::statistics_by_row(&batch, key).map_err(corrupt)?;
                let versions = schema::keys_from_batch(&batch).map_err(corrupt)?;
                for ((id, version), own) in versions.into_iter().zip(own_statistics) {
                    if newest.get(&id).is_some_and(|(known, _)| *known >= version) {
                        continue;
                    }
                    let row = (id, version.sequence.clone(), version.embedded_at);
                    let statistics = own.or_else(|| backfilled.get(&row).map(|b| b.statistics));
                    newest.insert(row.0, (version, statistics));
                }
            }
        }
        let live = newest.into_values().filter(|(version, _)| !version.deleted);
        let mut result = LiveStatistics::default();
        for (_, statistics) in live {
            result.live_image_count += 1;
            result.statistics.extend(statistics);
        }
        Ok(result)
    }
}

/// Whether the store has no such file.
fn is_not_found(error: &ParquetError) -> bool {
    let ParquetError::External(source) = error else { return false };
    matches!(source.downcast_ref(), Some(object_store::Error::NotFound { .. }))
}
