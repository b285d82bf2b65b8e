//! Following the table: everything at first, then each commit as it comes.

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
use super::statistics::{self, BackfilledStatistics};
use crate::balance::statistics::StatisticsKey;
use crate::record::ImageRow;
use crate::retry::{Classify, Disposition};
use crate::store::Store;

/// Files read at one time by a fresh reader.
const MAX_CONCURRENT_FILES: usize = 8;
/// Bytes of files whose rows are handed out at one time while a whole table is read, but one file at least;
/// in memory rows take several times as much.
const MAX_PART_BYTES: u64 = 256 << 20;
/// A reader that sees no next commit for this long asks whether the log was cleaned up behind it.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// What came since the last look.
#[derive(Debug)]
pub struct TableChanges {
    /// Version of the table that these rows lead to.
    pub version: u64,
    /// Whether `rows` are the whole table instead of what is new.
    pub is_full_snapshot: bool,
    /// Which part of it.
    pub part: SnapshotPart,
    /// Rows in no particular order: versions decide.
    pub rows: Vec<ImageRow>,
    /// Statistics that were computed meanwhile for rows that were handed out before. Each counts
    /// only for exactly the version that it names.
    pub statistics: Vec<(StatisticsKey, Vec<BackfilledStatistics>)>,
}

/// A part of what came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotPart {
    /// All of it.
    All,
    /// Others follow at once, of other images.
    First,
    /// The same, after others.
    Middle,
    /// The last of several.
    Last,
}

impl SnapshotPart {
    /// Whether nothing of it is left.
    pub fn is_last(self) -> bool {
        matches!(self, Self::All | Self::Last)
    }

    /// Whether nothing of it came before.
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

/// Reads the tables of one generation, from the beginning on: images first, then statistics.
pub struct Follower {
    log: DeltaLog,
    /// The table of backfilled statistics, which may not be there yet.
    statistics_log: DeltaLog,
    /// Version of it up to which everything was handed out.
    statistics_version: Option<u64>,
    /// Version up to which everything was handed out.
    images_version: Option<u64>,
    last_commit_at: Instant,
    /// A whole table of which parts are to be handed out yet.
    pending_snapshot: Option<PendingSnapshot>,
    max_part_bytes: u64,
}

/// A whole table that is handed out in parts.
struct PendingSnapshot {
    version: u64,
    /// Files and which of their rows are the newest of their images; none: all that are there.
    parts: VecDeque<Vec<(Path, Option<Vec<bool>>)>>,
    /// Files of backfilled statistics, by key and unit.
    statistics_files: HashMap<StatisticsKey, HashMap<String, String>>,
    is_started: bool,
    files_read: usize,
    total_files: usize,
}

impl Follower {
    /// Opens the table of `generation`; `Missing` where no worker has made it yet.
    pub async fn open(catalogue: &Store, generation: &Generation) -> Result<Self, TableError> {
        Ok(Self {
            log: DeltaLog::open_images(catalogue, generation).await?,
            statistics_log: DeltaLog::handle(catalogue, generation, TableKind::Statistics),
            statistics_version: None,
            images_version: None,
            last_commit_at: Instant::now(),
            pending_snapshot: None,
            max_part_bytes: MAX_PART_BYTES,
        })
    }

