//! Answers one query and starts its shadow query.

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
use crate::search::snapshot::{ServingRole, ServingSnapshot};
use crate::search::timings::Timings;

/// Texts of one query of which it is said what was not read.
const MAX_UNREAD_TEXTS: usize = 3;

/// An answer: the best hits by balanced and by raw score, from one scan.
#[derive(Debug)]
pub struct SearchResults {
    /// Version of the table that was searched.
    pub table_version: u64,
    /// Prompt set whose statistics were used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Number of images in the catalogue.
    pub scanned_image_count: usize,
    /// Number of images that were ranked: those that the filter allows.
    pub matched_image_count: usize,
    /// Mean and standard deviation of the balanced scores of all images; with a filter, of a sample of
    /// them.
    pub score_distribution: ScoreDistribution,
    /// Configurations that were served at that time.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that answered, one of those in `serving_snapshot`.
    pub configuration_name: String,
    /// Best hits by balanced score.
    pub hits: Vec<Hit>,
    /// Best hits by raw score.
    pub raw_hits: Vec<Hit>,
    /// Durations of the steps.
    pub timings: Timings,
    /// Reason not to trust the answer, and what of the query was not read; `None` if there is none.
    pub warning: Option<String>,
    /// Whether the best hit is no better than those of unrelated texts. `None` if nothing is calibrated
    /// for such a query, and on later pages.
    pub no_match_verdict: Option<NoMatchVerdict>,
    /// Smallest balanced score that hits had to have.
    pub min_score: Option<f32>,
    /// Cursor of the next page; `None` on the last page.
    pub next_cursor: Option<String>,
}

impl Engine {
    /// Answers a query. Blocks while it computes: call it from a thread that may block.
    pub fn search(&self, query: &Query) -> Result<SearchResults, QueryError> {
        self.search_with_cancel(query, &CancellationToken::new())
    }

