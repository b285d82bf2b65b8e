//! What is known of the rows of files by their keys: which image each is of, and which is the newest.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use deltalake_core::parquet::arrow::ProjectionMask;
use futures::{StreamExt, TryStreamExt, stream};

use super::log::Log;
use super::maintenance::upkeep::Options;
use super::{TableError, file, schema};
use crate::record::Version;

/// Files whose keys are read at one time.
const CONCURRENT_FILES: usize = 8;

/// Which rows of a job's files stay.
pub struct Kept {
    /// A row each, a file each.
    pub masks: Vec<Vec<bool>>,
    pub superseded: usize,
    pub tombstones: usize,
}

/// Which image each row is of, and which row of each image is the newest. About 200 bytes an image
/// and 4 a row.
pub struct Keys {
    /// The image of each row, by file.
    rows: Vec<Vec<u32>>,
    /// What is known of each image.
    images: Vec<Newest>,
}

struct Newest {
    version: Version,
    file: u32,
    row: u32,
    /// Rows of this image in all files.
    rows: u32,
}

impl Keys {
    /// Of files by their path and size.
    pub async fn read(log: &Log, files: Vec<(String, u64)>) -> Result<Self, TableError> {
        let mut keys = Self { rows: Vec::with_capacity(files.len()), images: Vec::new() };
        let mut reads = stream::iter(files)
            .map(|(path, size)| file_keys(log, path, size))
            .buffered(CONCURRENT_FILES);
        let mut indices: HashMap<String, u32> = HashMap::new();
        while let Some(found) = reads.try_next().await? {
            let file = keys.rows.len() as u32;
            let mut of = Vec::with_capacity(found.len());
            for (row, (id, version)) in found.into_iter().enumerate() {
                let row = row as u32;
                let index = *indices.entry(id).or_insert(keys.images.len() as u32);
                match keys.images.get_mut(index as usize) {
                    None => keys.images.push(Newest { version, file, row, rows: 1 }),
                    Some(known) => {
                        known.rows += 1;
                        if version > known.version {
                            (known.version, known.file, known.row) = (version, file, row);
                        }
                    }
                }
                of.push(index);
            }
            keys.rows.push(of);
        }
        Ok(keys)
    }

    /// Files with too many rows that can go, or with an image that was erased long enough ago.
    pub fn stale(&self, options: &Options, now: DateTime<Utc>) -> Vec<usize> {
        let stale = |file: &usize| {
            let rows = &self.rows[*file];
            let (mut dead, mut erased) = (0, false);
            for (row, index) in rows.iter().enumerate() {
                let newest = &self.images[*index as usize];
                if self.is_newest(*file, row) {
                    dead += usize::from(newest.rows == 1 && options.may_drop(&newest.version, now));
                } else {
                    dead += 1;
                    erased |= options.is_erased(&newest.version, now);
                }
            }
            erased || (dead > 0 && dead * 100 >= rows.len() * options.superseded_percent as usize)
        };
        (0..self.rows.len()).filter(stale).collect()
    }

    fn is_newest(&self, file: usize, row: usize) -> bool {
        let newest = &self.images[self.rows[file][row] as usize];
        (newest.file as usize, newest.row as usize) == (file, row)
    }

    /// What stays of the files of `job` when every row of the table is known.
    pub fn kept(&self, job: &[usize], options: &Options, now: DateTime<Utc>) -> Kept {
        let mut kept = Kept { masks: Vec::new(), superseded: 0, tombstones: 0 };
        for file in job {
            let mask = (0..self.rows[*file].len()).map(|row| {
                let newest = &self.images[self.rows[*file][row] as usize];
                if !self.is_newest(*file, row) {
                    kept.superseded += 1;
                    return false;
                }
                // While an older row is anywhere, even in this job, the tombstone stays: what is
                // superseded leaves in one commit, the tombstone in a later one.
                let drop = newest.rows == 1 && options.may_drop(&newest.version, now);
                kept.tombstones += usize::from(drop);
                !drop
            });
            let mask = mask.collect();
            kept.masks.push(mask);
        }
        kept
    }

    /// What stays of all files when nothing else is known.
    pub fn kept_among_themselves(&self) -> Kept {
        let mask = |file: usize| -> Vec<bool> {
            (0..self.rows[file].len()).map(|row| self.is_newest(file, row)).collect()
        };
        let masks: Vec<Vec<bool>> = (0..self.rows.len()).map(mask).collect();
        let superseded = masks.iter().flatten().filter(|kept| !**kept).count();
        Kept { masks, superseded, tombstones: 0 }
    }
}

/// Image and version of every row of a file, without its embeddings.
async fn file_keys(
    log: &Log,
    path: String,
    size: u64,
) -> Result<Vec<(String, Version)>, TableError> {
    let corrupt =
        |reason: String| TableError::Corrupt { file: format!("{}/{path}", log.place), reason };
    let failed = |e: deltalake_core::parquet::errors::ParquetError| log.error(e.into());
    let builder = file::columns(log, &path, size).await.map_err(failed)?;
    let mask = ProjectionMask::columns(builder.parquet_schema(), schema::KEYS);
    let mut batches = builder.with_projection(mask).build().map_err(failed)?;
    let mut keys = Vec::new();
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        keys.extend(schema::keys(&batch).map_err(corrupt)?);
    }
    Ok(keys)
}
