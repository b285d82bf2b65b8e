//! Text and image search over the stored table.
//!
//! A snapshot keeps the newest version of every image in memory and follows the table (`snapshot`).
//! A query is validated, embedded and turned into a mask of the rows that its filter allows
//! (`query`). One pass over compact codes of the embeddings, followed by exact scoring of the few
//! rows that matter, ranks the images (`scan`). The engine combines these steps into answers: it
//! chooses the configuration, pages, explains, and compares a candidate with the live configuration
//! (`engine`). Every normaliser is affine in the raw score (see [`crate::balance::normalise`]), so
//! that one pass gives both the raw and the balanced ranking.

mod engine;
mod error;
mod options;
mod query;
mod scan;
mod snapshot;
mod timings;

pub use engine::{
    Engine, EngineRoles, Engines, Explanation, FollowError, RankingDifference, RerankCandidate,
    RerankResults, RerankedImage, ScoreAndRank, ScoredPrompt, SearchResults, TrafficCounts,
};
pub use error::QueryError;
pub use options::SearchOptions;
pub use query::{CalibratedThreshold, Filter, MinScore, Query, QueryInput, WeightedText};
pub use scan::{Hit, NoMatchVerdict};
pub use snapshot::{
    AttributeFacet, ImageMetadata, MemoryLimitExceeded, ServingRole, ServingSnapshot, Snapshot,
    SnapshotImageChange, SnapshotMemory, SnapshotStore, memory_limit_bytes, memory_required_bytes,
};
pub use timings::Timings;

#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod exactness_tests;
#[cfg(test)]
pub(crate) mod testing;
