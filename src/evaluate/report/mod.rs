//! The result of an evaluation, and its verdict in words. `terminal` and `html` render it; `chart`
//! and `html_tables` are the parts of a page.

pub(crate) mod chart;
pub(crate) mod html;
pub(crate) mod html_tables;
pub(crate) mod terminal;

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::compare::{ConfigurationResult, CorrectionCost, ModelInfo};
use super::measures::interval::{
    ConfidenceInterval, MeasureComparison, MeasureDirection, wilson_interval,
};
use super::measures::{Cutoffs, FALSE_HIT_MEASURE};
use crate::record::to_hex;

/// A difference with a p value below this is significant.
pub const SIGNIFICANCE_LEVEL: f64 = 0.05;

/// The result of an evaluation; serialised, it is the JSON report.
#[derive(Debug, Clone, Serialize)]
pub struct EvaluationReport {
    /// SHA-256 over all other fields except `created_at`, in hexadecimal. A stored calibration
    /// refers to its evaluation by it.
    pub fingerprint: String,
    /// When the evaluation was made.
    pub created_at: DateTime<Utc>,
    /// Version of this program.
    pub version: String,
    /// The catalogue: its URL, or a description of a synthetic one.
    pub catalogue: String,
    /// The models whose embeddings were ranked.
    pub models: Vec<ModelInfo>,
    /// How many queries of which kinds were ranked.
    pub queries: QueryCounts,
    /// Names of the measures, in the order of every [`MeasureSummary`].
    ///
    /// [`MeasureSummary`]: super::compare::MeasureSummary
    pub measures: Vec<String>,
    /// Name of the configuration with which all others are compared.
    pub baseline: String,
    /// The cost of manual correction, if the owner gave it.
    pub cost: Option<CorrectionCost>,
    /// The result in words.
    pub verdict: String,
    /// Caveats that a reader of the figures must know.
    pub notes: Vec<String>,
    /// The measurements of each configuration.
    pub configurations: Vec<ConfigurationResult>,
}

/// Numbers of queries, by what is known of them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct QueryCounts {
    /// Where the queries come from.
    pub source: String,
    /// SHA-256 over texts, groups and judgements, in hexadecimal.
    pub fingerprint: String,
    /// All queries.
    pub total: usize,
    /// Queries with a relevant image in the catalogue, which are measured.
    pub judged: usize,
    /// Queries judged to match nothing.
    pub judged_no_match: usize,
    /// Unjudged queries, whose rankings are compared but not measured.
    pub unjudged: usize,
    /// Judged queries without a relevant image in the catalogue, which are left out.
    pub without_relevant_image: usize,
    /// Judged images that are not in the catalogue.
    pub missing_images: usize,
    /// Unrelated and gibberish texts that were ranked in addition.
    pub probes: usize,
}

impl EvaluationReport {
    /// Fills in verdict and fingerprint.
    pub fn with_verdict_and_fingerprint(mut self) -> Self {
        self.verdict = describe_verdict(&self);
        self.fingerprint.clear();
        let created_at = std::mem::take(&mut self.created_at);
        let bytes = serde_json::to_vec(&self).unwrap_or_default();
        self.fingerprint = to_hex(&Sha256::digest(&bytes));
        self.created_at = created_at;
        self
    }

    /// Returns a measure of a configuration over all judged queries; `None` if there are none, or
    /// no such measure.
    pub fn measure_comparison(
        &self,
        result: &ConfigurationResult,
        measure: &str,
    ) -> Option<MeasureComparison> {
        let index = self.measures.iter().position(|name| name == measure)?;
        Some(result.overall.as_ref()?.measures[index])
    }

    /// Returns all configurations except the baseline.
    pub fn non_baseline_results(&self) -> impl Iterator<Item = &ConfigurationResult> {
        self.configurations.iter().filter(|result| result.name != self.baseline)
    }
}

/// Whether a difference from the baseline is significant, and in which direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeasuredDifference {
    /// Significantly better than the baseline.
    Better,
    /// Significantly worse than the baseline.
    Worse,
    /// The queries do not show a difference.
    NotSignificant,
}

/// Classifies the difference of a measure from the baseline. It is significant if the corrected p
/// value is small and 0 is outside the interval.
pub fn classify_difference(measure: &str, comparison: &MeasureComparison) -> MeasuredDifference {
    if comparison.p_value >= SIGNIFICANCE_LEVEL || !comparison.gain.excludes_zero() {
        return MeasuredDifference::NotSignificant;
    }
    let is_higher = comparison.gain.mean > 0.0;
    let is_better = (Cutoffs::measure_direction(measure) == MeasureDirection::Higher) == is_higher;
    if is_better { MeasuredDifference::Better } else { MeasuredDifference::Worse }
}

