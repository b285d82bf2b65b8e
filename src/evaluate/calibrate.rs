//! Thresholds of a configuration: chosen on one half of the queries, measured on the other.

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::judgements::NoMatchKind;
use super::measures::interval::{ConfidenceInterval, wilson_interval};
use crate::balance::calibration::{BestHitFeatures, NoMatchRule, NoMatchSignal};

/// Fewest shown hits from which a rate of false ones is told.
const MIN_SHOWN_HITS: usize = 20;
/// Share of unrelated and gibberish texts that is worth flagging; beyond it, fewer lost hits are
/// worth more.
const SUFFICIENT_FLAGGED_SHARE: f64 = 0.97;

/// What thresholds are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ThresholdTargets {
    /// Share of false ones among the first hits that are shown, at most.
    pub target_false_hit_rate: f64,
    /// Share of good first hits that may be flagged as no match, at most.
    pub max_lost_hits: f64,
}

impl Default for ThresholdTargets {
    fn default() -> Self {
        Self { target_false_hit_rate: 0.2, max_lost_hits: 0.05 }
    }
}

/// A text's best hit, and what is known of it.
#[derive(Debug, Clone)]
pub struct CalibrationSample<'a> {
    /// The text: decides its half.
    pub text: &'a str,
    /// Its best hit.
    pub best_hit: BestHitFeatures,
    /// What is known of the text.
    pub ground_truth: GroundTruth,
}

/// What is known of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroundTruth {
    /// Some image matches it; whether the best hit does.
    HasMatch {
        /// Whether the best hit is right.
        best_hit_is_right: bool,
    },
    /// No image matches it.
    NoMatch(NoMatchKind),
}

/// Thresholds, and how sure they are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thresholds {
    /// What they were to reach.
    pub targets: ThresholdTargets,
    /// Hits with a lower score are more often wrong than was asked for; none where no threshold
    /// reaches it.
    pub min_score: Option<f32>,
    /// When nothing matches; none where good hits or texts that match nothing are too few.
    pub no_match: Option<NoMatchRule>,
    /// Texts on which they were chosen.
    pub chosen_on_texts: usize,
    /// What they reach on the other half, on which nothing was chosen.
    pub held_out: HeldOutResult,
    /// What each signal could reach, on the held-out half.
    pub signals: Vec<SignalResult>,
}

/// What thresholds reach on texts on which nothing was chosen. Intervals are Wilson's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutResult {
    /// Share of unrelated texts, gibberish and absent ones that are flagged as no match.
    pub flagged: Vec<FlaggedShare>,
    /// Share of good first hits that are flagged as no match.
    pub lost_hits: Option<ConfidenceInterval>,
    /// Share of wrong first hits, where some image matches, that are flagged as no match.
    pub wrong_flagged: Option<ConfidenceInterval>,
    /// Of all that is flagged, how much matches nothing, in this mix of texts.
    pub precision: Option<ConfidenceInterval>,
    /// Share of the queries whose first hit reaches `min_score`.
    pub shown_share: Option<ConfidenceInterval>,
    /// Share of false ones among those.
    pub false_hit_rate: Option<ConfidenceInterval>,
    /// Share of false ones among all first hits, for comparison.
    pub false_hit_rate_unfiltered: Option<ConfidenceInterval>,
}

/// How much of a kind of texts is flagged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlaggedShare {
    /// Which texts.
    pub kind: NoMatchKind,
    /// How many were asked.
    pub texts: usize,
    /// Share that is flagged.
    pub share: Option<ConfidenceInterval>,
}

/// What a signal can reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SignalResult {
    /// Which.
    pub signal: NoMatchSignal,
    /// The threshold that it would have.
    pub threshold: f32,
    /// Chance that a good first hit has a higher value than the best hit of an unrelated or
    /// gibberish text (area under the ROC curve): 0.5 tells nothing, 1 everything.
    pub auc: f64,
    /// Share of unrelated and gibberish texts that it flags.
    pub flagged: f64,
    /// Share of good first hits that it loses.
    pub lost_hits: f64,
}

/// Whether a text belongs to the half on which thresholds are chosen; the other half is held out.
/// Decided by the text, so that it is the same in every evaluation.
pub fn is_in_selection_half(text: &str) -> bool {
    Sha256::digest(text.as_bytes()).first().is_some_and(|byte| byte % 2 == 0)
}

