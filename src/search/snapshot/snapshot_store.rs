//! Holds the newest snapshot and builds the next one from commits and changed configurations.
//!
//! The next snapshot is built while the newest one is served; then a pointer is swapped. Readers never
//! wait, and an answer never mixes two versions of the table or two configurations. Snapshots share
//! what did not change: a commit costs its own rows, the bitmaps of the chunks that it touches, and
//! occasionally the merging of small chunks.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use chrono::Utc;
use rayon::prelude::*;
use tokio::sync::broadcast;

use super::chunk::{Chunk, ImageMetadata, MAX_CHUNK_ROWS};
use super::chunk_maintenance::{
    add_missing_statistics, compact_chunks, compute_statistics_column, sync_statistics_columns,
};
use super::memory::MemoryLimitExceeded;
use super::serving::ServingSnapshot;
use super::table_snapshot::Snapshot;
use crate::balance::statistics::StatisticsKey;
use crate::prompts::EmbeddedPromptSet;
use crate::record::{ImageId, ImageRow, RowVersion};
use crate::table::{SnapshotPart, TableChanges};

/// Number of changes that are buffered for slow listeners. A listener that is further behind misses
/// the oldest.
const CHANGE_BUFFER_CAPACITY: usize = 1024;

/// One changed image, as it is sent to listeners.
#[derive(Debug, Clone)]
pub struct SnapshotImageChange {
    /// Id of the image.
    pub image_id: ImageId,
    /// The image after the change; `None` if it was deleted.
    pub image_after: Option<Arc<ImageMetadata>>,
    /// The image before the change; `None` if it is new.
    pub image_before: Option<Arc<ImageMetadata>>,
    /// Version of the table that contains the change.
    pub table_version: u64,
}

/// The newest snapshot, and the changes that lead to the next. Clones share the same state.
#[derive(Clone)]
pub struct SnapshotStore {
    inner: Arc<SharedSnapshots>,
}

struct SharedSnapshots {
    newest: ArcSwap<Snapshot>,
    /// Whether the whole table has been applied once.
    is_table_loaded: AtomicBool,
    changes: broadcast::Sender<SnapshotImageChange>,
    memory_limit_bytes: u64,
    /// Locked while the next snapshot is built.
    builder_state: Mutex<SnapshotBuilderState>,
}

/// What is needed to build the next snapshot.
struct SnapshotBuilderState {
    /// Prompt sets whose statistics are computed for new rows that were stored without them.
    prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// Newest version of each deleted image: an older row of it may still arrive.
    tombstones: HashMap<ImageId, RowVersion>,
    /// Memory of the tombstones.
    tombstone_bytes: usize,
    /// A whole table that is being loaded and of which parts are still missing.
    partial_snapshot: Option<Snapshot>,
}

impl SnapshotBuilderState {
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

/// Returns the bytes of a tombstone: two reference-counted texts, and an entry of a map that is at
/// worst half empty.
fn tombstone_bytes(id: &ImageId, version: &RowVersion) -> usize {
    let reference_counts = 4 * size_of::<usize>();
    2 * size_of::<(ImageId, RowVersion)>()
        + reference_counts
        + id.as_str().len()
        + version.sequence.as_str().len()
}

impl SnapshotStore {
    /// Creates a store whose snapshot is empty until the first [`SnapshotStore::apply_changes`]. It
    /// loads at most `memory_limit_bytes`.
    pub fn new(serving_snapshot: ServingSnapshot, memory_limit_bytes: u64) -> Self {
        let writer = SnapshotBuilderState {
            prompt_sets: serving_snapshot.prompt_sets.clone(),
            tombstones: HashMap::new(),
            tombstone_bytes: 0,
            partial_snapshot: None,
        };
        let inner = SharedSnapshots {
            newest: ArcSwap::from_pointee(Snapshot::empty(serving_snapshot.into())),
            is_table_loaded: false.into(),
            changes: broadcast::channel(CHANGE_BUFFER_CAPACITY).0,
            memory_limit_bytes,
            builder_state: writer.into(),
        };
        Self { inner: inner.into() }
    }

    /// Returns the newest snapshot.
    pub fn newest(&self) -> Arc<Snapshot> {
        self.inner.newest.load_full()
    }

