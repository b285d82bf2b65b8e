//! Thresholds of a configuration: chosen on one half of the queries, measured on the other.

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::judgements::probes::ProbeKind;
use super::measures::interval::{Interval, share};
use crate::balance::calibration::{BestHit, NoMatch, Signal};

/// Fewest shown hits from which a rate of false ones is told.
const FEWEST: usize = 20;
/// Share of unrelated and gibberish texts that is worth flagging; beyond it, fewer lost hits are
/// worth more.
const ENOUGH: f64 = 0.97;

/// What thresholds are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Wanted {
    /// Share of false ones among the first hits that are shown, at most.
    pub false_hits: f64,
    /// Share of good first hits that may be flagged as no match, at most.
    pub lost: f64,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { false_hits: 0.2, lost: 0.05 }
    }
}

/// A text's best hit, and what is known of it.
#[derive(Debug, Clone)]
pub struct Sample<'a> {
    /// The text: decides its half.
    pub text: &'a str,
    /// Its best hit.
    pub hit: BestHit,
    /// What is known of the text.
    pub known: Known,
}

/// What is known of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Some image matches it; whether the best hit does.
    Answer {
        /// Whether the best hit is right.
        right: bool,
    },
    /// No image matches it.
    Nothing(ProbeKind),
}

/// Thresholds, and how sure they are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thresholds {
    /// What they were to reach.
    pub wanted: Wanted,
    /// Hits with a lower score are more often wrong than was asked for; none where no threshold
    /// reaches it.
    pub min_score: Option<f32>,
    /// When nothing matches; none where good hits or texts that match nothing are too few.
    pub no_match: Option<NoMatch>,
    /// Texts on which they were chosen.
    pub chosen_on: usize,
    /// What they reach on the other half, on which nothing was chosen.
    pub held_out: HeldOut,
    /// What each signal could reach, on the held-out half.
    pub signals: Vec<SignalOutcome>,
}

/// What thresholds reach on texts on which nothing was chosen. Intervals are Wilson's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOut {
    /// Share of unrelated texts, gibberish and absent ones that are flagged as no match.
    pub flagged: Vec<Flagged>,
    /// Share of good first hits that are flagged as no match.
    pub lost: Option<Interval>,
    /// Share of wrong first hits, where some image matches, that are flagged as no match.
    pub wrong_flagged: Option<Interval>,
    /// Of all that is flagged, how much matches nothing, in this mix of texts.
    pub precision: Option<Interval>,
    /// Share of the queries whose first hit reaches `min_score`.
    pub shown: Option<Interval>,
    /// Share of false ones among those.
    pub false_hits: Option<Interval>,
    /// Share of false ones among all first hits, for comparison.
    pub false_hits_without: Option<Interval>,
}

/// How much of a kind of texts is flagged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flagged {
    /// Which texts.
    pub kind: ProbeKind,
    /// How many were asked.
    pub texts: usize,
    /// Share that is flagged.
    pub share: Option<Interval>,
}

/// What a signal can reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SignalOutcome {
    /// Which.
    pub signal: Signal,
    /// The threshold that it would have.
    pub below: f32,
    /// Chance that a good first hit has a higher value than the best hit of an unrelated or
    /// gibberish text (area under the ROC curve): 0.5 tells nothing, 1 everything.
    pub auc: f64,
    /// Share of unrelated and gibberish texts that it flags.
    pub flagged: f64,
    /// Share of good first hits that it loses.
    pub lost: f64,
}

/// Whether a text belongs to the half on which thresholds are chosen; the other half is held out.
/// Decided by the text, so that it is the same in every evaluation.
pub fn for_choosing(text: &str) -> bool {
    Sha256::digest(text.as_bytes()).first().is_some_and(|byte| byte % 2 == 0)
}

