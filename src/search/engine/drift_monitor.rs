//! Detects whether balancing changes answers more strongly than it did at calibration.
//!
//! A window of recent answers of the live configuration, with each query counted once, is compared with
//! the [`Baseline`] that was measured at calibration, and so are the statistics of the live images.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::info;

use crate::balance::calibration::{AnswerStats, Baseline, StatisticsSummary};
use crate::catalogue::ServingConfig;
use crate::record::ImageId;
use crate::search::snapshot::Snapshot;
use crate::telemetry::{event, metrics};

/// Maximum number of answers in the window.
const MAX_WINDOW_ANSWERS: usize = 2_000;
/// Age at which an answer leaves the window.
const MAX_ANSWER_AGE: Duration = Duration::from_secs(3_600);

/// What the window keeps of an answer.
struct ObservedAnswer {
    observed_at: Instant,
    query_hash: u64,
    first_hit: ImageId,
    first_raw_hit: ImageId,
    no_match: Option<bool>,
}

/// Recent answers of one configuration, the oldest first.
#[derive(Default)]
struct AnswerWindow {
    /// Configuration that gave the answers.
    serving: Option<ServingConfig>,
    answers: VecDeque<ObservedAnswer>,
}

impl AnswerWindow {
    /// Starts a new window if the configuration has changed, and drops answers that are too old or too
    /// many.
    fn reset_or_expire(&mut self, serving: &ServingConfig) {
        if self.serving.as_ref() != Some(serving) {
            self.serving = Some(serving.clone());
            self.answers.clear();
        }
        while self.answers.len() > MAX_WINDOW_ANSWERS
            || self
                .answers
                .front()
                .is_some_and(|answer| answer.observed_at.elapsed() > MAX_ANSWER_AGE)
        {
            self.answers.pop_front();
        }
    }
}

/// Keeps the window of recent answers and compares it with the baseline.
#[derive(Default)]
pub(crate) struct DriftMonitor(Mutex<AnswerWindow>);

