//! Ranks the candidates that a caller has found elsewhere: exactly these, by plain CLIP and balanced.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use pulp::Arch;
use rayon::prelude::*;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::explain::{RankedScore, ScoredPrompt, explain_in_words};
use super::generation_engine::Engine;
use super::query_log::query_hash;
use super::query_plan::{QueryPlan, resolve_configuration};
use super::shadow::ShadowQuery;
use crate::balance::normalise::{AffineTransform, BalanceParameters};
use crate::balance::statistics::ScoreStatistics;
use crate::prompts::EmbeddedPromptSet;
use crate::record::arrays::JsonEmbedding;
use crate::record::{Embedding, ImageId};
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::scan::{ExactDotProduct, ScanRequest, report_raw_score, report_score};
use crate::search::snapshot::{ServingRole, ServingSnapshot};
use crate::search::timings::{Timings, to_milliseconds};
use crate::telemetry::{self, event};

/// Most candidates of a request.
pub const MAX_RERANK_CANDIDATES: usize = 5_000;
/// Prompts that an explanation of a candidate names.
const EXPLAINED_PROMPTS: usize = 5;
/// Invalid candidates that an error describes.
const MAX_DESCRIBED_CANDIDATES: usize = 10;

/// An image that a caller has found.
#[derive(Debug, Clone)]
pub struct RerankCandidate {
    /// Id of the image.
    pub id: String,
    /// Embedding of the image by the model of the configuration that answers. Without one, the stored embedding
    /// of the image with this id is used.
    pub embedding: Option<JsonEmbedding>,
    /// The caller's own score, which only gets a rank.
    pub score: Option<f64>,
}

/// A score, and its rank among all candidates that have one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreAndRank<T> {
    /// The score.
    pub score: T,
    /// Its rank, from 1.
    pub rank: usize,
}

/// A candidate with its scores and ranks.
#[derive(Debug)]
pub struct RerankedImage {
    /// Id of the image.
    pub id: String,
    /// Whether the catalogue has an image with this id.
    pub is_known: bool,
    /// The caller's own score, if it gave one.
    pub own: Option<ScoreAndRank<f64>>,
    /// Cosine similarity of query and image.
    pub raw: ScoreAndRank<f32>,
    /// The balanced score.
    pub balanced: ScoreAndRank<f32>,
    /// α and β of the image.
    pub affine: AffineTransform,
    /// What determines the rank; `None` if it was not asked for.
    pub explanation: Option<RerankExplanation>,
}

/// What determines the rank of a candidate.
#[derive(Debug)]
pub struct RerankExplanation {
    /// Statistics of the image's auxiliary scores; `None` if it has none.
    pub statistics: Option<ScoreStatistics>,
    /// The prompts with the highest scores for the image.
    pub top_prompts: Vec<ScoredPrompt>,
    /// The explanation as a sentence.
    pub summary: String,
}

/// The candidates by balanced score.
#[derive(Debug)]
pub struct RerankResults {
    /// Version of the table whose embeddings were used.
    pub table_version: u64,
    /// Prompt set whose statistics were used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Configurations that were served at that time.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that answered.
    pub configuration_name: String,
    /// All candidates but the unknown ones, best balanced score first.
    pub images: Vec<RerankedImage>,
    /// Candidates without an embedding whose ids are not in the catalogue, in the order of the request.
    pub unknown_ids: Vec<String>,
    /// Durations of the steps; nothing is scanned.
    pub timings: Timings,
    /// Reason not to trust the answer; `None` if there is none.
    pub warning: Option<String>,
}

/// A candidate with its exact scores.
struct ScoredCandidate {
    /// Its number in the request.
    index: usize,
    is_known: bool,
    raw: f64,
    balanced: f64,
    affine: AffineTransform,
    statistics: Option<ScoreStatistics>,
    /// The embedding from which the scores were computed, if it is explained.
    embedding: Option<Embedding>,
}

