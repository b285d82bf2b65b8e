//! Which configuration answers a query: the live one, the candidate where it is asked for by name
//! or for its share of the traffic, and the candidate unseen beside the live one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::catalogue::{Candidate, Serving};
use crate::search::query::filter::Filter;

/// What decides who answers, of a query.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// The configuration that is asked for by name.
    pub configuration: Option<&'a str>,
    /// What the caller is told apart by: the same key always gets the same configuration.
    pub key: Option<&'a str>,
    /// Whether the query says itself how it is to be answered.
    pub own: bool,
    /// Which images it may find.
    pub filter: Option<&'a Filter>,
}

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The live configuration.
    Live,
    /// The candidate.
    Candidate,
}

/// Who answers a query, by the candidate that there is. `Err` where it asks for a configuration that
/// there is not; names those that there are.
pub fn route(
    live: &str,
    candidate: Option<&Candidate>,
    asking: Asking<'_>,
) -> Result<Route, String> {
    match (asking.configuration, candidate) {
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
    let (Some(candidate), Some(key), false) = (candidate, asking.key, asking.own) else {
        return Ok(Route::Live);
    };
    // A share may be kept for queries whose filter asks for a certain value.
    let asks_for = |only: &String| {
        let (name, value) = only.split_once('=').unwrap_or((only, ""));
        asking.filter.is_some_and(|filter| filter.implies(name, value))
    };
    let takes = candidate.only.as_ref().is_none_or(asks_for)
        && place(&candidate.name, key) < f64::from(candidate.share);
    Ok(if takes { Route::Candidate } else { Route::Live })
}

/// Where a key stands between 0 and 1 for a candidate: evenly spread, the same on every query worker.
/// A share that grows keeps those that it had.
fn place(candidate: &str, key: &str) -> f64 {
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
pub struct Traffic {
    live: AtomicU64,
    candidate: AtomicU64,
    shadows: AtomicU64,
    shadows_skipped: AtomicU64,
    /// Sum of overlaps in millionths.
    overlap: AtomicU64,
    top_changed: AtomicU64,
    shadowing: AtomicBool,
    /// The candidate that is counted.
    of: Mutex<Option<(String, Serving)>>,
}

/// The counts as they are told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct TrafficCounts {
    /// Answers by the live configuration.
    pub live: u64,
    /// Answers by the candidate.
    pub candidate: u64,
    /// Queries that were computed in the shadow.
    pub shadows: u64,
    /// Queries that were due to be, while another was computed.
    pub shadows_skipped: u64,
    /// Mean share of common results of those; none before the first.
    pub overlap: Option<f64>,
    /// How many of those had another best result.
    pub top_changed: u64,
}

impl Traffic {
    /// Begins anew where `candidate` is another one, or answers otherwise, than the one that was counted.
    pub fn of(&self, candidate: Option<&Candidate>) {
        let new = candidate.map(|candidate| (candidate.name.clone(), candidate.serving.clone()));
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if *of == new {
            return;
        }
        *of = new;
        let counters = [
            &self.live,
            &self.candidate,
            &self.shadows,
            &self.shadows_skipped,
            &self.overlap,
            &self.top_changed,
        ];
        for counter in counters {
            counter.store(0, Ordering::Relaxed);
        }
    }

    /// Counts an answer.
    pub fn count(&self, route: Route) {
        let counter = match route {
            Route::Live => &self.live,
            Route::Candidate => &self.candidate,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the only turn that there is to compute in the shadow; false while it is taken: the
    /// shadow never delays more than itself.
    pub fn begin_shadow(&self) -> bool {
        let free = !self.shadowing.swap(true, Ordering::AcqRel);
        if !free {
            self.shadows_skipped.fetch_add(1, Ordering::Relaxed);
        }
        free
    }

    /// Gives the turn back, with what was found.
    pub fn end_shadow(&self, found: Option<&Difference>) {
        if let Some(found) = found {
            self.shadows.fetch_add(1, Ordering::Relaxed);
            self.overlap.fetch_add((found.overlap * 1e6) as u64, Ordering::Relaxed);
            self.top_changed.fetch_add(u64::from(found.top_changed), Ordering::Relaxed);
        }
        self.shadowing.store(false, Ordering::Release);
    }

    /// The counts at this moment.
    pub fn counts(&self) -> TrafficCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shadows = load(&self.shadows);
        TrafficCounts {
            live: load(&self.live),
            candidate: load(&self.candidate),
            shadows,
            shadows_skipped: load(&self.shadows_skipped),
            overlap: (shadows > 0).then(|| load(&self.overlap) as f64 / 1e6 / shadows as f64),
            top_changed: load(&self.top_changed),
        }
    }
}

/// How two answers to one query differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Share of the first one's results that the second has too, 0..=1.
    pub overlap: f64,
    /// Common results whose place differs.
    pub moved: usize,
    /// Whether another result is best.
    pub top_changed: bool,
}

impl Difference {
    /// Of two rankings, by the ids of their results, the best first.
    pub fn of(live: &[&str], candidate: &[&str]) -> Self {
        let places: BTreeMap<&str, usize> =
            candidate.iter().enumerate().map(|(place, id)| (*id, place)).collect();
        let common: Vec<(usize, usize)> =
            live.iter().enumerate().filter_map(|(a, id)| Some((a, *places.get(id)?))).collect();
        let longest = live.len().max(candidate.len()).max(1);
        let empty = live.is_empty() && candidate.is_empty();
        Self {
            overlap: if empty { 1.0 } else { common.len() as f64 / longest as f64 },
            moved: common.iter().filter(|(a, b)| a != b).count(),
            top_changed: live.first() != candidate.first(),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::balance::statistics::StatisticsKey;

    fn candidate(share: f32) -> Candidate {
        Candidate {
            name: "new".into(),
            generation: "g".into(),
            serving: Serving::new(StatisticsKey::from_stored("k"), Normaliser::Nnn, 0.5),
            share,
            shadow: 0.0,
            only: None,
            since: DateTime::from_timestamp(0, 0).unwrap(),
            evaluation: None,
        }
    }

    fn asking(key: Option<&str>) -> Asking<'_> {
        Asking { configuration: None, key, own: false, filter: None }
    }

    #[test]
    fn a_share_is_kept_by_key_and_grows_without_taking_anybody_away() {
        let keys: Vec<String> = (0..4_000).map(|i| format!("user-{i}")).collect();
        let of = |share: f32| -> Vec<&String> {
            let candidate = candidate(share);
            let takes = |key: &&String| {
                route("old", Some(&candidate), asking(Some(key))).unwrap() == Route::Candidate
            };
            keys.iter().filter(takes).collect()
        };
        let (tenth, third) = (of(0.1), of(0.3));
        assert!((300..500).contains(&tenth.len()), "{}", tenth.len());
        assert!(tenth.iter().all(|key| third.contains(key)));
        assert_eq!((of(0.0).len(), of(1.0).len()), (0, 4_000));
        assert_eq!(route("old", Some(&candidate(1.0)), asking(None)), Ok(Route::Live));
        let own = Asking { own: true, ..asking(Some("user-1")) };
        assert_eq!(route("old", Some(&candidate(1.0)), own), Ok(Route::Live));
    }

    #[test]
    fn a_configuration_can_be_asked_for_and_an_unknown_one_is_named() {
        let new = candidate(0.0);
        let by = |name, candidate| {
            route("old", candidate, Asking { configuration: Some(name), ..asking(None) })
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
        let same = Difference::of(&["a", "b"], &["a", "b"]);
        assert_eq!(same, Difference { overlap: 1.0, moved: 0, top_changed: false });
        let other = Difference::of(&["a", "b", "c", "d"], &["b", "a", "e", "d"]);
        assert_eq!(other, Difference { overlap: 0.75, moved: 2, top_changed: true });
        assert!((Difference::of(&[], &[]).overlap - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn one_shadow_at_a_time_and_its_counts() {
        let traffic = Traffic::default();
        assert!(traffic.begin_shadow());
        assert!(!traffic.begin_shadow());
        traffic.end_shadow(Some(&Difference { overlap: 0.5, moved: 1, top_changed: true }));
        assert!(traffic.begin_shadow());
        traffic.end_shadow(None);
        let counts = traffic.counts();
        assert_eq!((counts.shadows, counts.shadows_skipped, counts.top_changed), (1, 1, 1));
        assert_eq!(counts.overlap, Some(0.5));
    }

    #[test]
    fn counts_are_of_one_candidate() {
        let traffic = Traffic::default();
        let larger = Candidate { share: 0.5, ..candidate(0.1) };
        let mut heavier = candidate(0.1);
        heavier.serving.weight = 0.75;
        let mut counted = Vec::new();
        for next in [Some(candidate(0.1)), Some(larger), Some(heavier), None] {
            traffic.of(next.as_ref());
            traffic.count(Route::Candidate);
            counted.push(traffic.counts().candidate);
        }
        assert_eq!(counted, [1, 2, 1, 1]);
    }
}