/// Chooses thresholds on one half of `samples` and measures them on the other. `None` where there
/// are no judged queries.
pub fn thresholds(samples: &[Sample], wanted: Wanted) -> Option<Thresholds> {
    let (choose, rest): (Vec<&Sample>, Vec<&Sample>) =
        samples.iter().partition(|sample| for_choosing(sample.text));
    let answers = |all: &[&Sample]| all.iter().filter(|s| answer(s).is_some()).count();
    if answers(&choose) == 0 || answers(&rest) == 0 {
        return None;
    }
    let chosen = Signal::ALL.map(|signal| choose_signal(signal, &choose, wanted.lost));
    // The simplest of those that flag most.
    let most = chosen.iter().flatten().map(|(_, flagged)| *flagged).fold(0.0, f64::max);
    let no_match = chosen.iter().flatten().find(|(_, flagged)| *flagged > most - 0.005);
    let no_match = no_match.map(|(rule, _)| *rule);
    let signals = chosen.iter().flatten().map(|(rule, _)| outcome(rule, &rest)).collect();
    let min_score = choose_min_score(&choose, wanted.false_hits);
    Some(Thresholds {
        wanted,
        min_score,
        no_match,
        chosen_on: choose.len(),
        held_out: held_out(&rest, min_score, no_match),
        signals,
    })
}

/// Whether the best hit is right, where some image matches.
fn answer(sample: &Sample) -> Option<bool> {
    match sample.known {
        Known::Answer { right } => Some(right),
        Known::Nothing(_) => None,
    }
}

/// Values of a signal on good first hits, and on unrelated and gibberish texts; each ascending.
fn values(signal: Signal, samples: &[&Sample]) -> (Vec<f32>, Vec<f32>) {
    let of = |wanted: fn(Known) -> bool| {
        let found = samples.iter().filter(|s| wanted(s.known));
        let mut values: Vec<f32> = found.map(|s| signal.of(s.hit)).collect();
        values.sort_unstable_by(f32::total_cmp);
        values
    };
    let probe =
        |known| matches!(known, Known::Nothing(ProbeKind::Unrelated | ProbeKind::Gibberish));
    (of(|known| known == Known::Answer { right: true }), of(probe))
}

/// Share of ascending `values` that lie below `threshold`.
fn below(values: &[f32], threshold: f32) -> f64 {
    values.partition_point(|value| *value < threshold) as f64 / values.len().max(1) as f64
}

/// The rule of a signal that loses at most `lost` of the good first hits, and the share of unrelated
/// and gibberish texts that it flags.
fn choose_signal(signal: Signal, samples: &[&Sample], lost: f64) -> Option<(NoMatch, f64)> {
    let (good, nothing) = values(signal, samples);
    if good.len() < FEWEST || nothing.is_empty() {
        return None;
    }
    let highest = good[((good.len() as f64 * lost) as usize).min(good.len() - 1)];
    // Where a lower threshold flags enough as well, the middle between both is safest.
    let enough = nothing[((nothing.len() as f64 * ENOUGH).ceil() as usize).max(1) - 1];
    let threshold = if enough < highest { f32::midpoint(enough, highest) } else { highest };
    Some((NoMatch { signal, below: threshold }, below(&nothing, threshold)))
}

fn outcome(rule: &NoMatch, samples: &[&Sample]) -> SignalOutcome {
    let (good, nothing) = values(rule.signal, samples);
    let half = |value: f32| {
        let less = nothing.partition_point(|v| *v < value);
        let equal = nothing.partition_point(|v| *v <= value) - less;
        less as f64 + equal as f64 / 2.0
    };
    let pairs = (good.len() * nothing.len()).max(1) as f64;
    SignalOutcome {
        signal: rule.signal,
        below: rule.below,
        auc: good.iter().map(|value| half(*value)).sum::<f64>() / pairs,
        flagged: below(&nothing, rule.below),
        lost: below(&good, rule.below),
    }
}

/// The lowest score from which on at most the wanted share of first hits is false.
fn choose_min_score(samples: &[&Sample], wanted: f64) -> Option<f32> {
    let mut scored: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.hit.score, answer(s)?))).collect();
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
        if shown >= FEWEST.min(scored.len()) && wrong as f64 <= wanted * shown as f64 {
            lowest = Some(*score);
        }
    }
    lowest
}

