//! The live images at one version of the table.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use chrono::{DateTime, Utc};

use super::chunk::{Chunk, ImageMetadata};
use super::facets::AttributeFacet;
use super::memory::SnapshotMemory;
use super::serving::ServingSnapshot;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::Embedding;

/// Constants of the catalogue that are not frozen are computed again when one row in so many has
/// changed.
const SCALE_REFRESH_DIVISOR: u64 = 100;

/// The live images at one version of the table, and how they are served.
#[derive(Debug)]
pub struct Snapshot {
    /// Version of the table.
    pub table_version: u64,
    /// Tells snapshots apart: two of one version may be served differently.
    pub serial: u64,
    /// When that version was taken in.
    pub applied_at: Option<DateTime<Utc>>,
    /// By what queries are answered.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Statistics that were computed here, because the row came without them: one an image and set.
    pub computed_statistics: usize,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) live_count: usize,
    /// Rows that were taken in since the start.
    pub(crate) changed_rows: u64,
    /// Bytes of what is remembered of deleted images.
    pub(crate) tombstone_bytes: usize,
    pub(crate) scale_cache: ScaleCache,
    /// What there is to filter by, once asked for.
    pub(crate) facets: OnceLock<Vec<AttributeFacet>>,
}

pub(crate) type ScaleCache =
    Arc<Mutex<HashMap<(StatisticsKey, Normaliser), (u64, ScaleConstants)>>>;

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RowLocation {
    pub chunk: usize,
    pub row: usize,
}

impl Snapshot {
    pub(crate) fn empty(served: Arc<ServingSnapshot>) -> Self {
        Self {
            table_version: 0,
            serial: 0,
            applied_at: None,
            serving_snapshot: served,
            computed_statistics: 0,
            chunks: Vec::new(),
            live_count: 0,
            changed_rows: 0,
            tombstone_bytes: 0,
            scale_cache: ScaleCache::default(),
            facets: OnceLock::new(),
        }
    }

    /// What the next one begins with.
    pub(crate) fn clone_for_update(&self) -> Self {
        Self {
            serving_snapshot: self.serving_snapshot.clone(),
            chunks: self.chunks.clone(),
            scale_cache: self.scale_cache.clone(),
            facets: OnceLock::new(),
            ..*self
        }
    }

    /// How many images are live.
    pub fn len(&self) -> usize {
        self.live_count
    }

    /// Whether no image is live.
    pub fn is_empty(&self) -> bool {
        self.live_count == 0
    }

    /// What is known of the image with this id, if it is live.
    pub fn metadata(&self, id: &str) -> Option<Arc<ImageMetadata>> {
        let place = self.find_row(id)?;
        self.chunks[place.chunk].data.metadata(place.row).map(Arc::new)
    }

    /// The stored embedding of the image with this id, if it is live.
    pub fn embedding(&self, id: &str) -> Option<Embedding> {
        let place = self.find_row(id)?;
        Some(self.chunks[place.chunk].data.embedding(place.row))
    }

    /// The statistics of a live image.
    pub fn statistics(&self, id: &str, key: &StatisticsKey) -> Option<ScoreStatistics> {
        let place = self.find_row(id)?;
        let column = self.chunks[place.chunk].statistics.get(key)?;
        Some(column[place.row]).filter(|s| s.n > 0)
    }

    /// All live images with their embeddings, in no particular order.
    pub fn images(&self) -> impl Iterator<Item = (ImageMetadata, Embedding)> + '_ {
        let of = |chunk: &'_ Chunk, row: usize| {
            Some((chunk.data.metadata(row)?, chunk.data.embedding(row)))
        };
        self.chunks.iter().flat_map(move |c| c.live_rows().filter_map(move |row| of(c, row)))
    }

    pub(crate) fn find_row(&self, id: &str) -> Option<RowLocation> {
        self.chunks.iter().enumerate().find_map(|(chunk, c)| {
            let row = c.data.find_row(id).filter(|row| c.is_live(*row))?;
            Some(RowLocation { chunk, row })
        })
    }

    /// The constants c and m of a normaliser over the live images. They are kept while less than
    /// one row in [`STALE_SCALE`] has changed.
    pub fn scale_constants(&self, key: &StatisticsKey, normaliser: Normaliser) -> ScaleConstants {
        if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
            return ScaleConstants::default();
        }
        let name = (key.clone(), normaliser);
        let scales = || self.scale_cache.lock().unwrap_or_else(PoisonError::into_inner);
        let known = scales().get(&name).copied();
        let fresh = |at: u64| {
            self.changed_rows.abs_diff(at) <= self.live_count as u64 / SCALE_REFRESH_DIVISOR
        };
        if let Some((_, scale)) = known.filter(|(at, _)| fresh(*at)) {
            return scale;
        }
        let scale = ScaleConstants::from_catalogue(normaliser, self.live_statistics(key));
        scales().insert(name, (self.changed_rows, scale));
        scale
    }

    /// The statistics of the live images that have them.
    pub(crate) fn live_statistics<'a>(
        &'a self,
        key: &'a StatisticsKey,
    ) -> impl Iterator<Item = ScoreStatistics> + 'a {
        let columns = self.chunks.iter().filter_map(|c| Some((c, c.statistics.get(key)?)));
        columns.flat_map(|(c, all)| c.live_rows().map(|row| all[row])).filter(|s| s.n > 0)
    }

    /// Bytes in memory, and how they are spent.
    pub fn memory_usage(&self) -> SnapshotMemory {
        let (mut named, mut rest) = (self.tombstone_bytes, 0);
        for chunk in &self.chunks {
            let (n, r) = chunk.memory_bytes();
            named += n;
            rest += r;
        }
        SnapshotMemory { image_count: self.live_count, text_bytes: named, other_bytes: rest }
    }

    /// The same with the statistics of so many sets.
    pub(crate) fn memory_usage_with_sets(&self, sets: usize) -> SnapshotMemory {
        let memory = self.memory_usage();
        let column = |chunk: &Chunk| chunk.data.len * size_of::<ScoreStatistics>();
        let now: usize = self.chunks.iter().map(|c| c.statistics.len() * column(c)).sum();
        let then = sets * self.chunks.iter().map(column).sum::<usize>();
        SnapshotMemory { other_bytes: memory.other_bytes - now + then, ..memory }
    }
}
