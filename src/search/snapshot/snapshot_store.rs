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

use super::chunk::{
    Chunk, ChunkData, ImageMetadata, MAX_CHUNK_ROWS, NO_STATISTICS, ROWS_PER_GROUP,
};
use super::memory::MemoryLimitExceeded;
use super::{ServingSnapshot, Snapshot};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{ImageId, ImageRow, RowVersion, StoredImage};
use crate::table::{SnapshotPart, TableChanges};

/// Changes kept for listeners that are slow; a slower one misses the oldest.
const CHANGE_BUFFER_CAPACITY: usize = 1024;

/// One change, for listeners.
#[derive(Debug, Clone)]
pub struct SnapshotChange {
    /// Which image.
    pub image_id: ImageId,
    /// The image as it is now; none where it was deleted.
    pub after: Option<Arc<ImageMetadata>>,
    /// The image as it was; none where it is new.
    pub before: Option<Arc<ImageMetadata>>,
    /// Version of the table that brought the change.
    pub table_version: u64,
}

/// The newest snapshot, and what changes. Copies are the same one.
#[derive(Clone)]
pub struct SnapshotStore {
    inner: Arc<SharedSnapshots>,
}

struct SharedSnapshots {
    newest: ArcSwap<Snapshot>,
    ready: AtomicBool,
    changes: broadcast::Sender<SnapshotChange>,
    memory_limit_bytes: u64,
    writer: Mutex<WriterState>,
}

/// Held by whoever builds the next snapshot.
struct WriterState {
    /// Sets whose statistics new rows get here if they came without them.
    prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// Newest version of each deleted image: an older row may come later.
    tombstones: HashMap<ImageId, RowVersion>,
    /// Bytes of these.
    tombstone_bytes: usize,
    /// A whole table of which parts are still to come.
    partial_load: Option<Snapshot>,
}

impl WriterState {
    fn add_tombstone(&mut self, id: ImageId, version: RowVersion) {
        self.remove_tombstone(&id);
        self.tombstone_bytes += tombstone_bytes(&id, &version);
        self.tombstones.insert(id, version);
    }

    fn remove_tombstone(&mut self, id: &ImageId) {
        if let Some(version) = self.tombstones.remove(id) {
            self.tombstone_bytes -= tombstone_bytes(id, &version);
        }
    }
}

/// Two texts that are counted, and an entry of a map that is half empty at worst.
fn tombstone_bytes(id: &ImageId, version: &RowVersion) -> usize {
    let counts = 4 * size_of::<usize>();
    2 * size_of::<(ImageId, RowVersion)>()
        + counts
        + id.as_str().len()
        + version.sequence.as_str().len()
}

impl SnapshotStore {
    /// Empty, until the first [`Snapshots::apply`]; at most `limit` bytes are loaded.
    pub fn new(served: ServingSnapshot, limit: u64) -> Self {
        let writer = WriterState {
            prompt_sets: served.prompt_sets.clone(),
            tombstones: HashMap::new(),
            tombstone_bytes: 0,
            partial_load: None,
        };
        let inner = SharedSnapshots {
            newest: ArcSwap::from_pointee(Snapshot::empty(served.into())),
            ready: false.into(),
            changes: broadcast::channel(CHANGE_BUFFER_CAPACITY).0,
            memory_limit_bytes: limit,
            writer: writer.into(),
        };
        Self { inner: inner.into() }
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Arc<Snapshot> {
        self.inner.newest.load_full()
    }

    /// Whether the whole table has been taken in once.
    pub fn is_ready(&self) -> bool {
        self.inner.ready.load(Ordering::Acquire)
    }

    /// Most bytes that are loaded.
    pub fn memory_limit_bytes(&self) -> u64 {
        self.inner.memory_limit_bytes
    }

    /// Hears of every change from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<SnapshotChange> {
        self.inner.changes.subscribe()
    }

    /// Takes in what the follower brought and publishes the next snapshot, a whole table with its last
    /// part. Where that would need more memory than the limit, the snapshot stays as it is.
    pub async fn apply_changes(&self, changes: TableChanges) -> Result<(), MemoryLimitExceeded> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || inner.apply_changes(changes)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Computes the statistics that live rows lack for `served`, then serves it, in one swap.
    /// `progress` hears of images done and images in all. Computes for as long as that takes: call
    /// it from a thread that may block.
    pub fn switch_serving(
        &self,
        served: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        self.inner.switch_serving(served, progress)
    }
}

