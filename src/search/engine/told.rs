//! What the log and the metrics tell of an answer.

use std::time::Instant;

use tracing::{info, warn};

use crate::balance::normalise::Balance;
use crate::record::hex;
use crate::search::Options;
use crate::search::query::{Query, Timings};
use crate::search::scan::rank::Hit;
use crate::search::scan::unmatched::Unmatched;
use crate::telemetry::{self, event, metrics};

/// An answer, as far as it is told.
pub struct Told<'a> {
    pub query: &'a Query,
    /// The name of the configuration that answered.
    pub configuration: &'a str,
    pub balance: &'a Balance,
    pub k: usize,
    /// Results on earlier pages.
    pub offset: usize,
    pub scanned: usize,
    /// Images that could have been a result.
    pub matched: usize,
    pub hits: &'a [Hit],
    pub raw_hits: &'a [Hit],
    pub no_match: Option<&'a Unmatched>,
    pub timings: &'a Timings,
    pub version: u64,
    /// When the question came.
    pub since: Instant,
}

impl Told<'_> {
    /// Logs `search`, and `search.slow` where it took longer than it should; counts both.
    pub fn tell(&self, options: &Options) {
        let moved = self.hits.iter().filter(|h| h.rank != h.raw_rank).count();
        let first_moved = self.hits.first().map(|hit| hit.rank != hit.raw_rank);
        let ms = self.since.elapsed().as_secs_f64() * 1e3;
        let normaliser = self.balance.normaliser.name();
        let described = self.query.input.described();
        let query_hash = query_hash(&described);
        let (trace_id, parent_id) = self.query.trace.as_ref().map(|(t, p)| (t, p)).unzip();
        info!(
            event = event::SEARCH,
            query_hash,
            query = telemetry::query_text(&described),
            input = self.query.input.name(),
            trace_id,
            parent_id,
            by = self.query.by,
            configuration = self.configuration,
            own = self.query.is_own(),
            normaliser,
            weight = self.balance.weight,
            k = self.k,
            offset = self.offset,
            filtered = self.query.filter.is_some(),
            scanned = self.scanned,
            matched = self.matched,
            top = self.hits.first().map(|hit| hit.score),
            top_raw = self.raw_hits.first().map(|hit| hit.raw_score),
            no_match = self.no_match.map(|verdict| verdict.holds),
            moved,
            results = self.hits.len(),
            first_moved = first_moved.filter(|_| self.offset == 0),
            text_ms = self.timings.text_ms,
            wait_ms = self.timings.wait_ms,
            scan_ms = self.timings.scan_ms,
            rank_ms = self.timings.rank_ms,
            version = self.version,
            "answered"
        );
        if options.slow_ms > 0 && ms > options.slow_ms as f64 {
            warn!(
                event = event::SEARCH_SLOW,
                query_hash,
                trace_id,
                ms,
                text_ms = self.timings.text_ms,
                wait_ms = self.timings.wait_ms,
                scan_ms = self.timings.scan_ms,
                rank_ms = self.timings.rank_ms,
                scanned = self.scanned,
                limit_ms = options.slow_ms,
                "an answer took long"
            );
        }
        let metrics = metrics::get();
        metrics.searches.add(&[normaliser], 1);
        metrics.results.add(&[], self.hits.len() as u64);
        metrics.moved.add(&[], moved as u64);
        let Timings { text_ms, wait_ms, scan_ms, rank_ms } = self.timings;
        for (part, ms) in
            [("text", text_ms), ("wait", wait_ms), ("scan", scan_ms), ("rank", rank_ms)]
        {
            metrics.search_seconds.observe(&[part], ms / 1e3);
        }
    }
}

/// Recognises a repeated query in the logs without showing its text.
pub fn query_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(text.as_bytes())[..6])
}
