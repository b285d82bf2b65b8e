//! Logs an answer and counts it in the metrics.

use std::time::Instant;

use tracing::{info, warn};

use crate::balance::normalise::BalanceParameters;
use crate::record::to_hex;
use crate::search::options::SearchOptions;
use crate::search::query::Query;
use crate::search::scan::{Hit, NoMatchVerdict};
use crate::search::timings::Timings;
use crate::telemetry::{self, event, metrics};

/// What is logged about an answer.
pub struct QueryLog<'a> {
    pub query: &'a Query,
    /// Name of the configuration that answered.
    pub configuration_name: &'a str,
    pub balance: &'a BalanceParameters,
    pub k: usize,
    /// Number of results on earlier pages.
    pub offset: usize,
    /// Number of images in the catalogue.
    pub scanned_image_count: usize,
    /// Number of images that the filter allows: these were ranked.
    pub matched_image_count: usize,
    pub hits: &'a [Hit],
    pub raw_hits: &'a [Hit],
    pub no_match_verdict: Option<&'a NoMatchVerdict>,
    pub timings: &'a Timings,
    pub table_version: u64,
    /// When the query arrived.
    pub started_at: Instant,
}

impl QueryLog<'_> {
    /// Logs `search`, and `search.slow` if the answer took longer than `search.slow_ms`. Updates the
    /// metrics.
    pub fn log_and_count(&self, options: &SearchOptions) {
        let reranked = self.hits.iter().filter(|h| h.rank != h.raw_rank).count();
        let top_hit_changed = self.hits.first().map(|hit| hit.rank != hit.raw_rank);
        let duration_ms = self.started_at.elapsed().as_secs_f64() * 1e3;
        let normaliser = self.balance.normaliser.name();
        let description = self.query.input.description();
        let query_hash = query_hash(&description);
        let (trace_id, parent_id) =
            self.query.trace_and_span_id.as_ref().map(|(t, p)| (t, p)).unzip();
        info!(
            event = event::SEARCH,
            query_hash,
            query = telemetry::loggable_query_text(&description),
            input = self.query.input.kind_name(),
            trace_id,
            parent_id,
            api_key_name = self.query.api_key_name,
            configuration = self.configuration_name,
            overrides = self.query.has_overrides(),
            normaliser,
            weight = self.balance.weight,
            k = self.k,
            offset = self.offset,
            filtered = self.query.filter.is_some(),
            scanned = self.scanned_image_count,
            matched = self.matched_image_count,
            top_score = self.hits.first().map(Hit::reported_score),
            top_raw_score = self.raw_hits.first().map(Hit::reported_raw_score),
            no_match = self.no_match_verdict.map(|verdict| verdict.nothing_matches),
            reranked,
            results = self.hits.len(),
            top_hit_changed = top_hit_changed.filter(|_| self.offset == 0),
            embed_ms = self.timings.embed_ms,
            wait_ms = self.timings.wait_ms,
            scan_ms = self.timings.scan_ms,
            rank_ms = self.timings.rank_ms,
            table_version = self.table_version,
            "answered"
        );
        if options.slow_ms > 0 && duration_ms > options.slow_ms as f64 {
            warn!(
                event = event::SEARCH_SLOW,
                query_hash,
                trace_id,
                duration_ms,
                embed_ms = self.timings.embed_ms,
                wait_ms = self.timings.wait_ms,
                scan_ms = self.timings.scan_ms,
                rank_ms = self.timings.rank_ms,
                scanned = self.scanned_image_count,
                limit_ms = options.slow_ms,
                "the query was slow"
            );
        }
        let metrics = metrics::global();
        metrics.searches.add(&[normaliser], 1);
        metrics.search_results.add(&[], self.hits.len() as u64);
        metrics.search_reranked.add(&[], reranked as u64);
        let Timings { embed_ms, wait_ms, scan_ms, rank_ms } = self.timings;
        for (phase, ms) in
            [("embed", embed_ms), ("wait", wait_ms), ("scan", scan_ms), ("rank", rank_ms)]
        {
            metrics.search_seconds.observe_seconds(&[phase], ms / 1e3);
        }
    }
}

/// Returns a short hash that identifies a repeated query in the logs without revealing its text.
pub fn query_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    to_hex(&Sha256::digest(text.as_bytes())[..6])
}
