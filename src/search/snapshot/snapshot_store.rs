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

use super::chunk::{Chunk, ImageMetadata, MAX_CHUNK_ROWS};
use super::chunk_maintenance::{
    add_missing_statistics, compact_chunks, complete_statistics, compute_statistics_column,
};
use super::memory::MemoryLimitExceeded;
use super::serving::ServingSnapshot;
use super::table_snapshot::Snapshot;
use crate::balance::statistics::StatisticsKey;
use crate::prompts::EmbeddedPromptSet;
use crate::record::{ImageId, ImageRow, RowVersion};
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
