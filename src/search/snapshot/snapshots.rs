//! The newest snapshot and the next: commits and configurations are taken in.
//!
//! The next snapshot is built beside the newest and a pointer is swapped, so readers never wait and an
//! answer mixes neither two versions of the table nor two configurations. Snapshots share what did
//! not change: a commit costs its own rows, the bitmaps of the chunks that it touches, and now and
//! then the merging of small chunks.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use chrono::Utc;
use rayon::prelude::*;
use tokio::sync::broadcast;

use super::chunk::{Body, Chunk, Entry, GROUP, MAX_ROWS, NONE};
use super::memory::OverMemory;
use super::{Served, Snapshot};
use crate::balance::statistics::{Statistics, StatisticsKey};
use crate::prompts::EmbeddedSet;
use crate::record::{Image, ImageId, Row, Version};
use crate::table::{Changes, Part};

/// Changes kept for listeners that are slow; a slower one misses the oldest.
const CHANGE_BUFFER: usize = 1024;

/// One change, for listeners.
#[derive(Debug, Clone)]
pub struct Change {
    /// Which image.
    pub image_id: ImageId,
    /// The image as it is now; none where it was deleted.
    pub entry: Option<Arc<Entry>>,
    /// The image as it was; none where it is new.
    pub before: Option<Arc<Entry>>,
    /// Version of the table that brought the change.
    pub version: u64,
}

/// The newest snapshot, and what changes. Copies are the same one.
#[derive(Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
}

struct Inner {
    newest: ArcSwap<Snapshot>,
    ready: AtomicBool,
    changes: broadcast::Sender<Change>,
    limit: u64,
    writer: Mutex<Writer>,
}

/// Held by whoever builds the next snapshot.
struct Writer {
    /// Sets whose statistics new rows get here if they came without them.
    sets: Vec<Arc<EmbeddedSet>>,
    /// Newest version of each deleted image: an older row may come later.
    tombstones: HashMap<ImageId, Version>,
    /// Bytes of these.
    remembered: usize,
    /// A whole table of which parts are still to come.
    loading: Option<Snapshot>,
}

impl Writer {
    fn remember(&mut self, id: ImageId, version: Version) {
        self.forget(&id);
        self.remembered += tombstone_bytes(&id, &version);
        self.tombstones.insert(id, version);
    }

    fn forget(&mut self, id: &ImageId) {
        if let Some(version) = self.tombstones.remove(id) {
            self.remembered -= tombstone_bytes(id, &version);
        }
    }
}

/// Two texts that are counted, and an entry of a map that is half empty at worst.
fn tombstone_bytes(id: &ImageId, version: &Version) -> usize {
    let counts = 4 * size_of::<usize>();
    2 * size_of::<(ImageId, Version)>()
        + counts
        + id.as_str().len()
        + version.sequence.as_str().len()
}

impl Snapshots {
    /// Empty, until the first [`Snapshots::apply`]; at most `limit` bytes are loaded.
    pub fn new(served: Served, limit: u64) -> Self {
        let writer = Writer {
            sets: served.sets.clone(),
            tombstones: HashMap::new(),
            remembered: 0,
            loading: None,
        };
        let inner = Inner {
            newest: ArcSwap::from_pointee(Snapshot::empty(served.into())),
            ready: false.into(),
            changes: broadcast::channel(CHANGE_BUFFER).0,
            limit,
            writer: writer.into(),
        };
        Self { inner: inner.into() }
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Arc<Snapshot> {
        self.inner.newest.load_full()
    }

    /// Whether the whole table has been taken in once.
    pub fn ready(&self) -> bool {
        self.inner.ready.load(Ordering::Acquire)
    }

    /// Most bytes that are loaded.
    pub fn limit(&self) -> u64 {
        self.inner.limit
    }

    /// Hears of every change from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.inner.changes.subscribe()
    }

