//! The table in memory: the newest version of each image, and how it is served.
//!
//! A snapshot is immutable: chunks of rows, a bitmap of the live ones for each, and the
//! configuration by which queries are answered. The next one is built beside it and a pointer is
//! swapped, so readers never wait and an answer mixes neither two versions of the table nor two
//! configurations. Snapshots share what did not change: a commit costs its own rows, the bitmaps of
//! the chunks that it touches, and now and then the merging of small chunks.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use chrono::{DateTime, Utc};
use rayon::prelude::*;
use tokio::sync::broadcast;

use super::attributes::Attribute;
use super::chunk::{Chunk, Entry, GROUP, MAX_ROWS, NONE};
use super::memory::{Memory, OverMemory};
use super::traffic::Route;
use crate::normalise::{Normaliser, Scale};
use crate::prompts::EmbeddedSet;
use crate::record::{Embedding, Image, ImageId, Row, Version};
use crate::statistics::{Statistics, StatisticsKey};
use crate::table::{Candidate, CatalogueState, Changes, Serving};

/// Changes kept for listeners that are slow; a slower one misses the oldest.
const CHANGE_BUFFER: usize = 1024;
/// Constants of the catalogue that are not frozen are computed again when one row in so many has
/// changed.
const STALE_SCALE: u64 = 100;

/// By what queries are answered.
#[derive(Debug, Clone)]
pub struct Served {
    /// Revision of the catalogue's state that says so.
    pub revision: u64,
    /// Generation that the images are of.
    pub generation: String,
    /// Name of the configuration.
    pub name: String,
    /// What it is to the catalogue: the candidate where another generation is live.
    pub stands_as: Route,
    /// Prompt sets that a query may name; rows that lack their statistics get them here.
    pub sets: Vec<Arc<EmbeddedSet>>,
    /// How queries are answered unless they say otherwise.
    pub serving: Serving,
    /// What may become live, answers those who ask for it, and its share; its set is among `sets`.
    pub candidate: Option<Candidate>,
}

impl Served {
    /// As a revision of the state says; `sets` are its prompt sets, embedded.
    pub fn of(state: &CatalogueState, sets: Vec<Arc<EmbeddedSet>>) -> Self {
        Self {
            revision: state.revision,
            generation: state.live.id.clone(),
            name: state.name.clone(),
            stands_as: Route::Live,
            sets,
            serving: state.serving.clone(),
            // One that reads another generation is not in this snapshot.
            candidate: state.candidate.clone().filter(|c| c.generation == state.live.id),
        }
    }

    /// As a revision of the state says for the generation beside the live one: as its candidate;
    /// where it has none, as `before`.
    pub fn beside(
        state: &CatalogueState,
        generation: &str,
        sets: Vec<Arc<EmbeddedSet>>,
        before: Option<&Self>,
    ) -> Self {
        let candidate = state.candidate.as_ref().filter(|c| c.generation == generation);
        let known = before.map_or((&state.name, &state.serving), |b| (&b.name, &b.serving));
        let (name, serving) = candidate.map_or(known, |c| (&c.name, &c.serving));
        Self {
            revision: state.revision,
            generation: generation.to_owned(),
            name: name.clone(),
            stands_as: Route::Candidate,
            sets,
            serving: serving.clone(),
            candidate: None,
        }
    }

    /// Name of the configuration that answers a query.
    pub(super) fn name_of(&self, route: Route) -> &str {
        match (&self.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.name,
            _ => &self.name,
        }
    }

    fn keys(&self) -> Vec<StatisticsKey> {
        self.sets.iter().map(|set| set.key.clone()).collect()
    }
}

/// The live images at one version of the table, and how they are served.
#[derive(Debug)]
pub struct Snapshot {
    /// Version of the table.
    pub version: u64,
    /// Tells snapshots apart: two of one version may be served differently.
    pub serial: u64,
    /// When that version was taken in.
    pub at: Option<DateTime<Utc>>,
    /// By what queries are answered.
    pub served: Arc<Served>,
    /// Images whose statistics were computed here, because their row came without them.
    pub computed: usize,
    pub(super) chunks: Vec<Chunk>,
    count: usize,
    changed: u64,
    scales: Scales,
    /// What there is to filter by, once asked for.
    pub(super) attributes: OnceLock<Vec<Attribute>>,
}

