//! Which configuration answers a query: the live one, the candidate where it is asked for by name
//! or for its share of the traffic, and the candidate unseen beside the live one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::catalogue::{RolloutCandidate, ServingConfig};
use crate::search::query::Filter;
use crate::search::snapshot::Route;

/// What decides who answers, of a query.
#[derive(Debug, Clone, Copy)]
pub struct RoutingRequest<'a> {
    /// The configuration that is asked for by name.
    pub configuration: Option<&'a str>,
    /// What the caller is told apart by: the same key always gets the same configuration.
    pub traffic_key: Option<&'a str>,
    /// Whether the query says itself how it is to be answered.
    pub has_overrides: bool,
    /// Which images it may find.
    pub filter: Option<&'a Filter>,
}

/// Who answers a query, by the candidate that there is. `Err` where it asks for a configuration that
/// there is not; names those that there are.
pub fn choose_route(
    live: &str,
    candidate: Option<&RolloutCandidate>,
    request: RoutingRequest<'_>,
) -> Result<Route, String> {
    match (request.configuration, candidate) {
        (Some("live"), _) => return Ok(Route::Live),
        (Some(name), _) if name == live => return Ok(Route::Live),
        (Some("candidate"), Some(_)) => return Ok(Route::Candidate),
        (Some(name), Some(candidate)) if name == candidate.name => return Ok(Route::Candidate),
        (Some(name), _) => {
            let there = candidate.map_or_else(
                || format!("live ({live}); there is no candidate"),
                |candidate| format!("live ({live}) and candidate ({})", candidate.name),
            );
            return Err(format!("{name:?} is not a configuration; there is {there}"));
        }
        (None, _) => {}
    }
    let (Some(candidate), Some(key), false) =
        (candidate, request.traffic_key, request.has_overrides)
    else {
        return Ok(Route::Live);
    };
    // A share may be kept for queries whose filter asks for a certain value.
    let asks_for = |only: &String| {
        let (name, value) = only.split_once('=').unwrap_or((only, ""));
        request.filter.is_some_and(|filter| filter.implies(name, value))
    };
    let in_share = candidate.traffic_filter.as_ref().is_none_or(asks_for)
        && hash_to_unit_interval(&candidate.name, key) < f64::from(candidate.traffic_share);
    Ok(if in_share { Route::Candidate } else { Route::Live })
}

/// Where a key stands between 0 and 1 for a candidate: evenly spread, the same on every query worker.
/// A share that grows keeps those that it had.
fn hash_to_unit_interval(candidate: &str, key: &str) -> f64 {
    let mut hasher = Sha256::new();
    hasher.update((candidate.len() as u64).to_le_bytes());
    hasher.update(candidate.as_bytes());
    hasher.update(key.as_bytes());
    let digest = hasher.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    // 53 bits are what a double holds exactly.
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

/// Answers so far, since this query worker started or has another candidate.
#[derive(Debug, Default)]
pub struct TrafficCounters {
    live_answers: AtomicU64,
    candidate_answers: AtomicU64,
    shadow_queries: AtomicU64,
    skipped_shadow_queries: AtomicU64,
    /// Sum of overlaps in millionths.
    overlap_millionths: AtomicU64,
    top_hit_changed: AtomicU64,
    is_shadow_running: AtomicBool,
    /// The candidate that is counted.
    counted_candidate: Mutex<Option<(String, ServingConfig)>>,
}

/// The counts as they are told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct TrafficCounts {
    /// Answers by the live configuration.
    pub live: u64,
    /// Answers by the candidate.
    pub candidate: u64,
    /// Queries that were computed in the shadow.
    pub shadow_queries: u64,
    /// Queries that were due to be, while another was computed.
    pub shadow_queries_skipped: u64,
    /// Mean share of common results of those; none before the first.
    pub mean_overlap: Option<f64>,
    /// How many of those had another best result.
    pub top_hit_changed: u64,
}