impl SharedSnapshots {
    fn lock_writer(&self) -> std::sync::MutexGuard<'_, WriterState> {
        // A writer that panicked has published nothing; its tombstones may be ahead, which keeps
        // deleted images deleted.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply_changes(&self, changes: TableChanges) -> Result<(), MemoryLimitExceeded> {
        let mut writer = self.lock_writer();
        let old = self.newest.load_full();
        let events = !changes.is_full_snapshot && self.changes.receiver_count() > 0;
        let loading = writer.partial_load.take().filter(|_| !changes.part.is_first());
        let mut next = match loading {
            _ if !changes.is_full_snapshot => old.clone_for_update(),
            Some(loading) => loading,
            None => {
                (writer.tombstones, writer.tombstone_bytes) = (HashMap::new(), 0);
                Snapshot {
                    chunks: Vec::new(),
                    computed_statistics: 0,
                    live_count: 0,
                    ..old.clone_for_update()
                }
            }
        };
        next.table_version = changes.version;
        next.applied_at = Some(Utc::now());
        let mut changed_images = Vec::new();
        let (mut dead, mut fresh): (BTreeMap<usize, Vec<usize>>, Vec<ImageRow>) =
            Default::default();
        for row in newest_row_per_image(changes.rows) {
            let version = RowVersion::from_row(&row);
            // No image of a whole table comes twice.
            let place =
                (!changes.is_full_snapshot).then(|| next.find_row(row.image_id.as_str())).flatten();
            let known = place.map(|p| next.chunks[p.chunk].data.version(p.row));
            let known = known.as_ref().or_else(|| writer.tombstones.get(&row.image_id));
            if known.is_some_and(|known| *known >= version) {
                continue;
            }
            next.changed_rows += 1;
            if let Some(place) = place {
                dead.entry(place.chunk).or_default().push(place.row);
            }
            if events {
                let before = place.and_then(|p| next.chunks[p.chunk].data.metadata(p.row));
                changed_images.push((row.image_id.clone(), before));
            }
            if row.image.is_some() {
                writer.remove_tombstone(&row.image_id);
                fresh.push(row);
            } else {
                writer.add_tombstone(row.image_id, version);
            }
        }
        next.tombstone_bytes = writer.tombstone_bytes;
        for (chunk, rows) in dead {
            next.chunks[chunk] = next.chunks[chunk].without_rows(&rows);
        }
        next.memory_usage().check_limit_with_rows(&fresh, self.memory_limit_bytes)?;
        next.computed_statistics += add_missing_statistics(&mut fresh, &writer.prompt_sets);
        let keys: Vec<StatisticsKey> =
            writer.prompt_sets.iter().map(|set| set.statistics_key.clone()).collect();
        let mut pieces = Vec::new();
        while !fresh.is_empty() {
            let rest = fresh.split_off(fresh.len().min(MAX_CHUNK_ROWS));
            pieces.push(std::mem::replace(&mut fresh, rest));
        }
        next.chunks.par_extend(pieces.into_par_iter().map(|rows| Chunk::from_rows(&rows, &keys)));
        next.computed_statistics += compact_chunks(&mut next.chunks, &writer.prompt_sets);
        if !changes.part.is_last() {
            self.count_and_check_memory(&mut next)?;
            writer.partial_load = Some(next);
            return Ok(());
        }
        if changes.part == SnapshotPart::Last {
            // What is served may have been changed since the first part.
            let now = self.newest.load();
            (next.serving_snapshot, next.serial) = (now.serving_snapshot.clone(), now.serial);
            for chunk in &mut next.chunks {
                next.computed_statistics +=
                    complete_statistics(chunk, &writer.prompt_sets, &mut HashMap::new());
            }
        }
        self.publish(next)?;
        self.ready.store(true, Ordering::Release);
        let newest = self.newest.load();
        for (image_id, before) in changed_images {
            let entry = newest.metadata(image_id.as_str());
            let before = before.map(Arc::new);
            // An error means that nobody listens.
            let _ = self.changes.send(SnapshotChange {
                image_id,
                after: entry,
                before,
                table_version: newest.table_version,
            });
        }
        Ok(())
    }

    fn switch_serving(
        &self,
        served: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        let previous_sets = {
            let mut writer = self.lock_writer();
            // Refused before anything is computed: whoever asks may ask again and again.
            self.newest
                .load()
                .memory_usage_with_sets(served.prompt_sets.len())
                .check_limit(self.memory_limit_bytes)?;
            // From here on new rows bring the statistics of both configurations.
            let before = writer.prompt_sets.clone();
            for set in &served.prompt_sets {
                if writer.prompt_sets.iter().all(|known| known.statistics_key != set.statistics_key)
                {
                    writer.prompt_sets.push(set.clone());
                }
            }
            before
        };
        // Most rows without the writer's lock, so that commits are taken in meanwhile.
        let seen = self.newest.load_full();
        let (mut done, total) = (0, seen.len());
        let mut columns = HashMap::new();
        for chunk in &seen.chunks {
            for set in &served.prompt_sets {
                if !chunk.statistics.contains_key(&set.statistics_key) {
                    let name = (Arc::as_ptr(&chunk.data), set.statistics_key.clone());
                    columns.insert(name, compute_statistics_column(chunk, set));
                }
            }
            done += chunk.live_count;
            progress(done, total);
        }
        let mut writer = self.lock_writer();
        let mut next = self.newest.load_full().clone_for_update();
        for chunk in &mut next.chunks {
            next.computed_statistics +=
                complete_statistics(chunk, &served.prompt_sets, &mut columns);
        }
        let sets = served.prompt_sets.clone();
        next.serving_snapshot = served.into();
        let published = self.publish(next);
        writer.prompt_sets = if published.is_ok() { sets } else { previous_sets };
        published
    }

    /// Counts what is live, and refuses what needs more memory than the limit.
    fn count_and_check_memory(&self, next: &mut Snapshot) -> Result<(), MemoryLimitExceeded> {
        next.live_count = next.chunks.iter().map(|chunk| chunk.live_count).sum();
        next.memory_usage().check_limit(self.memory_limit_bytes)
    }

    fn publish(&self, mut next: Snapshot) -> Result<(), MemoryLimitExceeded> {
        self.count_and_check_memory(&mut next)?;
        next.serial += 1;
        self.newest.store(next.into());
        Ok(())
    }
}

