//! The engine of one generation: its parts, and access to them.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::cursor::PinnedSnapshots;
use super::drift_monitor::DriftMonitor;
use super::fit_monitor::FitMonitor;
use super::traffic::{TrafficCounters, TrafficCounts};
use crate::balance::bank::MeasuredBank;
use crate::catalogue::RolloutCandidate;
use crate::clip::Encoders;
use crate::ingest::decode;
use crate::record::AttributeTypes;
use crate::search::options::SearchOptions;
use crate::search::query::{FilterCache, QueryEmbedder};
use crate::search::scan::BatchScanner;
use crate::search::snapshot::{
    AttributeFacet, MemoryLimitExceeded, ServingSnapshot, Snapshot, SnapshotStore, count_facets,
    memory_limit_bytes,
};

/// Answers queries over the newest snapshot of one generation, with one model.
pub struct Engine {
    pub(super) embedder: QueryEmbedder,
    pub(super) options: SearchOptions,
    pub(super) declared_attributes: AttributeTypes,
    pub(super) snapshots: SnapshotStore,
    pub(super) filter_cache: FilterCache,
    pub(super) pinned_snapshots: PinnedSnapshots,
    pub(super) scanner: Arc<BatchScanner>,
    pub(super) traffic_counters: Arc<TrafficCounters>,
    /// When the table was last polled successfully.
    pub(super) last_polled_at: Mutex<Instant>,
    pub(super) drift_monitor: DriftMonitor,
    pub(super) fit_monitor: FitMonitor,
}

impl Engine {
    /// Creates an engine with an empty snapshot. It answers as `serving_snapshot` defines, until
    /// [`Engine::switch_serving`] is called.
    pub fn new(
        encoders: Arc<dyn Encoders>,
        serving_snapshot: ServingSnapshot,
        options: SearchOptions,
    ) -> Self {
        let cursor_lifetime = Duration::from_secs(options.cursor_seconds);
        Self {
            embedder: QueryEmbedder::new(encoders, &options),
            declared_attributes: AttributeTypes::new(),
            snapshots: SnapshotStore::new(serving_snapshot, memory_limit_bytes(options.memory_mib)),
            filter_cache: FilterCache::default(),
            pinned_snapshots: PinnedSnapshots::new(cursor_lifetime, options.cursor_mib << 20),
            scanner: Arc::new(BatchScanner::start(&options)),
            traffic_counters: Arc::default(),
            last_polled_at: Mutex::new(Instant::now()),
            drift_monitor: DriftMonitor::default(),
            fit_monitor: FitMonitor::default(),
            options,
        }
    }

    /// Returns the same engine with these declared attributes, which filters may name, and these limits
    /// for decoding the pictures of queries.
    pub fn with_attributes_and_decoding(
        mut self,
        declared: AttributeTypes,
        decode_options: decode::DecodeOptions,
    ) -> Self {
        self.declared_attributes = declared;
        self.embedder = self.embedder.with_decode_options(decode_options);
        self
    }

    /// Creates an engine with the same options for another generation and its model. The two engines
    /// share only the traffic counters.
    pub fn for_generation(
        &self,
        encoders: Arc<dyn Encoders>,
        serving_snapshot: ServingSnapshot,
    ) -> Self {
        let other = Self::new(encoders, serving_snapshot, self.options.clone());
        let other = other.with_attributes_and_decoding(
            self.declared_attributes.clone(),
            self.embedder.decode_options().clone(),
        );
        Self { traffic_counters: self.traffic_counters.clone(), ..other }
    }

    /// Returns the store of the snapshots.
    pub fn snapshots(&self) -> &SnapshotStore {
        &self.snapshots
    }

    /// Returns the text and image encoders of the model.
    pub fn encoders(&self) -> &dyn Encoders {
        &**self.embedder.encoders()
    }

    /// Returns a shared reference to the encoders.
    pub fn shared_encoders(&self) -> Arc<dyn Encoders> {
        self.embedder.encoders().clone()
    }

    /// Returns the declared attributes, counted over the live images of `snapshot`.
    pub fn facets<'a>(&self, snapshot: &'a Snapshot) -> &'a [AttributeFacet] {
        snapshot.facets.get_or_init(|| count_facets(&self.declared_attributes, &snapshot.chunks))
    }

    /// Returns the bytes of older snapshots that are kept for cursors.
    pub fn pinned_snapshot_bytes(&self) -> u64 {
        self.pinned_snapshots.extra_bytes(&self.snapshots.newest())
    }

    /// Drops pinned snapshots that are too old, or that take too much memory.
    pub(in crate::search) fn evict_pinned_snapshots(&self) {
        self.pinned_snapshots.evict(&self.snapshots.newest());
    }

    /// Returns the configuration that answers queries now.
    pub fn serving_snapshot(&self) -> Arc<ServingSnapshot> {
        self.snapshots.newest().serving_snapshot.clone()
    }

    /// Replaces the configuration in one step: an answer uses either the old or the new one. Before
    /// that, missing statistics of the new prompt sets are computed, while queries are answered and
    /// commits are applied. `progress` is called with the number of completed images and of all
    /// images. Blocks while it computes: call it from a thread that may block.
    pub fn switch_serving(
        &self,
        serving_snapshot: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        self.snapshots.switch_serving(serving_snapshot, progress)
    }

    /// Counts traffic for `candidate` from now on. Counts of another candidate are reset.
    pub fn count_traffic_for(&self, candidate: Option<&RolloutCandidate>) {
        self.traffic_counters.reset_for(candidate);
    }

    /// Returns how many queries each configuration has answered, and the results of shadow queries.
    pub fn traffic_counts(&self) -> TrafficCounts {
        self.traffic_counters.counts()
    }

    /// Returns the traffic counters, which all engines share.
    pub(super) fn traffic_counters(&self) -> &Arc<TrafficCounters> {
        &self.traffic_counters
    }

    /// Returns how well prompt sets fitted recent queries when that was last measured; nothing before.
    pub fn measured_banks(&self) -> Arc<Vec<MeasuredBank>> {
        self.fit_monitor.measured_banks()
    }

    /// Returns the options of the section `[search]`.
    pub fn options(&self) -> &SearchOptions {
        &self.options
    }
}
