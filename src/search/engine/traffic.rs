//! Decides which configuration answers a query, and counts the answers of each.
//!
//! The live configuration answers, unless the query names the candidate or belongs to the candidate's
//! share of the traffic. In addition, shadow queries compare the candidate with the live answers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::catalogue::{RolloutCandidate, ServingConfig};
use crate::search::query::Filter;
use crate::search::snapshot::ServingRole;

/// The properties of a query that decide which configuration answers it.
#[derive(Debug, Clone, Copy)]
pub struct RoutingRequest<'a> {
    /// Configuration that the query names.
    pub requested_configuration: Option<&'a str>,
    /// Identifies the caller: the same key always gets the same configuration.
    pub traffic_key: Option<&'a str>,
    /// Whether the query sets its own prompt set, normaliser, weight or λ.
    pub has_overrides: bool,
    /// Filter of the query.
    pub filter: Option<&'a Filter>,
}

/// Chooses the configuration that answers a query. Returns an error that lists the existing
/// configurations if the query names another one.
pub fn choose_route(
    live: &str,
    candidate: Option<&RolloutCandidate>,
    request: RoutingRequest<'_>,
) -> Result<ServingRole, String> {
    match (request.requested_configuration, candidate) {
        (Some("live"), _) => return Ok(ServingRole::Live),
        (Some(name), _) if name == live => return Ok(ServingRole::Live),
        (Some("candidate"), Some(_)) => return Ok(ServingRole::Candidate),
        (Some(name), Some(candidate)) if name == candidate.name => {
            return Ok(ServingRole::Candidate);
        }
        (Some(name), _) => {
            let existing = candidate.map_or_else(
                || format!("live ({live}); there is no candidate"),
                |candidate| format!("live ({live}) and candidate ({})", candidate.name),
            );
            return Err(format!("{name:?} is not a configuration; there is {existing}"));
        }
        (None, _) => {}
    }
    let (Some(candidate), Some(key), false) =
        (candidate, request.traffic_key, request.has_overrides)
    else {
        return Ok(ServingRole::Live);
    };
    // The share may be restricted to queries whose filter requires a certain value of an attribute.
    let is_required_by_filter = |attribute_value: &String| {
        let (name, value) = attribute_value.split_once('=').unwrap_or((attribute_value, ""));
        request.filter.is_some_and(|filter| filter.implies(name, value))
    };
    let in_share = candidate.traffic_filter.as_ref().is_none_or(is_required_by_filter)
        && hash_to_unit_interval(&candidate.name, key) < f64::from(candidate.traffic_share);
    Ok(if in_share { ServingRole::Candidate } else { ServingRole::Live })
}

/// Maps a key to a number from 0 to less than 1, evenly spread and the same on every query worker. It
/// depends on the candidate, and a growing share keeps the keys that it had.
fn hash_to_unit_interval(candidate: &str, key: &str) -> f64 {
    let mut hasher = Sha256::new();
    hasher.update((candidate.len() as u64).to_le_bytes());
    hasher.update(candidate.as_bytes());
    hasher.update(key.as_bytes());
    let digest = hasher.finalize();
    let mut first_bytes = [0; 8];
    first_bytes.copy_from_slice(&digest[..8]);
    // An f64 represents integers of 53 bits exactly.
    (u64::from_le_bytes(first_bytes) >> 11) as f64 / (1u64 << 53) as f64
}

/// Counts of answers since this query worker started or the candidate changed.
#[derive(Debug, Default)]
pub struct TrafficCounters {
    live_answers: AtomicU64,
    candidate_answers: AtomicU64,
    shadow_queries: AtomicU64,
    skipped_shadow_queries: AtomicU64,
    /// Sum of the overlaps of all shadow queries, in millionths.
    overlap_millionths: AtomicU64,
    top_hit_change_count: AtomicU64,
    is_shadow_running: AtomicBool,
    /// Name and configuration of the candidate that is counted.
    counted_candidate: Mutex<Option<(String, ServingConfig)>>,
}

