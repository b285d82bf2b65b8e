//! Shadow queries: ranks the images as the candidate would have answered, for a share of the queries,
//! and logs how that differs from the live answer. Callers only get the live answer.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::query_log::query_hash;
use super::traffic::{RankingDifference, TrafficCounters};
use crate::catalogue::RolloutCandidate;
use crate::search::query::Query;
use crate::search::scan::{BatchScanner, Hit, ScanGoal, ScanRequest};
use crate::telemetry::event;

/// A shadow query that may run. It holds the only permit, which is released when this is dropped.
pub struct ShadowQuery {
    permit: ShadowPermit,
    live_configuration_name: String,
    candidate_name: String,
    query_hash: String,
    /// Number of results to compare.
    pub k: usize,
}

/// The permit to run a shadow query. Dropping it records the difference and releases the permit.
struct ShadowPermit {
    counters: Arc<TrafficCounters>,
    difference: Option<RankingDifference>,
}

impl Drop for ShadowPermit {
    fn drop(&mut self) {
        self.counters.end_shadow(self.difference.as_ref());
    }
}

impl ShadowQuery {
    /// Starts a shadow query to compare with the `k` results of `live_configuration`. Returns `None` if
    /// the query does not belong to the shadow share of `candidate`, which is decided at random, or if
    /// another shadow query is running.
    pub fn try_acquire(
        counters: &Arc<TrafficCounters>,
        candidate: &RolloutCandidate,
        live_configuration: &str,
        query: &Query,
        k: usize,
    ) -> Option<Self> {
        if candidate.shadow_share <= rand::random::<f32>() || !counters.try_begin_shadow() {
            return None;
        }
        Some(Self {
            permit: ShadowPermit { counters: counters.clone(), difference: None },
            live_configuration_name: live_configuration.to_owned(),
            candidate_name: candidate.name.clone(),
            query_hash: query_hash(&query.input.description()),
            k,
        })
    }

    /// Scans for the request that `build_request` returns, on a new thread, and logs how the result
    /// differs from the live `hits`.
    pub fn spawn(
        self,
        scanner: &Arc<BatchScanner>,
        hits: &[Hit],
        build_request: impl FnOnce() -> Option<ScanRequest> + Send + 'static,
    ) {
        let ids =
            |hits: &[Hit]| hits.iter().map(|h| h.image_metadata.image_id.to_string()).collect();
        let scanner = scanner.clone();
        self.spawn_ranking(ids(hits), move || {
            let request = build_request()?;
            let table_version = request.snapshot.table_version;
            let goal = ScanGoal::TopHits { offset: 0 };
            let reply = scanner.scan_and_wait(request, goal, &CancellationToken::new()).ok()?;
            Some((ids(&reply.top_k.hits), table_version))
        });
    }

    /// Calls `rank` on a new thread, and logs how the ids that it returns, ranked by the version of a table,
    /// differ from `live_ids`.
    pub fn spawn_ranking(
        self,
        live_ids: Vec<String>,
        rank: impl FnOnce() -> Option<(Vec<String>, u64)> + Send + 'static,
    ) {
        std::thread::spawn(move || {
            let Self {
                mut permit,
                live_configuration_name: live_configuration,
                candidate_name: candidate,
                query_hash,
                k,
            } = self;
            let Some((candidate_ids, table_version)) = rank() else { return };
            let [live_ids, candidate_ids] = [&live_ids, &candidate_ids]
                .map(|ids| ids.iter().map(String::as_str).collect::<Vec<_>>());
            let difference = RankingDifference::from_rankings(&live_ids, &candidate_ids);
            info!(
                event = event::SHADOW_COMPARED,
                query_hash,
                configuration = live_configuration,
                candidate,
                k,
                overlap = difference.overlap,
                reranked = difference.moved_result_count,
                top_hit_changed = difference.top_hit_changed,
                table_version,
                "the candidate's ranking is compared with the live answer"
            );
            permit.difference = Some(difference);
        });
    }
}