fn held_out(samples: &[&Sample], min_score: Option<f32>, rule: Option<NoMatch>) -> HeldOut {
    let flagged = |sample: &&&Sample| rule.is_some_and(|rule| rule.holds(sample.hit));
    let part = |wanted: &dyn Fn(&Sample) -> bool| {
        let all: Vec<&&Sample> = samples.iter().filter(|s| wanted(s)).collect();
        (all.iter().copied().filter(|s| flagged(s)).count(), all.len())
    };
    let rate = |(count, of)| rule.and_then(|_| share(count, of));
    let of_kind = |kind| {
        let (count, texts) = part(&|s| s.known == Known::Nothing(kind));
        Flagged { kind, texts, share: rate((count, texts)) }
    };
    let nothing = part(&|s| matches!(s.known, Known::Nothing(_)));
    let all = part(&|_| true);
    let answered: Vec<(f32, bool)> =
        samples.iter().filter_map(|s| Some((s.hit.score, answer(s)?))).collect();
    let shown: Vec<bool> = answered
        .iter()
        .filter(|(score, _)| min_score.is_some_and(|least| *score >= least))
        .map(|(_, right)| *right)
        .collect();
    let wrong = |all: &[bool]| all.iter().filter(|right| !**right).count();
    let every: Vec<bool> = answered.iter().map(|(_, right)| *right).collect();
    HeldOut {
        flagged: ProbeKind::ALL.map(of_kind).into_iter().filter(|f| f.texts > 0).collect(),
        lost: rate(part(&|s| answer(s) == Some(true))),
        wrong_flagged: rate(part(&|s| answer(s) == Some(false))),
        precision: share(nothing.0, all.0),
        shown: min_score.and_then(|_| share(shown.len(), answered.len())),
        false_hits: min_score.and_then(|_| share(wrong(&shown), shown.len())),
        false_hits_without: share(wrong(&every), every.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::calibration::Background;

    fn hit(score: f32) -> BestHit {
        BestHit { score, background: Background { mean: 0.0, std: 1.0 }, known: 1.0 }
    }

    #[test]
    fn thresholds_are_chosen_on_one_half_and_told_from_the_other() {
        let texts: Vec<String> = (0..4_000).map(|i| format!("text {i}")).collect();
        // Right hits score 0.5 to 1.5, wrong ones 0 to 1, what matches nothing −0.5 to 0.52.
        let samples: Vec<Sample> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let place = (i * 7919 % 1_000) as f32 / 1_000.0;
                let (score, known) = match i % 4 {
                    0 | 1 => (0.5 + place, Known::Answer { right: true }),
                    2 => (place, Known::Answer { right: false }),
                    _ => (place * 1.02 - 0.5, Known::Nothing(ProbeKind::Gibberish)),
                };
                Sample { text, hit: hit(score), known }
            })
            .collect();
        let found = thresholds(&samples, Wanted { false_hits: 0.1, lost: 0.05 }).unwrap();
        let rule = found.no_match.unwrap();
        assert_eq!(rule.signal, Signal::Score, "the simplest of equals");
        assert!((0.49..0.56).contains(&rule.below), "{rule:?}");
        let held = &found.held_out;
        assert!(held.lost.unwrap().mean < 0.07, "{held:?}");
        assert!(held.flagged[0].share.unwrap().mean > 0.95, "{held:?}");
        assert!(held.false_hits.unwrap().mean < 0.14, "{held:?}");
        assert!(held.false_hits_without.unwrap().mean > 0.3, "{held:?}");
        assert!((found.chosen_on as f64 / 4_000.0 - 0.5).abs() < 0.05);
        let other = found.signals.iter().find(|s| s.signal == Signal::Standout).unwrap();
        assert!(other.auc > 0.99, "{other:?}");
    }

    #[test]
    fn where_nothing_reaches_what_is_wanted_there_is_no_threshold() {
        let texts: Vec<String> = (0..400).map(|i| format!("text {i}")).collect();
        let samples: Vec<Sample> = texts
            .iter()
            .map(|text| Sample { text, hit: hit(0.5), known: Known::Answer { right: false } })
            .collect();
        let found = thresholds(&samples, Wanted::default()).unwrap();
        assert_eq!((found.min_score, found.no_match), (None, None));
        assert!(thresholds(&[], Wanted::default()).is_none());
    }
}