/// The counts of answers at one moment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct TrafficCounts {
    /// Number of answers by the live configuration.
    pub live: u64,
    /// Number of answers by the candidate.
    pub candidate: u64,
    /// Number of shadow queries.
    pub shadow_queries: u64,
    /// Number of shadow queries that were skipped because another one was running.
    pub shadow_queries_skipped: u64,
    /// Mean share of results that live answer and shadow query have in common, 0 to 1; `None` before the
    /// first shadow query.
    pub mean_overlap: Option<f64>,
    /// Number of shadow queries with another best result than the live answer.
    pub top_hit_changed: u64,
}

impl TrafficCounters {
    /// Resets all counts if `candidate` has another name or configuration than the one that is counted.
    pub fn reset_for(&self, candidate: Option<&RolloutCandidate>) {
        let new = candidate.map(|candidate| (candidate.name.clone(), candidate.serving.clone()));
        let mut counted = self.counted_candidate.lock().unwrap_or_else(PoisonError::into_inner);
        if *counted == new {
            return;
        }
        *counted = new;
        let counters = [
            &self.live_answers,
            &self.candidate_answers,
            &self.shadow_queries,
            &self.skipped_shadow_queries,
            &self.overlap_millionths,
            &self.top_hit_change_count,
        ];
        for counter in counters {
            counter.store(0, Ordering::Relaxed);
        }
    }

    /// Counts one answer.
    pub fn count_answer(&self, route: ServingRole) {
        let counter = match route {
            ServingRole::Live => &self.live_answers,
            ServingRole::Candidate => &self.candidate_answers,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the permit to run a shadow query. Returns false, and counts a skipped query, if another one
    /// is running: shadow queries delay only each other.
    pub fn try_begin_shadow(&self) -> bool {
        let is_free = !self.is_shadow_running.swap(true, Ordering::AcqRel);
        if !is_free {
            self.skipped_shadow_queries.fetch_add(1, Ordering::Relaxed);
        }
        is_free
    }

    /// Releases the permit, and counts the difference that was found, if any.
    pub fn end_shadow(&self, difference: Option<&RankingDifference>) {
        if let Some(difference) = difference {
            self.shadow_queries.fetch_add(1, Ordering::Relaxed);
            self.overlap_millionths.fetch_add((difference.overlap * 1e6) as u64, Ordering::Relaxed);
            self.top_hit_change_count
                .fetch_add(u64::from(difference.top_hit_changed), Ordering::Relaxed);
        }
        self.is_shadow_running.store(false, Ordering::Release);
    }

    /// Returns the current counts.
    pub fn counts(&self) -> TrafficCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shadow_queries = load(&self.shadow_queries);
        TrafficCounts {
            live: load(&self.live_answers),
            candidate: load(&self.candidate_answers),
            shadow_queries,
            shadow_queries_skipped: load(&self.skipped_shadow_queries),
            mean_overlap: (shadow_queries > 0)
                .then(|| load(&self.overlap_millionths) as f64 / 1e6 / shadow_queries as f64),
            top_hit_changed: load(&self.top_hit_change_count),
        }
    }
}

/// How the candidate's answer to a query differs from the live one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankingDifference {
    /// Number of common results, relative to the longer of the two answers, 0 to 1.
    pub overlap: f64,
    /// Number of common results whose rank differs.
    pub moved_result_count: usize,
    /// Whether the best results differ.
    pub top_hit_changed: bool,
}