    /// Returns whether the whole table has been applied once.
    pub fn is_ready(&self) -> bool {
        self.inner.is_table_loaded.load(Ordering::Acquire)
    }

    /// Returns the maximum number of bytes that are loaded.
    pub fn memory_limit_bytes(&self) -> u64 {
        self.inner.memory_limit_bytes
    }

    /// Returns a receiver of all changes from now on, except those of a whole table.
    pub fn subscribe(&self) -> broadcast::Receiver<SnapshotImageChange> {
        self.inner.changes.subscribe()
    }

    /// Applies what the follower read and publishes the next snapshot; a whole table is published with
    /// its last part. If that would need more memory than the limit, the snapshot does not change.
    pub async fn apply_changes(&self, changes: TableChanges) -> Result<(), MemoryLimitExceeded> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || inner.apply_changes(changes)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Computes the statistics that live rows lack for `serving_snapshot`, then serves it in one step.
    /// `progress` is called with the number of completed images and of all images. Blocks while it
    /// computes: call it from a thread that may block.
    pub fn switch_serving(
        &self,
        serving_snapshot: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        self.inner.switch_serving(serving_snapshot, progress)
    }
}

impl SharedSnapshots {
    fn lock_builder_state(&self) -> std::sync::MutexGuard<'_, SnapshotBuilderState> {
        // A writer that panicked has published nothing; its tombstones may be ahead, which keeps
        // deleted images deleted.
        self.builder_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply_changes(&self, changes: TableChanges) -> Result<(), MemoryLimitExceeded> {
        let mut writer = self.lock_builder_state();
        let old = self.newest.load_full();
        let has_listeners = !changes.is_full_snapshot && self.changes.receiver_count() > 0;
        let partial_load = writer.partial_snapshot.take().filter(|_| !changes.part.is_first());
        let mut next = match partial_load {
            _ if !changes.is_full_snapshot => old.clone_for_update(),
            Some(partial_load) => partial_load,
            None => {
                (writer.tombstones, writer.tombstone_bytes) = (HashMap::new(), 0);
                Snapshot {
                    chunks: Vec::new(),
                    computed_statistics_count: 0,
                    live_count: 0,
                    ..old.clone_for_update()
                }
            }
        };
        next.table_version = changes.table_version;
        next.applied_at = Some(Utc::now());
        let mut changed_images = Vec::new();
        // Rows that stop being live, by chunk.
        let mut replaced_rows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut new_rows: Vec<ImageRow> = Vec::new();
        for row in newest_row_per_image(changes.rows) {
            let version = RowVersion::from_row(&row);
            // A whole table has each image only once, so that there is no earlier row to find.
            let location =
                (!changes.is_full_snapshot).then(|| next.find_row(row.image_id.as_str())).flatten();
            let known = location.map(|l| next.chunks[l.chunk_index].data.version(l.row_index));
            let known = known.as_ref().or_else(|| writer.tombstones.get(&row.image_id));
            if known.is_some_and(|known| *known >= version) {
                continue;
            }
            next.applied_row_count += 1;
            if let Some(location) = location {
                replaced_rows.entry(location.chunk_index).or_default().push(location.row_index);
            }
            if has_listeners {
                let before =
                    location.and_then(|l| next.chunks[l.chunk_index].data.metadata(l.row_index));
                changed_images.push((row.image_id.clone(), before));
            }
            if row.image.is_some() {
                writer.remove_tombstone(&row.image_id);
                new_rows.push(row);
            } else {
                writer.add_tombstone(row.image_id, version);
            }
        }
        next.tombstone_bytes = writer.tombstone_bytes;
        for (chunk, rows) in replaced_rows {
            next.chunks[chunk] = next.chunks[chunk].without_rows(&rows);
        }
        next.memory_usage().check_limit_with_rows(&new_rows, self.memory_limit_bytes)?;
        next.computed_statistics_count +=
            add_missing_statistics(&mut new_rows, &writer.prompt_sets);
        let keys: Vec<StatisticsKey> =
            writer.prompt_sets.iter().map(|set| set.statistics_key.clone()).collect();
        let mut rows_per_chunk = Vec::new();
        while !new_rows.is_empty() {
            let rest = new_rows.split_off(new_rows.len().min(MAX_CHUNK_ROWS));
            rows_per_chunk.push(std::mem::replace(&mut new_rows, rest));
        }
        let new_chunks = rows_per_chunk.into_par_iter().map(|rows| Chunk::from_rows(&rows, &keys));
        next.chunks.par_extend(new_chunks);
        next.computed_statistics_count += compact_chunks(&mut next.chunks, &writer.prompt_sets);
        if !changes.part.is_last() {
            self.count_and_check_memory(&mut next)?;
            writer.partial_snapshot = Some(next);
            return Ok(());
        }
        if changes.part == SnapshotPart::Last {
            // The configuration may have changed since the first part.
            let newest = self.newest.load();
            (next.serving_snapshot, next.serial) = (newest.serving_snapshot.clone(), newest.serial);
            for chunk in &mut next.chunks {
                next.computed_statistics_count +=
                    sync_statistics_columns(chunk, &writer.prompt_sets, &mut HashMap::new());
            }
        }
        self.publish(next)?;
        self.is_table_loaded.store(true, Ordering::Release);
        let newest = self.newest.load();
        for (image_id, before) in changed_images {
            let after = newest.metadata(image_id.as_str());
            let before = before.map(Arc::new);
            // An error means that there are no listeners any more.
            let _ = self.changes.send(SnapshotImageChange {
                image_id,
                image_after: after,
                image_before: before,
                table_version: newest.table_version,
            });
        }
        Ok(())
    }

