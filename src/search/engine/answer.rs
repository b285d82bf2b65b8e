//! The answer to one query.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::cursor::Cursor;
use super::generation_engine::Engine;
use super::query_log::QueryLog;
use super::query_plan::{QueryPlan, resolve_configuration, resolve_min_score};
use super::shadow::ShadowQuery;
use crate::balance::calibration::{Calibration, ScoreDistribution};
use crate::balance::normalise::BalanceParameters;
use crate::catalogue::ServingConfig;
use crate::prompts::EmbeddedPromptSet;
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::scan::{Hit, NoMatchVerdict, ScanGoal, ScanReply, ScanRequest, TopK};
use crate::search::snapshot::{Route, ServingSnapshot};
use crate::search::timings::Timings;

/// An answer: the best by balanced and by raw score, from one scan.
#[derive(Debug)]
pub struct SearchResults {
    /// Version of the table.
    pub table_version: u64,
    /// Prompt set that was used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Images in the catalogue.
    pub scanned: usize,
    /// Images that were ranked: those that the filter lets through.
    pub matched: usize,
    /// Moments of the balanced scores of all images; with a filter, of a part of them.
    pub score_distribution: ScoreDistribution,
    /// What was served when it was answered.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that answered, one of `served`.
    pub configuration: String,
    /// Best by balanced score.
    pub hits: Vec<Hit>,
    /// Best by raw score.
    pub raw_hits: Vec<Hit>,
    /// How long it took.
    pub timings: Timings,
    /// Why the answer is not to be trusted; none where nothing speaks against it.
    pub warning: Option<String>,
    /// Whether the best hit is no better than what unrelated texts reach; none where nothing is
    /// calibrated for such a query, and on later pages.
    pub no_match: Option<NoMatchVerdict>,
    /// The balanced score that hits had to have.
    pub min_score: Option<f32>,
    /// Where the next page begins; none after the last.
    pub next_cursor: Option<String>,
}

impl Engine {
    /// Answers a query. Computes: call it from a thread that may block.
    pub fn search(&self, query: &Query) -> Result<SearchResults, QueryError> {
        self.search_with_cancel(query, &CancellationToken::new())
    }

    /// Answers a query, unless `left` says that nobody waits for it any more.
    pub fn search_with_cancel(
        &self,
        query: &Query,
        cancel: &CancellationToken,
    ) -> Result<SearchResults, QueryError> {
        let k = query.k.unwrap_or(self.options.default_k);
        if !(1..=self.options.max_k).contains(&k) {
            let reason = format!("{k} is not between 1 and {}", self.options.max_k);
            return Err(QueryError::invalid_field("k", reason));
        }
        let started_at = Instant::now();
        let QueryPlan {
            request: ask,
            prompt_set: set,
            embed_ms: text_ms,
            route,
            offset,
            query_digest: digest,
            calibration,
        } = self.plan_query(query, k, cancel)?;
        let min_score = resolve_min_score(query, calibration.as_ref())?;
        let (snapshot, balance, depth) = (ask.snapshot.clone(), ask.balance, ask.depth);
        let configuration = snapshot.serving_snapshot.configuration_for(route).to_owned();
        let first = offset == 0;
        let shadow =
            (first && route == Route::Live && !query.input.is_image() && !query.has_overrides())
                .then(|| ask.clone());
        let ScanReply { top_k: mut found, timings } =
            self.scanner.scan_and_wait(ask, ScanGoal::TopHits { offset }, cancel)?;
        let timings = Timings { embed_ms: text_ms, ..timings };
        self.traffic_counters.count_answer(match route {
            Route::Live => snapshot.serving_snapshot.role,
            Route::Candidate => Route::Candidate,
        });
        let no_match = calibration
            .filter(|_| first)
            .and_then(|calibration| check_no_match(&query.input, &found, &set, &calibration));
        if first && route == Route::Live {
            self.observe_answer(
                query,
                &snapshot.serving_snapshot.serving,
                &found,
                no_match.as_ref(),
            );
        }
        if let Some(ask) = shadow {
            self.start_shadow(ask, query, k, &found.hits);
        }
        found.hits.retain(|hit| min_score.is_none_or(|least| hit.score >= least));
        let more =
            found.hits.len() == depth - offset && depth < found.matched.min(self.options.max_depth);
        let next_cursor = more.then(|| {
            self.pinned_snapshots.pin(&snapshot, &self.snapshots.newest());
            let (version, revision) =
                (snapshot.table_version, snapshot.serving_snapshot.state_revision);
            let (offset, scale) = (depth as u32, balance.scale);
            Cursor {
                table_version: version,
                state_revision: revision,
                offset,
                scale,
                query_digest: digest,
            }
            .encode()
        });
        let query_log = QueryLog {
            query,
            configuration: &configuration,
            balance: &balance,
            k,
            offset,
            scanned: snapshot.len(),
            matched: found.matched,
            hits: &found.hits,
            raw_hits: &found.raw_hits,
            no_match: no_match.as_ref(),
            timings: &timings,
            table_version: snapshot.table_version,
            started_at,
        };
        query_log.log_and_count(&self.options);
        Ok(SearchResults {
            table_version: snapshot.table_version,
            prompt_set: set,
            balance,
            scanned: snapshot.len(),
            matched: found.matched,
            score_distribution: found.score_distribution,
            serving_snapshot: snapshot.serving_snapshot.clone(),
            configuration,
            hits: found.hits,
            raw_hits: found.raw_hits,
            timings,
            warning: self.script_warning(&query.input),
            no_match,
            min_score,
            next_cursor,
        })
    }

