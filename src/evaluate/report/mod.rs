//! What an evaluation found, for machines and in words.

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

/// p below which a difference counts as measured.
pub const SIGNIFICANCE_LEVEL: f64 = 0.05;

/// What an evaluation found.
#[derive(Debug, Clone, Serialize)]
pub struct EvaluationReport {
    /// SHA-256 over everything else but `at`: what a calibration names as its evidence.
    pub fingerprint: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Version of this program.
    pub version: String,
    /// The catalogue: its address, or what was drawn.
    pub catalogue: String,
    /// Which models filled it.
    pub models: Vec<ModelInfo>,
    /// What was asked.
    pub queries: QueryCounts,
    /// Names of the measures, in the order of every summary's columns.
    pub measures: Vec<String>,
    /// The configuration that all others are compared with.
    pub baseline: String,
    /// Figures of the cost, as given.
    pub cost: Option<CorrectionCost>,
    /// In plain words.
    pub verdict: String,
    /// What must be known to read the figures.
    pub notes: Vec<String>,
    /// What each configuration is worth.
    pub configurations: Vec<ConfigurationResult>,
}

/// What was asked.
#[derive(Debug, Clone, Default, Serialize)]
pub struct QueryCounts {
    /// Where they come from.
    pub source: String,
    /// SHA-256 over texts and judgements.
    pub fingerprint: String,
    /// Queries in all.
    pub total: usize,
    /// With a right image in the catalogue: these are measured.
    pub judged: usize,
    /// Judged to match nothing.
    pub judged_no_match: usize,
    /// Of which nothing is known: rankings are compared only.
    pub unjudged: usize,
    /// Judged, but with no right image in the catalogue: left out.
    pub without_relevant_image: usize,
    /// Judged images that are not in the catalogue.
    pub missing_images: usize,
    /// Unrelated and gibberish texts that were asked besides.
    pub probes: usize,
}

impl EvaluationReport {
    /// Fills in verdict and fingerprint.
    pub fn with_verdict_and_fingerprint(mut self) -> Self {
        self.verdict = describe_verdict(&self);
        self.fingerprint.clear();
        let at = std::mem::take(&mut self.created_at);
        let bytes = serde_json::to_vec(&self).unwrap_or_default();
        self.fingerprint = to_hex(&Sha256::digest(&bytes));
        self.created_at = at;
        self
    }

    /// A measure of a configuration over all judged queries.
    pub fn measure_comparison(
        &self,
        outcome: &ConfigurationResult,
        measure: &str,
    ) -> Option<MeasureComparison> {
        let place = self.measures.iter().position(|name| name == measure)?;
        Some(outcome.overall.as_ref()?.measures[place])
    }

    /// The configurations beside the baseline.
    pub fn non_baseline(&self) -> impl Iterator<Item = &ConfigurationResult> {
        self.configurations.iter().filter(|outcome| outcome.name != self.baseline)
    }
}

/// What a difference says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeasuredDifference {
    /// Better than the baseline, measurably.
    Better,
    /// Worse, measurably.
    Worse,
    /// The queries do not tell.
    NotSignificant,
}

/// What a difference of a measure says: p corrected, and 0 outside the interval.
pub fn classify_difference(measure: &str, column: &MeasureComparison) -> MeasuredDifference {
    if column.p_value >= SIGNIFICANCE_LEVEL || !column.gain.excludes_zero() {
        return MeasuredDifference::NotSignificant;
    }
    let more = column.gain.mean > 0.0;
    let better = (Cutoffs::direction(measure) == MeasureDirection::Higher) == more;
    if better { MeasuredDifference::Better } else { MeasuredDifference::Worse }
}

/// A share as a percentage.
pub fn format_percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A difference of shares in percentage points, with its interval.
fn format_points(gain: &ConfidenceInterval) -> String {
    let signed = |v: f64| format!("{:+.1}", v * 100.0).replace('-', "−");
    format!(
        "{} points, 95 % interval {} to {}",
        signed(gain.mean),
        signed(gain.low),
        signed(gain.high)
    )
}

