//! Whether anything matches at all.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::calibration::{Background, BestHit, NoMatch, Signal, Vocabulary};

/// Whether the best hit can be told from what unrelated texts reach.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Unmatched {
    /// Whether it cannot: nothing matches.
    pub holds: bool,
    /// What was compared.
    pub signal: Signal,
    /// Its value for the best hit.
    pub value: f32,
    /// Less than this: nothing matches.
    pub below: f32,
    /// In plain words.
    pub reason: String,
}

impl Unmatched {
    /// By a calibrated threshold, from the best hit of `text` and the moments of all images' scores.
    pub fn of(
        rule: NoMatch,
        score: f32,
        background: Background,
        text: &str,
        vocabulary: &Vocabulary,
    ) -> Self {
        let hit = BestHit { score, background, known: vocabulary.known(text) };
        let (holds, value) = (rule.holds(hit), rule.signal.of(hit));
        let standout = Signal::Standout.of(hit);
        let found = match rule.signal {
            Signal::Score => format!("the best hit has the balanced score {score:.3}"),
            Signal::Standout => {
                format!(
                    "the best hit stands {standout:.1} standard deviations above the average image"
                )
            }
            Signal::Evidence => format!(
                "the best hit stands {standout:.1} standard deviations above the average image, and {:.0} % of the query's words are in the prompts of this catalogue",
                100.0 * hit.known
            ),
        };
        let verdict = if holds {
            "unrelated texts reach as much"
        } else {
            "unrelated texts rarely reach as much"
        };
        let reason = format!(
            "{found}: {verdict} ({} {value:.2}, threshold {:.2})",
            rule.signal.name(),
            rule.below
        );
        Self { holds, signal: rule.signal, value, below: rule.below, reason }
    }
}
