//! Why an image ranks where it does.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::generation_engine::Engine;
use super::query_plan::{QueryPlan, is_allowed};
use crate::balance::normalise::{AffineTransform, BalanceParameters};
use crate::balance::statistics::ScoreStatistics;
use crate::prompts::EmbeddedPromptSet;
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::scan::{Hit, ScanGoal};
use crate::search::snapshot::ServingSnapshot;

/// A prompt and the score that an image gives it.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct ScoredPrompt {
    /// The prompt.
    pub text: String,
    /// Its score.
    pub score: f32,
}

/// Why an image ranks where it does.
#[derive(Debug)]
pub struct Explanation {
    /// Its scores and places.
    pub hit: Hit,
    /// Its statistics.
    pub statistics: Option<ScoreStatistics>,
    /// All prompts with its scores, strongest first.
    pub scored_prompts: Vec<ScoredPrompt>,
    /// Images scanned.
    pub scanned: usize,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Prompt set that was used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// What was served when it was explained.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that is explained, one of `served`.
    pub configuration: String,
    /// In plain words.
    pub summary: String,
}

impl Engine {
    /// Explains the place of one image in the answer to a query, unless `left` says that nobody waits
    /// for it any more. Computes: may block.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        cancel: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let QueryPlan { request: ask, prompt_set: set, route, .. } =
            self.plan_query(query, 1, cancel)?;
        let (snapshot, balance) = (ask.snapshot.clone(), ask.balance);
        let no_image = || QueryError::ImageNotFound(image_id.to_owned());
        let place = snapshot.find_row(image_id).ok_or_else(no_image)?;
        if !is_allowed(&ask, place) {
            let reason = "is left out of this query by its filter, or is what the query looks like";
            return Err(QueryError::invalid_field("image_id", reason));
        }
        let reply = self.scanner.scan_and_wait(ask, ScanGoal::RankOf(place), cancel)?;
        let hit = reply.top_k.hits.into_iter().next().ok_or_else(no_image)?;
        let statistics = snapshot.statistics(image_id, &set.statistics_key);
        let embedding = snapshot.embedding(image_id).ok_or_else(no_image)?;
        let prompts: Vec<ScoredPrompt> = set
            .rank_prompts(&embedding)
            .into_iter()
            .map(|(text, score)| ScoredPrompt { text: text.to_owned(), score })
            .collect();
        Ok(Explanation {
            summary: explain_in_words(
                &query.input,
                &hit,
                statistics.as_ref(),
                &prompts,
                reply.top_k.matched,
            ),
            hit,
            statistics,
            scored_prompts: prompts,
            scanned: snapshot.len(),
            balance,
            prompt_set: set,
            configuration: snapshot.serving_snapshot.configuration_for(route).to_owned(),
            serving_snapshot: snapshot.serving_snapshot.clone(),
        })
    }
}

/// Whether the balance leaves the score as it is.
fn is_score_unchanged(hit: &Hit) -> bool {
    hit.affine == AffineTransform { alpha: 1.0, beta: 0.0 }
}

/// The explanation in plain words.
fn explain_in_words(
    input: &QueryInput,
    hit: &Hit,
    statistics: Option<&ScoreStatistics>,
    prompts: &[ScoredPrompt],
    ranked: usize,
) -> String {
    let Some(s) = statistics else {
        return "This image has no statistics for the prompt set, so its raw score counts as it is.".into();
    };
    if input.is_image() && is_score_unchanged(hit) {
        return format!(
            "Compared with a picture, this image has the cosine {:.3} and stands at place {} of {ranked}; prompts, which are texts, have no part in it.",
            hit.raw_score, hit.rank
        );
    }
    let above = prompts.iter().filter(|p| p.score >= hit.raw_score).count();
    let strongest = prompts.first().map_or("", |p| p.text.as_str());
    let moved = match hit.raw_rank.cmp(&hit.rank) {
        std::cmp::Ordering::Greater => {
            format!("moved up from place {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Less => {
            format!("moved down from place {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Equal => format!("stays at place {}", hit.rank),
    };
    format!(
        "This image gives the query {:.3}; its own prompts get {:.3} on average, and {above} of {} get as much as the query or more (most of all “{strongest}”, {:.3}). Balanced against that it {moved} of {ranked}.",
        hit.raw_score, s.mean, s.n, s.max
    )
}
