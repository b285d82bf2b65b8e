//! An index of data files by their keys: which image each row belongs to, and which row of each image
//! is the newest.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use deltalake_core::parquet::arrow::ProjectionMask;
use futures::{StreamExt, TryStreamExt, stream};

use super::error::TableError;
use super::log::DeltaLog;
use super::options::MaintenanceOptions;
use super::{file, schema};
use crate::record::RowVersion;

/// Files whose keys are read at the same time.
const MAX_CONCURRENT_FILES: usize = 8;

/// Which rows of some files are kept when the files are rewritten.
pub struct KeepMask {
    /// One mask per file, with one value per row.
    pub masks: Vec<Vec<bool>>,
    /// Rows that are dropped because a newer row of their image exists.
    pub superseded_row_count: usize,
    /// Tombstones that are dropped because their retention is over.
    pub dropped_tombstone_count: usize,
}

/// The image of each row, and the newest row of each image. Takes about 200 bytes per image and 4 bytes
/// per row.
pub struct KeyIndex {
    /// For each file, the index of each row's image in `newest_rows`.
    image_indices: Vec<Vec<u32>>,
    /// The newest row of each image.
    newest_rows: Vec<NewestRow>,
}

struct NewestRow {
    version: RowVersion,
    file_index: u32,
    row_index: u32,
    /// Number of rows of this image in all files.
    image_row_count: u32,
}

impl KeyIndex {
    /// Reads the keys of `files`, given by path and size in bytes.
    pub async fn read_files(log: &DeltaLog, files: Vec<(String, u64)>) -> Result<Self, TableError> {
        let mut index =
            Self { image_indices: Vec::with_capacity(files.len()), newest_rows: Vec::new() };
        let mut reads = stream::iter(files)
            .map(|(path, size)| read_file_keys(log, path, size))
            .buffered(MAX_CONCURRENT_FILES);
        let mut image_index_by_id: HashMap<String, u32> = HashMap::new();
        while let Some(keys) = reads.try_next().await? {
            let file = index.image_indices.len() as u32;
            let mut file_image_indices = Vec::with_capacity(keys.len());
            for (row, (id, version)) in keys.into_iter().enumerate() {
                let row = row as u32;
                let image = *image_index_by_id.entry(id).or_insert(index.newest_rows.len() as u32);
                match index.newest_rows.get_mut(image as usize) {
                    None => index.newest_rows.push(NewestRow {
                        version,
                        file_index: file,
                        row_index: row,
                        image_row_count: 1,
                    }),
                    Some(known) => {
                        known.image_row_count += 1;
                        if version > known.version {
                            (known.version, known.file_index, known.row_index) =
                                (version, file, row);
                        }
                    }
                }
                file_image_indices.push(image);
            }
            index.image_indices.push(file_image_indices);
        }
        Ok(index)
    }

    /// Returns the files, by index, that have too many rows to drop, or an embedding that must be erased.
    pub fn file_indices_to_rewrite(
        &self,
        options: &MaintenanceOptions,
        now: DateTime<Utc>,
    ) -> Vec<usize> {
        let must_be_rewritten = |file: &usize| {
            let images = &self.image_indices[*file];
            let (mut droppable_rows, mut has_erased_image) = (0, false);
            for (row, image) in images.iter().enumerate() {
                let newest = &self.newest_rows[*image as usize];
                if self.is_newest(*file, row) {
                    droppable_rows += usize::from(
                        newest.image_row_count == 1
                            && options.may_drop_tombstone(&newest.version, now),
                    );
                } else {
                    droppable_rows += 1;
                    has_erased_image |= options.is_erasure_due(&newest.version, now);
                }
            }
            let max_percent = options.max_superseded_percent as usize;
            has_erased_image
                || (droppable_rows > 0 && droppable_rows * 100 >= images.len() * max_percent)
        };
        (0..self.image_indices.len()).filter(must_be_rewritten).collect()
    }

    fn is_newest(&self, file: usize, row: usize) -> bool {
        let newest = &self.newest_rows[self.image_indices[file][row] as usize];
        (newest.file_index as usize, newest.row_index as usize) == (file, row)
    }

    /// Returns which rows of the files of `job` are kept, if this index covers the whole table.
    pub fn keep_mask(
        &self,
        job: &[usize],
        options: &MaintenanceOptions,
        now: DateTime<Utc>,
    ) -> KeepMask {
        let mut kept =
            KeepMask { masks: Vec::new(), superseded_row_count: 0, dropped_tombstone_count: 0 };
        for file in job {
            let mask = (0..self.image_indices[*file].len()).map(|row| {
                let newest = &self.newest_rows[self.image_indices[*file][row] as usize];
                if !self.is_newest(*file, row) {
                    kept.superseded_row_count += 1;
                    return false;
                }
                // As long as an older row exists anywhere, even in this job, the tombstone is kept:
                // superseded rows are dropped in one commit, the tombstone in a later one.
                let drop =
                    newest.image_row_count == 1 && options.may_drop_tombstone(&newest.version, now);
                kept.dropped_tombstone_count += usize::from(drop);
                !drop
            });
            let mask = mask.collect();
            kept.masks.push(mask);
        }
        kept
    }

    /// Returns which rows of all files are kept, if other files of the table are not in this index: the
    /// newest row of each image, even if it is a tombstone.
    pub fn keep_newest_mask(&self) -> KeepMask {
        let mask = |file: usize| -> Vec<bool> {
            (0..self.image_indices[file].len()).map(|row| self.is_newest(file, row)).collect()
        };
        let masks: Vec<Vec<bool>> = (0..self.image_indices.len()).map(mask).collect();
        let superseded = masks.iter().flatten().filter(|kept| !**kept).count();
        KeepMask { masks, superseded_row_count: superseded, dropped_tombstone_count: 0 }
    }
}

/// Reads the image id and version of every row of a file.
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