type Scales = Arc<Mutex<HashMap<(StatisticsKey, Normaliser), (u64, Scale)>>>;

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub chunk: usize,
    pub row: usize,
}

impl Snapshot {
    fn empty(served: Arc<Served>) -> Self {
        Self {
            version: 0,
            serial: 0,
            at: None,
            served,
            computed: 0,
            chunks: Vec::new(),
            count: 0,
            changed: 0,
            scales: Scales::default(),
            attributes: OnceLock::new(),
        }
    }

    /// How many images are live.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether no image is live.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What is known of the image with this id, if it is live.
    pub fn get(&self, id: &str) -> Option<Arc<Entry>> {
        let place = self.find(id)?;
        self.chunks[place.chunk].body.entry(place.row).map(Arc::new)
    }

    /// The stored embedding of the image with this id, if it is live.
    pub fn embedding(&self, id: &str) -> Option<Embedding> {
        let place = self.find(id)?;
        Some(self.chunks[place.chunk].body.embedding(place.row))
    }

    /// The statistics of a live image.
    pub fn statistics(&self, id: &str, key: &StatisticsKey) -> Option<Statistics> {
        let place = self.find(id)?;
        let column = self.chunks[place.chunk].statistics.get(key)?;
        Some(column[place.row]).filter(|s| s.n > 0)
    }

    /// All live images with their embeddings, in no particular order.
    pub fn images(&self) -> impl Iterator<Item = (Entry, Embedding)> + '_ {
        let of = |chunk: &'_ Chunk, row: usize| {
            Some((chunk.body.entry(row)?, chunk.body.embedding(row)))
        };
        self.chunks.iter().flat_map(move |c| c.rows().filter_map(move |row| of(c, row)))
    }

    pub(super) fn find(&self, id: &str) -> Option<Place> {
        self.chunks.iter().enumerate().find_map(|(chunk, c)| {
            let row = c.body.find(id).filter(|row| c.is_live(*row))?;
            Some(Place { chunk, row })
        })
    }

    /// The constants c and m of a normaliser over the live images. They are kept while less than
    /// one row in [`STALE_SCALE`] has changed.
    pub fn scale(&self, key: &StatisticsKey, normaliser: Normaliser) -> Scale {
        if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
            return Scale::default();
        }
        let name = (key.clone(), normaliser);
        let scales = || self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        let known = scales().get(&name).copied();
        let fresh = |at: u64| self.changed.abs_diff(at) <= self.count as u64 / STALE_SCALE;
        if let Some((_, scale)) = known.filter(|(at, _)| fresh(*at)) {
            return scale;
        }
        let scale = Scale::of(normaliser, self.all_statistics(key));
        scales().insert(name, (self.changed, scale));
        scale
    }

    /// The statistics of the live images that have them.
    pub(super) fn all_statistics<'a>(
        &'a self,
        key: &'a StatisticsKey,
    ) -> impl Iterator<Item = Statistics> + 'a {
        let columns = self.chunks.iter().filter_map(|c| Some((c, c.statistics.get(key)?)));
        columns.flat_map(|(c, all)| c.rows().map(|row| all[row])).filter(|s| s.n > 0)
    }

    /// Bytes in memory, and how they are spent.
    pub fn memory(&self) -> Memory {
        let (mut named, mut rest) = (0, 0);
        for chunk in &self.chunks {
            let (n, r) = chunk.bytes();
            named += n;
            rest += r;
        }
        Memory { images: self.count, named, rest }
    }
}

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
}