impl Engine {
    /// Ranks `candidates`, exactly these, by plain CLIP and by balanced score; equal scores by id. Returns
    /// [`QueryError::Cancelled`] if `cancel` is cancelled before that. Blocks while it computes.
    pub fn rerank(
        &self,
        query: &Query,
        candidates: &Arc<[RerankCandidate]>,
        explain: bool,
        cancel: &CancellationToken,
    ) -> Result<RerankResults, QueryError> {
        let embeddings = self.validate_candidates(candidates)?;
        let QueryPlan { request, prompt_set, embed_ms, route, .. } =
            self.plan_query(query, 1, cancel)?;
        let started_at = Instant::now();
        let scorer = CandidateScorer { request: &request, prompt_set: &prompt_set, explain };
        let (images, unknown_ids) = scorer.rank_all(candidates, &embeddings, &query.input);
        let rank_ms = to_milliseconds(started_at.elapsed());
        let snapshot = &request.snapshot;
        let serving_snapshot = snapshot.serving_snapshot.clone();
        self.count_answer(route, &serving_snapshot);
        if let QueryInput::Text(text) = &query.input {
            self.fit_monitor.record_query(text, request.embedding.clone(), None);
        }
        let results = RerankResults {
            table_version: snapshot.table_version,
            balance: request.balance,
            configuration_name: serving_snapshot.configuration_for(route).to_owned(),
            serving_snapshot,
            prompt_set,
            images,
            unknown_ids,
            timings: Timings { embed_ms, wait_ms: 0.0, scan_ms: 0.0, rank_ms },
            warning: self.text_warning(&query.input),
        };
        log_rerank(query, &results);
        if route == ServingRole::Live && !query.input.is_image() && !query.has_overrides() {
            self.start_rerank_shadow(request, query, candidates, embeddings, &results);
        }
        Ok(results)
    }

    /// Checks ids and number of the candidates, and returns their embeddings at unit length, rounded as they
    /// would be stored.
    fn validate_candidates(
        &self,
        candidates: &[RerankCandidate],
    ) -> Result<Vec<Option<Embedding>>, QueryError> {
        let invalid = |reason: String| QueryError::invalid_field("candidates", reason);
        if !(1..=MAX_RERANK_CANDIDATES).contains(&candidates.len()) {
            return Err(invalid(format!(
                "has {} candidates; give 1 to {MAX_RERANK_CANDIDATES}",
                candidates.len()
            )));
        }
        let dimension = self.encoders().card().dimension;
        let mut ids = HashSet::with_capacity(candidates.len());
        let mut problems = Vec::new();
        let mut embeddings = Vec::with_capacity(candidates.len());
        for (index, candidate) in candidates.iter().enumerate() {
            let mut add =
                |reason: String| problems.push(format!("{index} ({:?}): {reason}", candidate.id));
            if let Err(error) = ImageId::new(&candidate.id) {
                add(format!("id {}", error.reason));
            }
            if !ids.insert(candidate.id.as_str()) {
                add("id is given twice".into());
            }
            let embedding = candidate.embedding.as_ref().map(|json| json.to_unit_vector(dimension));
            embeddings.push(match embedding.transpose() {
                Ok(unit) => unit.map(|unit| Embedding::from_unit_vector(&unit)),
                Err(reason) => {
                    add(format!("embedding {reason}"));
                    None
                }
            });
        }
        if problems.is_empty() {
            return Ok(embeddings);
        }
        let more = problems.len().saturating_sub(MAX_DESCRIBED_CANDIDATES);
        problems.truncate(MAX_DESCRIBED_CANDIDATES);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        Err(invalid(format!("{}{more}", problems.join("; "))))
    }

    /// Ranks the candidates as the configuration that may become live would have, if the query belongs to its
    /// shadow share. `request` is that of the live answer.
    fn start_rerank_shadow(
        &self,
        mut request: ScanRequest,
        query: &Query,
        candidates: &Arc<[RerankCandidate]>,
        embeddings: Vec<Option<Embedding>>,
        results: &RerankResults,
    ) {
        let serving_snapshot = request.snapshot.serving_snapshot.clone();
        let Some(candidate) = &serving_snapshot.candidate else { return };
        let Some(shadow) = ShadowQuery::try_acquire(
            &self.traffic_counters,
            candidate,
            &serving_snapshot.configuration_name,
            query,
            candidates.len(),
        ) else {
            return;
        };
        let resolved = resolve_configuration(&request.snapshot, &candidate.serving, query);
        let (candidates, input) = (candidates.clone(), query.input.clone());
        shadow.spawn_ranking(ids_of(&results.images), move || {
            let (prompt_set, balance) = resolved.ok()?;
            request.set_configuration(&prompt_set, balance);
            let scorer =
                CandidateScorer { request: &request, prompt_set: &prompt_set, explain: false };
            Some(scorer.rank_ids(&candidates, &embeddings, &input))
        });
    }

