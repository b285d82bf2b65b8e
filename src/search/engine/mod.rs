//! Answers queries: combines snapshot, query and scan, and chooses which configuration answers.
//!
//! An [`Engine`] holds one model and one generation in memory (`generation_engine`) and follows its
//! table (`follow`). It turns a query into a request for the scan (`query_plan`), answers it page by
//! page (`answer`, `cursor`), explains the rank of an image (`explain`), and logs each answer
//! (`query_log`). `rerank` ranks candidates that a caller has found elsewhere. [`Engines`] holds the live engine and a standby of another generation and sends each
//! query to exactly one of them (`engines`). `traffic` decides which queries the candidate answers;
//! for some of the others it ranks the images in the background, and the difference is logged
//! (`shadow`). `drift_monitor` compares recent answers with the time of calibration, and `fit_monitor`
//! measures how well the prompt sets fit recent queries.

mod answer;
mod cursor;
mod drift_monitor;
mod engines;
mod explain;
mod fit_monitor;
mod follow;
mod generation_engine;
mod query_log;
mod query_plan;
mod rerank;
mod shadow;
mod traffic;

pub use answer::SearchResults;
pub use engines::{EngineRoles, Engines};
pub use explain::{Explanation, ScoredPrompt};
pub use follow::FollowError;
pub use generation_engine::Engine;
pub use rerank::{RerankCandidate, RerankResults, RerankedImage, ScoreAndRank};
pub use traffic::{RankingDifference, TrafficCounts};