/// The newest row of each image, sorted by id.
fn newest_row_per_image(mut rows: Vec<ImageRow>) -> Vec<ImageRow> {
    rows.par_sort_unstable_by(|a, b| {
        a.image_id
            .cmp(&b.image_id)
            .then_with(|| RowVersion::from_row(b).cmp(&RowVersion::from_row(a)))
    });
    rows.dedup_by(|later, first| later.image_id == first.image_id);
    rows
}

/// Computes the statistics that rows came without; how many that were.
fn add_missing_statistics(rows: &mut [ImageRow], sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let one = |image: &mut StoredImage| {
        let mut computed = 0;
        for set in sets {
            if image.statistics.contains_key(&set.statistics_key) {
                continue;
            }
            if let Some(statistics) = set.statistics(&image.embedding) {
                image.statistics.insert(set.statistics_key.clone(), statistics);
                computed += 1;
            }
        }
        computed
    };
    rows.par_iter_mut().filter_map(|row| row.image.as_mut()).map(one).sum()
}

/// Columns of statistics by the chunk and the set that they are of.
type StatisticsColumns = HashMap<(*const ChunkData, StatisticsKey), Arc<[ScoreStatistics]>>;

/// Has a chunk carry the statistics of exactly `sets`: what it lacks is taken from `columns`, or computed; how
/// many that were.
fn complete_statistics(
    chunk: &mut Chunk,
    sets: &[Arc<EmbeddedPromptSet>],
    columns: &mut StatisticsColumns,
) -> usize {
    let mut computed = 0;
    for set in sets {
        if chunk.statistics.contains_key(&set.statistics_key) {
            continue;
        }
        let name = (Arc::as_ptr(&chunk.data), set.statistics_key.clone());
        let column = columns.remove(&name).unwrap_or_else(|| compute_statistics_column(chunk, set));
        chunk.statistics.insert(set.statistics_key.clone(), column);
        computed += chunk.live_count;
    }
    chunk.statistics.retain(|key, _| sets.iter().any(|set| set.statistics_key == *key));
    computed
}

/// Statistics of a set for every live row of a chunk.
fn compute_statistics_column(chunk: &Chunk, set: &EmbeddedPromptSet) -> Arc<[ScoreStatistics]> {
    let of = |row: usize| {
        let live = chunk.is_live(row).then(|| set.statistics(&chunk.data.embedding(row)));
        live.flatten().unwrap_or(NO_STATISTICS)
    };
    (0..chunk.data.len).into_par_iter().map(of).collect::<Vec<_>>().into()
}