    /// Ranks the candidates as this engine of a standby generation would have, and compares the result with that
    /// of the live engine.
    pub(super) fn start_standby_rerank_shadow(
        self: &Arc<Self>,
        shadow: ShadowQuery,
        query: &Query,
        candidates: &Arc<[RerankCandidate]>,
        results: &RerankResults,
    ) {
        let (engine, query, candidates) =
            (self.clone(), query.without_routing(), candidates.clone());
        shadow.spawn_ranking(ids_of(&results.images), move || {
            let plan = engine.plan_query(&query, 1, &CancellationToken::new()).ok()?;
            let QueryPlan { request, prompt_set, .. } = plan;
            let scorer =
                CandidateScorer { request: &request, prompt_set: &prompt_set, explain: false };
            Some(scorer.rank_ids(&candidates, &vec![None; candidates.len()], &query.input))
        });
    }
}

/// Scores candidates exactly, in f64.
struct CandidateScorer<'a> {
    request: &'a ScanRequest,
    prompt_set: &'a EmbeddedPromptSet,
    /// Whether the embeddings are kept for explanations.
    explain: bool,
}

impl CandidateScorer<'_> {
    /// Ranks all candidates that have an embedding here or in the catalogue. Returns the ids of the others, too.
    fn rank_all(
        &self,
        candidates: &[RerankCandidate],
        embeddings: &[Option<Embedding>],
        input: &QueryInput,
    ) -> (Vec<RerankedImage>, Vec<String>) {
        let (scored, unknown_ids) = self.score_all(candidates, embeddings);
        (rank(&scored, candidates, self.prompt_set, input), unknown_ids)
    }

    /// Returns the ids of the ranked candidates, and the version of the table, for a comparison in the shadow.
    fn rank_ids(
        &self,
        candidates: &[RerankCandidate],
        embeddings: &[Option<Embedding>],
        input: &QueryInput,
    ) -> (Vec<String>, u64) {
        let (images, _) = self.rank_all(candidates, embeddings, input);
        (ids_of(&images), self.request.snapshot.table_version)
    }

    /// Scores all candidates that have an embedding here or in the catalogue. Returns the ids of the others,
    /// too.
    fn score_all(
        &self,
        candidates: &[RerankCandidate],
        embeddings: &[Option<Embedding>],
    ) -> (Vec<ScoredCandidate>, Vec<String>) {
        let score = |(index, (candidate, embedding)): (usize, (&RerankCandidate, &Option<_>))| {
            self.score(index, &candidate.id, embedding.as_ref()).ok_or_else(|| candidate.id.clone())
        };
        let scored: Vec<Result<ScoredCandidate, String>> =
            candidates.par_iter().zip(embeddings).enumerate().with_min_len(16).map(score).collect();
        let (mut known, mut unknown) = (Vec::with_capacity(scored.len()), Vec::new());
        for result in scored {
            match result {
                Ok(candidate) => known.push(candidate),
                Err(id) => unknown.push(id),
            }
        }
        (known, unknown)
    }

    /// Scores a candidate; `None` if it has no embedding.
    fn score(&self, index: usize, id: &str, given: Option<&Embedding>) -> Option<ScoredCandidate> {
        let snapshot = &self.request.snapshot;
        let location = snapshot.find_row(id);
        let (raw, statistics, embedding) = if let Some(embedding) = given {
            let statistics = self.prompt_set.compute_statistics(embedding);
            let row = embedding.to_f16();
            (self.dot_product(&row), statistics, self.explain.then(|| embedding.clone()))
        } else {
            let location = location?;
            let chunk = &snapshot.chunks[location.chunk_index];
            let row = location.row_index;
            let column = chunk.statistics.get(&self.request.statistics_key);
            let statistics = column.map(|column| column[row]).filter(|s| s.n > 0);
            let embedding = self.explain.then(|| chunk.data.embedding(row));
            (self.dot_product(chunk.data.stored_vector(row)), statistics, embedding)
        };
        let affine =
            statistics.as_ref().map_or(AffineTransform::RAW, |s| self.request.affine_transform(s));
        let balanced = f64::from(affine.alpha) * raw + f64::from(affine.beta);
        let is_known = location.is_some();
        Some(ScoredCandidate { index, is_known, raw, balanced, affine, statistics, embedding })
    }

    fn dot_product(&self, row: &[half::f16]) -> f64 {
        Arch::new().dispatch(ExactDotProduct { query: &self.request.embedding, row })
    }
}

