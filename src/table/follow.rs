//! Following the table: everything at first, then each commit as it comes.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use deltalake_core::kernel::Action;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::path::Path;

use super::file::{self, Unread};
use super::keys::Keys;
use super::log::{Kind, Log, object_path};
use super::statistics::{self, Backfilled};
use super::{TableError, schema};
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::Generation;
use crate::record::Row;
use crate::retry::{Decide, Verdict};
use crate::store::Store;

/// Files read at one time by a fresh reader.
const CONCURRENT_FILES: usize = 8;
/// Bytes of files whose rows are handed out at one time while a whole table is read, but one file at least;
/// in memory rows take several times as much.
const PART_BYTES: u64 = 256 << 20;
/// A reader that sees no next commit for this long asks whether the log was cleaned up behind it.
const RESYNC_AFTER: Duration = Duration::from_secs(60);

/// What came since the last look.
#[derive(Debug)]
pub struct Changes {
    /// Version of the table that these rows lead to.
    pub version: u64,
    /// Whether `rows` are the whole table instead of what is new.
    pub whole: bool,
    /// Which part of it.
    pub part: Part,
    /// Rows in no particular order: versions decide.
    pub rows: Vec<Row>,
    /// Statistics that were computed meanwhile for rows that were handed out before. Each counts
    /// only for exactly the version that it names.
    pub statistics: Vec<(StatisticsKey, Vec<Backfilled>)>,
}

/// A part of what came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    All,
    /// Others follow at once, of other images.
    First,
    /// The same, after others.
    Middle,
    /// The last of several.
    Last,
}

impl Part {
    /// Whether nothing of it is left.
    pub fn ends(self) -> bool {
        matches!(self, Self::All | Self::Last)
    }

    /// Whether nothing of it came before.
    pub fn begins(self) -> bool {
        matches!(self, Self::All | Self::First)
    }

    fn of(begins: bool, ends: bool) -> Self {
        match (begins, ends) {
            (true, true) => Self::All,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }
}

/// Reads the tables of one generation, from the beginning on: images first, then statistics.
pub struct Follower {
    log: Log,
    /// The table of backfilled statistics, which may not be there yet.
    backfill: Log,
    /// Version of it up to which everything was handed out.
    backfilled: Option<u64>,
    /// Version up to which everything was handed out.
    seen: Option<u64>,
    last_commit: Instant,
    /// A whole table of which parts are to be handed out yet.
    reading: Option<Whole>,
    part_bytes: u64,
}

/// A whole table that is handed out in parts.
struct Whole {
    version: u64,
    /// Files and which of their rows are the newest of their images; none: all that are there.
    parts: VecDeque<Vec<(Path, Option<Vec<bool>>)>>,
    /// Files of backfilled statistics, by key and unit.
    units: HashMap<StatisticsKey, HashMap<String, String>>,
    begun: bool,
    done: usize,
    total: usize,
}

impl Follower {
    /// Opens the table of `generation`; `Missing` where no worker has made it yet.
    pub async fn open(catalogue: &Store, generation: &Generation) -> Result<Self, TableError> {
        Ok(Self {
            log: Log::open(catalogue, generation).await?,
            backfill: Log::unloaded(catalogue, generation, Kind::Statistics),
            backfilled: None,
            seen: None,
            last_commit: Instant::now(),
            reading: None,
            part_bytes: PART_BYTES,
        })
    }

