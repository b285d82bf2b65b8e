//! What the log and the metrics tell of an answer.

use std::time::Instant;

use tracing::{info, warn};

use crate::balance::normalise::BalanceParameters;
use crate::record::to_hex;
use crate::search::options::SearchOptions;
use crate::search::query::Query;
use crate::search::scan::{Hit, NoMatchVerdict};
use crate::search::timings::Timings;
use crate::telemetry::{self, event, metrics};

/// An answer, as far as it is told.
pub struct QueryLog<'a> {
    pub query: &'a Query,
    /// The name of the configuration that answered.
    pub configuration: &'a str,
    pub balance: &'a BalanceParameters,
    pub k: usize,
    /// Results on earlier pages.
    pub offset: usize,
    pub scanned: usize,
    /// Images that could have been a result.
    pub matched: usize,
    pub hits: &'a [Hit],
    pub raw_hits: &'a [Hit],
    pub no_match: Option<&'a NoMatchVerdict>,
    pub timings: &'a Timings,
    pub table_version: u64,
    /// When the question came.
    pub started_at: Instant,
}

impl QueryLog<'_> {
    /// Logs `search`, and `search.slow` where it took longer than it should; counts both.
    pub fn log_and_count(&self, options: &SearchOptions) {
        let moved = self.hits.iter().filter(|h| h.rank != h.raw_rank).count();
        let first_moved = self.hits.first().map(|hit| hit.rank != hit.raw_rank);
        let ms = self.started_at.elapsed().as_secs_f64() * 1e3;
        let normaliser = self.balance.normaliser.name();
        let described = self.query.input.description();
        let query_hash = query_hash(&described);
        let (trace_id, parent_id) = self.query.trace_ids.as_ref().map(|(t, p)| (t, p)).unzip();
        info!(
            event = event::SEARCH,
            query_hash,
            query = telemetry::loggable_query_text(&described),
            input = self.query.input.name(),
            trace_id,
            parent_id,
            api_key_name = self.query.api_key_name,
            configuration = self.configuration,
            overrides = self.query.has_overrides(),
            normaliser,
            weight = self.balance.weight,
            k = self.k,
            offset = self.offset,
            filtered = self.query.filter.is_some(),
            scanned = self.scanned,
            matched = self.matched,
            top_score = self.hits.first().map(|hit| hit.score),
            top_raw_score = self.raw_hits.first().map(|hit| hit.raw_score),
            no_match = self.no_match.map(|verdict| verdict.nothing_matches),
            reranked = moved,
            results = self.hits.len(),
            top_hit_changed = first_moved.filter(|_| self.offset == 0),
            embed_ms = self.timings.embed_ms,
            wait_ms = self.timings.wait_ms,
            scan_ms = self.timings.scan_ms,
            rank_ms = self.timings.rank_ms,
            table_version = self.table_version,
            "answered"
        );
        if options.slow_ms > 0 && ms > options.slow_ms as f64 {
            warn!(
                event = event::SEARCH_SLOW,
                query_hash,
                trace_id,
                duration_ms = ms,
                embed_ms = self.timings.embed_ms,
                wait_ms = self.timings.wait_ms,
                scan_ms = self.timings.scan_ms,
                rank_ms = self.timings.rank_ms,
                scanned = self.scanned,
                limit_ms = options.slow_ms,
                "an answer took long"
            );
        }
        let metrics = metrics::global();
        metrics.searches.add(&[normaliser], 1);
        metrics.search_results.add(&[], self.hits.len() as u64);
        metrics.search_reranked.add(&[], moved as u64);
        let Timings { embed_ms: text_ms, wait_ms, scan_ms, rank_ms } = self.timings;
        for (part, ms) in
            [("embed", text_ms), ("wait", wait_ms), ("scan", scan_ms), ("rank", rank_ms)]
        {
            metrics.search_seconds.observe(&[part], ms / 1e3);
        }
    }
}

/// Recognises a repeated query in the logs without showing its text.
pub fn query_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    to_hex(&Sha256::digest(text.as_bytes())[..6])
}