impl TrafficCounters {
    /// Begins anew where `candidate` is another one, or answers otherwise, than the one that was counted.
    pub fn reset_for(&self, candidate: Option<&RolloutCandidate>) {
        let new = candidate.map(|candidate| (candidate.name.clone(), candidate.serving.clone()));
        let mut of = self.counted_candidate.lock().unwrap_or_else(PoisonError::into_inner);
        if *of == new {
            return;
        }
        *of = new;
        let counters = [
            &self.live_answers,
            &self.candidate_answers,
            &self.shadow_queries,
            &self.skipped_shadow_queries,
            &self.overlap_millionths,
            &self.top_hit_changed,
        ];
        for counter in counters {
            counter.store(0, Ordering::Relaxed);
        }
    }

    /// Counts an answer.
    pub fn count_answer(&self, route: Route) {
        let counter = match route {
            Route::Live => &self.live_answers,
            Route::Candidate => &self.candidate_answers,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the only turn that there is to compute in the shadow; false while it is taken: the
    /// shadow never delays more than itself.
    pub fn try_begin_shadow(&self) -> bool {
        let free = !self.is_shadow_running.swap(true, Ordering::AcqRel);
        if !free {
            self.skipped_shadow_queries.fetch_add(1, Ordering::Relaxed);
        }
        free
    }

    /// Gives the turn back, with what was found.
    pub fn end_shadow(&self, difference: Option<&RankingDifference>) {
        if let Some(found) = difference {
            self.shadow_queries.fetch_add(1, Ordering::Relaxed);
            self.overlap_millionths.fetch_add((found.overlap * 1e6) as u64, Ordering::Relaxed);
            self.top_hit_changed.fetch_add(u64::from(found.top_hit_changed), Ordering::Relaxed);
        }
        self.is_shadow_running.store(false, Ordering::Release);
    }

    /// The counts at this moment.
    pub fn counts(&self) -> TrafficCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shadows = load(&self.shadow_queries);
        TrafficCounts {
            live: load(&self.live_answers),
            candidate: load(&self.candidate_answers),
            shadow_queries: shadows,
            shadow_queries_skipped: load(&self.skipped_shadow_queries),
            mean_overlap: (shadows > 0)
                .then(|| load(&self.overlap_millionths) as f64 / 1e6 / shadows as f64),
            top_hit_changed: load(&self.top_hit_changed),
        }
    }
}

/// How two answers to one query differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankingDifference {
    /// Share of the first one's results that the second has too, 0..=1.
    pub overlap: f64,
    /// Common results whose place differs.
    pub moved_results: usize,
    /// Whether another result is best.
    pub top_hit_changed: bool,
}