impl RankingDifference {
    /// Compares two rankings, given by the ids of their results, best first.
    pub fn from_rankings(live: &[&str], candidate: &[&str]) -> Self {
        let candidate_ranks: BTreeMap<&str, usize> =
            candidate.iter().enumerate().map(|(rank, id)| (*id, rank)).collect();
        let common_ranks: Vec<(usize, usize)> = live
            .iter()
            .enumerate()
            .filter_map(|(rank, id)| Some((rank, *candidate_ranks.get(id)?)))
            .collect();
        let longest = live.len().max(candidate.len()).max(1);
        let both_empty = live.is_empty() && candidate.is_empty();
        Self {
            overlap: if both_empty { 1.0 } else { common_ranks.len() as f64 / longest as f64 },
            moved_result_count: common_ranks
                .iter()
                .filter(|(live, candidate)| live != candidate)
                .count(),
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
        RoutingRequest {
            requested_configuration: None,
            traffic_key: key,
            has_overrides: false,
            filter: None,
        }
    }

    #[test]
    fn a_growing_share_keeps_the_keys_that_it_had() {
        let keys: Vec<String> = (0..4_000).map(|i| format!("user-{i}")).collect();
        let keys_in_share = |share: f32| -> Vec<&String> {
            let candidate = candidate_with_share(share);
            let is_in_share = |key: &&String| {
                choose_route("old", Some(&candidate), request_with_key(Some(key))).unwrap()
                    == ServingRole::Candidate
            };
            keys.iter().filter(is_in_share).collect()
        };
        let (tenth, third) = (keys_in_share(0.1), keys_in_share(0.3));
        assert!((300..500).contains(&tenth.len()), "{}", tenth.len());
        assert!(tenth.iter().all(|key| third.contains(key)));
        assert_eq!((keys_in_share(0.0).len(), keys_in_share(1.0).len()), (0, 4_000));
        assert_eq!(
            choose_route("old", Some(&candidate_with_share(1.0)), request_with_key(None)),
            Ok(ServingRole::Live)
        );
        let with_overrides =
            RoutingRequest { has_overrides: true, ..request_with_key(Some("user-1")) };
        assert_eq!(
            choose_route("old", Some(&candidate_with_share(1.0)), with_overrides),
            Ok(ServingRole::Live)
        );
    }

    #[test]
    fn a_query_can_name_a_configuration_and_an_unknown_name_is_an_error() {
        let new = candidate_with_share(0.0);
        let route_for = |name, candidate| {
            choose_route(
                "old",
                candidate,
                RoutingRequest { requested_configuration: Some(name), ..request_with_key(None) },
            )
        };
        for (name, expected) in [
            ("live", ServingRole::Live),
            ("old", ServingRole::Live),
            ("candidate", ServingRole::Candidate),
            ("new", ServingRole::Candidate),
        ] {
            assert_eq!(route_for(name, Some(&new)), Ok(expected));
        }
        assert!(route_for("newer", Some(&new)).unwrap_err().contains("candidate (new)"));
        assert!(route_for("candidate", None).unwrap_err().contains("no candidate"));
    }

    #[test]
    fn ranking_differences_count_overlap_moves_and_top_hit() {
        let same = RankingDifference::from_rankings(&["a", "b"], &["a", "b"]);
        assert_eq!(
            same,
            RankingDifference { overlap: 1.0, moved_result_count: 0, top_hit_changed: false }
        );
        let other = RankingDifference::from_rankings(&["a", "b", "c", "d"], &["b", "a", "e", "d"]);
        assert_eq!(
            other,
            RankingDifference { overlap: 0.75, moved_result_count: 2, top_hit_changed: true }
        );
        assert!((RankingDifference::from_rankings(&[], &[]).overlap - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn one_shadow_query_runs_at_a_time_and_is_counted() {
        let traffic = TrafficCounters::default();
        assert!(traffic.try_begin_shadow());
        assert!(!traffic.try_begin_shadow());
        traffic.end_shadow(Some(&RankingDifference {
            overlap: 0.5,
            moved_result_count: 1,
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
            traffic.count_answer(ServingRole::Candidate);
            counted.push(traffic.counts().candidate);
        }
        assert_eq!(counted, [1, 2, 1, 1]);
    }
}
