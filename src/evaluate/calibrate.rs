//! Chooses the thresholds of a configuration on one half of the queries and measures them on the
//! other.

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::judgements::NoMatchKind;
use super::measures::interval::{ConfidenceInterval, wilson_interval};
use crate::balance::calibration::{BestHitFeatures, NoMatchRule, NoMatchSignal};

/// Minimum number of hits on which a threshold is based.
const MIN_SHOWN_HITS: usize = 20;
/// Share of unrelated and gibberish texts that is enough to flag; losing fewer good hits is worth
/// more than flagging more texts.
const SUFFICIENT_FLAGGED_SHARE: f64 = 0.97;

/// What chosen thresholds must achieve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ThresholdTargets {
    /// Maximum share of wrong ones among the first hits that are shown, 0 to 1.
    pub target_false_hit_rate: f64,
    /// Maximum share of right first hits that may be flagged as no match, 0 to 1.
    pub max_lost_hits: f64,
}

impl Default for ThresholdTargets {
    fn default() -> Self {
        Self { target_false_hit_rate: 0.2, max_lost_hits: 0.05 }
    }
}

/// The first hit of a text, with what is known of the text.
#[derive(Debug, Clone)]
pub struct CalibrationSample<'a> {
    /// The text, which also decides to which half the sample belongs.
    pub text: &'a str,
    /// Features of the first hit.
    pub best_hit: BestHitFeatures,
    /// What is known of the text.
    pub ground_truth: GroundTruth,
}

/// What is known of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroundTruth {
    /// Some image matches the text.
    HasMatch {
        /// Whether the first hit does.
        best_hit_is_right: bool,
    },
    /// No image matches the text.
    NoMatch(NoMatchKind),
}

/// Chosen thresholds with their measurements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThresholdReport {
    /// What the thresholds must achieve.
    pub targets: ThresholdTargets,
    /// The lowest score from which the rate of false hits meets its target; `None` if no score
    /// does.
    pub min_score: Option<f32>,
    /// The rule by which nothing matches; `None` if there are too few right hits, or no texts that
    /// match nothing.
    pub no_match: Option<NoMatchRule>,
    /// Number of texts on which the thresholds were chosen.
    pub chosen_on_texts: usize,
    /// What the thresholds achieve on the other half.
    pub held_out: HeldOutThresholdResult,
    /// What each signal alone would achieve on the other half.
    pub signals: Vec<NoMatchSignalResult>,
}

/// What thresholds achieve on texts on which nothing was chosen. Intervals are Wilson's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutThresholdResult {
    /// Share of the texts that match nothing that are flagged as no match, by kind.
    pub flagged: Vec<FlaggedShare>,
    /// Share of right first hits that are flagged as no match.
    pub lost_hits: Option<ConfidenceInterval>,
    /// Share of wrong first hits, of texts that some image matches, that are flagged as no match.
    pub wrong_flagged: Option<ConfidenceInterval>,
    /// Share of texts that match nothing among all flagged texts, in this mix of texts.
    pub precision: Option<ConfidenceInterval>,
    /// Share of the queries whose first hit reaches `min_score`.
    pub shown_share: Option<ConfidenceInterval>,
    /// Share of wrong ones among the first hits that reach `min_score`.
    pub false_hit_rate: Option<ConfidenceInterval>,
    /// Share of wrong ones among all first hits, for comparison.
    pub false_hit_rate_unfiltered: Option<ConfidenceInterval>,
}

/// Share of one kind of texts that is flagged as no match.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlaggedShare {
    /// The kind of texts.
    pub kind: NoMatchKind,
    /// Number of texts of this kind.
    pub texts: usize,
    /// Share that is flagged; `None` without a rule.
    pub share: Option<ConfidenceInterval>,
}

/// What a no-match signal achieves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct NoMatchSignalResult {
    /// The signal.
    pub signal: NoMatchSignal,
    /// The threshold that was chosen for it.
    pub threshold: f32,
    /// Probability that a right first hit has a higher value than the first hit of an unrelated or
    /// gibberish text (area under the ROC curve): 0.5 separates nothing, 1 everything.
    pub auc: f64,
    /// Share of unrelated and gibberish texts that it flags.
    pub flagged: f64,
    /// Share of right first hits that it flags.
    pub lost_hits: f64,
}

/// Returns whether a text belongs to the half on which thresholds are chosen. A hash of the text
/// decides, so that the halves are the same in every evaluation.
pub fn is_in_selection_half(text: &str) -> bool {
    Sha256::digest(text.as_bytes()).first().is_some_and(|byte| byte % 2 == 0)
}

