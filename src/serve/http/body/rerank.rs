//! The bodies of `/v1/rerank`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::request::QueryFields;
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::arrays::JsonEmbedding;
use crate::search::{
    Query, QueryError, RerankCandidate, RerankResults, RerankedImage, ScoreAndRank, ScoredPrompt,
    Timings, WeightedText,
};

/// Ranks images that were found elsewhere. Exactly one of `text`, `texts`, `image_id`, `image` and `vector` is
/// the query. Settings that are missing have the values of the configuration that answers.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankRequest {
    /// As in a search.
    text: Option<String>,
    /// As in a search.
    texts: Option<Vec<WeightedText>>,
    /// As in a search.
    image_id: Option<String>,
    /// As in a search.
    image: Option<String>,
    /// As in a search.
    vector: Option<Vec<f32>>,
    /// The images, 1 to 5,000, each id once.
    candidates: Vec<CandidateRequest>,
    /// Whether each result says what determines its rank.
    #[serde(default)]
    explain: bool,
    prompt_set: Option<String>,
    normaliser: Option<Normaliser>,
    weight: Option<f32>,
    lambda: Option<f32>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    configuration: Option<String>,
    /// Identifies the caller for the candidate's share of the traffic, as in a search.
    traffic_key: Option<String>,
}

/// An image to rank.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CandidateRequest {
    /// Id of the image. The catalogue must know it, unless `embedding` is given.
    id: String,
    /// Embedding of the image by the same model: numbers, or base64 of floats of 16 or 32 bits, little-endian.
    /// It is used in the place of the stored one, and its statistics are computed.
    embedding: Option<JsonEmbedding>,
    /// The caller's own score, greater for better images. It is returned with its rank, and changes nothing.
    score: Option<f64>,
}

impl RerankRequest {
    /// Returns the query, the candidates, and whether results are explained.
    pub fn into_parts(self) -> Result<(Query, Vec<RerankCandidate>, bool), QueryError> {
        let Self { text, texts, image_id, image, vector, .. } = self;
        let query = Query {
            input: QueryFields { text, texts, image_id, image, vector }.into_input("image_id")?,
            prompt_set: self.prompt_set,
            normaliser: self.normaliser,
            weight: self.weight,
            lambda: self.lambda,
            requested_configuration: self.configuration,
            traffic_key: self.traffic_key,
            ..Query::default()
        };
        let candidates = self.candidates.into_iter();
        let candidates = candidates.map(|CandidateRequest { id, embedding, score }| {
            RerankCandidate { id, embedding, score }
        });
        Ok((query, candidates.collect(), self.explain))
    }
}

/// The candidates of a request, ranked.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RerankResponse {
    /// Version of the table whose embeddings were used.
    table_version: u64,
    /// Generation of that table.
    generation: String,
    /// Name of the configuration that answered.
    configuration: String,
    /// Key of the prompt set whose statistics were used.
    prompt_set: StatisticsKey,
    /// Normaliser that was used.
    normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score.
    weight: f32,
    /// λ of `nnn`.
    lambda: f32,
    /// How long the parts took; nothing is scanned.
    timings: Timings,
    /// All candidates but the unknown ones, best balanced score first; equal scores by id.
    results: Vec<RerankResult>,
    /// Ids of the candidates without `embedding` that the catalogue does not know.
    unknown: Vec<String>,
    /// Why the ranking may be unreliable; null if there is no known reason.
    warning: Option<String>,
}

/// A candidate with its scores and ranks.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RerankResult {
    /// Its id.
    id: String,
    /// Whether the catalogue has an image with this id.
    known: bool,
    /// The caller's own score with its rank among them; null if none was given.
    own: Option<RankedOwnScore>,
    /// Score of plain CLIP: cosine similarity of query and image.
    raw: RankedScore,
    /// Balanced score: `alpha` · raw score + `beta`.
    balanced: RankedScore,
    /// Factor of this image, weight and scale included; the same for every query.
    alpha: f32,
    /// Shift of this image, weight and scale included; the same for every query.
    beta: f32,
    /// What determines its rank; null unless `explain` is true.
    explanation: Option<RerankExplanation>,
}

/// A score with its rank among the results, from 1.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RankedScore {
    score: f32,
    rank: usize,
}

/// A score of the caller with its rank among all candidates, from 1.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RankedOwnScore {
    score: f64,
    rank: usize,
}

/// What determines the rank of a candidate.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RerankExplanation {
    /// Statistics of its scores for the prompts; null if it has none.
    statistics: Option<ScoreStatistics>,
    /// The prompts with the highest scores for it.
    prompts: Vec<ScoredPrompt>,
    /// The explanation as a sentence.
    explanation: String,
}

impl From<RerankResults> for RerankResponse {
    fn from(results: RerankResults) -> Self {
        Self {
            table_version: results.table_version,
            generation: results.serving_snapshot.generation_id.clone(),
            configuration: results.configuration_name,
            prompt_set: results.prompt_set.statistics_key.clone(),
            normaliser: results.balance.normaliser,
            weight: results.balance.weight,
            lambda: results.balance.lambda,
            timings: results.timings,
            results: results.images.into_iter().map(RerankResult::from).collect(),
            unknown: results.unknown_ids,
            warning: results.warning,
        }
    }
}

impl From<RerankedImage> for RerankResult {
    fn from(image: RerankedImage) -> Self {
        let ranked = |ScoreAndRank { score, rank }| RankedScore { score, rank };
        Self {
            id: image.id,
            known: image.is_known,
            own: image.own.map(|ScoreAndRank { score, rank }| RankedOwnScore { score, rank }),
            raw: ranked(image.raw),
            balanced: ranked(image.balanced),
            alpha: image.affine.alpha,
            beta: image.affine.beta,
            explanation: image.explanation.map(|explanation| RerankExplanation {
                statistics: explanation.statistics,
                prompts: explanation.top_prompts,
                explanation: explanation.summary,
            }),
        }
    }
}
