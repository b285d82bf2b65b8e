//! What the candidate would have answered, computed unseen for its share of the queries.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::query_log::query_hash;
use super::traffic::{RankingDifference, TrafficCounters};
use crate::catalogue::RolloutCandidate;
use crate::search::query::Query;
use crate::search::scan::{BatchScanner, Hit, ScanGoal, ScanRequest};
use crate::telemetry::event;

/// The only turn that there is to compute in the shadow; dropping it gives it back.
pub struct ShadowQuery {
    permit: ShadowPermit,
    live_configuration: String,
    candidate: String,
    query_hash: String,
    /// Results.
    pub k: usize,
}

struct ShadowPermit {
    traffic: Arc<TrafficCounters>,
    difference: Option<RankingDifference>,
}

impl Drop for ShadowPermit {
    fn drop(&mut self) {
        self.traffic.end_shadow(self.difference.as_ref());
    }
}

impl ShadowQuery {
    /// Takes the turn to compute in the shadow what `configuration` has answered with `k` results,
    /// where the query belongs to the share of `candidate`, and the turn is free.
    pub fn try_start(
        traffic: &Arc<TrafficCounters>,
        candidate: &RolloutCandidate,
        configuration: &str,
        query: &Query,
        k: usize,
    ) -> Option<Self> {
        if candidate.shadow_share <= rand::random::<f32>() || !traffic.try_begin_shadow() {
            return None;
        }
        Some(Self {
            permit: ShadowPermit { traffic: traffic.clone(), difference: None },
            live_configuration: configuration.to_owned(),
            candidate: candidate.name.clone(),
            query_hash: query_hash(&query.input.description()),
            k,
        })
    }

    /// Computes what `ask` gives, on a thread of its own, and tells how it differs from `hits`.
    pub fn spawn(
        self,
        batches: &Arc<BatchScanner>,
        hits: &[Hit],
        build_request: impl FnOnce() -> Option<ScanRequest> + Send + 'static,
    ) {
        let live: Vec<String> = hits.iter().map(|h| h.image.image_id.to_string()).collect();
        let batches = batches.clone();
        std::thread::spawn(move || {
            let Self {
                permit: mut turn,
                live_configuration: configuration,
                candidate,
                query_hash,
                k,
            } = self;
            let Some(ask) = build_request() else { return };
            let version = ask.snapshot.table_version;
            let goal = ScanGoal::TopHits { offset: 0 };
            let Ok(reply) = batches.scan_and_wait(ask, goal, &CancellationToken::new()) else {
                return;
            };
            let hits = &reply.top_k.hits;
            let ids: Vec<&str> = hits.iter().map(|h| h.image.image_id.as_str()).collect();
            let live: Vec<&str> = live.iter().map(String::as_str).collect();
            let difference = RankingDifference::from_rankings(&live, &ids);
            info!(
                event = event::SHADOW_COMPARED,
                query_hash,
                configuration,
                candidate,
                k,
                overlap = difference.overlap,
                reranked = difference.moved_results,
                top_hit_changed = difference.top_hit_changed,
                table_version = version,
                "the candidate would have answered so"
            );
            turn.difference = Some(difference);
        });
    }
}