/// Drops empty chunks, writes half-empty ones anew and merges the newest while one is less than
/// twice as long as the one after it: a row is written anew some log₂([`MAX_ROWS`]) times at most,
/// and small chunks stay few. What rows lack of the statistics of `sets`, because these are being
/// adopted, is computed; how many that were.
fn compact_chunks(chunks: &mut Vec<Chunk>, sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let keys: Vec<StatisticsKey> = sets.iter().map(|set| set.statistics_key.clone()).collect();
    let mut computed = 0;
    let mut rebuild = |mut rows: Vec<ImageRow>| {
        computed += add_missing_statistics(&mut rows, sets);
        Chunk::from_rows(&rows, &keys)
    };
    chunks.retain(|chunk| chunk.live_count > 0);
    for chunk in chunks.iter_mut() {
        if chunk.data.len > ROWS_PER_GROUP && chunk.live_count * 2 < chunk.data.len {
            *chunk = rebuild(chunk.to_rows());
        }
    }
    while let [.., before, last] = &chunks[..] {
        if before.live_count >= 2 * last.live_count
            || before.live_count + last.live_count > MAX_CHUNK_ROWS
        {
            break;
        }
        let mut rows = before.to_rows();
        rows.extend(last.to_rows());
        rows.sort_unstable_by(|a, b| a.image_id.cmp(&b.image_id));
        chunks.truncate(chunks.len() - 2);
        chunks.push(rebuild(rows));
    }
    computed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{
        clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
    };

    async fn apply_rows(
        snapshots: &SnapshotStore,
        version: u64,
        rows: Vec<ImageRow>,
    ) -> Vec<String> {
        let part = SnapshotPart::All;
        let changes = TableChanges { version, is_full_snapshot: version == 1, part, rows };
        snapshots.apply_changes(changes).await.unwrap();
        let newest = snapshots.newest();
        let mut ids = Vec::new();
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(newest.embedding(id).unwrap(), embedding);
            assert_eq!(newest.metadata(id).unwrap().version, entry.version);
            let number: u64 = entry.version.sequence.as_str().parse().unwrap();
            ids.push(format!("{id}@{number}"));
        }
        assert_eq!(newest.len(), ids.len());
        ids.sort();
        ids
    }

    fn upsert(id: &str, sequence: u64) -> ImageRow {
        sample_row(id, sequence, Some(clip_like_embedding(sequence, 8)))
    }

    #[tokio::test]
    async fn the_newest_version_of_each_image_is_live_in_whatever_order_rows_come() {
        let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
        assert!(!snapshots.is_ready());
        let first = vec![upsert("a", 2), upsert("b", 1), upsert("a", 1)];
        assert_eq!(apply_rows(&snapshots, 1, first).await, ["a@2", "b@1"]);
        assert!(snapshots.is_ready());
        let second = vec![upsert("c", 1), sample_row("a", 3, None)];
        assert_eq!(apply_rows(&snapshots, 2, second).await, ["b@1", "c@1"]);
        // An upsert that is older than the delete does not bring the image back.
        assert_eq!(apply_rows(&snapshots, 3, vec![upsert("a", 2)]).await, ["b@1", "c@1"]);
        assert!(snapshots.newest().tombstone_bytes > 100);
        assert_eq!(apply_rows(&snapshots, 4, vec![upsert("a", 4)]).await, ["a@4", "b@1", "c@1"]);
        assert_eq!(snapshots.newest().tombstone_bytes, 0);
    }

    #[tokio::test]
    async fn a_reader_keeps_its_snapshot() {
        let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
        apply_rows(&snapshots, 1, vec![upsert("a", 1)]).await;
        let held = snapshots.newest();
        apply_rows(&snapshots, 2, vec![sample_row("a", 2, None)]).await;
        assert_eq!((held.table_version, held.len(), held.images().count()), (1, 1, 1));
        assert_eq!(snapshots.newest().len(), 0);
    }

    /// What is known of an image survives the merging of chunks, and small chunks stay few.
    #[tokio::test]
    async fn many_small_commits_cost_few_chunks() {
        let snapshots = SnapshotStore::new(
            sample_serving_snapshot(vec![sample_prompt_set("one", 8)]),
            u64::MAX,
        );
        apply_rows(&snapshots, 1, Vec::new()).await;
        for version in 2..200 {
            let mut one = upsert(&format!("i{:03}", version % 150), version);
            if let Some(image) = &mut one.image {
                image.uri = version.is_multiple_of(2).then(|| format!("file:///{version}"));
                image.content_hash = padded_hex(version);
                image.attributes = [("n".to_owned(), version.to_string())].into();
            }
            apply_rows(&snapshots, version, vec![one]).await;
        }
        let newest = snapshots.newest();
        assert_eq!(newest.len(), 150);
        assert!(newest.chunks.len() <= 9, "{} chunks", newest.chunks.len());
        for (entry, embedding) in newest.images() {
            let version: u64 = entry.version.sequence.as_str().parse().unwrap();
            assert_eq!(entry.uri, version.is_multiple_of(2).then(|| format!("file:///{version}")));
            assert_eq!(entry.content_hash, padded_hex(version));
            assert_eq!(entry.attributes["n"], version.to_string());
            let set = &newest.serving_snapshot.prompt_sets[0];
            let statistics = newest.statistics(entry.image_id.as_str(), &set.statistics_key);
            assert_eq!(statistics, set.statistics(&embedding), "to the bit");
        }
    }

    fn padded_hex(n: u64) -> String {
        format!("{n:064x}")
    }

    #[tokio::test]
    async fn a_new_configuration_replaces_the_old_one_atomically() {
        let snapshots = SnapshotStore::new(
            sample_serving_snapshot(vec![sample_prompt_set("one", 8)]),
            u64::MAX,
        );
        let rows = (0..300).map(|i| upsert(&format!("i{i}"), i + 1)).collect();
        apply_rows(&snapshots, 1, rows).await;
        let held = snapshots.newest();
        let other = sample_prompt_set("two", 8);
        let next =
            ServingSnapshot { state_revision: 7, ..sample_serving_snapshot(vec![other.clone()]) };
        let heard = Mutex::new(0);
        snapshots.switch_serving(next, &|done, _| *heard.lock().unwrap() = done).unwrap();
        let newest = snapshots.newest();
        assert_eq!((newest.serving_snapshot.state_revision, *heard.lock().unwrap()), (7, 300));
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(newest.statistics(id, &other.statistics_key), other.statistics(&embedding));
            let old = &held.serving_snapshot.prompt_sets[0].statistics_key;
            assert!(
                held.statistics(id, old).is_some()
                    && held.statistics(id, &other.statistics_key).is_none()
            );
            assert!(newest.statistics(id, old).is_none(), "what is not served costs no memory");
        }
        // Commits that are taken in meanwhile, and the chunks that these merge, have both.
        let third = sample_prompt_set("three", 8);
        let next = ServingSnapshot {
            state_revision: 8,
            ..sample_serving_snapshot(vec![other.clone(), third.clone()])
        };
        let runtime = tokio::runtime::Handle::current();
        let adopting = snapshots.clone();
        let work = move || {
            let meanwhile = |_, _| {
                let newest = adopting.newest().table_version;
                let rows = (0..200).map(|i| upsert(&format!("m{newest}-{i}"), i + 1)).collect();
                runtime.block_on(apply_rows(&adopting, newest + 1, rows));
            };
            adopting.switch_serving(next, &meanwhile).unwrap();
        };
        tokio::task::spawn_blocking(work).await.unwrap();
        let newest = snapshots.newest();
        assert!(newest.len() > 300);
        for (entry, embedding) in newest.images() {
            let found = newest.statistics(entry.image_id.as_str(), &third.statistics_key);
            assert_eq!(found, third.statistics(&embedding), "{}", entry.image_id.as_str());
        }
        // Later rows get what is served now.
        apply_rows(&snapshots, newest.table_version + 1, vec![upsert("late", 1)]).await;
        assert!(snapshots.newest().statistics("late", &other.statistics_key).is_some());
    }

    #[tokio::test]
    async fn a_whole_table_comes_in_parts_and_is_served_once_all_are_there() {
        let (one, two) = (sample_prompt_set("one", 8), sample_prompt_set("two", 8));
        let snapshots = SnapshotStore::new(sample_serving_snapshot(vec![one.clone()]), u64::MAX);
        apply_rows(&snapshots, 1, vec![upsert("gone", 1), upsert("i1", 1)]).await;
        let part = async |part, ids: std::ops::Range<u64>| {
            let mut rows: Vec<ImageRow> =
                ids.clone().map(|i| upsert(&format!("i{i}"), 9)).collect();
            rows.push(sample_row(&format!("deleted-{}", ids.start), 9, None));
            let changes = TableChanges { version: 5, is_full_snapshot: true, part, rows };
            snapshots.apply_changes(changes).await.unwrap();
            (snapshots.newest().table_version, snapshots.newest().len())
        };
        assert_eq!(part(SnapshotPart::First, 0..50).await, (1, 2), "one that was broken off");
        assert_eq!(part(SnapshotPart::First, 0..100).await, (1, 2));
        // What is served changes meanwhile.
        let next =
            ServingSnapshot { state_revision: 7, ..sample_serving_snapshot(vec![two.clone()]) };
        snapshots.switch_serving(next, &|_, _| {}).unwrap();
        let serial = snapshots.newest().serial;
        assert_eq!(part(SnapshotPart::Middle, 100..200).await, (1, 2));
        assert_eq!(part(SnapshotPart::Last, 200..300).await, (5, 300));
        let newest = snapshots.newest();
        assert_eq!((newest.serving_snapshot.state_revision, newest.serial), (7, serial + 1));
        for (entry, embedding) in newest.images() {
            let id = entry.image_id.as_str();
            assert_eq!(
                newest.statistics(id, &two.statistics_key),
                two.statistics(&embedding),
                "{id}"
            );
            assert!(newest.statistics(id, &one.statistics_key).is_none());
        }
        // Deletes of every part are remembered.
        let late = (0..300).step_by(100).map(|i| upsert(&format!("deleted-{i}"), 8)).collect();
        assert_eq!(apply_rows(&snapshots, 6, late).await.len(), 300);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_with_figures_and_what_fits_is_served() {
        let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), 4 << 20);
        apply_rows(&snapshots, 1, vec![upsert("a", 1)]).await;
        let many = (0..2000)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, 1024))))
            .collect();
        let refused = snapshots
            .apply_changes(TableChanges {
                version: 2,
                is_full_snapshot: false,
                part: SnapshotPart::All,
                rows: many,
            })
            .await;
        let refused = refused.unwrap_err();
        assert_eq!((refused.images, refused.limit_mib), (2001, 4));
        assert!(refused.to_string().contains("search.memory_mib"), "{refused}");
        assert_eq!((snapshots.newest().table_version, snapshots.newest().len()), (1, 1));

        // So are prompt sets, before anything is computed.
        let rows = || (0..1000).map(|i| upsert(&format!("i{i}"), 1)).collect::<Vec<_>>();
        let large = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
        apply_rows(&large, 1, rows()).await;
        let limit = large.newest().memory_usage().total_bytes() + 50_000;
        let small = SnapshotStore::new(sample_serving_snapshot(Vec::new()), limit);
        apply_rows(&small, 1, rows()).await;
        let sets = (0..4).map(|i| sample_prompt_set(&format!("set{i}"), 8)).collect();
        let refused = small
            .switch_serving(sample_serving_snapshot(sets), &|_, _| panic!("it computes"))
            .unwrap_err();
        assert_eq!(refused.images, 1000);
        apply_rows(&small, 2, vec![upsert("late", 1)]).await;
        assert_eq!(small.newest().chunks.iter().map(|c| c.statistics.len()).sum::<usize>(), 0);
    }

    /// The promise of the memory that a row takes, at 512 dimensions with one prompt set.
    #[tokio::test]
    async fn a_row_takes_no_more_memory_than_promised() {
        let snapshots = SnapshotStore::new(
            sample_serving_snapshot(vec![sample_prompt_set("one", 512)]),
            u64::MAX,
        );
        let rows = 5000;
        let all = (0..rows)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, 512))))
            .collect();
        apply_rows(&snapshots, 1, all).await;
        let memory = snapshots.newest().memory_usage();
        let a_row = memory.other_bytes as f64 / rows as f64;
        assert!(a_row <= 3.5 * 512.0 + 150.0, "{a_row} bytes a row");
        let estimated = crate::search::snapshot::memory::required_bytes(rows, 512, 1) as f64;
        assert!(
            (estimated / memory.other_bytes as f64 - 1.0).abs() < 0.05,
            "{estimated} {}",
            memory.other_bytes
        );
    }
}
