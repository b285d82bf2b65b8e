//! How long the steps of an answer take.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How long the parts of an answer took, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Embedding the query, or finding it among those that are remembered.
    pub embed_ms: f64,
    /// Waiting for a pass over the catalogue that other queries share.
    pub wait_ms: f64,
    /// That pass.
    pub scan_ms: f64,
    /// From its bounds to exact scores and places.
    pub rank_ms: f64,
}

pub(crate) fn to_milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
