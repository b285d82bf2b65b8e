//! The live images at one version of the table.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use chrono::{DateTime, Utc};

use super::chunk::{Chunk, ImageMetadata};
use super::facets::AttributeFacet;
use super::memory::SnapshotMemory;
use super::serving::ServingSnapshot;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::Embedding;

/// The scale constants of the catalogue, unless they are frozen, are computed again when one row in
/// this many has changed.
const SCALE_REFRESH_DIVISOR: u64 = 100;

/// The live images at one version of the table, and the configuration that serves them.
#[derive(Debug)]
pub struct Snapshot {
    /// Version of the Delta table.
    pub table_version: u64,
    /// Number of this snapshot since the start. Two snapshots of one table version may differ in their
    /// configuration.
    pub serial: u64,
    /// When that version was applied; `None` before the first.
    pub applied_at: Option<DateTime<Utc>>,
    /// The configuration that answers queries.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Number of statistics that were computed here because the row was stored without them, one per
    /// image and prompt set.
    pub computed_statistics_count: usize,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) live_count: usize,
    /// Number of rows that were applied since the start.
    pub(crate) applied_row_count: u64,
    /// Bytes of the tombstones of deleted images.
    pub(crate) tombstone_bytes: usize,
    pub(crate) scale_cache: ScaleCache,
    /// Facets of the live images, counted on first use.
    pub(crate) facets: OnceLock<Vec<AttributeFacet>>,
}

/// Scale constants, with the value of `changed_rows` at which they were computed.
pub(crate) type ScaleCache =
    Arc<Mutex<HashMap<(StatisticsKey, Normaliser), (u64, ScaleConstants)>>>;

/// Position of a row: the index of its chunk, and of the row in that chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RowLocation {
    pub chunk_index: usize,
    pub row_index: usize,
}

impl Snapshot {
    pub(crate) fn empty(serving_snapshot: Arc<ServingSnapshot>) -> Self {
        Self {
            table_version: 0,
            serial: 0,
            applied_at: None,
            serving_snapshot,
            computed_statistics_count: 0,
            chunks: Vec::new(),
            live_count: 0,
            applied_row_count: 0,
            tombstone_bytes: 0,
            scale_cache: ScaleCache::default(),
            facets: OnceLock::new(),
        }
    }

    /// Copies this snapshot as the start of the next one. The chunks are shared.
    pub(crate) fn clone_for_update(&self) -> Self {
        Self {
            serving_snapshot: self.serving_snapshot.clone(),
            chunks: self.chunks.clone(),
            scale_cache: self.scale_cache.clone(),
            facets: OnceLock::new(),
            ..*self
        }
    }

    /// Returns the number of live images.
    pub fn len(&self) -> usize {
        self.live_count
    }

    /// Returns whether no image is live.
    pub fn is_empty(&self) -> bool {
        self.live_count == 0
    }

    /// Returns the metadata of the image with this id, or `None` if it is not live.
    pub fn metadata(&self, id: &str) -> Option<Arc<ImageMetadata>> {
        let location = self.find_row(id)?;
        self.chunks[location.chunk_index].data.metadata(location.row_index).map(Arc::new)
    }

    /// Returns the stored embedding of the image with this id, or `None` if it is not live.
    pub fn embedding(&self, id: &str) -> Option<Embedding> {
        let location = self.find_row(id)?;
        Some(self.chunks[location.chunk_index].data.embedding(location.row_index))
    }

    /// Returns the statistics of an image, or `None` if it is not live or has none for `key`.
    pub fn statistics(&self, id: &str, key: &StatisticsKey) -> Option<ScoreStatistics> {
        let location = self.find_row(id)?;
        let column = self.chunks[location.chunk_index].statistics.get(key)?;
        Some(column[location.row_index]).filter(|s| s.n > 0)
    }