/// The measures that the verdict speaks of: false hits, then how much of what is there is found.
fn verdict_measures(report: &EvaluationReport) -> Vec<&String> {
    let wanted = |name: &&String| {
        *name == FALSE_HIT_MEASURE || name.starts_with("nDCG") || name.starts_with("capped")
    };
    let mut spoken: Vec<&String> = report.measures.iter().filter(wanted).collect();
    spoken.sort_by_key(|name| *name != FALSE_HIT_MEASURE);
    spoken
}

fn describe_verdict(report: &EvaluationReport) -> String {
    let mut text = String::new();
    let QueryCounts { judged, total: asked, .. } = report.queries;
    let baseline = &report.baseline;
    if report.non_baseline().next().is_none() {
        return format!("Only {baseline} was measured; nothing is compared.");
    }
    if judged == 0 {
        let _ = write!(
            text,
            "None of the {asked} queries has a judged right image in the catalogue, so nothing is said about right and wrong. "
        );
        for outcome in report.non_baseline() {
            if let Some(stability) = &outcome.stability {
                let _ = write!(
                    text,
                    "Against {baseline}, {} changes the first result of {} of the queries and shares {} of the best {}. ",
                    outcome.name,
                    format_percent(stability.top_hit_changed.mean),
                    format_percent(stability.overlap.mean),
                    stability.depth,
                );
            }
        }
        text.push_str("Look at the queries that change most, and have them judged.");
        return text;
    }
    let _ = write!(text, "On {judged} judged queries, compared with {baseline}: ");
    let measures = verdict_measures(report);
    let mut same = Vec::new();
    for outcome in report.non_baseline() {
        let found: Vec<(&String, MeasureComparison, MeasuredDifference)> = measures
            .iter()
            .filter_map(|name| {
                let column = report.measure_comparison(outcome, name)?;
                Some((*name, column, classify_difference(name, &column)))
            })
            .collect();
        let description = describe_differences(&outcome.name, &found);
        let Some(told) = description else {
            same.push((outcome.name.as_str(), found.first().map(|(_, column, _)| *column)));
            continue;
        };
        text.push_str(&told);
        let counts = |(name, _, finding): &(&String, MeasureComparison, MeasuredDifference)| {
            *name == FALSE_HIT_MEASURE && *finding != MeasuredDifference::NotSignificant
        };
        if let Some(savings) = outcome.savings.filter(|_| found.iter().any(counts)) {
            text.push_str(&describe_savings(savings.minutes_per_day));
        }
    }
    if !same.is_empty() {
        let names: Vec<&str> = same.iter().map(|(name, _)| *name).collect();
        let word = if text.ends_with(": ") { "no" } else { "No" };
        let _ = write!(text, "{word} measurable difference for {}", names.join(", "));
        let columns = same.iter().filter_map(|(_, column)| *column);
        let widest =
            columns.map(|column| undetectable_change(&column.gain, judged)).fold(0.0, f64::max);
        let _ = write!(
            text,
            "; with these queries, a change of false first hits of up to {:.1} percentage points could hide. ",
            widest * 100.0
        );
    }
    if report.configurations.len() > 2 {
        text.push_str("Chances are corrected for the number of configurations compared. ");
    }
    text.trim_end().to_owned()
}

/// How large a change of the share of false first hits may go unseen on so many queries. Where few or no
/// first hits changed, samples of these queries hold no more changes than they do: Wilson's bound of the
/// net change, whole queries of `judged`, counts those that were not asked.
fn undetectable_change(gain: &ConfidenceInterval, judged: usize) -> f64 {
    let net = (gain.mean.abs() * judged as f64).round() as usize;
    let counted = wilson_interval(net, judged).map_or(1.0, |share| share.high);
    gain.low.abs().max(gain.high.abs()).max(counted)
}