impl RankingDifference {
    /// Of two rankings, by the ids of their results, the best first.
    pub fn from_rankings(live: &[&str], candidate: &[&str]) -> Self {
        let places: BTreeMap<&str, usize> =
            candidate.iter().enumerate().map(|(place, id)| (*id, place)).collect();
        let common: Vec<(usize, usize)> =
            live.iter().enumerate().filter_map(|(a, id)| Some((a, *places.get(id)?))).collect();
        let longest = live.len().max(candidate.len()).max(1);
        let empty = live.is_empty() && candidate.is_empty();
        Self {
            overlap: if empty { 1.0 } else { common.len() as f64 / longest as f64 },
            moved_results: common.iter().filter(|(a, b)| a != b).count(),
            top_hit_changed: live.first() != candidate.first(),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::balance::statistics::StatisticsKey;

    fn candidate_with_share(share: f32) -> RolloutCandidate {
        RolloutCandidate {
            name: "new".into(),
            generation: "g".into(),
            serving: ServingConfig::new(StatisticsKey::from_stored("k"), Normaliser::Nnn, 0.5),
            traffic_share: share,
            shadow_share: 0.0,
            traffic_filter: None,
            since: DateTime::from_timestamp(0, 0).unwrap(),
            evaluation_fingerprint: None,
        }
    }

    fn request_with_key(key: Option<&str>) -> RoutingRequest<'_> {
        RoutingRequest { configuration: None, traffic_key: key, has_overrides: false, filter: None }
    }

    #[test]
    fn a_growing_share_keeps_the_keys_that_it_had() {
        let keys: Vec<String> = (0..4_000).map(|i| format!("user-{i}")).collect();
        let of = |share: f32| -> Vec<&String> {
            let candidate = candidate_with_share(share);
            let takes = |key: &&String| {
                choose_route("old", Some(&candidate), request_with_key(Some(key))).unwrap()
                    == Route::Candidate
            };
            keys.iter().filter(takes).collect()
        };
        let (tenth, third) = (of(0.1), of(0.3));
        assert!((300..500).contains(&tenth.len()), "{}", tenth.len());
        assert!(tenth.iter().all(|key| third.contains(key)));
        assert_eq!((of(0.0).len(), of(1.0).len()), (0, 4_000));
        assert_eq!(
            choose_route("old", Some(&candidate_with_share(1.0)), request_with_key(None)),
            Ok(Route::Live)
        );
        let own = RoutingRequest { has_overrides: true, ..request_with_key(Some("user-1")) };
        assert_eq!(choose_route("old", Some(&candidate_with_share(1.0)), own), Ok(Route::Live));
    }

    #[test]
    fn a_configuration_can_be_asked_for_and_an_unknown_one_is_named() {
        let new = candidate_with_share(0.0);
        let by = |name, candidate| {
            choose_route(
                "old",
                candidate,
                RoutingRequest { configuration: Some(name), ..request_with_key(None) },
            )
        };
        for (name, wanted) in [
            ("live", Route::Live),
            ("old", Route::Live),
            ("candidate", Route::Candidate),
            ("new", Route::Candidate),
        ] {
            assert_eq!(by(name, Some(&new)), Ok(wanted));
        }
        assert!(by("newer", Some(&new)).unwrap_err().contains("candidate (new)"));
        assert!(by("candidate", None).unwrap_err().contains("no candidate"));
    }

    #[test]
    fn differences_of_rankings() {
        let same = RankingDifference::from_rankings(&["a", "b"], &["a", "b"]);
        assert_eq!(
            same,
            RankingDifference { overlap: 1.0, moved_results: 0, top_hit_changed: false }
        );
        let other = RankingDifference::from_rankings(&["a", "b", "c", "d"], &["b", "a", "e", "d"]);
        assert_eq!(
            other,
            RankingDifference { overlap: 0.75, moved_results: 2, top_hit_changed: true }
        );
        assert!((RankingDifference::from_rankings(&[], &[]).overlap - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn one_shadow_at_a_time_and_its_counts() {
        let traffic = TrafficCounters::default();
        assert!(traffic.try_begin_shadow());
        assert!(!traffic.try_begin_shadow());
        traffic.end_shadow(Some(&RankingDifference {
            overlap: 0.5,
            moved_results: 1,
            top_hit_changed: true,
        }));
        assert!(traffic.try_begin_shadow());
        traffic.end_shadow(None);
        let counts = traffic.counts();
        assert_eq!(
            (counts.shadow_queries, counts.shadow_queries_skipped, counts.top_hit_changed),
            (1, 1, 1)
        );
        assert_eq!(counts.mean_overlap, Some(0.5));
    }

    #[test]
    fn another_candidate_resets_the_counts() {
        let traffic = TrafficCounters::default();
        let larger = RolloutCandidate { traffic_share: 0.5, ..candidate_with_share(0.1) };
        let mut heavier = candidate_with_share(0.1);
        heavier.serving.weight = 0.75;
        let mut counted = Vec::new();
        for next in [Some(candidate_with_share(0.1)), Some(larger), Some(heavier), None] {
            traffic.reset_for(next.as_ref());
            traffic.count_answer(Route::Candidate);
            counted.push(traffic.counts().candidate);
        }
        assert_eq!(counted, [1, 2, 1, 1]);
    }
}