    /// The changes since the last call: the whole table at first, then one commit a call, then
    /// `None` until there is another. `progress` hears of files read and files in all.
    pub async fn next(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<Changes>, TableError> {
        let mut all: Option<Changes> = None;
        loop {
            let part = match self.next_part(progress).await {
                Ok(Some(part)) => part,
                Ok(None) => break,
                Err(error) => {
                    // What came before it is lost with `all`: the next call begins anew.
                    if self.reading.take().is_some() {
                        self.seen = None;
                    }
                    return Err(error);
                }
            };
            let ends = part.part.ends();
            match &mut all {
                Some(all) if !part.part.begins() => all.rows.extend(part.rows),
                _ => all = Some(Changes { part: Part::All, ..part }),
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
    ) -> Result<Option<Changes>, TableError> {
        if let Some(whole) = self.reading.take() {
            return self.part(whole, progress).await.map(Some);
        }
        let Some(seen) = self.seen else {
            return self.begin(progress).await.map(Some);
        };
        let version = seen + 1;
        let Some(actions) = self.log.commit(version).await? else {
            if let Some(statistics) = self.next_statistics().await? {
                let rows = Vec::new();
                let (whole, part) = (false, Part::All);
                let changes = Changes { version: seen, whole, part, rows, statistics };
                return Ok(Some(changes));
            }
            return self.behind(seen, progress).await;
        };
        let mut rows = Vec::new();
        for action in actions {
            match action {
                Action::Add(add) if add.data_change => {
                    let path =
                        object_path(&add).map_err(|e| self.corrupt(&add.path, e.to_string()))?;
                    match self.read(&path).await {
                        Ok(more) => rows.extend(more),
                        // Compacted into another file since, and removed: this reader is far behind.
                        Err(Unread::Missing) => return self.begin(progress).await.map(Some),
                        Err(error) => return Err(error.of(&self.log, &add.path)),
                    }
                }
                _ => {}
            }
        }
        self.advance(version);
        let (whole, part) = (false, Part::All);
        Ok(Some(Changes { version, whole, part, rows, statistics: Vec::new() }))
    }

    /// What the next commit of backfilled statistics brings; `None` where there is none. A file that
    /// was removed meanwhile brings nothing: its rows carry the statistics themselves.
    async fn next_statistics(
        &mut self,
    ) -> Result<Option<Vec<(StatisticsKey, Vec<Backfilled>)>>, TableError> {
        let version = self.backfilled.map_or(0, |seen| seen + 1);
        let Some(actions) = self.backfill.commit(version).await? else { return Ok(None) };
        let mut found = Vec::new();
        for action in &actions {
            if let Action::Add(add) = action
                && add.data_change
            {
                found.extend(statistics::added(&self.backfill, add).await?);
            }
        }
        self.backfilled = Some(version);
        Ok(Some(found))
    }

    /// Hands a whole table out in parts of so many bytes.
    #[cfg(test)]
    pub(super) fn in_parts_of(mut self, bytes: u64) -> Self {
        self.part_bytes = bytes;
        self
    }

    /// Has the next look find out whether the log was cleaned up, as if a minute had passed.
    #[cfg(test)]
    pub(super) fn wait_a_minute(&mut self) {
        if let Some(earlier) = Instant::now().checked_sub(RESYNC_AFTER) {
            self.last_commit = earlier;
        }
    }

    /// There is no next commit: either nothing is new, or the log was cleaned up past this reader.
    async fn behind(
        &mut self,
        seen: u64,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<Changes>, TableError> {
        if self.last_commit.elapsed() < RESYNC_AFTER {
            return Ok(None);
        }
        self.last_commit = Instant::now();
        self.log.update().await?;
        // A commit may have come between the two looks: then it can be read.
        let images = self.log.version() == seen || self.log.commit(seen + 1).await?.is_some();
        if images && !self.statistics_behind().await? {
            return Ok(None);
        }
        self.begin(progress).await.map(Some)
    }

    async fn begin(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Changes, TableError> {
        let whole = self.whole().await?;
        self.part(whole, progress).await
    }

    /// Whether the log of the backfilled statistics was cleaned up past this reader.
    async fn statistics_behind(&mut self) -> Result<bool, TableError> {
        let seen = self.backfilled;
        if !self.backfill.reload().await? || seen == Some(self.backfill.version()) {
            return Ok(false);
        }
        let next = seen.map_or(0, |seen| seen + 1);
        Ok(self.backfill.commit(next).await?.is_none())
    }

    /// Begins to hand out the whole table. What is larger than a part is read twice: its keys at first,
    /// so that no image is in two parts and superseded rows need no memory.
    async fn whole(&mut self) -> Result<Whole, TableError> {
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
        self.backfilled = None;
        if self.backfill.reload().await? {
            self.backfilled = Some(self.backfill.version());
            for (unit, file) in statistics::units(&self.backfill)? {
                units.entry(file.key).or_default().insert(unit, file.path);
            }
        }
        let large = files.iter().map(|(_, _, size)| size).sum::<u64>() > self.part_bytes;
        let masks = if large {
            let named = files.iter().map(|(_, path, size)| (path.clone(), *size)).collect();
            let keys = Keys::read(&self.log, named).boxed().await?;
            keys.kept_among_themselves().masks.into_iter().map(Some).collect()
        } else {
            vec![None; files.len()]
        };
        let total = files.len();
        let mut parts = VecDeque::from([Vec::new()]);
        let mut bytes = 0;
        for ((path, _, size), mask) in files.into_iter().zip(masks) {
            if bytes > 0 && bytes + size > self.part_bytes {
                parts.push_back(Vec::new());
                bytes = 0;
            }
            bytes += size;
            if let Some(part) = parts.back_mut() {
                part.push((path, mask));
            }
        }
        Ok(Whole { version, parts, units, begun: false, done: 0, total })
    }

    /// The next part of a whole table. Where it cannot be read, it is tried again at the next call; where
    /// a file is gone, the newest table is begun.
    async fn part(
        &mut self,
        mut whole: Whole,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Changes, TableError> {
        let files = whole.parts.pop_front().unwrap_or_default();
        // Boxed, or the compiler does not see that it may be sent to another thread.
        match self.rows_of(&whole, &files, progress).boxed().await {
            Ok(rows) => {
                whole.done += files.len();
                let first = !std::mem::replace(&mut whole.begun, true);
                let (version, last) = (whole.version, whole.parts.is_empty());
                if last {
                    self.advance(version);
                } else {
                    self.reading = Some(whole);
                }
                let part = Part::of(first, last);
                Ok(Changes { version, whole: true, part, rows, statistics: Vec::new() })
            }
            Err(error) => {
                if error.verdict() == Verdict::Retry {
                    whole.parts.push_front(files);
                    self.reading = Some(whole);
                } else {
                    self.seen = None;
                }
                Err(error)
            }
        }
    }

    async fn rows_of(
        &self,
        whole: &Whole,
        files: &[(Path, Option<Vec<bool>>)],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Vec<Row>, TableError> {
        let mut reads = stream::iter(0..files.len())
            .map(|file| async move {
                let (path, mask) = &files[file];
                let mut rows = self.read(path).await.map_err(|e| e.of(&self.log, path.as_ref()))?;
                if let Some(mask) = mask {
                    if mask.len() != rows.len() {
                        return Err(self.corrupt(path.as_ref(), "has other rows now".into()));
                    }
                    let mut kept = mask.iter();
                    rows.retain(|_| kept.next().is_some_and(|kept| *kept));
                }
                for (key, of) in &whole.units {
                    if let Some(file) = of.get(&statistics::unit(key, path.as_ref())) {
                        let found = statistics::read(&self.backfill, file).await?;
                        statistics::attach(&mut rows, key, &statistics::by_version(found));
                    }
                }
                Ok::<_, TableError>(rows)
            })
            .buffer_unordered(CONCURRENT_FILES);
        let (mut rows, mut done) = (Vec::new(), whole.done);
        while let Some(more) = reads.try_next().await? {
            rows.extend(more);
            done += 1;
            progress(done, whole.total);
        }
        Ok(rows)
    }

    fn advance(&mut self, version: u64) {
        self.seen = Some(version);
        self.last_commit = Instant::now();
    }

    /// All rows of one data file.
    async fn read(&self, path: &Path) -> Result<Vec<Row>, Unread> {
        schema::rows(file::get(&self.log, path).await?)
    }

    fn corrupt(&self, file: &str, reason: String) -> TableError {
        TableError::Corrupt { file: format!("{}/{file}", self.log.place), reason }
    }
}