/// What is measurable of a configuration; `None` where nothing is.
fn describe_differences(
    name: &str,
    found: &[(&String, MeasureComparison, MeasuredDifference)],
) -> Option<String> {
    let describe_measures = |wanted: MeasuredDifference| {
        let others = found.iter().filter(|(name, ..)| *name != FALSE_HIT_MEASURE);
        let descriptions =
            others.filter(|(.., finding)| *finding == wanted).map(|(name, column, _)| {
                let (mean, before) = (column.value.mean, column.value.mean - column.gain.mean);
                format!("{name} ({mean:.3} instead of {before:.3})")
            });
        descriptions.collect::<Vec<_>>().join(" and ")
    };
    let (better, worse) = (
        describe_measures(MeasuredDifference::Better),
        describe_measures(MeasuredDifference::Worse),
    );
    let false_hits = found.iter().find(|(name, ..)| *name == FALSE_HIT_MEASURE);
    let mut text = match false_hits {
        Some((_, column, finding)) if *finding != MeasuredDifference::NotSignificant => {
            let word = if *finding == MeasuredDifference::Better { "fewer" } else { "more" };
            let (mean, before) = (column.value.mean, column.value.mean - column.gain.mean);
            format!(
                "{name} shows {word} false first hits, {} instead of {} ({})",
                format_percent(mean),
                format_percent(before),
                format_points(&column.gain)
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

fn describe_savings(minutes: ConfidenceInterval) -> String {
    let word = if minutes.mean >= 0.0 { "saves" } else { "costs" };
    let (a, b) = if minutes.mean >= 0.0 {
        (minutes.low, minutes.high)
    } else {
        (-minutes.high, -minutes.low)
    };
    format!(
        "By the given figures that {word} {:.0} minutes of correction a day ({a:.0} to {b:.0}). ",
        minutes.mean.abs()
    )
    .replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure_comparison(mean: f64, half: f64, p: f64) -> MeasureComparison {
        let interval = |mean: f64| ConfidenceInterval { mean, low: mean - half, high: mean + half };
        MeasureComparison { value: interval(0.3), gain: interval(mean), p_value: p }
    }

    #[test]
    fn what_could_hide_is_never_nothing() {
        let gain =
            |mean: f64, half: f64| ConfidenceInterval { mean, low: mean - half, high: mean + half };
        // No first hit changed: z²/(n + z²), Wilson's bound of 0 of 100.
        assert!((undetectable_change(&gain(0.0, 0.0), 100) - 0.0370).abs() < 1e-4);
        assert!((undetectable_change(&gain(0.0, 0.0), 1_000) - 0.0038).abs() < 1e-4);
        // One more false hit of 100, of which a sample holds three at most.
        assert!((undetectable_change(&gain(0.01, 0.02), 100) - 0.0545).abs() < 1e-4);
        // Many changed to and fro: their samples tell.
        assert_eq!(undetectable_change(&gain(0.0, 0.15), 100), 0.15);
    }

    #[test]
    fn what_is_measurable_is_told_and_nothing_else() {
        let names = [FALSE_HIT_MEASURE.to_owned(), "nDCG@10".to_owned()];
        let describe = |columns: [MeasureComparison; 2]| {
            let found =
                names.iter().zip(columns).map(|(name, c)| (name, c, classify_difference(name, &c)));
            super::describe_differences("live", &found.collect::<Vec<_>>())
        };
        let nothing = measure_comparison(-0.01, 0.02, 0.4);
        assert_eq!(describe([nothing, nothing]), None);
        // An interval that leaves 0 out is not enough where the corrected p is not small.
        assert_eq!(describe([measure_comparison(-0.04, 0.03, 0.06), nothing]), None);
        let fewer = describe([measure_comparison(-0.1, 0.03, 0.001), nothing]).unwrap();
        assert!(fewer.contains("fewer false first hits, 30.0 % instead of 40.0 %"), "{fewer}");
        assert!(fewer.contains("−10.0 points, 95 % interval −13.0 to −7.0"), "{fewer}");
        let worse = describe([nothing, measure_comparison(-0.1, 0.03, 0.001)]).unwrap();
        assert!(
            worse.contains("no measurable difference in false first hits, and is worse in nDCG@10")
        );
    }
}
