//! Follows a table: reads the whole of it first, then each commit as it comes.
//!
//! An idle poll costs one request, for the log entry after the last one that was read. Statistics that
//! are backfilled later are not followed: a query worker computes what its rows lack from their
//! embeddings when it starts to serve a prompt set. Backfilled statistics only save that work when a
//! whole table is read.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use deltalake_core::kernel::Action;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::path::Path;

use super::error::TableError;
use super::file::{self, FileReadError};
use super::generation::Generation;
use super::key_index::KeyIndex;
use super::log::{DeltaLog, TableKind, data_file_path};
use super::statistics;
use crate::balance::statistics::StatisticsKey;
use crate::record::ImageRow;
use crate::retry::{Classify, Disposition};
use crate::store::Store;

/// Files that are read at the same time while a whole table is read.
const MAX_CONCURRENT_FILES: usize = 8;
/// Bytes of the files of one part of a whole table; a part has at least one file. In memory, rows take
/// several times as much.
const MAX_PART_BYTES: u64 = 256 << 20;
/// After this time without a commit, the follower checks whether the log was cleaned up past the entry
/// that it polls for.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// What [`Follower::next_part`] read.
#[derive(Debug)]
pub struct TableChanges {
    /// Version of the table after these rows.
    pub table_version: u64,
    /// Whether `rows` belong to a whole table and replace everything that was read before.
    pub is_full_snapshot: bool,
    /// Position of `rows` among the parts of a whole table; [`SnapshotPart::All`] for a commit.
    pub part: SnapshotPart,
    /// Rows in no particular order: their versions decide which row of an image is current.
    pub rows: Vec<ImageRow>,
}

/// Position of a part among those of a whole table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotPart {
    /// The only part.
    All,
    /// The first of several parts. No image is in two of them.
    First,
    /// Neither the first nor the last part.
    Middle,
    /// The last of several parts.
    Last,
}

impl SnapshotPart {
    /// Whether no part follows.
    pub fn is_last(self) -> bool {
        matches!(self, Self::All | Self::Last)
    }

    /// Whether no part came before.
    pub fn is_first(self) -> bool {
        matches!(self, Self::All | Self::First)
    }

    fn from_first_and_last(is_first: bool, is_last: bool) -> Self {
        match (is_first, is_last) {
            (true, true) => Self::All,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }
}

/// Reads the `images` table of one generation from its beginning.
pub struct Follower {
    log: DeltaLog,
    /// The table of backfilled statistics. It may not exist yet.
    statistics_log: DeltaLog,
    /// Version of the `images` table up to which everything was returned.
    images_table_version: Option<u64>,
    last_commit_or_resync_at: Instant,
    /// A whole table of which some parts were not returned yet.
    pending_snapshot: Option<PendingSnapshot>,
    max_part_bytes: u64,
}

/// A data file, with a mask of the rows to keep. `None` keeps all of them.
type MaskedFile = (Path, Option<Vec<bool>>);

/// A whole table that is returned in parts.
struct PendingSnapshot {
    table_version: u64,
    parts: VecDeque<Vec<MaskedFile>>,
    /// Paths of the files of backfilled statistics, by prompt set and unit.
    statistics_files: HashMap<StatisticsKey, HashMap<String, String>>,
    is_first_part_read: bool,
    read_file_count: usize,
    total_files: usize,
}

impl Follower {
    /// Opens the table of `generation`. Fails with [`TableError::NotFound`] if no worker has created it
    /// yet.
    pub async fn open(catalogue: &Store, generation: &Generation) -> Result<Self, TableError> {
        Ok(Self {
            log: DeltaLog::open_images(catalogue, generation).await?,
            statistics_log: DeltaLog::handle(catalogue, generation, TableKind::Statistics),
            images_table_version: None,
            last_commit_or_resync_at: Instant::now(),
            pending_snapshot: None,
            max_part_bytes: MAX_PART_BYTES,
        })
    }

    /// Opens the table of `generation` to read what changed after `version`. If the log no longer has all commits
    /// after it, the whole table is read first. Fails with [`TableError::Mismatch`] if the table has not come so
    /// far.
    pub async fn open_after(
        catalogue: &Store,
        generation: &Generation,
        version: u64,
    ) -> Result<Self, TableError> {
        let mut follower = Self::open(catalogue, generation).await?;
        let newest = follower.log.version();
        if version > newest {
            return Err(TableError::Mismatch {
                property: "version",
                stored: newest.to_string(),
                configured: version.to_string(),
                remedy: "Give a version that an earlier run has named",
            });
        }
        let has_next = version == newest || follower.log.read_commit(version + 1).await?.is_some();
        follower.images_table_version = has_next.then_some(version);
        Ok(follower)
    }

