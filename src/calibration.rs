//! Thresholds below which a hit is not to be trusted, and what they were measured on. Pure.
//!
//! They hold for one configuration (generation, prompt set, normaliser, weight, scale) and are stored
//! with it, so that they change when it does.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Thresholds of one configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Calibration {
    /// Hits with a lower balanced score are more often wrong than was asked for; none where no
    /// threshold reaches it.
    pub min_score: Option<f32>,
    /// When a best hit says that nothing matches.
    pub no_match: Option<NoMatch>,
    /// When this was measured.
    pub at: DateTime<Utc>,
    /// Fingerprint of the evaluation's report.
    pub evaluation: String,
}

/// The best hit of a query is not distinguishable from what unrelated texts reach where `signal` is
/// less than `below`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatch {
    /// What is compared.
    pub signal: Signal,
    /// The threshold.
    pub below: f32,
}

/// What is compared of the best hit of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// Its balanced score.
    Score,
    /// How many standard deviations its balanced score stands above the mean of all images'.
    Standout,
}

/// Moments of the balanced scores of one query over all scanned images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Background {
    /// Mean.
    pub mean: f32,
    /// Population standard deviation.
    pub std: f32,
}

impl NoMatch {
    /// Whether nothing matches, by the best balanced score and the scores of all images.
    pub fn holds(&self, best: f32, background: Background) -> bool {
        let value = match self.signal {
            Signal::Score => best,
            Signal::Standout => (best - background.mean) / background.std.max(f32::MIN_POSITIVE),
        };
        value < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_decides_what_is_compared() {
        let background = Background { mean: 0.2, std: 0.02 };
        let score = NoMatch { signal: Signal::Score, below: 0.25 };
        let standout = NoMatch { signal: Signal::Standout, below: 3.0 };
        assert!(score.holds(0.24, background) && !score.holds(0.26, background));
        assert!(standout.holds(0.25, background) && !standout.holds(0.27, background));
        assert!(!standout.holds(0.27, Background { std: 0.0, ..background }));
    }
}
