//! Following the table: everything at first, then each commit as it comes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use deltalake_core::kernel::Action;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;

use super::file::{self, Unread};
use super::log::{Kind, Log, object_path};
use super::state::Generation;
use super::statistics::{self, Backfilled};
use super::{TableError, schema};
use crate::record::Row;
use crate::statistics::StatisticsKey;
use crate::store::Store;

/// Files read at one time by a fresh reader.
const CONCURRENT_FILES: usize = 8;
/// A reader that sees no next commit for this long asks whether the log was cleaned up behind it.
const RESYNC_AFTER: Duration = Duration::from_secs(60);

/// What came since the last look.
#[derive(Debug)]
pub struct Changes {
    /// Version of the table that these rows lead to.
    pub version: u64,
    /// Whether `rows` are the whole table instead of what is new.
    pub whole: bool,
    /// Rows in no particular order: versions decide.
    pub rows: Vec<Row>,
    /// Statistics that were computed meanwhile for rows that were handed out before. Each counts
    /// only for exactly the version that it names.
    pub statistics: Vec<(StatisticsKey, Vec<Backfilled>)>,
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
        })
    }

    /// The changes since the last call: the whole table at first, then one commit a call, then
    /// `None` until there is another. `progress` hears of files read and files in all.
    pub async fn next(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<Changes>, TableError> {
        let Some(seen) = self.seen else {
            return self.whole(progress).await.map(Some);
        };
        let version = seen + 1;
        let Some(actions) = self.log.commit(version).await? else {
            if let Some(statistics) = self.next_statistics().await? {
                let changes = Changes { version: seen, whole: false, rows: Vec::new(), statistics };
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
                        Err(Unread::Missing) => return self.whole(progress).await.map(Some),
                        Err(error) => return Err(error.of(&self.log, &add.path)),
                    }
                }
                _ => {}
            }
        }
        self.advance(version);
        Ok(Some(Changes { version, whole: false, rows, statistics: Vec::new() }))
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
        self.whole(progress).await.map(Some)
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

    async fn whole(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Changes, TableError> {
        self.log.update().await?;
        let version = self.log.version();
        let state = self.log.snapshot()?;
        let files: Vec<Path> = state.log_data().iter().map(|f| f.object_store_path()).collect();
        let total = files.len();
        // After the images: a unit that compaction has folded into the rows since is not missed.
        let mut units: HashMap<StatisticsKey, HashMap<String, String>> = HashMap::new();
        self.backfilled = None;
        if self.backfill.reload().await? {
            self.backfilled = Some(self.backfill.version());
            for (unit, file) in statistics::units(&self.backfill)? {
                units.entry(file.key).or_default().insert(unit, file.path);
            }
        }
        let (this, units) = (&*self, &units);
        let mut reads = stream::iter(files)
            .map(|path| async move {
                let mut rows =
                    this.read(&path).await.map_err(|e| e.of(&this.log, path.as_ref()))?;
                for (key, of) in units {
                    if let Some(file) = of.get(&statistics::unit(key, path.as_ref())) {
                        let found = statistics::read(&this.backfill, file).await?;
                        statistics::attach(&mut rows, key, &statistics::by_version(found));
                    }
                }
                Ok::<_, TableError>(rows)
            })
            .buffer_unordered(CONCURRENT_FILES);
        let (mut rows, mut done) = (Vec::new(), 0);
        while let Some(more) = reads.try_next().await? {
            rows.extend(more);
            done += 1;
            progress(done, total);
        }
        drop(reads);
        self.advance(version);
        Ok(Changes { version, whole: true, rows, statistics: Vec::new() })
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
