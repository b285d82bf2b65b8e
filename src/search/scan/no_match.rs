//! Decides whether the best hit of a query matches at all.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::calibration::{
    BestHitFeatures, NoMatchRule, NoMatchSignal, ScoreDistribution, Vocabulary,
};

/// Whether the best hit of a query scores better than best hits of unrelated texts do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatchVerdict {
    /// Whether the best hit is no better than those of unrelated texts, so that probably nothing
    /// matches.
    pub nothing_matches: bool,
    /// Signal that was compared with the threshold.
    pub signal: NoMatchSignal,
    /// Value of the signal for the best hit.
    pub value: f32,
    /// If the value is below this, nothing matches.
    pub threshold: f32,
    /// The verdict as a sentence.
    pub reason: String,
}

impl NoMatchVerdict {
    /// Applies a calibrated rule to the balanced score of the best hit of `text`. `background` is the
    /// distribution of the scores of all images, `vocabulary` the words of the served prompt set.
    pub fn from_best_hit(
        rule: NoMatchRule,
        score: f32,
        background: ScoreDistribution,
        text: &str,
        vocabulary: &Vocabulary,
    ) -> Self {
        let hit = BestHitFeatures {
            score,
            background,
            known_word_share: vocabulary.known_word_share(text),
        };
        let (nothing_matches, value) = (rule.is_no_match(hit), rule.signal.value(hit));
        let z_score = NoMatchSignal::ZScore.value(hit);
        let observation = match rule.signal {
            NoMatchSignal::Score => format!("the best hit has the balanced score {score:.3}"),
            NoMatchSignal::ZScore => {
                format!("the best hit is {z_score:.1} standard deviations above the average image")
            }
            NoMatchSignal::VocabularyZScore => format!(
                "the best hit is {z_score:.1} standard deviations above the average image, and {:.0} % of the query's words are in the prompts of this catalogue",
                100.0 * hit.known_word_share
            ),
        };
        let comparison = if nothing_matches {
            "unrelated texts score as high"
        } else {
            "unrelated texts rarely score as high"
        };
        let reason = format!(
            "{observation}: {comparison} ({} {value:.2}, threshold {:.2})",
            rule.signal.name(),
            rule.threshold
        );
        Self { nothing_matches, signal: rule.signal, value, threshold: rule.threshold, reason }
    }
}