/// Chooses thresholds on one half of `samples` and measures them on the other. `None` where there
/// are no judged queries.
pub fn choose_thresholds(
    samples: &[CalibrationSample],
    targets: ThresholdTargets,
) -> Option<Thresholds> {
    let (choose, rest): (Vec<&CalibrationSample>, Vec<&CalibrationSample>) =
        samples.iter().partition(|sample| is_in_selection_half(sample.text));
    let answers =
        |all: &[&CalibrationSample]| all.iter().filter(|s| is_best_hit_right(s).is_some()).count();
    if answers(&choose) == 0 || answers(&rest) == 0 {
        return None;
    }
    let chosen = NoMatchSignal::ALL
        .map(|signal| choose_signal_threshold(signal, &choose, targets.max_lost_hits));
    // The simplest of those that flag most.
    let max_flagged = chosen.iter().flatten().map(|(_, flagged)| *flagged).fold(0.0, f64::max);
    let no_match = chosen.iter().flatten().find(|(_, flagged)| *flagged > max_flagged - 0.005);
    let no_match = no_match.map(|(rule, _)| *rule);
    let signals = chosen.iter().flatten().map(|(rule, _)| measure_signal(rule, &rest)).collect();
    let min_score = choose_min_score(&choose, targets.target_false_hit_rate);
    Some(Thresholds {
        targets,
        min_score,
        no_match,
        chosen_on_texts: choose.len(),
        held_out: measure_held_out(&rest, min_score, no_match),
        signals,
    })
}

/// Whether the best hit is right, where some image matches.
fn is_best_hit_right(sample: &CalibrationSample) -> Option<bool> {
    match sample.ground_truth {
        GroundTruth::HasMatch { best_hit_is_right: right } => Some(right),
        GroundTruth::NoMatch(_) => None,
    }
}

/// Values of a signal on good first hits, and on unrelated and gibberish texts; each ascending.
fn signal_values(signal: NoMatchSignal, samples: &[&CalibrationSample]) -> (Vec<f32>, Vec<f32>) {
    let sorted_values = |wanted: fn(GroundTruth) -> bool| {
        let found = samples.iter().filter(|s| wanted(s.ground_truth));
        let mut values: Vec<f32> = found.map(|s| signal.value(s.best_hit)).collect();
        values.sort_unstable_by(f32::total_cmp);
        values
    };
    let probe = |known| {
        matches!(known, GroundTruth::NoMatch(NoMatchKind::Unrelated | NoMatchKind::Gibberish))
    };
    (
        sorted_values(|known| known == GroundTruth::HasMatch { best_hit_is_right: true }),
        sorted_values(probe),
    )
}

/// Share of ascending `values` that lie below `threshold`.
fn share_below(values: &[f32], threshold: f32) -> f64 {
    values.partition_point(|value| *value < threshold) as f64 / values.len().max(1) as f64
}

/// The rule of a signal that loses at most `lost` of the good first hits, and the share of unrelated
/// and gibberish texts that it flags.
fn choose_signal_threshold(
    signal: NoMatchSignal,
    samples: &[&CalibrationSample],
    max_lost: f64,
) -> Option<(NoMatchRule, f64)> {
    let (good, nothing) = signal_values(signal, samples);
    if good.len() < MIN_SHOWN_HITS || nothing.is_empty() {
        return None;
    }
    let highest = good[((good.len() as f64 * max_lost) as usize).min(good.len() - 1)];
    // Where a lower threshold flags enough as well, the middle between both is safest.
    let enough =
        nothing[((nothing.len() as f64 * SUFFICIENT_FLAGGED_SHARE).ceil() as usize).max(1) - 1];
    let threshold = if enough < highest { f32::midpoint(enough, highest) } else { highest };
    Some((NoMatchRule { signal, threshold }, share_below(&nothing, threshold)))
}

fn measure_signal(rule: &NoMatchRule, samples: &[&CalibrationSample]) -> SignalResult {
    let (good, nothing) = signal_values(rule.signal, samples);
    let half = |value: f32| {
        let less = nothing.partition_point(|v| *v < value);
        let equal = nothing.partition_point(|v| *v <= value) - less;
        less as f64 + equal as f64 / 2.0
    };
    let pairs = (good.len() * nothing.len()).max(1) as f64;
    SignalResult {
        signal: rule.signal,
        threshold: rule.threshold,
        auc: good.iter().map(|value| half(*value)).sum::<f64>() / pairs,
        flagged: share_below(&nothing, rule.threshold),
        lost_hits: share_below(&good, rule.threshold),
    }
}

/// The lowest score from which on at most the wanted share of first hits is false.
fn choose_min_score(samples: &[&CalibrationSample], max_false_share: f64) -> Option<f32> {
    let mut scored: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.best_hit.score, is_best_hit_right(s)?))).collect();
    scored.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    let mut wrong = 0;
    let mut lowest = None;
    for (i, (score, right)) in scored.iter().enumerate() {
        wrong += usize::from(!right);
        // Of those with the same score, all are shown or none.
        if scored.get(i + 1).is_some_and(|next| next.0 == *score) {
            continue;
        }
        let shown = i + 1;
        if shown >= MIN_SHOWN_HITS.min(scored.len())
            && wrong as f64 <= max_false_share * shown as f64
        {
            lowest = Some(*score);
        }
    }
    lowest
}