/// Formats a share as a percentage.
pub fn format_percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Formats a difference of shares in percentage points, with its interval.
fn format_points(gain: &ConfidenceInterval) -> String {
    let signed = |v: f64| format!("{:+.1}", v * 100.0).replace('-', "−");
    format!(
        "{} points, 95 % interval {} to {}",
        signed(gain.mean),
        signed(gain.low),
        signed(gain.high)
    )
}

/// Returns the measures that the verdict mentions, false hits first.
fn verdict_measures(report: &EvaluationReport) -> Vec<&String> {
    let is_mentioned = |name: &&String| {
        *name == FALSE_HIT_MEASURE || name.starts_with("nDCG") || name.starts_with("capped")
    };
    let mut measures: Vec<&String> = report.measures.iter().filter(is_mentioned).collect();
    measures.sort_by_key(|name| *name != FALSE_HIT_MEASURE);
    measures
}

fn describe_verdict(report: &EvaluationReport) -> String {
    let mut text = String::new();
    let QueryCounts { judged, total, .. } = report.queries;
    let baseline = &report.baseline;
    if report.non_baseline_results().next().is_none() {
        return format!("Only {baseline} was measured; nothing is compared.");
    }
    if judged == 0 {
        let _ = write!(
            text,
            "None of the {total} queries has a judged right image in the catalogue, so right and wrong results cannot be counted. "
        );
        for result in report.non_baseline_results() {
            if let Some(stability) = &result.stability {
                let _ = write!(
                    text,
                    "Against {baseline}, {} changes the first result of {} of the queries and shares {} of the best {}. ",
                    result.name,
                    format_percent(stability.top_hit_changed.mean),
                    format_percent(stability.overlap.mean),
                    stability.depth,
                );
            }
        }
        text.push_str("Have the queries that change most judged.");
        return text;
    }
    let _ = write!(text, "On {judged} judged queries, compared with {baseline}: ");
    let measures = verdict_measures(report);
    let mut indistinguishable = Vec::new();
    for result in report.non_baseline_results() {
        let differences: Vec<Difference> = measures
            .iter()
            .filter_map(|name| {
                let comparison = report.measure_comparison(result, name)?;
                Some((*name, comparison, classify_difference(name, &comparison)))
            })
            .collect();
        let Some(description) = describe_differences(&result.name, &differences) else {
            let false_hits = differences.first().map(|(_, comparison, _)| *comparison);
            indistinguishable.push((result.name.as_str(), false_hits));
            continue;
        };
        text.push_str(&description);
        let changes_false_hits = |(name, _, difference): &Difference| {
            *name == FALSE_HIT_MEASURE && *difference != MeasuredDifference::NotSignificant
        };
        if let Some(savings) = result.savings.filter(|_| differences.iter().any(changes_false_hits))
        {
            text.push_str(&describe_savings(savings.minutes_per_day));
        }
    }
    if !indistinguishable.is_empty() {
        let names: Vec<&str> = indistinguishable.iter().map(|(name, _)| *name).collect();
        let word = if text.ends_with(": ") { "no" } else { "No" };
        let _ = write!(text, "{word} measurable difference for {}", names.join(", "));
        let false_hits = indistinguishable.iter().filter_map(|(_, comparison)| *comparison);
        let largest_undetectable = false_hits
            .map(|comparison| undetectable_change(&comparison.gain, judged))
            .fold(0.0, f64::max);
        let _ = write!(
            text,
            "; with these queries, a change of false first hits of up to {:.1} percentage points could hide. ",
            largest_undetectable * 100.0
        );
    }
    text.push_str(&describe_separation(report));
    if report.configurations.len() > 2 {
        text.push_str("Chances are corrected for the number of configurations compared. ");
    }
    text.trim_end().to_owned()
}

/// Returns the largest change of the share of false first hits that these queries may not show. If
/// few or no first hits changed, bootstrap samples underestimate it, because they contain no more
/// changes than the queries themselves. Wilson's upper bound of the net change accounts for queries
/// that were not measured.
fn undetectable_change(gain: &ConfidenceInterval, judged: usize) -> f64 {
    let net_changes = (gain.mean.abs() * judged as f64).round() as usize;
    let upper_bound = wilson_interval(net_changes, judged).map_or(1.0, |share| share.high);
    gain.low.abs().max(gain.high.abs()).max(upper_bound)
}

/// A measure, its comparison with the baseline, and the class of the difference.
type Difference<'a> = (&'a String, MeasureComparison, MeasuredDifference);

