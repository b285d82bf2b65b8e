//! Durations of the steps of an answer.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Durations of the steps of an answer, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Embedding the query, or finding its embedding in the cache.
    pub embed_ms: f64,
    /// Waiting for a pass over the catalogue, which other queries share.
    pub wait_ms: f64,
    /// The pass over the codes of all images.
    pub scan_ms: f64,
    /// Computing exact scores and ranks from the bounds of the pass.
    pub rank_ms: f64,
}

/// Converts to milliseconds, rounded to microseconds.
pub(crate) fn to_milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