impl DriftMonitor {
    /// Adds an answer of the live configuration to a text query without a filter: its first hit, and the
    /// first hit by plain CLIP.
    pub fn record_answer(
        &self,
        serving: &ServingConfig,
        text: &str,
        (first_hit, first_raw_hit): (ImageId, ImageId),
        no_match: Option<bool>,
    ) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.answers.push_back(ObservedAnswer {
            observed_at: Instant::now(),
            query_hash: hasher.finish(),
            first_hit,
            first_raw_hit,
            no_match,
        });
        window.reset_or_expire(serving);
    }

    /// Returns the number of different queries in the window, and how they were answered. `images` is
    /// the number of live images.
    fn answer_stats(&self, serving: &ServingConfig, images: usize) -> (usize, Option<AnswerStats>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.reset_or_expire(serving);
        // Only the last answer to each query, so that a popular query counts as one observation.
        let queries: HashMap<u64, &ObservedAnswer> =
            window.answers.iter().map(|answer| (answer.query_hash, answer)).collect();
        let answers = queries.values().map(|answer| {
            (answer.first_hit.clone(), answer.first_raw_hit.clone(), answer.no_match)
        });
        (queries.len(), AnswerStats::from_answers(answers, images))
    }

    /// Logs `balance.drift` and sets the metrics of the same name. Reads the statistics of all images.
    pub fn report_drift(&self, snapshot: &Snapshot) {
        let serving_snapshot = &snapshot.serving_snapshot;
        let serving = &serving_snapshot.serving;
        let baseline: Option<Baseline> = serving.calibration.as_ref().and_then(|c| c.baseline);
        let (queries, answers) = self.answer_stats(serving, snapshot.len());
        let baseline_answers = baseline.map(|baseline| baseline.answers);
        let statistics = snapshot.live_statistics(&serving.prompt_set);
        let summary = StatisticsSummary::from_statistics(statistics);
        let baseline_summary = baseline.and_then(|baseline| baseline.score_moments);
        let summaries = summary.as_ref().zip(baseline_summary.as_ref());
        let drift = summaries.and_then(|(current, baseline)| current.mean_drift_from(baseline));
        let std_ratio = summaries
            .filter(|(_, baseline)| baseline.mean_of_stds > 0.0)
            .map(|(current, baseline)| current.mean_of_stds / baseline.mean_of_stds);
        info!(
            event = event::BALANCE_DRIFT,
            configuration = serving_snapshot.configuration_name,
            revision = serving_snapshot.state_revision,
            calibrated = baseline.is_some(),
            images = snapshot.len(),
            queries,
            top_hit_changed = answers.map(|a| a.top_hit_changed),
            top_hit_changed_baseline = baseline_answers.map(|a| a.top_hit_changed),
            no_match = answers.and_then(|a| a.no_match),
            no_match_baseline = baseline_answers.and_then(|a| a.no_match),
            hubness = answers.map(|a| a.hubness),
            hubness_raw = answers.map(|a| a.hubness_raw),
            hubness_ratio = answers.and_then(|a| a.hubness_ratio()),
            hubness_ratio_baseline = baseline_answers.and_then(|a| a.hubness_ratio()),
            mean = summary.map(|s| s.mean),
            mean_baseline = baseline_summary.map(|s| s.mean),
            std = summary.map(|s| s.mean_of_stds),
            std_baseline = baseline_summary.map(|s| s.mean_of_stds),
            drift,
            "balancing compared with its calibration"
        );
        let metrics = metrics::global();
        metrics.balance_queries.set(&[], queries as f64);
        metrics.balance_drift.set_or_nan(drift);
        metrics.balance_std.set_or_nan(std_ratio);
        for (period, stats) in [("current", answers), ("baseline", baseline_answers)] {
            let or_nan = |value: Option<f64>| value.unwrap_or(f64::NAN);
            let top_hit_changed = stats.map(|a| a.top_hit_changed);
            metrics.balance_top_hit_changed.set(&[period], or_nan(top_hit_changed));
            metrics.balance_no_match.set(&[period], or_nan(stats.and_then(|a| a.no_match)));
            metrics.balance_hubness.set(&[period], or_nan(stats.and_then(|a| a.hubness_ratio())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{sample_prompt_set, sample_serving_snapshot};

    fn observe_ids(
        monitor: &DriftMonitor,
        serving: &ServingConfig,
        query: usize,
        first_hit: usize,
        first_raw_hit: usize,
    ) {
        let id = |n: usize| ImageId::new(n.to_string()).unwrap();
        monitor.record_answer(
            serving,
            &query.to_string(),
            (id(first_hit), id(first_raw_hit)),
            None,
        );
    }

    #[test]
    fn a_query_counts_once_and_another_configuration_resets_the_window() {
        let serving = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]).serving;
        let monitor = DriftMonitor::default();
        for i in 0..50 {
            observe_ids(&monitor, &serving, 0, 0, 1);
            observe_ids(&monitor, &serving, 1 + i % 3, 2, 2);
        }
        let (queries, stats) = monitor.answer_stats(&serving, 10);
        let stats = stats.unwrap();
        assert_eq!((queries, stats.top_hit_changed, stats.no_match), (4, 0.25, None));
        let stronger = ServingConfig { weight: 0.9, ..serving };
        assert_eq!(monitor.answer_stats(&stronger, 10), (0, None));
    }

    #[test]
    fn the_window_is_bounded_and_drops_the_oldest_answers() {
        let serving = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]).serving;
        let monitor = DriftMonitor::default();
        for query in 0..3 * MAX_WINDOW_ANSWERS {
            observe_ids(
                &monitor,
                &serving,
                query,
                query % 2,
                usize::from(query < 2 * MAX_WINDOW_ANSWERS),
            );
        }
        let (queries, stats) = monitor.answer_stats(&serving, 10);
        assert_eq!((queries, stats.unwrap().top_hit_changed), (MAX_WINDOW_ANSWERS, 0.5));
    }
}
