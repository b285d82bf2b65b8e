//! What the candidate would have answered, computed unseen for its share of the queries.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::told::query_hash;
use super::traffic::{Difference, Traffic};
use crate::catalogue::Candidate;
use crate::search::query::Query;
use crate::search::scan::Ask;
use crate::search::scan::batch::{Batches, Want};
use crate::search::scan::rank::Hit;
use crate::telemetry::event;

/// The only turn that there is to compute in the shadow; dropping it gives it back.
pub struct Shadow {
    turn: Turn,
    configuration: String,
    candidate: String,
    query_hash: String,
    /// Results.
    pub k: usize,
}

struct Turn {
    traffic: Arc<Traffic>,
    found: Option<Difference>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.traffic.end_shadow(self.found.as_ref());
    }
}

impl Shadow {
    /// Takes the turn to compute in the shadow what `configuration` has answered with `k` results,
    /// where the query belongs to the share of `candidate`, and the turn is free.
    pub fn begin(
        traffic: &Arc<Traffic>,
        candidate: &Candidate,
        configuration: &str,
        query: &Query,
        k: usize,
    ) -> Option<Self> {
        if candidate.shadow <= rand::random::<f32>() || !traffic.begin_shadow() {
            return None;
        }
        Some(Self {
            turn: Turn { traffic: traffic.clone(), found: None },
            configuration: configuration.to_owned(),
            candidate: candidate.name.clone(),
            query_hash: query_hash(&query.input.described()),
            k,
        })
    }

    /// Computes what `ask` gives, on a thread of its own, and tells how it differs from `hits`.
    pub fn compute(
        self,
        batches: &Arc<Batches>,
        hits: &[Hit],
        ask: impl FnOnce() -> Option<Ask> + Send + 'static,
    ) {
        let live: Vec<String> = hits.iter().map(|h| h.entry.image_id.to_string()).collect();
        let batches = batches.clone();
        std::thread::spawn(move || {
            let Self { mut turn, configuration, candidate, query_hash, k } = self;
            let Some(ask) = ask() else { return };
            let version = ask.snapshot.version;
            let want = Want::Best { offset: 0 };
            let Ok(reply) = batches.ask(ask, want, &CancellationToken::new()) else { return };
            let hits = &reply.found.hits;
            let ids: Vec<&str> = hits.iter().map(|h| h.entry.image_id.as_str()).collect();
            let live: Vec<&str> = live.iter().map(String::as_str).collect();
            let found = Difference::of(&live, &ids);
            info!(
                event = event::SHADOW,
                query_hash,
                configuration,
                candidate,
                k,
                overlap = found.overlap,
                moved = found.moved,
                top_changed = found.top_changed,
                version,
                "the candidate would have answered so"
            );
            turn.found = Some(found);
        });
    }
}
