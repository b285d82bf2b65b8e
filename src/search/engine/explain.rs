//! Explains the rank of an image.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::generation_engine::Engine;
use super::query_plan::{QueryPlan, is_row_allowed};
use crate::balance::normalise::{AffineTransform, BalanceParameters};
use crate::balance::statistics::ScoreStatistics;
use crate::prompts::EmbeddedPromptSet;
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::scan::{Hit, ScanGoal};
use crate::search::snapshot::ServingSnapshot;

/// A prompt and its auxiliary score for an image.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct ScoredPrompt {
    /// Text of the prompt.
    pub text: String,
    /// Cosine similarity of prompt and image.
    pub score: f32,
}

/// What determines the rank of an image.
#[derive(Debug)]
pub struct Explanation {
    /// Scores and ranks of the image.
    pub hit: Hit,
    /// Statistics of its auxiliary scores; `None` if it has none.
    pub statistics: Option<ScoreStatistics>,
    /// All prompts with their scores for the image, highest first.
    pub scored_prompts: Vec<ScoredPrompt>,
    /// Number of images in the catalogue.
    pub scanned_image_count: usize,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Prompt set whose statistics were used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Configurations that were served at that time.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that is explained, one of those in `serving_snapshot`.
    pub configuration_name: String,
    /// The explanation as a sentence.
    pub summary: String,
}

impl Engine {
    /// Explains the rank of one image in the answer to a query. Returns [`QueryError::Cancelled`] if
    /// `cancel` is cancelled before the scan. Blocks while it computes.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        cancel: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let QueryPlan { request, prompt_set, route, .. } = self.plan_query(query, 1, cancel)?;
        let (snapshot, balance) = (request.snapshot.clone(), request.balance);
        let not_found = || QueryError::ImageNotFound(image_id.to_owned());
        let location = snapshot.find_row(image_id).ok_or_else(not_found)?;
        if !is_row_allowed(&request, location) {
            let reason = "is excluded by the filter of this query, or is the query itself";
            return Err(QueryError::invalid_field("image_id", reason));
        }
        let reply = self.scanner.scan_and_wait(request, ScanGoal::RankOf(location), cancel)?;
        let hit = reply.top_k.hits.into_iter().next().ok_or_else(not_found)?;
        let statistics = snapshot.statistics(image_id, &prompt_set.statistics_key);
        let embedding = snapshot.embedding(image_id).ok_or_else(not_found)?;
        let scored_prompts: Vec<ScoredPrompt> = prompt_set
            .rank_prompts(&embedding)
            .into_iter()
            .map(|(text, score)| ScoredPrompt { text: text.to_owned(), score })
            .collect();
        Ok(Explanation {
            summary: explain_in_words(
                &query.input,
                &RankedScore::from(&hit),
                statistics.as_ref(),
                &scored_prompts,
                reply.top_k.matched_image_count,
            ),
            hit,
            statistics,
            scored_prompts,
            scanned_image_count: snapshot.len(),
            balance,
            prompt_set,
            configuration_name: snapshot.serving_snapshot.configuration_for(route).to_owned(),
            serving_snapshot: snapshot.serving_snapshot.clone(),
        })
    }
}

/// The scores and ranks of an image that is explained.
pub(super) struct RankedScore {
    pub raw_score: f32,
    /// Rank by raw score, from 1.
    pub raw_rank: usize,
    /// Rank by balanced score, from 1.
    pub rank: usize,
    /// α and β of the image.
    pub affine: AffineTransform,
}

impl From<&Hit> for RankedScore {
    fn from(hit: &Hit) -> Self {
        let Hit { raw_score, raw_rank, rank, affine, .. } = *hit;
        Self { raw_score, raw_rank, rank, affine }
    }
}

/// Returns the explanation as a sentence. `ranked` is the number of ranked images.
pub(super) fn explain_in_words(
    input: &QueryInput,
    hit: &RankedScore,
    statistics: Option<&ScoreStatistics>,
    prompts: &[ScoredPrompt],
    ranked: usize,
) -> String {
    let Some(s) = statistics else {
        return "This image has no statistics for the prompt set, so its raw score is not balanced.".into();
    };
    let is_score_unchanged = hit.affine == AffineTransform::RAW;
    if input.is_image() && is_score_unchanged {
        return format!(
            "Compared with a picture, this image has the cosine similarity {:.3} and rank {} of {ranked}; prompts, which are texts, play no part in this.",
            hit.raw_score, hit.rank
        );
    }
    let at_least_as_high = prompts.iter().filter(|p| p.score >= hit.raw_score).count();
    let strongest = prompts.first().map_or("", |p| p.text.as_str());
    let moved = match hit.raw_rank.cmp(&hit.rank) {
        std::cmp::Ordering::Greater => {
            format!("moved up from rank {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Less => {
            format!("moved down from rank {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Equal => format!("stays at rank {}", hit.rank),
    };
    format!(
        "The raw score of this image for the query is {:.3}; its scores for the prompts are {:.3} on average, and {at_least_as_high} of {} are at least as high as the score for the query (highest: “{strongest}”, {:.3}). Balanced against these scores, the image {moved} of {ranked}.",
        hit.raw_score, s.mean, s.n, s.max
    )
}
