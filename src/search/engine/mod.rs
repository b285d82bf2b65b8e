//! Answers.

mod answer;
mod cursor;
mod drift_monitor;
mod engines;
mod explain;
mod follow;
mod generation_engine;
mod query_log;
mod query_plan;
mod shadow;
mod traffic;

pub use answer::SearchResults;
pub use engines::{EngineRoles, Engines};
pub use explain::{Explanation, ScoredPrompt};
pub use follow::FollowError;
pub use generation_engine::Engine;
pub use traffic::{RankingDifference, TrafficCounts};