/// Returns the candidates by balanced score, with their ranks.
fn rank(
    scored: &[ScoredCandidate],
    candidates: &[RerankCandidate],
    prompt_set: &EmbeddedPromptSet,
    input: &QueryInput,
) -> Vec<RerankedImage> {
    let id = |position: usize| candidates[scored[position].index].id.as_str();
    let sort = |score: &dyn Fn(&ScoredCandidate) -> f64| {
        let mut order: Vec<usize> = (0..scored.len()).collect();
        let by_score = |a: &usize, b: &usize| score(&scored[*b]).total_cmp(&score(&scored[*a]));
        order.sort_unstable_by(|a, b| by_score(a, b).then_with(|| id(*a).cmp(id(*b))));
        order
    };
    let balanced_order = sort(&|candidate| candidate.balanced);
    let raw_ranks = invert(&sort(&|candidate| candidate.raw));
    let own_ranks = rank_own_scores(candidates);
    let ranked = scored.len();
    let build = |(rank, position): (usize, &usize)| {
        let candidate = &scored[*position];
        let given = &candidates[candidate.index];
        let (rank, affine) = (rank + 1, candidate.affine);
        let raw_rank = raw_ranks[*position] + 1;
        let explanation = candidate.embedding.as_ref().map(|embedding| {
            let prompts: Vec<ScoredPrompt> = prompt_set
                .rank_prompts(embedding)
                .into_iter()
                .map(|(text, score)| ScoredPrompt { text: text.to_owned(), score })
                .collect();
            let score = RankedScore { raw_score: candidate.raw as f32, raw_rank, rank, affine };
            let statistics = candidate.statistics;
            let summary = explain_in_words(input, &score, statistics.as_ref(), &prompts, ranked);
            let top_prompts = prompts.into_iter().take(EXPLAINED_PROMPTS).collect();
            RerankExplanation { statistics, top_prompts, summary }
        });
        let own_rank = own_ranks[candidate.index];
        RerankedImage {
            id: given.id.clone(),
            is_known: candidate.is_known,
            own: given.score.map(|score| ScoreAndRank { score, rank: own_rank }),
            raw: ScoreAndRank { score: report_raw_score(candidate.raw as f32), rank: raw_rank },
            balanced: ScoreAndRank { score: report_score(candidate.balanced as f32, affine), rank },
            affine,
            explanation,
        }
    };
    balanced_order.par_iter().with_min_len(64).enumerate().map(build).collect()
}

fn ids_of(images: &[RerankedImage]) -> Vec<String> {
    images.iter().map(|image| image.id.clone()).collect()
}

/// Returns the rank, from 1, of the own score of each candidate that has one; equal scores keep their order.
fn rank_own_scores(candidates: &[RerankCandidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let score = |i: usize| candidates[i].score.unwrap_or(f64::NEG_INFINITY);
    order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    invert(&order).into_iter().map(|rank| rank + 1).collect()
}

/// Returns the place of each element in `order`.
fn invert(order: &[usize]) -> Vec<usize> {
    let mut places = vec![0; order.len()];
    for (place, element) in order.iter().enumerate() {
        places[*element] = place;
    }
    places
}

fn log_rerank(query: &Query, results: &RerankResults) {
    let description = query.input.description();
    let (trace_id, parent_id) = query.trace_and_span_id.as_ref().map(|(t, p)| (t, p)).unzip();
    let images = &results.images;
    info!(
        event = event::RERANK,
        query_hash = query_hash(&description),
        query = telemetry::loggable_query_text(&description),
        input = query.input.kind_name(),
        trace_id,
        parent_id,
        api_key_name = query.api_key_name,
        configuration = results.configuration_name,
        overrides = query.has_overrides(),
        normaliser = results.balance.normaliser.name(),
        weight = results.balance.weight,
        ranked = images.len(),
        known = images.iter().filter(|image| image.is_known).count(),
        unknown = results.unknown_ids.len(),
        reranked = images.iter().filter(|image| image.raw.rank != image.balanced.rank).count(),
        top_hit_changed = images.first().map(|image| image.raw.rank != 1),
        embed_ms = results.timings.embed_ms,
        rank_ms = results.timings.rank_ms,
        table_version = results.table_version,
        "candidates of a caller were ranked"
    );
}
