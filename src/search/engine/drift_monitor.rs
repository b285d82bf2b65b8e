//! Does balancing go further than when it was calibrated? Looked at in the answers themselves.
//!
//! A window of the last answers that the live configuration gave, each query once, is compared with
//! what was usual at calibration ([`Usual`]), and so are the statistics of the images that are there.

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

/// Answers that are looked at; older ones leave the window.
const MAX_WINDOW_ANSWERS: usize = 2_000;
/// Age at which an answer leaves the window.
const MAX_ANSWER_AGE: Duration = Duration::from_secs(3_600);

/// An answer, as far as it is looked at.
struct ObservedAnswer {
    observed_at: Instant,
    query_hash: u64,
    first_hit: ImageId,
    first_raw_hit: ImageId,
    no_match: Option<bool>,
}

/// The last answers of one configuration.
#[derive(Default)]
struct AnswerWindow {
    serving: Option<ServingConfig>,
    answers: VecDeque<ObservedAnswer>,
}

impl AnswerWindow {
    /// What changes how is answered begins a new window, and the old leave it.
    fn reset_or_expire(&mut self, serving: &ServingConfig) {
        if self.serving.as_ref() != Some(serving) {
            self.serving = Some(serving.clone());
            self.answers.clear();
        }
        while self.answers.len() > MAX_WINDOW_ANSWERS
            || self.answers.front().is_some_and(|seen| seen.observed_at.elapsed() > MAX_ANSWER_AGE)
        {
            self.answers.pop_front();
        }
    }
}

/// Watches answers.
#[derive(Default)]
pub(crate) struct DriftMonitor(Mutex<AnswerWindow>);

impl DriftMonitor {
    /// Sees the first hit, and that of plain CLIP, of an answer by the live configuration to an
    /// unfiltered text.
    pub fn observe(
        &self,
        serving: &ServingConfig,
        text: &str,
        (first, first_raw): (ImageId, ImageId),
        no_match: Option<bool>,
    ) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.answers.push_back(ObservedAnswer {
            observed_at: Instant::now(),
            query_hash: hasher.finish(),
            first_hit: first,
            first_raw_hit: first_raw,
            no_match,
        });
        window.reset_or_expire(serving);
    }

    /// How many different queries are in the window, and how they were answered.
    fn answer_stats(&self, serving: &ServingConfig, images: usize) -> (usize, Option<AnswerStats>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.reset_or_expire(serving);
        // The last answer to each query: one that everybody asks is one observation.
        let queries: HashMap<u64, &ObservedAnswer> =
            window.answers.iter().map(|s| (s.query_hash, s)).collect();
        let of = |seen: &&ObservedAnswer| {
            (seen.first_hit.clone(), seen.first_raw_hit.clone(), seen.no_match)
        };
        (queries.len(), AnswerStats::from_answers(queries.values().map(of), images))
    }

    /// Logs `balance.drift` and sets the metrics of the same name.
    pub fn log_drift(&self, snapshot: &Snapshot) {
        let served = &snapshot.serving_snapshot;
        let baseline: Option<Baseline> =
            served.serving.calibration.as_ref().and_then(|c| c.baseline);
        let (queries, now) = self.answer_stats(&served.serving, snapshot.len());
        let baseline_answers = baseline.map(|usual| usual.answers);
        let summary = StatisticsSummary::from_statistics(
            snapshot.live_statistics(&served.serving.prompt_set),
        );
        let baseline_summary = baseline.and_then(|usual| usual.score_moments);
        let pair = summary.as_ref().zip(baseline_summary.as_ref());
        let drift = pair.and_then(|(now, then)| now.drift_from(then));
        let std_ratio = pair
            .filter(|(_, then)| then.mean_of_stds > 0.0)
            .map(|(now, then)| now.mean_of_stds / then.mean_of_stds);
        info!(
            event = event::BALANCE_DRIFT,
            configuration = served.configuration_name,
            revision = served.state_revision,
            calibrated = baseline.is_some(),
            images = snapshot.len(),
            queries,
            top_hit_changed = now.map(|h| h.top_hit_changed),
            top_hit_changed_baseline = baseline_answers.map(|h| h.top_hit_changed),
            no_match = now.and_then(|h| h.no_match),
            no_match_baseline = baseline_answers.and_then(|h| h.no_match),
            hubness = now.map(|h| h.hubness),
            hubness_raw = now.map(|h| h.hubness_raw),
            hubness_ratio = now.and_then(|h| h.hubness_ratio()),
            hubness_ratio_baseline = baseline_answers.and_then(|h| h.hubness_ratio()),
            mean = summary.map(|m| m.mean),
            mean_baseline = baseline_summary.map(|m| m.mean),
            std = summary.map(|m| m.mean_of_stds),
            std_baseline = baseline_summary.map(|m| m.mean_of_stds),
            drift,
            "how far balancing goes"
        );
        let metrics = metrics::global();
        metrics.balance_queries.set(&[], queries as f64);
        metrics.balance_drift.set_or_nan(drift);
        metrics.balance_std.set_or_nan(std_ratio);
        for (at, habits) in [("current", now), ("baseline", baseline_answers)] {
            let known = |value: Option<f64>| value.unwrap_or(f64::NAN);
            metrics.balance_top_hit_changed.set(&[at], known(habits.map(|h| h.top_hit_changed)));
            metrics.balance_no_match.set(&[at], known(habits.and_then(|h| h.no_match)));
            metrics.balance_hubness.set(&[at], known(habits.and_then(|h| h.hubness_ratio())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{sample_prompt_set, sample_serving_snapshot};

    fn observe_ids(
        watch: &DriftMonitor,
        serving: &ServingConfig,
        query: usize,
        first: usize,
        raw: usize,
    ) {
        let id = |n: usize| ImageId::new(n.to_string()).unwrap();
        watch.observe(serving, &query.to_string(), (id(first), id(raw)), None);
    }

    #[test]
    fn a_query_counts_once_and_another_configuration_resets_the_window() {
        let serving = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]).serving;
        let watch = DriftMonitor::default();
        for i in 0..50 {
            observe_ids(&watch, &serving, 0, 0, 1);
            observe_ids(&watch, &serving, 1 + i % 3, 2, 2);
        }
        let (queries, habits) = watch.answer_stats(&serving, 10);
        let habits = habits.unwrap();
        assert_eq!((queries, habits.top_hit_changed, habits.no_match), (4, 0.25, None));
        let stronger = ServingConfig { weight: 0.9, ..serving };
        assert_eq!(watch.answer_stats(&stronger, 10), (0, None));
    }

    #[test]
    fn the_window_is_bounded_and_forgets_the_oldest() {
        let serving = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]).serving;
        let watch = DriftMonitor::default();
        for query in 0..3 * MAX_WINDOW_ANSWERS {
            observe_ids(
                &watch,
                &serving,
                query,
                query % 2,
                usize::from(query < 2 * MAX_WINDOW_ANSWERS),
            );
        }
        let (queries, habits) = watch.answer_stats(&serving, 10);
        assert_eq!((queries, habits.unwrap().top_hit_changed), (MAX_WINDOW_ANSWERS, 0.5));
    }
}