    /// Takes in what the follower brought and publishes the next snapshot, a whole table with its last
    /// part. Where that would need more memory than the limit, the snapshot stays as it is.
    pub async fn apply(&self, changes: Changes) -> Result<(), OverMemory> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || inner.apply(changes)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Computes the statistics that live rows lack for `served`, then serves it, in one swap.
    /// `progress` hears of images done and images in all. Computes for as long as that takes: call
    /// it from a thread that may block.
    pub fn adopt(
        &self,
        served: Served,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), OverMemory> {
        self.inner.adopt(served, progress)
    }
}

impl Inner {
    fn writer(&self) -> std::sync::MutexGuard<'_, Writer> {
        // A writer that panicked has published nothing; its tombstones may be ahead, which keeps
        // deleted images deleted.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, changes: Changes) -> Result<(), OverMemory> {
        let mut writer = self.writer();
        let old = self.newest.load_full();
        let events = !changes.whole && self.changes.receiver_count() > 0;
        let loading = writer.loading.take().filter(|_| !changes.part.begins());
        let mut next = match loading {
            _ if !changes.whole => old.copy(),
            Some(loading) => loading,
            None => {
                (writer.tombstones, writer.remembered) = (HashMap::new(), 0);
                Snapshot { chunks: Vec::new(), computed: 0, count: 0, ..old.copy() }
            }
        };
        next.version = changes.version;
        next.at = Some(Utc::now());
        let mut told = Vec::new();
        let (mut dead, mut fresh): (BTreeMap<usize, Vec<usize>>, Vec<Row>) = Default::default();
        for row in newest_of_each(changes.rows) {
            let version = Version::of(&row);
            // No image of a whole table comes twice.
            let place = (!changes.whole).then(|| next.find(row.image_id.as_str())).flatten();
            let known = place.map(|p| next.chunks[p.chunk].body.version(p.row));
            let known = known.as_ref().or_else(|| writer.tombstones.get(&row.image_id));
            if known.is_some_and(|known| *known >= version) {
                continue;
            }
            next.changed += 1;
            if let Some(place) = place {
                dead.entry(place.chunk).or_default().push(place.row);
            }
            if events {
                let before = place.and_then(|p| next.chunks[p.chunk].body.entry(p.row));
                told.push((row.image_id.clone(), before));
            }
            if row.image.is_some() {
                writer.forget(&row.image_id);
                fresh.push(row);
            } else {
                writer.remember(row.image_id, version);
            }
        }
        next.remembered = writer.remembered;
        for (chunk, rows) in dead {
            next.chunks[chunk] = next.chunks[chunk].without(&rows);
        }
        next.memory().expect(&fresh, self.limit)?;
        next.computed += fill(&mut fresh, &writer.sets);
        let keys: Vec<StatisticsKey> = writer.sets.iter().map(|set| set.key.clone()).collect();
        let mut pieces = Vec::new();
        while !fresh.is_empty() {
            let rest = fresh.split_off(fresh.len().min(MAX_ROWS));
            pieces.push(std::mem::replace(&mut fresh, rest));
        }
        next.chunks.par_extend(pieces.into_par_iter().map(|rows| Chunk::of(&rows, &keys)));
        next.computed += tidy(&mut next.chunks, &writer.sets);
        if !changes.part.ends() {
            self.fits(&mut next)?;
            writer.loading = Some(next);
            return Ok(());
        }
        if changes.part == Part::Last {
            // What is served may have been changed since the first part.
            let now = self.newest.load();
            (next.served, next.serial) = (now.served.clone(), now.serial);
            for chunk in &mut next.chunks {
                next.computed += complete(chunk, &writer.sets, &mut HashMap::new());
            }
        }
        self.publish(next)?;
        self.ready.store(true, Ordering::Release);
        let newest = self.newest.load();
        for (image_id, before) in told {
            let entry = newest.get(image_id.as_str());
            let before = before.map(Arc::new);
            // An error means that nobody listens.
            let _ = self.changes.send(Change { image_id, entry, before, version: newest.version });
        }
        Ok(())
    }

    fn adopt(
        &self,
        served: Served,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), OverMemory> {
        let before = {
            let mut writer = self.writer();
            // Refused before anything is computed: whoever asks may ask again and again.
            self.newest.load().memory_with(served.sets.len()).within(self.limit)?;
            // From here on new rows bring the statistics of both configurations.
            let before = writer.sets.clone();
            for set in &served.sets {
                if writer.sets.iter().all(|known| known.key != set.key) {
                    writer.sets.push(set.clone());
                }
            }
            before
        };
        // Most rows without the writer's lock, so that commits are taken in meanwhile.
        let seen = self.newest.load_full();
        let (mut done, total) = (0, seen.len());
        let mut columns = HashMap::new();
        for chunk in &seen.chunks {
            for set in &served.sets {
                if !chunk.statistics.contains_key(&set.key) {
                    let name = (Arc::as_ptr(&chunk.body), set.key.clone());
                    columns.insert(name, column(chunk, set));
                }
            }
            done += chunk.count;
            progress(done, total);
        }
        let mut writer = self.writer();
        let mut next = self.newest.load_full().copy();
        for chunk in &mut next.chunks {
            next.computed += complete(chunk, &served.sets, &mut columns);
        }
        let sets = served.sets.clone();
        next.served = served.into();
        let published = self.publish(next);
        writer.sets = if published.is_ok() { sets } else { before };
        published
    }

    /// Counts what is live, and refuses what needs more memory than the limit.
    fn fits(&self, next: &mut Snapshot) -> Result<(), OverMemory> {
        next.count = next.chunks.iter().map(|chunk| chunk.count).sum();
        next.memory().within(self.limit)
    }

    fn publish(&self, mut next: Snapshot) -> Result<(), OverMemory> {
        self.fits(&mut next)?;
        next.serial += 1;
        self.newest.store(next.into());
        Ok(())
    }
}