/// Chooses thresholds on one half of `samples` and measures them on the other. Returns `None` if
/// one half has no text that some image matches.
pub fn choose_thresholds(
    samples: &[CalibrationSample],
    targets: ThresholdTargets,
) -> Option<ThresholdReport> {
    let (selection, held_out): (Vec<&CalibrationSample>, Vec<&CalibrationSample>) =
        samples.iter().partition(|sample| is_in_selection_half(sample.text));
    let has_match =
        |half: &[&CalibrationSample]| half.iter().any(|s| is_best_hit_right(s).is_some());
    if !has_match(&selection) || !has_match(&held_out) {
        return None;
    }
    let rules = NoMatchSignal::ALL
        .map(|signal| choose_signal_rule(signal, &selection, targets.max_lost_hits));
    // Signals are ordered from the simplest: the first one that flags about as much as the best is
    // taken.
    let max_flagged = rules.iter().flatten().map(|(_, flagged)| *flagged).fold(0.0, f64::max);
    let no_match = rules.iter().flatten().find(|(_, flagged)| *flagged > max_flagged - 0.005);
    let no_match = no_match.map(|(rule, _)| *rule);
    let signals = rules.iter().flatten().map(|(rule, _)| measure_signal(rule, &held_out)).collect();
    let min_score = choose_min_score(&selection, targets.target_false_hit_rate);
    Some(ThresholdReport {
        targets,
        min_score,
        no_match,
        chosen_on_texts: selection.len(),
        held_out: measure_on_held_out_half(&held_out, min_score, no_match),
        signals,
    })
}

/// Returns whether the first hit is right; `None` for a text that no image matches.
fn is_best_hit_right(sample: &CalibrationSample) -> Option<bool> {
    match sample.ground_truth {
        GroundTruth::HasMatch { best_hit_is_right } => Some(best_hit_is_right),
        GroundTruth::NoMatch(_) => None,
    }
}

/// Returns the values of a signal on right first hits, and on unrelated and gibberish texts; both
/// ascending.
fn signal_values(signal: NoMatchSignal, samples: &[&CalibrationSample]) -> (Vec<f32>, Vec<f32>) {
    let sorted_values = |is_wanted: fn(GroundTruth) -> bool| {
        let wanted = samples.iter().filter(|s| is_wanted(s.ground_truth));
        let mut values: Vec<f32> = wanted.map(|s| signal.value(s.best_hit)).collect();
        values.sort_unstable_by(f32::total_cmp);
        values
    };
    let is_right_hit =
        |truth: GroundTruth| truth == GroundTruth::HasMatch { best_hit_is_right: true };
    let is_probe = |truth: GroundTruth| {
        matches!(truth, GroundTruth::NoMatch(NoMatchKind::Unrelated | NoMatchKind::Gibberish))
    };
    (sorted_values(is_right_hit), sorted_values(is_probe))
}

/// Returns the share of ascending `values` that are below `threshold`.
fn share_below(values: &[f32], threshold: f32) -> f64 {
    values.partition_point(|value| *value < threshold) as f64 / values.len().max(1) as f64
}

/// Returns the rule of a signal that loses at most the share `max_lost` of right first hits, and
/// the share of unrelated and gibberish texts that it flags. `None` if there are too few samples.
fn choose_signal_rule(
    signal: NoMatchSignal,
    samples: &[&CalibrationSample],
    max_lost: f64,
) -> Option<(NoMatchRule, f64)> {
    let (right_hits, probes) = signal_values(signal, samples);
    if right_hits.len() < MIN_SHOWN_HITS || probes.is_empty() {
        return None;
    }
    let max_threshold =
        right_hits[((right_hits.len() as f64 * max_lost) as usize).min(right_hits.len() - 1)];
    // If a lower threshold flags enough texts too, the middle between both is safest.
    let sufficient =
        probes[((probes.len() as f64 * SUFFICIENT_FLAGGED_SHARE).ceil() as usize).max(1) - 1];
    let threshold = if sufficient < max_threshold {
        f32::midpoint(sufficient, max_threshold)
    } else {
        max_threshold
    };
    Some((NoMatchRule { signal, threshold }, share_below(&probes, threshold)))
}

fn measure_signal(rule: &NoMatchRule, samples: &[&CalibrationSample]) -> NoMatchSignalResult {
    let (right_hits, probes) = signal_values(rule.signal, samples);
    // Equal values count half, as in the Mann–Whitney statistic.
    let probes_below = |value: f32| {
        let less = probes.partition_point(|v| *v < value);
        let equal = probes.partition_point(|v| *v <= value) - less;
        less as f64 + equal as f64 / 2.0
    };
    let pairs = (right_hits.len() * probes.len()).max(1) as f64;
    NoMatchSignalResult {
        signal: rule.signal,
        threshold: rule.threshold,
        auc: right_hits.iter().map(|value| probes_below(*value)).sum::<f64>() / pairs,
        flagged: share_below(&probes, rule.threshold),
        lost_hits: share_below(&right_hits, rule.threshold),
    }
}

