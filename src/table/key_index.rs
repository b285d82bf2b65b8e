//! What is known of the rows of files by their keys: which image each is of, and which is the newest.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use deltalake_core::parquet::arrow::ProjectionMask;
use futures::{StreamExt, TryStreamExt, stream};

use super::error::TableError;
use super::log::DeltaLog;
use super::options::MaintenanceOptions;
use super::{file, schema};
use crate::record::RowVersion;

/// Files whose keys are read at one time.
const MAX_CONCURRENT_FILES: usize = 8;

/// Which rows of a job's files stay.
pub struct KeepMask {
    /// A row each, a file each.
    pub masks: Vec<Vec<bool>>,
    pub superseded_rows: usize,
    pub dropped_tombstones: usize,
}

/// Which image each row is of, and which row of each image is the newest. About 200 bytes an image
/// and 4 a row.
pub struct KeyIndex {
    /// The image of each row, by file.
    image_indices: Vec<Vec<u32>>,
    /// What is known of each image.
    newest_rows: Vec<NewestRow>,
}

struct NewestRow {
    version: RowVersion,
    file_index: u32,
    row_index: u32,
    /// Rows of this image in all files.
    row_count: u32,
}

impl KeyIndex {
    /// Of files by their path and size.
    pub async fn read_files(log: &DeltaLog, files: Vec<(String, u64)>) -> Result<Self, TableError> {
        let mut keys =
            Self { image_indices: Vec::with_capacity(files.len()), newest_rows: Vec::new() };
        let mut reads = stream::iter(files)
            .map(|(path, size)| read_file_keys(log, path, size))
            .buffered(MAX_CONCURRENT_FILES);
        let mut indices: HashMap<String, u32> = HashMap::new();
        while let Some(found) = reads.try_next().await? {
            let file = keys.image_indices.len() as u32;
            let mut file_image_indices = Vec::with_capacity(found.len());
            for (row, (id, version)) in found.into_iter().enumerate() {
                let row = row as u32;
                let index = *indices.entry(id).or_insert(keys.newest_rows.len() as u32);
                match keys.newest_rows.get_mut(index as usize) {
                    None => keys.newest_rows.push(NewestRow {
                        version,
                        file_index: file,
                        row_index: row,
                        row_count: 1,
                    }),
                    Some(known) => {
                        known.row_count += 1;
                        if version > known.version {
                            (known.version, known.file_index, known.row_index) =
                                (version, file, row);
                        }
                    }
                }
                file_image_indices.push(index);
            }
            keys.image_indices.push(file_image_indices);
        }
        Ok(keys)
    }

    /// Files with too many rows that can go, or with an image that was erased long enough ago.
    pub fn files_to_rewrite(&self, options: &MaintenanceOptions, now: DateTime<Utc>) -> Vec<usize> {
        let stale = |file: &usize| {
            let rows = &self.image_indices[*file];
            let (mut dead, mut erased) = (0, false);
            for (row, index) in rows.iter().enumerate() {
                let newest = &self.newest_rows[*index as usize];
                if self.is_newest(*file, row) {
                    dead += usize::from(
                        newest.row_count == 1 && options.may_drop_tombstone(&newest.version, now),
                    );
                } else {
                    dead += 1;
                    erased |= options.is_erasure_due(&newest.version, now);
                }
            }
            erased
                || (dead > 0 && dead * 100 >= rows.len() * options.max_superseded_percent as usize)
        };
        (0..self.image_indices.len()).filter(stale).collect()
    }

    fn is_newest(&self, file: usize, row: usize) -> bool {
        let newest = &self.newest_rows[self.image_indices[file][row] as usize];
        (newest.file_index as usize, newest.row_index as usize) == (file, row)
    }

    /// What stays of the files of `job` when every row of the table is known.
    pub fn keep_mask(
        &self,
        job: &[usize],
        options: &MaintenanceOptions,
        now: DateTime<Utc>,
    ) -> KeepMask {
        let mut kept = KeepMask { masks: Vec::new(), superseded_rows: 0, dropped_tombstones: 0 };
        for file in job {
            let mask = (0..self.image_indices[*file].len()).map(|row| {
                let newest = &self.newest_rows[self.image_indices[*file][row] as usize];
                if !self.is_newest(*file, row) {
                    kept.superseded_rows += 1;
                    return false;
                }
                // While an older row is anywhere, even in this job, the tombstone stays: what is
                // superseded leaves in one commit, the tombstone in a later one.
                let drop =
                    newest.row_count == 1 && options.may_drop_tombstone(&newest.version, now);
                kept.dropped_tombstones += usize::from(drop);
                !drop
            });
            let mask = mask.collect();
            kept.masks.push(mask);
        }
        kept
    }

    /// What stays of all files when nothing else is known.
    pub fn keep_newest_mask(&self) -> KeepMask {
        let mask = |file: usize| -> Vec<bool> {
            (0..self.image_indices[file].len()).map(|row| self.is_newest(file, row)).collect()
        };
        let masks: Vec<Vec<bool>> = (0..self.image_indices.len()).map(mask).collect();
        let superseded = masks.iter().flatten().filter(|kept| !**kept).count();
        KeepMask { masks, superseded_rows: superseded, dropped_tombstones: 0 }
    }
}

/// Image and version of every row of a file, without its embeddings.
async fn read_file_keys(
    log: &DeltaLog,
    path: String,
    size: u64,
) -> Result<Vec<(String, RowVersion)>, TableError> {
    let corrupt =
        |reason: String| TableError::Corrupt { file: format!("{}/{path}", log.location), reason };
    let failed = |e: deltalake_core::parquet::errors::ParquetError| log.wrap_error(e.into());
    let builder = file::open_column_reader(log, &path, size).await.map_err(failed)?;
    let mask = ProjectionMask::columns(builder.parquet_schema(), schema::KEY_COLUMNS);
    let mut batches = builder.with_projection(mask).build().map_err(failed)?;
    let mut keys = Vec::new();
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        keys.extend(schema::keys_from_batch(&batch).map_err(corrupt)?);
    }
    Ok(keys)
}