    /// The changes since the last call: the whole table at first, then one commit a call, then
    /// `None` until there is another. `progress` hears of files read and files in all.
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
                    // What came before it is lost with `all`: the next call begins anew.
                    if self.pending_snapshot.take().is_some() {
                        self.images_version = None;
                    }
                    return Err(error);
                }
            };
            let ends = part.part.is_last();
            match &mut all {
                Some(all) if !part.part.is_first() => all.rows.extend(part.rows),
                _ => all = Some(TableChanges { part: SnapshotPart::All, ..part }),
            }
            if ends {
                break;
            }
        }
        Ok(all)
    }

    /// The same for who need not have a whole table in memory twice: it comes in parts.
    pub async fn next_part(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<TableChanges>, TableError> {
        if let Some(whole) = self.pending_snapshot.take() {
            return self.read_snapshot_part(whole, progress).await.map(Some);
        }
        let Some(seen) = self.images_version else {
            return self.start_snapshot(progress).await.map(Some);
        };
        let version = seen + 1;
        let Some(actions) = self.log.read_commit(version).await? else {
            if let Some(statistics) = self.next_statistics().await? {
                let rows = Vec::new();
                let (whole, part) = (false, SnapshotPart::All);
                let changes =
                    TableChanges { version: seen, is_full_snapshot: whole, part, rows, statistics };
                return Ok(Some(changes));
            }
            return self.resync_if_behind(seen, progress).await;
        };
        let mut rows = Vec::new();
        for action in actions {
            match action {
                Action::Add(add) if add.data_change => {
                    let path = data_file_path(&add)
                        .map_err(|e| self.corrupt_file_error(&add.path, e.to_string()))?;
                    match self.read_file(&path).await {
                        Ok(more) => rows.extend(more),
                        // Compacted into another file since, and removed: this reader is far behind.
                        Err(FileReadError::NotFound) => {
                            return self.start_snapshot(progress).await.map(Some);
                        }
                        Err(error) => return Err(error.into_table_error(&self.log, &add.path)),
                    }
                }
                _ => {}
            }
        }
        self.advance_to(version);
        let (whole, part) = (false, SnapshotPart::All);
        Ok(Some(TableChanges {
            version,
            is_full_snapshot: whole,
            part,
            rows,
            statistics: Vec::new(),
        }))
    }

    /// What the next commit of backfilled statistics brings; `None` where there is none. A file that
    /// was removed meanwhile brings nothing: its rows carry the statistics themselves.
    async fn next_statistics(
        &mut self,
    ) -> Result<Option<Vec<(StatisticsKey, Vec<BackfilledStatistics>)>>, TableError> {
        let version = self.statistics_version.map_or(0, |seen| seen + 1);
        let Some(actions) = self.statistics_log.read_commit(version).await? else {
            return Ok(None);
        };
        let mut found = Vec::new();
        for action in &actions {
            if let Action::Add(add) = action
                && add.data_change
            {
                found.extend(statistics::read_added_file(&self.statistics_log, add).await?);
            }
        }
        self.statistics_version = Some(version);
        Ok(Some(found))
    }

    /// Hands a whole table out in parts of so many bytes.
    #[cfg(test)]
    pub(super) fn with_max_part_bytes(mut self, bytes: u64) -> Self {
        self.max_part_bytes = bytes;
        self
    }

    /// Has the next look find out whether the log was cleaned up, as if a minute had passed.
    #[cfg(test)]
    pub(super) fn expire_resync_timeout(&mut self) {
        if let Some(earlier) = Instant::now().checked_sub(RESYNC_TIMEOUT) {
            self.last_commit_at = earlier;
        }
    }

    /// There is no next commit: either nothing is new, or the log was cleaned up past this reader.
    async fn resync_if_behind(
        &mut self,
        seen: u64,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<TableChanges>, TableError> {
        if self.last_commit_at.elapsed() < RESYNC_TIMEOUT {
            return Ok(None);
        }
        self.last_commit_at = Instant::now();
        self.log.update().await?;
        // A commit may have come between the two looks: then it can be read.
        let images = self.log.version() == seen || self.log.read_commit(seen + 1).await?.is_some();
        if images && !self.is_statistics_log_behind().await? {
            return Ok(None);
        }
        self.start_snapshot(progress).await.map(Some)
    }

    async fn start_snapshot(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<TableChanges, TableError> {
        let whole = self.plan_snapshot().await?;
        self.read_snapshot_part(whole, progress).await
    }

    /// Whether the log of the backfilled statistics was cleaned up past this reader.
    async fn is_statistics_log_behind(&mut self) -> Result<bool, TableError> {
        let seen = self.statistics_version;
        if !self.statistics_log.load_if_exists().await?
            || seen == Some(self.statistics_log.version())
        {
            return Ok(false);
        }
        let next = seen.map_or(0, |seen| seen + 1);
        Ok(self.statistics_log.read_commit(next).await?.is_none())
    }

    /// Begins to hand out the whole table. What is larger than a part is read twice: its keys at first,
    /// so that no image is in two parts and superseded rows need no memory.
    async fn plan_snapshot(&mut self) -> Result<PendingSnapshot, TableError> {
        self.log.update().await?;
        let version = self.log.version();
        let state = self.log.snapshot()?;
        let files: Vec<(Path, String, u64)> = state
            .log_data()
            .iter()
            .map(|f| (f.object_store_path(), f.path().into_owned(), f.size().unsigned_abs()))
            .collect();
        // After the images: a unit that compaction has folded into the rows since is not missed.
        let mut units: HashMap<StatisticsKey, HashMap<String, String>> = HashMap::new();
        self.statistics_version = None;
        if self.statistics_log.load_if_exists().await? {
            self.statistics_version = Some(self.statistics_log.version());
            for (unit, file) in statistics::files_by_unit(&self.statistics_log)? {
                units.entry(file.key).or_default().insert(unit, file.path);
            }
        }
        let large = files.iter().map(|(_, _, size)| size).sum::<u64>() > self.max_part_bytes;
        let masks = if large {
            let named = files.iter().map(|(_, path, size)| (path.clone(), *size)).collect();
            let keys = KeyIndex::read_files(&self.log, named).boxed().await?;
            keys.keep_newest_mask().masks.into_iter().map(Some).collect()
        } else {
            vec![None; files.len()]
        };
        let total = files.len();
        let mut parts = VecDeque::from([Vec::new()]);
        let mut bytes = 0;
        for ((path, _, size), mask) in files.into_iter().zip(masks) {
            if bytes > 0 && bytes + size > self.max_part_bytes {
                parts.push_back(Vec::new());
                bytes = 0;
            }
            bytes += size;
            if let Some(part) = parts.back_mut() {
                part.push((path, mask));
            }
        }
        Ok(PendingSnapshot {
            version,
            parts,
            statistics_files: units,
            is_started: false,
            files_read: 0,
            total_files: total,
        })
    }

    /// The next part of a whole table. Where it cannot be read, it is tried again at the next call; where
    /// a file is gone, the newest table is begun.
    async fn read_snapshot_part(
        &mut self,
        mut whole: PendingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<TableChanges, TableError> {
        let files = whole.parts.pop_front().unwrap_or_default();
        // Boxed, or the compiler does not see that it may be sent to another thread.
        match self.read_part_rows(&whole, &files, progress).boxed().await {
            Ok(rows) => {
                whole.files_read += files.len();
                let first = !std::mem::replace(&mut whole.is_started, true);
                let (version, last) = (whole.version, whole.parts.is_empty());
                if last {
                    self.advance_to(version);
                } else {
                    self.pending_snapshot = Some(whole);
                }
                let part = SnapshotPart::from_first_and_last(first, last);
                Ok(TableChanges {
                    version,
                    is_full_snapshot: true,
                    part,
                    rows,
                    statistics: Vec::new(),
                })
            }
            Err(error) => {
                if error.disposition() == Disposition::Retry {
                    whole.parts.push_front(files);
                    self.pending_snapshot = Some(whole);
                } else {
                    self.images_version = None;
                }
                Err(error)
            }
        }
    }

    async fn read_part_rows(
        &self,
        whole: &PendingSnapshot,
        files: &[(Path, Option<Vec<bool>>)],
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
                for (key, of) in &whole.statistics_files {
                    if let Some(file) = of.get(&statistics::backfill_unit_id(key, path.as_ref())) {
                        let found =
                            statistics::read_file_or_empty(&self.statistics_log, file).await?;
                        statistics::attach_statistics(
                            &mut rows,
                            key,
                            &statistics::index_by_version(found),
                        );
                    }
                }
                Ok::<_, TableError>(rows)
            })
            .buffer_unordered(MAX_CONCURRENT_FILES);
        let (mut rows, mut done) = (Vec::new(), whole.files_read);
        while let Some(more) = reads.try_next().await? {
            rows.extend(more);
            done += 1;
            progress(done, whole.total_files);
        }
        Ok(rows)
    }

    fn advance_to(&mut self, version: u64) {
        self.images_version = Some(version);
        self.last_commit_at = Instant::now();
    }

    /// All rows of one data file.
    async fn read_file(&self, path: &Path) -> Result<Vec<ImageRow>, FileReadError> {
        file::rows_from_parquet(file::read_and_verify_checksum(&self.log, path).await?)
    }

    fn corrupt_file_error(&self, file: &str, reason: String) -> TableError {
        TableError::Corrupt { file: format!("{}/{file}", self.log.location), reason }
    }
}