    /// Returns the changes since the last call: first the whole table, then one commit per call, then
    /// `None` until there is another. Calls `progress` with the files read so far and the files in all.
    pub async fn next(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<TableChanges>, TableError> {
        let mut all: Option<TableChanges> = None;
        loop {
            let part = match self.next_part(progress).await {
                Ok(Some(part)) => part,
                Ok(None) => break,
                Err(error) => {
                    // The parts before it are lost with `all`: the next call reads the table again.
                    if self.pending_snapshot.take().is_some() {
                        self.images_table_version = None;
                    }
                    return Err(error);
                }
            };
            let is_last = part.part.is_last();
            match &mut all {
                Some(all) if !part.part.is_first() => all.rows.extend(part.rows),
                _ => all = Some(TableChanges { part: SnapshotPart::All, ..part }),
            }
            if is_last {
                break;
            }
        }
        Ok(all)
    }

    /// Does the same as [`Self::next`], but returns a large table in parts, so that the caller need not
    /// hold it in memory twice.
    pub async fn next_part(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<TableChanges>, TableError> {
        if let Some(snapshot) = self.pending_snapshot.take() {
            return self.read_snapshot_part(snapshot, progress).await.map(Some);
        }
        let Some(seen) = self.images_table_version else {
            return self.start_snapshot(progress).await.map(Some);
        };
        let version = seen + 1;
        let Some(actions) = self.log.read_commit(version).await? else {
            return self.resync_if_behind(seen, progress).await;
        };
        let mut rows = Vec::new();
        for action in actions {
            let Action::Add(add) = action else { continue };
            if !add.data_change {
                continue;
            }
            let path = data_file_path(&add)
                .map_err(|e| self.corrupt_file_error(&add.path, e.to_string()))?;
            match self.read_file(&path).await {
                Ok(more) => rows.extend(more),
                // This follower is so far behind that the file was compacted and removed.
                Err(FileReadError::NotFound) => {
                    return self.start_snapshot(progress).await.map(Some);
                }
                Err(error) => return Err(error.into_table_error(&self.log, &add.path)),
            }
        }
        self.advance_to(version);
        Ok(Some(TableChanges {
            table_version: version,
            is_full_snapshot: false,
            part: SnapshotPart::All,
            rows,
        }))
    }

    /// Limits the files of one part of a whole table to `bytes`.
    #[cfg(test)]
    pub(super) fn with_max_part_bytes(mut self, bytes: u64) -> Self {
        self.max_part_bytes = bytes;
        self
    }

    /// Makes the next poll check whether the log was cleaned up, as if a minute had passed.
    #[cfg(test)]
    pub(super) fn expire_resync_timeout(&mut self) {
        if let Some(earlier) = Instant::now().checked_sub(RESYNC_TIMEOUT) {
            self.last_commit_or_resync_at = earlier;
        }
    }

    /// Handles a missing next log entry: either nothing was committed, or the log was cleaned up past
    /// the entry. Only then, and only once per [`RESYNC_TIMEOUT`], more is read than that entry.
    async fn resync_if_behind(
        &mut self,
        seen: u64,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<TableChanges>, TableError> {
        if self.last_commit_or_resync_at.elapsed() < RESYNC_TIMEOUT {
            return Ok(None);
        }
        self.last_commit_or_resync_at = Instant::now();
        self.log.load_newest_snapshot().await?;
        // A commit may have come since the poll: the next call reads it.
        if self.log.version() == seen || self.log.read_commit(seen + 1).await?.is_some() {
            return Ok(None);
        }
        self.start_snapshot(progress).await.map(Some)
    }

    async fn start_snapshot(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<TableChanges, TableError> {
        let snapshot = self.plan_snapshot().await?;
        self.read_snapshot_part(snapshot, progress).await
    }

    /// Splits the newest version of the table into parts. The keys of a table that is larger than one
    /// part are read first, so that no image is in two parts and superseded rows take no memory.
    async fn plan_snapshot(&mut self) -> Result<PendingSnapshot, TableError> {
        self.log.load_newest_snapshot().await?;
        let version = self.log.version();
        let state = self.log.snapshot()?;
        let files: Vec<(Path, String, u64)> = state
            .log_data()
            .iter()
            .map(|f| (f.object_store_path(), f.path().into_owned(), f.size().unsigned_abs()))
            .collect();
        // Listed after the images, so that a unit that compaction has moved into the rows since is in
        // one of the two.
        let mut units: HashMap<StatisticsKey, HashMap<String, String>> = HashMap::new();
        if self.statistics_log.load_if_exists().await? {
            for (unit, file) in statistics::files_by_unit(&self.statistics_log)? {
                units.entry(file.prompt_set_key).or_default().insert(unit, file.path);
            }
        }
        let is_large = files.iter().map(|(_, _, size)| size).sum::<u64>() > self.max_part_bytes;
        let masks = if is_large {
            let paths = files.iter().map(|(_, path, size)| (path.clone(), *size)).collect();
            let keys = KeyIndex::read_files(&self.log, paths).boxed().await?;
            keys.keep_newest_mask().masks.into_iter().map(Some).collect()
        } else {
            vec![None; files.len()]
        };
        let total_files = files.len();
        let mut parts = VecDeque::from([Vec::new()]);
        let mut part_bytes = 0;
        for ((path, _, size), mask) in files.into_iter().zip(masks) {
            if part_bytes > 0 && part_bytes + size > self.max_part_bytes {
                parts.push_back(Vec::new());
                part_bytes = 0;
            }
            part_bytes += size;
            if let Some(part) = parts.back_mut() {
                part.push((path, mask));
            }
        }
        Ok(PendingSnapshot {
            table_version: version,
            parts,
            statistics_files: units,
            is_first_part_read: false,
            read_file_count: 0,
            total_files,
        })
    }

    /// Reads the next part of a whole table. After an error that may pass, the next call reads the same
    /// part again; after any other, such as a file that is gone, it starts with the newest table.
    async fn read_snapshot_part(
        &mut self,
        mut snapshot: PendingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<TableChanges, TableError> {
        let files = snapshot.parts.pop_front().unwrap_or_default();
        // Boxed, or the compiler does not see that it may be sent to another thread.
        match self.read_part_rows(&snapshot, &files, progress).boxed().await {
            Ok(rows) => {
                snapshot.read_file_count += files.len();
                let is_first = !std::mem::replace(&mut snapshot.is_first_part_read, true);
                let (version, is_last) = (snapshot.table_version, snapshot.parts.is_empty());
                if is_last {
                    self.advance_to(version);
                } else {
                    self.pending_snapshot = Some(snapshot);
                }
                let part = SnapshotPart::from_first_and_last(is_first, is_last);
                Ok(TableChanges { table_version: version, is_full_snapshot: true, part, rows })
            }
            Err(error) => {
                if error.disposition() == Disposition::Retry {
                    snapshot.parts.push_front(files);
                    self.pending_snapshot = Some(snapshot);
                } else {
                    self.images_table_version = None;
                }
                Err(error)
            }
        }
    }

    async fn read_part_rows(
        &self,
        snapshot: &PendingSnapshot,
        files: &[MaskedFile],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Vec<ImageRow>, TableError> {
        let mut reads = stream::iter(0..files.len())
            .map(|file| async move {
                let (path, mask) = &files[file];
                let mut rows = self
                    .read_file(path)
                    .await
                    .map_err(|e| e.into_table_error(&self.log, path.as_ref()))?;
                if let Some(mask) = mask {
                    if mask.len() != rows.len() {
                        return Err(
                            self.corrupt_file_error(path.as_ref(), "has other rows now".into())
                        );
                    }
                    let mut kept = mask.iter();
                    rows.retain(|_| kept.next().is_some_and(|kept| *kept));
                }
                for (key, units) in &snapshot.statistics_files {
                    let unit = statistics::backfill_unit_id(key, path.as_ref());
                    if let Some(file) = units.get(&unit) {
                        let backfilled =
                            statistics::read_file_or_empty(&self.statistics_log, file).await?;
                        let by_version = statistics::index_by_version(backfilled);
                        statistics::attach_statistics(&mut rows, key, &by_version);
                    }
                }
                Ok::<_, TableError>(rows)
            })
            .buffer_unordered(MAX_CONCURRENT_FILES);
        let (mut rows, mut files_read) = (Vec::new(), snapshot.read_file_count);
        while let Some(more) = reads.try_next().await? {
            rows.extend(more);
            files_read += 1;
            progress(files_read, snapshot.total_files);
        }
        Ok(rows)
    }

    fn advance_to(&mut self, version: u64) {
        self.images_table_version = Some(version);
        self.last_commit_or_resync_at = Instant::now();
    }

    async fn read_file(&self, path: &Path) -> Result<Vec<ImageRow>, FileReadError> {
        file::rows_from_parquet(file::read_and_verify_checksum(&self.log, path).await?)
    }

    fn corrupt_file_error(&self, file: &str, reason: String) -> TableError {
        TableError::Corrupt { file: format!("{}/{file}", self.log.location), reason }
    }
}
