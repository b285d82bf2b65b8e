//! The engine of one generation.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::cursor::PinnedSnapshots;
use super::drift_monitor::DriftMonitor;
use super::traffic::{TrafficCounters, TrafficCounts};
use crate::catalogue::RolloutCandidate;
use crate::clip::Encoders;
use crate::ingest::decode;
use crate::record::AttributeTypes;
use crate::search::options::SearchOptions;
use crate::search::query::{FilterCache, QueryEmbedder};
use crate::search::scan::BatchScanner;
use crate::search::snapshot::{
    AttributeFacet, MemoryLimitExceeded, ServingSnapshot, Snapshot, SnapshotStore, count_facets,
    limit_bytes,
};

/// Answers queries over the newest snapshot.
pub struct Engine {
    pub(super) embedder: QueryEmbedder,
    pub(super) options: SearchOptions,
    pub(super) declared_attributes: AttributeTypes,
    pub(super) snapshots: SnapshotStore,
    pub(super) filter_cache: FilterCache,
    pub(super) pinned_snapshots: PinnedSnapshots,
    pub(super) scanner: Arc<BatchScanner>,
    pub(super) traffic_counters: Arc<TrafficCounters>,
    /// When the table was last read to its end.
    pub(super) last_refreshed_at: Mutex<Instant>,
    pub(super) drift_monitor: DriftMonitor,
}

impl Engine {
    /// An engine that answers as `served` says, until [`Engine::adopt`].
    pub fn new(towers: Arc<dyn Encoders>, served: ServingSnapshot, options: SearchOptions) -> Self {
        let age = Duration::from_secs(options.cursor_seconds);
        Self {
            embedder: QueryEmbedder::new(towers, &options),
            declared_attributes: AttributeTypes::new(),
            snapshots: SnapshotStore::new(served, limit_bytes(options.memory_mib)),
            filter_cache: FilterCache::default(),
            pinned_snapshots: PinnedSnapshots::new(age, options.cursor_mib << 20),
            scanner: Arc::new(BatchScanner::start(&options)),
            traffic_counters: Arc::default(),
            last_refreshed_at: Mutex::new(Instant::now()),
            drift_monitor: DriftMonitor::default(),
            options,
        }
    }

    /// The same engine, whose filters may name the attributes of `declared`, and that decodes the
    /// pictures of queries within the limits of `decode`.
    pub fn with_attributes_and_decoding(
        mut self,
        declared: AttributeTypes,
        decode: decode::DecodeOptions,
    ) -> Self {
        self.declared_attributes = declared;
        self.embedder = self.embedder.with_decode_options(decode);
        self
    }

    /// An engine with the same limits for another generation, whose model is `towers`. It shares nothing
    /// with this one but the counts.
    pub fn for_generation(&self, towers: Arc<dyn Encoders>, served: ServingSnapshot) -> Self {
        let other = Self::new(towers, served, self.options.clone());
        let other = other.with_attributes_and_decoding(
            self.declared_attributes.clone(),
            self.embedder.decode_options().clone(),
        );
        Self { traffic_counters: self.traffic_counters.clone(), ..other }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &SnapshotStore {
        &self.snapshots
    }

    /// The model.
    pub fn encoders(&self) -> &dyn Encoders {
        &**self.embedder.encoders()
    }

    /// The model, shared.
    pub fn shared_encoders(&self) -> Arc<dyn Encoders> {
        self.embedder.encoders().clone()
    }

    /// What filters may name, over the live images of `snapshot`.
    pub fn facets<'a>(&self, snapshot: &'a Snapshot) -> &'a [AttributeFacet] {
        snapshot.facets.get_or_init(|| count_facets(&self.declared_attributes, &snapshot.chunks))
    }

    /// Bytes of versions that cursors point to, beside the newest.
    pub fn pinned_snapshot_bytes(&self) -> u64 {
        self.pinned_snapshots.extra_bytes(&self.snapshots.newest())
    }

    /// Lets go of versions that no cursor may ask for any more, or that take too much memory.
    pub(in crate::search) fn evict_pinned_snapshots(&self) {
        self.pinned_snapshots.evict(&self.snapshots.newest());
    }

    /// The prompt sets that a query may name, and how queries are answered unless they say
    /// otherwise.
    pub fn serving_snapshot(&self) -> Arc<ServingSnapshot> {
        self.snapshots.newest().serving_snapshot.clone()
    }

    /// Serves `served` from one moment to the next: an answer uses either the old configuration or
    /// the new one. What images lack of the statistics of its sets is computed before; queries and
    /// commits go on meanwhile. `progress` hears of images done and images in all. Computes: call
    /// it from a thread that may block.
    pub fn switch_serving(
        &self,
        served: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        self.snapshots.switch_serving(served, progress)
    }

    /// From now on it is counted how `candidate` does; what was counted of another one is forgotten.
    pub fn count_traffic_for(&self, candidate: Option<&RolloutCandidate>) {
        self.traffic_counters.reset_for(candidate);
    }

    /// Who has answered how many queries, and what the shadow showed.
    pub fn traffic_counts(&self) -> TrafficCounts {
        self.traffic_counters.counts()
    }

    pub(super) fn traffic_counters(&self) -> &Arc<TrafficCounters> {
        &self.traffic_counters
    }

    /// The limits.
    pub fn options(&self) -> &SearchOptions {
        &self.options
    }
}
