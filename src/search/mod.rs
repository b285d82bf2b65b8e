//! Queries over the stored table: an in-memory snapshot that follows it, and exact ranking.

mod engine;
mod error;
mod options;
mod query;
mod scan;
mod snapshot;
mod timings;

pub use engine::{
    Engine, EngineRoles, Engines, Explanation, FollowError, RankingDifference, ScoredPrompt,
    SearchResults, TrafficCounts,
};
pub use error::QueryError;
pub use options::SearchOptions;
pub use query::{CalibratedThreshold, Filter, MinScore, Query, QueryInput, WeightedText};
pub use scan::{Hit, NoMatchVerdict};
pub use snapshot::{
    AttributeFacet, ImageMetadata, MemoryLimitExceeded, Route, ServingSnapshot, Snapshot,
    SnapshotChange, SnapshotMemory, SnapshotStore, limit_bytes as memory_limit,
    required_bytes as memory_needed,
};
pub use timings::Timings;

#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod exactness_tests;
#[cfg(test)]
pub(crate) mod testing;