/// The newest row of each image, sorted by id.
fn newest_of_each(mut rows: Vec<Row>) -> Vec<Row> {
    rows.par_sort_unstable_by(|a, b| {
        a.image_id.cmp(&b.image_id).then_with(|| Version::of(b).cmp(&Version::of(a)))
    });
    rows.dedup_by(|later, first| later.image_id == first.image_id);
    rows
}

/// Computes the statistics that rows came without; how many that were.
fn fill(rows: &mut [Row], sets: &[Arc<EmbeddedSet>]) -> usize {
    let one = |image: &mut Image| {
        let mut computed = 0;
        for set in sets {
            if image.statistics.contains_key(&set.key) {
                continue;
            }
            if let Some(statistics) = set.statistics(&image.embedding) {
                image.statistics.insert(set.key.clone(), statistics);
                computed += 1;
            }
        }
        computed
    };
    rows.par_iter_mut().filter_map(|row| row.image.as_mut()).map(one).sum()
}

/// Columns of statistics by the chunk and the set that they are of.
type Columns = HashMap<(*const Body, StatisticsKey), Arc<[Statistics]>>;

/// Has a chunk carry the statistics of exactly `sets`: what it lacks is taken from `columns`, or computed; how
/// many that were.
fn complete(chunk: &mut Chunk, sets: &[Arc<EmbeddedSet>], columns: &mut Columns) -> usize {
    let mut computed = 0;
    for set in sets {
        if chunk.statistics.contains_key(&set.key) {
            continue;
        }
        let name = (Arc::as_ptr(&chunk.body), set.key.clone());
        let column = columns.remove(&name).unwrap_or_else(|| column(chunk, set));
        chunk.statistics.insert(set.key.clone(), column);
        computed += chunk.count;
    }
    chunk.statistics.retain(|key, _| sets.iter().any(|set| set.key == *key));
    computed
}

/// Statistics of a set for every live row of a chunk.
fn column(chunk: &Chunk, set: &EmbeddedSet) -> Arc<[Statistics]> {
    let of = |row: usize| {
        let live = chunk.is_live(row).then(|| set.statistics(&chunk.body.embedding(row)));
        live.flatten().unwrap_or(NONE)
    };
    (0..chunk.body.len).into_par_iter().map(of).collect::<Vec<_>>().into()
}

