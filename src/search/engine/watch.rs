//! Does balancing go further than when it was calibrated? Looked at in the answers themselves.
//!
//! A window of the last answers that the live configuration gave, each query once, is compared with
//! what was usual at calibration ([`Usual`]), and so are the statistics of the images that are there.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::engines::Engines;
use crate::balance::calibration::{Habits, Moments, Usual};
use crate::catalogue::Serving;
use crate::record::ImageId;
use crate::search::snapshot::Snapshot;
use crate::telemetry::{event, metrics};

/// Answers that are looked at; older ones leave the window.
const WINDOW: usize = 2_000;
/// Age at which an answer leaves the window.
const MAX_AGE: Duration = Duration::from_secs(3_600);

/// An answer, as far as it is looked at.
struct Seen {
    at: Instant,
    query: u64,
    first: ImageId,
    first_raw: ImageId,
    no_match: Option<bool>,
}

/// The last answers of one configuration.
#[derive(Default)]
struct Window {
    serving: Option<Serving>,
    seen: VecDeque<Seen>,
}

impl Window {
    /// What changes how is answered begins a new window, and the old leave it.
    fn keep(&mut self, serving: &Serving) {
        if self.serving.as_ref() != Some(serving) {
            self.serving = Some(serving.clone());
            self.seen.clear();
        }
        while self.seen.len() > WINDOW
            || self.seen.front().is_some_and(|seen| seen.at.elapsed() > MAX_AGE)
        {
            self.seen.pop_front();
        }
    }
}

/// Watches answers.
#[derive(Default)]
pub(crate) struct Watch(Mutex<Window>);

impl Watch {
    /// Sees the first hit, and that of plain CLIP, of an answer by the live configuration to an
    /// unfiltered text.
    pub fn see(
        &self,
        serving: &Serving,
        text: &str,
        (first, first_raw): (ImageId, ImageId),
        no_match: Option<bool>,
    ) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.seen.push_back(Seen {
            at: Instant::now(),
            query: hasher.finish(),
            first,
            first_raw,
            no_match,
        });
        window.keep(serving);
    }

    /// How many different queries are in the window, and how they were answered.
    fn habits(&self, serving: &Serving, images: usize) -> (usize, Option<Habits>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.keep(serving);
        // The last answer to each query: one that everybody asks is one observation.
        let queries: HashMap<u64, &Seen> = window.seen.iter().map(|s| (s.query, s)).collect();
        let of = |seen: &&Seen| (seen.first.clone(), seen.first_raw.clone(), seen.no_match);
        (queries.len(), Habits::of(queries.values().map(of), images))
    }

    /// Logs `balance.watch` and sets the metrics of the same name.
    fn tell(&self, snapshot: &Snapshot) {
        let served = &snapshot.served;
        let usual: Option<Usual> = served.serving.calibration.as_ref().and_then(|c| c.usual);
        let (queries, now) = self.habits(&served.serving, snapshot.len());
        let then = usual.map(|usual| usual.answers);
        let moments = Moments::of(snapshot.all_statistics(&served.serving.prompt_set));
        let moments_then = usual.and_then(|usual| usual.statistics);
        let pair = moments.as_ref().zip(moments_then.as_ref());
        let drift = pair.and_then(|(now, then)| now.drift(then));
        let std_ratio =
            pair.filter(|(_, then)| then.std > 0.0).map(|(now, then)| now.std / then.std);
        info!(
            event = event::BALANCE_WATCH,
            configuration = served.name,
            revision = served.revision,
            calibrated = usual.is_some(),
            images = snapshot.len(),
            queries,
            first_moved = now.map(|h| h.first_moved),
            first_moved_then = then.map(|h| h.first_moved),
            no_match = now.and_then(|h| h.no_match),
            no_match_then = then.and_then(|h| h.no_match),
            hubness = now.map(|h| h.hubness),
            hubness_raw = now.map(|h| h.hubness_raw),
            hubness_ratio = now.and_then(|h| h.hubness_ratio()),
            hubness_ratio_then = then.and_then(|h| h.hubness_ratio()),
            mean = moments.map(|m| m.mean),
            mean_then = moments_then.map(|m| m.mean),
            std = moments.map(|m| m.std),
            std_then = moments_then.map(|m| m.std),
            drift,
            "how far balancing goes"
        );
        let metrics = metrics::get();
        metrics.balance_queries.set(&[], queries as f64);
        metrics.balance_drift.known(drift);
        metrics.balance_std.known(std_ratio);
        for (at, habits) in [("now", now), ("calibration", then)] {
            let known = |value: Option<f64>| value.unwrap_or(f64::NAN);
            metrics.balance_first_moved.set(&[at], known(habits.map(|h| h.first_moved)));
            metrics.balance_no_match.set(&[at], known(habits.and_then(|h| h.no_match)));
            metrics.balance_hubness.set(&[at], known(habits.and_then(|h| h.hubness_ratio())));
        }
    }
}

impl Engines {
    /// Tells how far the live engine's balancing goes every `search.watch_seconds`, until `token` is cancelled.
    pub async fn keep_watch(self: Arc<Self>, token: CancellationToken) {
        let seconds = self.live().options().watch_seconds;
        if seconds == 0 {
            return;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
                () = token.cancelled() => return,
            }
            let engine = self.live();
            // Reads the statistics of all images.
            let told = tokio::task::spawn_blocking(move || {
                if engine.snapshots().ready() {
                    engine.watch.tell(&engine.snapshots().newest());
                }
            });
            if let Err(error) = told.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::{served, set};

    fn see(watch: &Watch, serving: &Serving, query: usize, first: usize, raw: usize) {
        let id = |n: usize| ImageId::new(n.to_string()).unwrap();
        watch.see(serving, &query.to_string(), (id(first), id(raw)), None);
    }

    #[test]
    fn a_query_counts_once_and_another_configuration_begins_anew() {
        let serving = served(vec![set("one", 4)]).serving;
        let watch = Watch::default();
        for i in 0..50 {
            see(&watch, &serving, 0, 0, 1);
            see(&watch, &serving, 1 + i % 3, 2, 2);
        }
        let (queries, habits) = watch.habits(&serving, 10);
        let habits = habits.unwrap();
        assert_eq!((queries, habits.first_moved, habits.no_match), (4, 0.25, None));
        let stronger = Serving { weight: 0.9, ..serving };
        assert_eq!(watch.habits(&stronger, 10), (0, None));
    }

    #[test]
    fn the_window_is_bounded_and_forgets_the_oldest() {
        let serving = served(vec![set("one", 4)]).serving;
        let watch = Watch::default();
        for query in 0..3 * WINDOW {
            see(&watch, &serving, query, query % 2, usize::from(query < 2 * WINDOW));
        }
        let (queries, habits) = watch.habits(&serving, 10);
        assert_eq!((queries, habits.unwrap().first_moved), (WINDOW, 0.5));
    }
}