/// Describes the significant differences of a configuration; `None` if there are none.
fn describe_differences(name: &str, differences: &[Difference]) -> Option<String> {
    let describe_measures = |class: MeasuredDifference| {
        let others = differences.iter().filter(|(name, ..)| *name != FALSE_HIT_MEASURE);
        let descriptions =
            others.filter(|(.., difference)| *difference == class).map(|(name, comparison, _)| {
                let mean = comparison.value.mean;
                let before = mean - comparison.gain.mean;
                format!("{name} ({mean:.3} instead of {before:.3})")
            });
        descriptions.collect::<Vec<_>>().join(" and ")
    };
    let (better, worse) = (
        describe_measures(MeasuredDifference::Better),
        describe_measures(MeasuredDifference::Worse),
    );
    let false_hits = differences.iter().find(|(name, ..)| *name == FALSE_HIT_MEASURE);
    let mut text = match false_hits {
        Some((_, comparison, difference)) if *difference != MeasuredDifference::NotSignificant => {
            let word = if *difference == MeasuredDifference::Better { "fewer" } else { "more" };
            let mean = comparison.value.mean;
            format!(
                "{name} shows {word} false first hits, {} instead of {} ({})",
                format_percent(mean),
                format_percent(mean - comparison.gain.mean),
                format_points(&comparison.gain)
            )
        }
        _ if better.is_empty() && worse.is_empty() => return None,
        _ => format!("{name} shows no measurable difference in false first hits"),
    };
    for (word, measures) in [("better", better), ("worse", worse)] {
        if !measures.is_empty() {
            let _ = write!(text, ", and is {word} in {measures}");
        }
    }
    text.push_str(". ");
    Some(text)
}

/// Describes the configurations that separate answerable queries from those that nothing answers
/// measurably better or worse than the baseline.
fn describe_separation(report: &EvaluationReport) -> String {
    let mut text = String::new();
    for result in report.non_baseline_results() {
        for separation in result.separation.iter().filter(|s| s.gain.excludes_zero()) {
            let (mean, gain) = (separation.auroc.mean, separation.gain.mean);
            let word = if gain > 0.0 { "better" } else { "worse" };
            let _ = write!(
                text,
                "{} separates queries with an answer {word} from {} texts (AUROC {mean:.3} instead of {:.3}). ",
                result.name,
                separation.kind.name(),
                mean - gain
            );
        }
    }
    text
}

fn describe_savings(minutes: ConfidenceInterval) -> String {
    let word = if minutes.mean >= 0.0 { "saves" } else { "costs" };
    let (low, high) = if minutes.mean >= 0.0 {
        (minutes.low, minutes.high)
    } else {
        (-minutes.high, -minutes.low)
    };
    format!(
        "By the given figures that {word} {:.0} minutes of correction per day ({low:.0} to {high:.0}). ",
        minutes.mean.abs()
    )
    .replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(mean: f64, half_width: f64) -> ConfidenceInterval {
        ConfidenceInterval { mean, low: mean - half_width, high: mean + half_width }
    }

    fn measure_comparison(gain: f64, half_width: f64, p_value: f64) -> MeasureComparison {
        MeasureComparison {
            value: interval(0.3, half_width),
            gain: interval(gain, half_width),
            p_value,
        }
    }

    #[test]
    fn an_undetectable_change_is_never_0() {
        // No first hit changed: z²/(n + z²), Wilson's bound of 0 of 100.
        assert!((undetectable_change(&interval(0.0, 0.0), 100) - 0.0370).abs() < 1e-4);
        assert!((undetectable_change(&interval(0.0, 0.0), 1_000) - 0.0038).abs() < 1e-4);
        // One more false hit of 100, of which a bootstrap sample contains three at most.
        assert!((undetectable_change(&interval(0.01, 0.02), 100) - 0.0545).abs() < 1e-4);
        // Many first hits changed in both directions: the bootstrap interval is wide enough.
        assert_eq!(undetectable_change(&interval(0.0, 0.15), 100), 0.15);
    }

    #[test]
    fn the_verdict_mentions_significant_differences_only() {
        let names = [FALSE_HIT_MEASURE.to_owned(), "nDCG@10".to_owned()];
        let describe = |comparisons: [MeasureComparison; 2]| {
            let differences = names
                .iter()
                .zip(comparisons)
                .map(|(name, c)| (name, c, classify_difference(name, &c)));
            describe_differences("live", &differences.collect::<Vec<_>>())
        };
        let not_significant = measure_comparison(-0.01, 0.02, 0.4);
        assert_eq!(describe([not_significant, not_significant]), None);
        // An interval without 0 is not enough if the corrected p is not small.
        assert_eq!(describe([measure_comparison(-0.04, 0.03, 0.06), not_significant]), None);
        let fewer = describe([measure_comparison(-0.1, 0.03, 0.001), not_significant]).unwrap();
        assert!(fewer.contains("fewer false first hits, 30.0 % instead of 40.0 %"), "{fewer}");
        assert!(fewer.contains("−10.0 points, 95 % interval −13.0 to −7.0"), "{fewer}");
        let worse = describe([not_significant, measure_comparison(-0.1, 0.03, 0.001)]).unwrap();
        assert!(
            worse.contains("no measurable difference in false first hits, and is worse in nDCG@10")
        );
    }
}