/// Drops empty chunks, writes half-empty ones anew and merges the newest while one is less than
/// twice as long as the one after it: a row is written anew some log₂([`MAX_ROWS`]) times at most,
/// and small chunks stay few. What rows lack of the statistics of `sets`, because these are being
/// adopted, is computed; how many that were.
fn tidy(chunks: &mut Vec<Chunk>, sets: &[Arc<EmbeddedSet>]) -> usize {
    let keys: Vec<StatisticsKey> = sets.iter().map(|set| set.key.clone()).collect();
    let mut computed = 0;
    let mut anew = |mut rows: Vec<Row>| {
        computed += fill(&mut rows, sets);
        Chunk::of(&rows, &keys)
    };
    chunks.retain(|chunk| chunk.count > 0);
    for chunk in chunks.iter_mut() {
        if chunk.body.len > GROUP && chunk.count * 2 < chunk.body.len {
            *chunk = anew(chunk.to_rows());
        }
    }
    while let [.., before, last] = &chunks[..] {
        if before.count >= 2 * last.count || before.count + last.count > MAX_ROWS {
            break;
        }
        let mut rows = before.to_rows();
        rows.extend(last.to_rows());
        rows.sort_unstable_by(|a, b| a.image_id.cmp(&b.image_id));
        chunks.truncate(chunks.len() - 2);
        chunks.push(anew(rows));
    }
    computed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{embedding, row, served, set};

    async fn apply(snapshots: &Snapshots, version: u64, rows: Vec<Row>) -> Vec<String> {
        let part = Part::All;
        let changes = Changes { version, whole: version == 1, part, rows, statistics: Vec::new() };
        snapshots.apply(changes).await.unwrap();
        let newest = snapshots.newest();
        let mut ids = Vec::new();
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(newest.embedding(id).unwrap(), embedding);
            assert_eq!(newest.get(id).unwrap().version, entry.version);
            let number: u64 = entry.version.sequence.as_str().parse().unwrap();
            ids.push(format!("{id}@{number}"));
        }
        assert_eq!(newest.len(), ids.len());
        ids.sort();
        ids
    }

    fn upsert(id: &str, sequence: u64) -> Row {
        row(id, sequence, Some(embedding(sequence, 8)))
    }

    #[tokio::test]
    async fn the_newest_version_of_each_image_is_live_in_whatever_order_rows_come() {
        let snapshots = Snapshots::new(served(Vec::new()), u64::MAX);
        assert!(!snapshots.ready());
        let first = vec![upsert("a", 2), upsert("b", 1), upsert("a", 1)];
        assert_eq!(apply(&snapshots, 1, first).await, ["a@2", "b@1"]);
        assert!(snapshots.ready());
        let second = vec![upsert("c", 1), row("a", 3, None)];
        assert_eq!(apply(&snapshots, 2, second).await, ["b@1", "c@1"]);
        // An upsert that is older than the delete does not bring the image back.
        assert_eq!(apply(&snapshots, 3, vec![upsert("a", 2)]).await, ["b@1", "c@1"]);
        assert!(snapshots.newest().remembered > 100);
        assert_eq!(apply(&snapshots, 4, vec![upsert("a", 4)]).await, ["a@4", "b@1", "c@1"]);
        assert_eq!(snapshots.newest().remembered, 0);
    }

    #[tokio::test]
    async fn a_reader_keeps_its_snapshot() {
        let snapshots = Snapshots::new(served(Vec::new()), u64::MAX);
        apply(&snapshots, 1, vec![upsert("a", 1)]).await;
        let held = snapshots.newest();
        apply(&snapshots, 2, vec![row("a", 2, None)]).await;
        assert_eq!((held.version, held.len(), held.images().count()), (1, 1, 1));
        assert_eq!(snapshots.newest().len(), 0);
    }

    /// What is known of an image survives the merging of chunks, and small chunks stay few.
    #[tokio::test]
    async fn many_small_commits_cost_few_chunks() {
        let snapshots = Snapshots::new(served(vec![set("one", 8)]), u64::MAX);
        apply(&snapshots, 1, Vec::new()).await;
        for version in 2..200 {
            let mut one = upsert(&format!("i{:03}", version % 150), version);
            if let Some(image) = &mut one.image {
                image.uri = version.is_multiple_of(2).then(|| format!("file:///{version}"));
                image.content_hash = hex_of(version);
                image.attributes = [("n".to_owned(), version.to_string())].into();
            }
            apply(&snapshots, version, vec![one]).await;
        }
        let newest = snapshots.newest();
        assert_eq!(newest.len(), 150);
        assert!(newest.chunks.len() <= 9, "{} chunks", newest.chunks.len());
        for (entry, embedding) in newest.images() {
            let version: u64 = entry.version.sequence.as_str().parse().unwrap();
            assert_eq!(entry.uri, version.is_multiple_of(2).then(|| format!("file:///{version}")));
            assert_eq!(entry.content_hash, hex_of(version));
            assert_eq!(entry.attributes["n"], version.to_string());
            let set = &newest.served.sets[0];
            let statistics = newest.statistics(entry.image_id.as_str(), &set.key);
            assert_eq!(statistics, set.statistics(&embedding), "to the bit");
        }
    }

    fn hex_of(n: u64) -> String {
        format!("{n:064x}")
    }

    #[tokio::test]
    async fn another_configuration_is_served_whole_from_one_moment_to_the_next() {
        let snapshots = Snapshots::new(served(vec![set("one", 8)]), u64::MAX);
        let rows = (0..300).map(|i| upsert(&format!("i{i}"), i + 1)).collect();
        apply(&snapshots, 1, rows).await;
        let held = snapshots.newest();
        let other = set("two", 8);
        let next = Served { revision: 7, ..served(vec![other.clone()]) };
        let heard = Mutex::new(0);
        snapshots.adopt(next, &|done, _| *heard.lock().unwrap() = done).unwrap();
        let newest = snapshots.newest();
        assert_eq!((newest.served.revision, *heard.lock().unwrap()), (7, 300));
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(newest.statistics(id, &other.key), other.statistics(&embedding));
            let old = &held.served.sets[0].key;
            assert!(
                held.statistics(id, old).is_some() && held.statistics(id, &other.key).is_none()
            );
            assert!(newest.statistics(id, old).is_none(), "what is not served costs no memory");
        }
        // Commits that are taken in meanwhile, and the chunks that these merge, have both.
        let third = set("three", 8);
        let next = Served { revision: 8, ..served(vec![other.clone(), third.clone()]) };
        let runtime = tokio::runtime::Handle::current();
        let adopting = snapshots.clone();
        let work = move || {
            let meanwhile = |_, _| {
                let newest = adopting.newest().version;
                let rows = (0..200).map(|i| upsert(&format!("m{newest}-{i}"), i + 1)).collect();
                runtime.block_on(apply(&adopting, newest + 1, rows));
            };
            adopting.adopt(next, &meanwhile).unwrap();
        };
        tokio::task::spawn_blocking(work).await.unwrap();
        let newest = snapshots.newest();
        assert!(newest.len() > 300);
        for (entry, embedding) in newest.images() {
            let found = newest.statistics(entry.image_id.as_str(), &third.key);
            assert_eq!(found, third.statistics(&embedding), "{}", entry.image_id.as_str());
        }
        // Later rows get what is served now.
        apply(&snapshots, newest.version + 1, vec![upsert("late", 1)]).await;
        assert!(snapshots.newest().statistics("late", &other.key).is_some());
    }

    #[tokio::test]
    async fn a_whole_table_comes_in_parts_and_is_served_once_all_are_there() {
        let (one, two) = (set("one", 8), set("two", 8));
        let snapshots = Snapshots::new(served(vec![one.clone()]), u64::MAX);
        apply(&snapshots, 1, vec![upsert("gone", 1), upsert("i1", 1)]).await;
        let part = async |part, ids: std::ops::Range<u64>| {
            let mut rows: Vec<Row> = ids.clone().map(|i| upsert(&format!("i{i}"), 9)).collect();
            rows.push(row(&format!("deleted-{}", ids.start), 9, None));
            let changes = Changes { version: 5, whole: true, part, rows, statistics: Vec::new() };
            snapshots.apply(changes).await.unwrap();
            (snapshots.newest().version, snapshots.newest().len())
        };
        assert_eq!(part(Part::First, 0..50).await, (1, 2), "one that was broken off");
        assert_eq!(part(Part::First, 0..100).await, (1, 2));
        // What is served changes meanwhile.
        let next = Served { revision: 7, ..served(vec![two.clone()]) };
        snapshots.adopt(next, &|_, _| {}).unwrap();
        let serial = snapshots.newest().serial;
        assert_eq!(part(Part::Middle, 100..200).await, (1, 2));
        assert_eq!(part(Part::Last, 200..300).await, (5, 300));
        let newest = snapshots.newest();
        assert_eq!((newest.served.revision, newest.serial), (7, serial + 1));
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(newest.statistics(id, &two.key), two.statistics(&embedding), "{id}");
            assert!(newest.statistics(id, &one.key).is_none());
        }
        // Deletes of every part are remembered.
        let late = (0..300).step_by(100).map(|i| upsert(&format!("deleted-{i}"), 8)).collect();
        assert_eq!(apply(&snapshots, 6, late).await.len(), 300);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_with_figures_and_what_fits_is_served() {
        let snapshots = Snapshots::new(served(Vec::new()), 4 << 20);
        apply(&snapshots, 1, vec![upsert("a", 1)]).await;
        let many = (0..2000).map(|i| row(&format!("i{i}"), 1, Some(embedding(i, 1024)))).collect();
        let refused = snapshots
            .apply(Changes {
                version: 2,
                whole: false,
                part: Part::All,
                rows: many,
                statistics: Vec::new(),
            })
            .await;
        let refused = refused.unwrap_err();
        assert_eq!((refused.images, refused.limit_mib), (2001, 4));
        assert!(refused.to_string().contains("search.memory_mib"), "{refused}");
        assert_eq!((snapshots.newest().version, snapshots.newest().len()), (1, 1));

        // So are prompt sets, before anything is computed.
        let rows = || (0..1000).map(|i| upsert(&format!("i{i}"), 1)).collect::<Vec<_>>();
        let large = Snapshots::new(served(Vec::new()), u64::MAX);
        apply(&large, 1, rows()).await;
        let limit = large.newest().memory().bytes() + 50_000;
        let small = Snapshots::new(served(Vec::new()), limit);
        apply(&small, 1, rows()).await;
        let sets = (0..4).map(|i| set(&format!("set{i}"), 8)).collect();
        let refused = small.adopt(served(sets), &|_, _| panic!("it computes")).unwrap_err();
        assert_eq!(refused.images, 1000);
        apply(&small, 2, vec![upsert("late", 1)]).await;
        assert_eq!(small.newest().chunks.iter().map(|c| c.statistics.len()).sum::<usize>(), 0);
    }

    /// The promise of the memory that a row takes, at 512 dimensions with one prompt set.
    #[tokio::test]
    async fn a_row_takes_no_more_memory_than_promised() {
        let snapshots = Snapshots::new(served(vec![set("one", 512)]), u64::MAX);
        let rows = 5000;
        let all = (0..rows).map(|i| row(&format!("i{i}"), 1, Some(embedding(i, 512)))).collect();
        apply(&snapshots, 1, all).await;
        let memory = snapshots.newest().memory();
        let a_row = memory.rest as f64 / rows as f64;
        assert!(a_row <= 3.5 * 512.0 + 150.0, "{a_row} bytes a row");
        let told = crate::search::snapshot::memory::needed(rows, 512, 1) as f64;
        assert!((told / memory.rest as f64 - 1.0).abs() < 0.05, "{told} {}", memory.rest);
    }
}
