//! Whether anything matches at all.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::calibration::{
    BestHitFeatures, NoMatchRule, NoMatchSignal, ScoreDistribution, Vocabulary,
};

/// Whether the best hit can be told from what unrelated texts reach.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatchVerdict {
    /// Whether it cannot: nothing matches.
    pub nothing_matches: bool,
    /// What was compared.
    pub signal: NoMatchSignal,
    /// Its value for the best hit.
    pub value: f32,
    /// Less than this: nothing matches.
    pub threshold: f32,
    /// In plain words.
    pub reason: String,
}

impl NoMatchVerdict {
    /// By a calibrated threshold, from the best hit of `text` and the moments of all images' scores.
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
        let (holds, value) = (rule.is_no_match(hit), rule.signal.value(hit));
        let standout = NoMatchSignal::ZScore.value(hit);
        let found = match rule.signal {
            NoMatchSignal::Score => format!("the best hit has the balanced score {score:.3}"),
            NoMatchSignal::ZScore => {
                format!(
                    "the best hit stands {standout:.1} standard deviations above the average image"
                )
            }
            NoMatchSignal::VocabularyZScore => format!(
                "the best hit stands {standout:.1} standard deviations above the average image, and {:.0} % of the query's words are in the prompts of this catalogue",
                100.0 * hit.known_word_share
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
            rule.threshold
        );
        Self {
            nothing_matches: holds,
            signal: rule.signal,
            value,
            threshold: rule.threshold,
            reason,
        }
    }
}