impl Snapshots {
    /// Empty, until the first [`Snapshots::apply`]; at most `limit` bytes are loaded.
    pub fn new(served: Served, limit: u64) -> Self {
        let writer = Writer { sets: served.sets.clone(), tombstones: HashMap::new() };
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

    /// Takes in what the follower brought and publishes the next snapshot. Where that would need
    /// more memory than the limit, the snapshot stays as it is.
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
        let mut next = if changes.whole {
            writer.tombstones.clear();
            Snapshot { chunks: Vec::new(), computed: 0, ..copy(&old) }
        } else {
            copy(&old)
        };
        next.version = changes.version;
        next.at = Some(Utc::now());
        let mut told = Vec::new();
        let (mut dead, mut fresh): (BTreeMap<usize, Vec<usize>>, Vec<Row>) = Default::default();
        for row in newest_of_each(changes.rows) {
            let version = Version::of(&row);
            let place = next.find(row.image_id.as_str());
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
                writer.tombstones.remove(&row.image_id);
                fresh.push(row);
            } else {
                writer.tombstones.insert(row.image_id, version);
            }
        }
        for (chunk, rows) in dead {
            next.chunks[chunk] = next.chunks[chunk].without(&rows);
        }
        let keys: Vec<StatisticsKey> = writer.sets.iter().map(|set| set.key.clone()).collect();
        next.memory().expect(&fresh, self.limit)?;
        next.computed += fill(&mut fresh, &writer.sets);
        let mut pieces = Vec::new();
        while !fresh.is_empty() {
            let rest = fresh.split_off(fresh.len().min(MAX_ROWS));
            pieces.push(std::mem::replace(&mut fresh, rest));
        }
        next.chunks.par_extend(pieces.into_par_iter().map(|rows| Chunk::of(&rows, &keys)));
        tidy(&mut next.chunks, &keys);
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
        {
            // From here on new rows bring the statistics of both configurations.
            let mut writer = self.writer();
            for set in &served.sets {
                if writer.sets.iter().all(|known| known.key != set.key) {
                    writer.sets.push(set.clone());
                }
            }
        }
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
        let mut next = copy(&self.newest.load_full());
        let keys = served.keys();
        for chunk in &mut next.chunks {
            for set in &served.sets {
                if chunk.statistics.contains_key(&set.key) {
                    continue;
                }
                let name = (Arc::as_ptr(&chunk.body), set.key.clone());
                let column = columns.remove(&name).unwrap_or_else(|| column(chunk, set));
                chunk.statistics.insert(set.key.clone(), column);
                next.computed += chunk.count;
            }
            chunk.statistics.retain(|key, _| keys.contains(key));
        }
        writer.sets.clone_from(&served.sets);
        next.served = served.into();
        self.publish(next)
    }

    fn publish(&self, mut next: Snapshot) -> Result<(), OverMemory> {
        next.memory().within(self.limit)?;
        next.serial += 1;
        next.count = next.chunks.iter().map(|chunk| chunk.count).sum();
        self.newest.store(next.into());
        Ok(())
    }
}

fn copy(old: &Snapshot) -> Snapshot {
    Snapshot {
        served: old.served.clone(),
        chunks: old.chunks.clone(),
        scales: old.scales.clone(),
        attributes: OnceLock::new(),
        ..*old
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
/// and small chunks stay few.
fn tidy(chunks: &mut Vec<Chunk>, keys: &[StatisticsKey]) {
    chunks.retain(|chunk| chunk.count > 0);
    for chunk in chunks.iter_mut() {
        if chunk.body.len > GROUP && chunk.count * 2 < chunk.body.len {
            *chunk = Chunk::of(&chunk.to_rows(), keys);
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
        chunks.push(Chunk::of(&rows, keys));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{embedding, row, served, set};

    async fn apply(snapshots: &Snapshots, version: u64, rows: Vec<Row>) -> Vec<String> {
        let changes = Changes { version, whole: version == 1, rows, statistics: Vec::new() };
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
        assert_eq!(apply(&snapshots, 4, vec![upsert("a", 4)]).await, ["a@4", "b@1", "c@1"]);
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
        // Later rows get what is served now.
        apply(&snapshots, 2, vec![upsert("late", 1)]).await;
        assert!(snapshots.newest().statistics("late", &other.key).is_some());
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_with_figures_and_what_fits_is_served() {
        let snapshots = Snapshots::new(served(Vec::new()), 4 << 20);
        apply(&snapshots, 1, vec![upsert("a", 1)]).await;
        let many = (0..2000).map(|i| row(&format!("i{i}"), 1, Some(embedding(i, 1024)))).collect();
        let refused = snapshots
            .apply(Changes { version: 2, whole: false, rows: many, statistics: Vec::new() })
            .await;
        let refused = refused.unwrap_err();
        assert_eq!((refused.images, refused.limit_mib), (2001, 4));
        assert!(refused.to_string().contains("search.memory_mib"), "{refused}");
        assert_eq!((snapshots.newest().version, snapshots.newest().len()), (1, 1));
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
        let told = crate::search::memory_needed(rows, 512, 1) as f64;
        assert!((told / memory.rest as f64 - 1.0).abs() < 0.05, "{told} {}", memory.rest);
    }
}