    fn switch_serving(
        &self,
        serving_snapshot: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        let previous_sets = {
            let mut writer = self.lock_builder_state();
            // Checked before anything is computed, because a caller may retry without end.
            self.newest
                .load()
                .memory_usage_with_sets(serving_snapshot.prompt_sets.len())
                .check_limit(self.memory_limit_bytes)?;
            // From here on new rows get the statistics of both configurations.
            let previous_sets = writer.prompt_sets.clone();
            for set in &serving_snapshot.prompt_sets {
                if writer.prompt_sets.iter().all(|known| known.statistics_key != set.statistics_key)
                {
                    writer.prompt_sets.push(set.clone());
                }
            }
            previous_sets
        };
        // Most rows are computed without holding the lock, so that commits can be applied in the
        // meantime. The rows that these add already have the statistics of both configurations.
        let snapshot = self.newest.load_full();
        let (mut completed, total) = (0, snapshot.len());
        let mut columns = HashMap::new();
        for chunk in &snapshot.chunks {
            for set in &serving_snapshot.prompt_sets {
                if !chunk.statistics.contains_key(&set.statistics_key) {
                    let key = (Arc::as_ptr(&chunk.data), set.statistics_key.clone());
                    columns.insert(key, compute_statistics_column(chunk, set));
                }
            }
            completed += chunk.live_count;
            progress(completed, total);
        }
        let mut writer = self.lock_builder_state();
        let mut next = self.newest.load_full().clone_for_update();
        for chunk in &mut next.chunks {
            next.computed_statistics_count +=
                sync_statistics_columns(chunk, &serving_snapshot.prompt_sets, &mut columns);
        }
        let sets = serving_snapshot.prompt_sets.clone();
        next.serving_snapshot = serving_snapshot.into();
        let result = self.publish(next);
        writer.prompt_sets = if result.is_ok() { sets } else { previous_sets };
        result
    }

    /// Counts the live images of `next`, and returns an error if it needs more memory than the limit.
    fn count_and_check_memory(&self, next: &mut Snapshot) -> Result<(), MemoryLimitExceeded> {
        next.live_count = next.chunks.iter().map(|chunk| chunk.live_count).sum();
        next.memory_usage().check_limit(self.memory_limit_bytes)
    }

    /// Makes `next` the newest snapshot, unless it needs more memory than the limit.
    fn publish(&self, mut next: Snapshot) -> Result<(), MemoryLimitExceeded> {
        self.count_and_check_memory(&mut next)?;
        next.serial += 1;
        self.newest.store(next.into());
        Ok(())
    }
}

/// Keeps the newest row of each image, sorted by id.
fn newest_row_per_image(mut rows: Vec<ImageRow>) -> Vec<ImageRow> {
    rows.par_sort_unstable_by(|a, b| {
        a.image_id
            .cmp(&b.image_id)
            .then_with(|| RowVersion::from_row(b).cmp(&RowVersion::from_row(a)))
    });
    rows.dedup_by(|later, first| later.image_id == first.image_id);
    rows
}