fn measure_held_out(
    samples: &[&CalibrationSample],
    min_score: Option<f32>,
    rule: Option<NoMatchRule>,
) -> HeldOutResult {
    let flagged =
        |sample: &&&CalibrationSample| rule.is_some_and(|rule| rule.is_no_match(sample.best_hit));
    let part = |wanted: &dyn Fn(&CalibrationSample) -> bool| {
        let all: Vec<&&CalibrationSample> = samples.iter().filter(|s| wanted(s)).collect();
        (all.iter().copied().filter(|s| flagged(s)).count(), all.len())
    };
    let rate = |(count, of)| rule.and_then(|_| wilson_interval(count, of));
    let of_kind = |kind| {
        let (count, texts) = part(&|s| s.ground_truth == GroundTruth::NoMatch(kind));
        FlaggedShare { kind, texts, share: rate((count, texts)) }
    };
    let nothing = part(&|s| matches!(s.ground_truth, GroundTruth::NoMatch(_)));
    let all = part(&|_| true);
    let answered: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.best_hit.score, is_best_hit_right(s)?))).collect();
    let shown: Vec<bool> = answered
        .iter()
        .filter(|(score, _)| min_score.is_some_and(|min_score| *score >= min_score))
        .map(|(_, right)| *right)
        .collect();
    let wrong = |all: &[bool]| all.iter().filter(|right| !**right).count();
    let every: Vec<bool> = answered.iter().map(|(_, right)| *right).collect();
    HeldOutResult {
        flagged: NoMatchKind::ALL.map(of_kind).into_iter().filter(|f| f.texts > 0).collect(),
        lost_hits: rate(part(&|s| is_best_hit_right(s) == Some(true))),
        wrong_flagged: rate(part(&|s| is_best_hit_right(s) == Some(false))),
        precision: wilson_interval(nothing.0, all.0),
        shown_share: min_score.and_then(|_| wilson_interval(shown.len(), answered.len())),
        false_hit_rate: min_score.and_then(|_| wilson_interval(wrong(&shown), shown.len())),
        false_hit_rate_unfiltered: wilson_interval(wrong(&every), every.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::calibration::ScoreDistribution;

    fn best_hit(score: f32) -> BestHitFeatures {
        BestHitFeatures {
            score,
            background: ScoreDistribution { mean: 0.0, std: 1.0 },
            known_word_share: 1.0,
        }
    }

    #[test]
    fn thresholds_are_chosen_on_one_half_and_told_from_the_other() {
        let texts: Vec<String> = (0..4_000).map(|i| format!("text {i}")).collect();
        // Right hits score 0.5 to 1.5, wrong ones 0 to 1, what matches nothing −0.5 to 0.52.
        let samples: Vec<CalibrationSample> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let place = (i * 7919 % 1_000) as f32 / 1_000.0;
                let (score, known) = match i % 4 {
                    0 | 1 => (0.5 + place, GroundTruth::HasMatch { best_hit_is_right: true }),
                    2 => (place, GroundTruth::HasMatch { best_hit_is_right: false }),
                    _ => (place * 1.02 - 0.5, GroundTruth::NoMatch(NoMatchKind::Gibberish)),
                };
                CalibrationSample { text, best_hit: best_hit(score), ground_truth: known }
            })
            .collect();
        let found = choose_thresholds(
            &samples,
            ThresholdTargets { target_false_hit_rate: 0.1, max_lost_hits: 0.05 },
        )
        .unwrap();
        let rule = found.no_match.unwrap();
        assert_eq!(rule.signal, NoMatchSignal::Score, "the simplest of equals");
        assert!((0.49..0.56).contains(&rule.threshold), "{rule:?}");
        let held = &found.held_out;
        assert!(held.lost_hits.unwrap().mean < 0.07, "{held:?}");
        assert!(held.flagged[0].share.unwrap().mean > 0.95, "{held:?}");
        assert!(held.false_hit_rate.unwrap().mean < 0.14, "{held:?}");
        assert!(held.false_hit_rate_unfiltered.unwrap().mean > 0.3, "{held:?}");
        assert!((found.chosen_on_texts as f64 / 4_000.0 - 0.5).abs() < 0.05);
        let other = found.signals.iter().find(|s| s.signal == NoMatchSignal::ZScore).unwrap();
        assert!(other.auc > 0.99, "{other:?}");
    }

    #[test]
    fn where_nothing_reaches_what_is_wanted_there_is_no_threshold() {
        let texts: Vec<String> = (0..400).map(|i| format!("text {i}")).collect();
        let samples: Vec<CalibrationSample> = texts
            .iter()
            .map(|text| CalibrationSample {
                text,
                best_hit: best_hit(0.5),
                ground_truth: GroundTruth::HasMatch { best_hit_is_right: false },
            })
            .collect();
        let found = choose_thresholds(&samples, ThresholdTargets::default()).unwrap();
        assert_eq!((found.min_score, found.no_match), (None, None));
        assert!(choose_thresholds(&[], ThresholdTargets::default()).is_none());
    }
}