    /// Answers a query. Returns [`QueryError::Cancelled`] if `cancel` is cancelled before the scan.
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
        let QueryPlan { request, prompt_set, embed_ms, route, offset, query_digest, calibration } =
            self.plan_query(query, k, cancel)?;
        let min_score = resolve_min_score(query, calibration.as_ref())?;
        let (snapshot, balance, depth) = (request.snapshot.clone(), request.balance, request.depth);
        let configuration = snapshot.serving_snapshot.configuration_for(route).to_owned();
        let is_first_page = offset == 0;
        let can_be_shadowed = is_first_page
            && route == ServingRole::Live
            && !query.input.is_image()
            && !query.has_overrides();
        let shadow_request = can_be_shadowed.then(|| request.clone());
        let embedding = request.embedding.clone();
        let ScanReply { mut top_k, timings } =
            self.scanner.scan_and_wait(request, ScanGoal::TopHits { offset }, cancel)?;
        let timings = Timings { embed_ms, ..timings };
        self.count_answer(route, &snapshot.serving_snapshot);
        let no_match = calibration.filter(|_| is_first_page).and_then(|calibration| {
            check_no_match(&query.input, &top_k, &prompt_set, &calibration)
        });
        if is_first_page && route == ServingRole::Live {
            let serving = &snapshot.serving_snapshot.serving;
            self.record_answer_for_drift(query, serving, &top_k, no_match.as_ref());
        }
        if is_first_page && let QueryInput::Text(text) = &query.input {
            let raw_hit = top_k.raw_hits.first().filter(|_| query.filter.is_none());
            let first_raw_hit = raw_hit.map(|hit| hit.image_metadata.image_id.clone());
            self.fit_monitor.record_query(text, embedding, first_raw_hit);
        }
        if let Some(request) = shadow_request {
            self.start_shadow(request, query, k, &top_k.hits);
        }
        top_k.hits.retain(|hit| min_score.is_none_or(|min_score| hit.score >= min_score));
        let has_next_page = top_k.hits.len() == depth - offset
            && depth < top_k.matched_image_count.min(self.options.max_depth);
        let next_cursor = has_next_page.then(|| {
            self.pinned_snapshots.pin(&snapshot, &self.snapshots.newest());
            let cursor = Cursor {
                table_version: snapshot.table_version,
                state_revision: snapshot.serving_snapshot.state_revision,
                offset: depth as u32,
                scale: balance.scale,
                query_digest,
            };
            cursor.encode()
        });
        let query_log = QueryLog {
            query,
            configuration_name: &configuration,
            balance: &balance,
            k,
            offset,
            scanned_image_count: snapshot.len(),
            matched_image_count: top_k.matched_image_count,
            hits: &top_k.hits,
            raw_hits: &top_k.raw_hits,
            no_match_verdict: no_match.as_ref(),
            timings: &timings,
            table_version: snapshot.table_version,
            started_at,
        };
        query_log.log_and_count(&self.options);
        Ok(SearchResults {
            table_version: snapshot.table_version,
            prompt_set,
            balance,
            scanned_image_count: snapshot.len(),
            matched_image_count: top_k.matched_image_count,
            score_distribution: top_k.score_distribution,
            serving_snapshot: snapshot.serving_snapshot.clone(),
            configuration_name: configuration,
            hits: top_k.hits,
            raw_hits: top_k.raw_hits,
            timings,
            warning: self.text_warning(&query.input),
            no_match_verdict: no_match,
            min_score,
            next_cursor,
        })
    }

    /// Reports the first hits of a text query to the drift monitor, if neither a filter nor overrides
    /// make the answer special.
    fn record_answer_for_drift(
        &self,
        query: &Query,
        serving: &ServingConfig,
        top_k: &TopK,
        no_match: Option<&NoMatchVerdict>,
    ) {
        if let QueryInput::Text(text) = &query.input
            && query.filter.is_none()
            && !query.has_overrides()
            && let (Some(hit), Some(raw_hit)) = (top_k.hits.first(), top_k.raw_hits.first())
        {
            let first_hits =
                (hit.image_metadata.image_id.clone(), raw_hit.image_metadata.image_id.clone());
            self.drift_monitor.record_answer(
                serving,
                text,
                first_hits,
                no_match.map(|verdict| verdict.nothing_matches),
            );
        }
    }

    /// Ranks the images as the candidate would have, over the same snapshot, if the query belongs to
    /// the candidate's shadow share. `request` is that of the live answer.
    fn start_shadow(&self, mut request: ScanRequest, query: &Query, k: usize, hits: &[Hit]) {
        let serving_snapshot = request.snapshot.serving_snapshot.clone();
        let Some(candidate) = &serving_snapshot.candidate else { return };
        let Some(shadow) = ShadowQuery::try_acquire(
            &self.traffic_counters,
            candidate,
            &serving_snapshot.configuration_name,
            query,
            k,
        ) else {
            return;
        };
        let resolved = resolve_configuration(&request.snapshot, &candidate.serving, query);
        shadow.spawn(&self.scanner, hits, move || {
            let (prompt_set, balance) = resolved.ok()?;
            request.set_configuration(&prompt_set, balance);
            Some(request)
        });
    }

    /// Ranks the images as this engine of a standby generation would have answered `query`, and compares
    /// the result with `hits`, which the live engine returned.
    pub(super) fn start_standby_shadow(
        self: &Arc<Self>,
        shadow: ShadowQuery,
        query: &Query,
        hits: &[Hit],
    ) {
        let (engine, query, k) = (self.clone(), query.without_routing(), shadow.k);
        shadow.spawn(&self.scanner, hits, move || {
            let request = engine.plan_query(&query, k, &CancellationToken::new()).ok()?.request;
            if let QueryInput::Text(text) = &query.input {
                engine.fit_monitor.record_query(text, request.embedding.clone(), None);
            }
            Some(request)
        });
    }

    /// Counts an answer: as the candidate's if its configuration, or this whole generation, is the candidate.
    pub(super) fn count_answer(&self, route: ServingRole, serving_snapshot: &ServingSnapshot) {
        self.traffic_counters.count_answer(match route {
            ServingRole::Live => serving_snapshot.role,
            ServingRole::Candidate => ServingRole::Candidate,
        });
    }

    /// Returns a warning if the model cannot read the script of a text of the query, or does not read
    /// all of it.
    pub(super) fn text_warning(&self, input: &QueryInput) -> Option<String> {
        let encoders = self.encoders();
        let card = encoders.card();
        let texts = input.texts();
        let mut warnings = Vec::new();
        if !texts.iter().all(|text| encoders.supports_script(text)) {
            warnings.push(format!(
                "the text encoder of {} is not multilingual: its vocabulary does not have the script of this query, so these results mean nothing",
                card.name
            ));
        }
        let unread = texts.iter().filter_map(|text| encoders.find_unread(text).describe(card));
        warnings.extend(unread.take(MAX_UNREAD_TEXTS));
        (!warnings.is_empty()).then(|| warnings.join("; "))
    }
}

/// Decides whether the best hit is no better than those of unrelated texts. Returns `None` if that is
/// not calibrated, or if the query is not a text.
fn check_no_match(
    input: &QueryInput,
    top_k: &TopK,
    prompt_set: &EmbeddedPromptSet,
    calibration: &Calibration,
) -> Option<NoMatchVerdict> {
    let (QueryInput::Text(text), Some(hit)) = (input, top_k.hits.first()) else { return None };
    let rule = calibration.no_match?;
    Some(NoMatchVerdict::from_best_hit(
        rule,
        hit.score,
        top_k.score_distribution,
        text,
        prompt_set.vocabulary(),
    ))
}