    /// Shows the first results of a text, answered as everyone's are, to the watch.
    fn observe_answer(
        &self,
        query: &Query,
        serving: &ServingConfig,
        found: &TopK,
        no_match: Option<&NoMatchVerdict>,
    ) {
        if let QueryInput::Text(text) = &query.input
            && query.filter.is_none()
            && !query.has_overrides()
            && let (Some(hit), Some(raw)) = (found.hits.first(), found.raw_hits.first())
        {
            let firsts = (hit.image.image_id.clone(), raw.image.image_id.clone());
            self.drift_monitor.observe(
                serving,
                text,
                firsts,
                no_match.map(|verdict| verdict.nothing_matches),
            );
        }
    }

    /// Computes what the candidate would have answered, for its share of the queries, over the very
    /// same snapshot.
    fn start_shadow(&self, mut ask: ScanRequest, query: &Query, k: usize, hits: &[Hit]) {
        let served = ask.snapshot.serving_snapshot.clone();
        let Some(candidate) = &served.candidate else { return };
        let Some(shadow) = ShadowQuery::try_start(
            &self.traffic_counters,
            candidate,
            &served.configuration_name,
            query,
            k,
        ) else {
            return;
        };
        let set = resolve_configuration(&ask.snapshot, &candidate.serving, query).map(
            |(set, balance)| {
                ask.statistics_key = set.statistics_key.clone();
                ask.balance = balance;
            },
        );
        shadow.spawn(&self.scanner, hits, move || set.ok().map(|()| ask));
    }

    /// Computes what this engine, whose generation is a candidate's, would have answered to `query`,
    /// where another one's first `k` results are `hits`.
    pub(super) fn start_standby_shadow(
        self: &Arc<Self>,
        shadow: ShadowQuery,
        query: &Query,
        hits: &[Hit],
    ) {
        let (engine, query, k) = (self.clone(), query.without_routing(), shadow.k);
        shadow.spawn(&self.scanner, hits, move || {
            Some(engine.plan_query(&query, k, &CancellationToken::new()).ok()?.request)
        });
    }

    fn script_warning(&self, input: &QueryInput) -> Option<String> {
        let towers = self.encoders();
        (!input.texts().into_iter().all(|text| towers.supports_script(text))).then(|| {
            format!(
                "the text tower of {} is not multilingual: its vocabulary does not have the script of this query, so these results mean nothing",
                towers.card().name
            )
        })
    }
}

/// Whether the best hit is no better than what unrelated texts reach; none where that was not
/// measured, or something else than a text was asked.
fn check_no_match(
    input: &QueryInput,
    found: &TopK,
    set: &EmbeddedPromptSet,
    calibration: &Calibration,
) -> Option<NoMatchVerdict> {
    let (QueryInput::Text(text), Some(hit)) = (input, found.hits.first()) else { return None };
    let rule = calibration.no_match?;
    Some(NoMatchVerdict::from_best_hit(
        rule,
        hit.score,
        found.score_distribution,
        text,
        set.vocabulary(),
    ))
}