/// Returns the lowest score such that at most the share `max_false_share` of the first hits with
/// this or a higher score is wrong; `None` if there is no such score.
fn choose_min_score(samples: &[&CalibrationSample], max_false_share: f64) -> Option<f32> {
    let mut scored: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.best_hit.score, is_best_hit_right(s)?))).collect();
    scored.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    let mut wrong = 0;
    let mut lowest = None;
    for (i, (score, right)) in scored.iter().enumerate() {
        wrong += usize::from(!right);
        // Hits with equal scores are either all shown or all hidden.
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

fn measure_on_held_out_half(
    samples: &[&CalibrationSample],
    min_score: Option<f32>,
    rule: Option<NoMatchRule>,
) -> HeldOutThresholdResult {
    let is_flagged =
        |sample: &CalibrationSample| rule.is_some_and(|rule| rule.is_no_match(sample.best_hit));
    // How many of the matching samples are flagged, and how many there are.
    let count_flagged = |matches: &dyn Fn(&CalibrationSample) -> bool| {
        let matching: Vec<_> = samples.iter().filter(|s| matches(s)).collect();
        (matching.iter().filter(|s| is_flagged(s)).count(), matching.len())
    };
    let rate = |(count, total)| rule.and_then(|_| wilson_interval(count, total));
    let flagged_share = |kind| {
        let (count, texts) = count_flagged(&|s| s.ground_truth == GroundTruth::NoMatch(kind));
        FlaggedShare { kind, texts, share: rate((count, texts)) }
    };
    let (flagged_without_match, _) =
        count_flagged(&|s| matches!(s.ground_truth, GroundTruth::NoMatch(_)));
    let (flagged, _) = count_flagged(&|_| true);
    let with_match: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.best_hit.score, is_best_hit_right(s)?))).collect();
    let shown: Vec<bool> = with_match
        .iter()
        .filter(|(score, _)| min_score.is_some_and(|min_score| *score >= min_score))
        .map(|(_, right)| *right)
        .collect();
    let count_wrong = |hits: &[bool]| hits.iter().filter(|right| !**right).count();
    let unfiltered: Vec<bool> = with_match.iter().map(|(_, right)| *right).collect();
    HeldOutThresholdResult {
        flagged: NoMatchKind::ALL.map(flagged_share).into_iter().filter(|f| f.texts > 0).collect(),
        lost_hits: rate(count_flagged(&|s| is_best_hit_right(s) == Some(true))),
        wrong_flagged: rate(count_flagged(&|s| is_best_hit_right(s) == Some(false))),
        precision: wilson_interval(flagged_without_match, flagged),
        shown_share: min_score.and_then(|_| wilson_interval(shown.len(), with_match.len())),
        false_hit_rate: min_score.and_then(|_| wilson_interval(count_wrong(&shown), shown.len())),
        false_hit_rate_unfiltered: wilson_interval(count_wrong(&unfiltered), unfiltered.len()),
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
    fn thresholds_are_chosen_on_one_half_and_measured_on_the_other() {
        let texts: Vec<String> = (0..4_000).map(|i| format!("text {i}")).collect();
        // Right hits score 0.5 to 1.5, wrong ones 0 to 1, texts that match nothing −0.5 to 0.52.
        let samples: Vec<CalibrationSample> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let spread = (i * 7919 % 1_000) as f32 / 1_000.0;
                let (score, ground_truth) = match i % 4 {
                    0 | 1 => (0.5 + spread, GroundTruth::HasMatch { best_hit_is_right: true }),
                    2 => (spread, GroundTruth::HasMatch { best_hit_is_right: false }),
                    _ => (spread * 1.02 - 0.5, GroundTruth::NoMatch(NoMatchKind::Gibberish)),
                };
                CalibrationSample { text, best_hit: best_hit(score), ground_truth }
            })
            .collect();
        let thresholds = choose_thresholds(
            &samples,
            ThresholdTargets { target_false_hit_rate: 0.1, max_lost_hits: 0.05 },
        )
        .unwrap();
        let rule = thresholds.no_match.unwrap();
        assert_eq!(rule.signal, NoMatchSignal::Score, "the simplest of equals");
        assert!((0.49..0.56).contains(&rule.threshold), "{rule:?}");
        let held_out = &thresholds.held_out;
        assert!(held_out.lost_hits.unwrap().mean < 0.07, "{held_out:?}");
        assert!(held_out.flagged[0].share.unwrap().mean > 0.95, "{held_out:?}");
        assert!(held_out.false_hit_rate.unwrap().mean < 0.14, "{held_out:?}");
        assert!(held_out.false_hit_rate_unfiltered.unwrap().mean > 0.3, "{held_out:?}");
        assert!((thresholds.chosen_on_texts as f64 / 4_000.0 - 0.5).abs() < 0.05);
        let z_score =
            thresholds.signals.iter().find(|s| s.signal == NoMatchSignal::ZScore).unwrap();
        assert!(z_score.auc > 0.99, "{z_score:?}");
    }

    #[test]
    fn there_is_no_threshold_if_none_meets_the_targets() {
        let texts: Vec<String> = (0..400).map(|i| format!("text {i}")).collect();
        let samples: Vec<CalibrationSample> = texts
            .iter()
            .map(|text| CalibrationSample {
                text,
                best_hit: best_hit(0.5),
                ground_truth: GroundTruth::HasMatch { best_hit_is_right: false },
            })
            .collect();
        let thresholds = choose_thresholds(&samples, ThresholdTargets::default()).unwrap();
        assert_eq!((thresholds.min_score, thresholds.no_match), (None, None));
        assert!(choose_thresholds(&[], ThresholdTargets::default()).is_none());
    }
}
