//! What query workers measured of the candidate's prompt set, and what that says against the candidate.

use chrono::{DateTime, Utc};

use super::error::RolloutError;
use crate::balance::bank::MeasuredBank;
use crate::balance::fit::MIN_FIT_QUERIES;
use crate::balance::normalise::Normaliser;
use crate::balance::proposal::{CAUTIOUS_WEIGHT, HIGH_FIT, MAX_CONCENTRATION};
use crate::catalogue::{ReplicaReports, RolloutCandidate, ServingConfig};
use crate::store::Store;

/// Returns what was measured of the candidate's prompt set, by the query worker that did so with most
/// queries; `None` if none has measured it.
pub(super) async fn find_measured_bank(
    catalogue: &Store,
    candidate: &RolloutCandidate,
    now: DateTime<Utc>,
) -> Result<Option<MeasuredBank>, RolloutError> {
    let reports = ReplicaReports::new(catalogue).list_and_remove_expired(now).await?;
    let active = reports.into_iter().filter(|report| !report.is_stale(now));
    let is_candidates = |bank: &MeasuredBank| {
        bank.prompt_set == candidate.serving.prompt_set && bank.generation == candidate.generation
    };
    let measured = active.flat_map(|report| report.banks).filter(is_candidates);
    Ok(measured.max_by_key(|bank| (bank.report.fit.is_some(), bank.queries)))
}

/// Returns a warning if the fit of a configuration's prompt set is low, if its concentration is high, or if
/// its weight is above the one that is proposed.
pub(super) fn bank_warning(serving: &ServingConfig, bank: Option<&MeasuredBank>) -> Option<String> {
    if serving.normaliser == Normaliser::Raw || serving.weight == 0.0 {
        return None;
    }
    let Some((bank, fit)) = bank.and_then(|bank| Some((bank, bank.report.fit?))) else {
        return (serving.weight > CAUTIOUS_WEIGHT).then(|| {
            let queries = bank.map_or(0, |bank| bank.queries);
            format!(
                "the fit of its prompt set is not known: query workers have answered {queries} different queries with it in memory, fewer than {MIN_FIT_QUERIES}; until then weight {CAUTIOUS_WEIGHT} is proposed instead of {}",
                serving.weight
            )
        });
    };
    let report = &bank.report;
    let is_above_proposal = serving.weight > report.proposed_weight;
    let is_concentrated = report.concentration.is_some_and(|c| c > MAX_CONCENTRATION);
    if fit.value >= HIGH_FIT && !is_concentrated && !is_above_proposal {
        return None;
    }
    let advice = if is_above_proposal {
        format!("weight {} is proposed instead of {}", report.proposed_weight, serving.weight)
    } else {
        format!("its weight {} is not above the proposed one", serving.weight)
    };
    Some(format!(
        "its prompt set has {}: {}; {advice} (docs/balancing.md, \"A weight without judgements\")",
        describe_measured_bank(bank),
        report.reason
    ))
}

/// Describes fit and concentration with their figures.
pub fn describe_measured_bank(bank: &MeasuredBank) -> String {
    let Some(fit) = bank.report.fit else {
        return format!("an unknown fit, after {} different queries", bank.queries);
    };
    let concentration = bank
        .report
        .concentration
        .map_or("an unknown concentration".into(), |value| format!("concentration {value:.2}"));
    format!("fit {fit} and {concentration} for {} recent queries", fit.queries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::bank::BankReport;
    use crate::balance::fit::BankFit;
    use crate::balance::statistics::StatisticsKey;

    fn bank(texts: usize, fit: Option<f64>, concentration: f64) -> MeasuredBank {
        let fit =
            fit.map(|value| BankFit { value, low: value - 0.05, high: value + 0.05, queries: 300 });
        MeasuredBank {
            generation: "g".into(),
            prompt_set: StatisticsKey::from_stored("k"),
            measured_at: DateTime::UNIX_EPOCH,
            images: 1_000,
            queries: if fit.is_some() { 300 } else { 12 },
            report: BankReport::new(texts, texts, fit, fit.map(|_| concentration)),
        }
    }

    fn warning(weight: f32, bank: Option<&MeasuredBank>) -> Option<String> {
        let key = StatisticsKey::from_stored("k");
        bank_warning(&ServingConfig::new(key, Normaliser::Nnn, weight), bank)
    }

    #[test]
    fn low_fit_and_high_concentration_are_reported_with_figures() {
        let has = |text: Option<String>, words: &[&str]| {
            let text = text.unwrap_or_default();
            for word in words {
                assert!(text.contains(word), "{word}: {text}");
            }
        };
        let low = bank(100, Some(0.05), 0.2);
        has(warning(0.25, Some(&low)), &["fit 0.05 (0.00 to 0.10)", "300 recent", "weight 0 is"]);
        let medium = bank(100, Some(0.34), 0.2);
        has(warning(0.5, Some(&medium)), &["fit 0.34", "weight 0.25 is proposed instead of 0.5"]);
        has(warning(0.25, Some(&medium)), &["0.34", "not above the proposed"]);
        let concentrated = bank(100, Some(0.95), 1.3);
        has(warning(0.5, Some(&concentrated)), &["concentration 1.30", "instead of 0.5"]);
        has(warning(0.5, Some(&bank(8, Some(0.9), 0.2))), &["8 texts", "0.25 is proposed"]);
        has(warning(0.5, Some(&bank(100, None, 0.0))), &["not known", "12 different queries"]);
        has(warning(0.5, None), &["not known"]);
    }

    #[test]
    fn nothing_is_said_about_a_bank_that_fits_or_is_not_used() {
        let (good, low) = (bank(100, Some(0.8), 0.4), bank(100, Some(0.05), 0.2));
        assert_eq!(warning(0.5, Some(&good)), None);
        assert_eq!(warning(0.25, None), None);
        assert_eq!(warning(0.0, Some(&low)), None);
        let raw = ServingConfig::new(StatisticsKey::from_stored("k"), Normaliser::Raw, 0.5);
        assert_eq!(bank_warning(&raw, Some(&low)), None);
    }
}