    /// Iterates over all live images, in no particular order.
    pub fn images(&self) -> impl Iterator<Item = ImageMetadata> + '_ {
        self.chunks.iter().flat_map(|c| c.live_rows().filter_map(|row| c.data.metadata(row)))
    }

    /// Returns the images that were embedded last, newest first, and at most `limit` of them.
    pub fn newest_images(&self, limit: usize) -> Vec<ImageMetadata> {
        // The oldest of the newest is at the top, to be replaced. Most images are older, and only compared.
        let mut newest = BinaryHeap::with_capacity(limit);
        for (chunk_index, chunk) in self.chunks.iter().enumerate() {
            for row in chunk.live_rows() {
                let image = Reverse((chunk.data.embedded_at[row], chunk_index, row));
                if newest.len() < limit {
                    newest.push(image);
                } else if let Some(mut oldest) = newest.peek_mut()
                    && image < *oldest
                {
                    *oldest = image;
                }
            }
        }
        let rows = newest.into_sorted_vec().into_iter();
        rows.filter_map(|Reverse((_, chunk, row))| self.chunks[chunk].data.metadata(row)).collect()
    }

    /// Iterates over all live images with their embeddings, in no particular order.
    pub fn images_with_embeddings(&self) -> impl Iterator<Item = (ImageMetadata, Embedding)> + '_ {
        let image = |chunk: &'_ Chunk, row: usize| {
            Some((chunk.data.metadata(row)?, chunk.data.embedding(row)))
        };
        self.chunks.iter().flat_map(move |c| c.live_rows().filter_map(move |row| image(c, row)))
    }

    /// Finds the row of a live image.
    pub(crate) fn find_row(&self, id: &str) -> Option<RowLocation> {
        self.chunks.iter().enumerate().find_map(|(chunk, c)| {
            let row = c.data.find_row(id).filter(|row| c.is_live(*row))?;
            Some(RowLocation { chunk_index: chunk, row_index: row })
        })
    }

    /// Returns the constants c and m of a normaliser over the live images. They are cached until more
    /// than one row in a hundred has changed.
    pub fn scale_constants(&self, key: &StatisticsKey, normaliser: Normaliser) -> ScaleConstants {
        if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
            return ScaleConstants::default();
        }
        let cache_key = (key.clone(), normaliser);
        let cache = || self.scale_cache.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = cache().get(&cache_key).copied();
        let is_fresh = |computed_at: u64| {
            let changed = self.applied_row_count.abs_diff(computed_at);
            changed <= self.live_count as u64 / SCALE_REFRESH_DIVISOR
        };
        if let Some((_, scale)) = cached.filter(|(computed_at, _)| is_fresh(*computed_at)) {
            return scale;
        }
        let scale = ScaleConstants::from_catalogue(normaliser, self.live_statistics(key));
        cache().insert(cache_key, (self.applied_row_count, scale));
        scale
    }

    /// Iterates over the statistics of the live images that have them.
    pub(crate) fn live_statistics<'a>(
        &'a self,
        key: &'a StatisticsKey,
    ) -> impl Iterator<Item = ScoreStatistics> + 'a {
        let columns = self.chunks.iter().filter_map(|c| Some((c, c.statistics.get(key)?)));
        columns.flat_map(|(c, all)| c.live_rows().map(|row| all[row])).filter(|s| s.n > 0)
    }

    /// Returns the bytes in memory, by purpose.
    pub fn memory_usage(&self) -> SnapshotMemory {
        let (mut text_bytes, mut other_bytes) = (self.tombstone_bytes, 0);
        for chunk in &self.chunks {
            let (text, other) = chunk.text_and_other_bytes();
            text_bytes += text;
            other_bytes += other;
        }
        SnapshotMemory { image_count: self.live_count, text_bytes, other_bytes }
    }

    /// Returns the bytes in memory that this snapshot would take with the statistics of `sets` prompt
    /// sets.
    pub(crate) fn memory_usage_with_sets(&self, sets: usize) -> SnapshotMemory {
        let memory = self.memory_usage();
        let column_bytes = |chunk: &Chunk| chunk.data.row_count * size_of::<ScoreStatistics>();
        let current: usize = self.chunks.iter().map(|c| c.statistics.len() * column_bytes(c)).sum();
        let future = sets * self.chunks.iter().map(column_bytes).sum::<usize>();
        SnapshotMemory { other_bytes: memory.other_bytes - current + future, ..memory }
    }
}
