//! Right and wrong results, on servers that know what their images show, as that of the demo does.

use schemars::JsonSchema;
use serde::Serialize;

use crate::balance::normalise::Normaliser;
use crate::search::{Engine, ImageMetadata, QueryError};

/// Says of an image whether it is a right answer.
pub type ImageJudge = Box<dyn Fn(&ImageMetadata) -> bool + Send>;

/// Knows what the images of a catalogue show.
pub trait ResultJudge: Send + Sync {
    /// Returns the judge of the answers to `text`; `None` if its right answers are not known.
    fn judge_text(&self, text: &str) -> Option<ImageJudge>;

    /// Compares the live ranking with plain CLIP over sample queries; `None` if no image is a right answer to
    /// any of them. Blocks for up to a second.
    fn score_samples(&self, engine: &Engine) -> Result<Option<SampleScore>, QueryError>;
}

/// Both rankings over queries whose right answers are known, and what the difference shows.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct SampleScore {
    /// Version of the table that was ranked.
    pub table_version: u64,
    /// Name of the live configuration.
    pub configuration: String,
    /// Its normaliser.
    pub normaliser: Normaliser,
    /// Its weight.
    pub weight: f32,
    /// Number of sample queries that have a right answer in the catalogue.
    pub queries: usize,
    /// Recall counts right answers among this many first results.
    pub recall_depth: usize,
    /// Plain CLIP.
    pub plain: RankingScore,
    /// The live ranking.
    pub balanced: RankingScore,
    /// Change of the share of false first hits; below 0 is better.
    pub false_first_hits: ScoreDifference,
    /// Change of recall; above 0 is better.
    pub recall: ScoreDifference,
    /// What both differences show, in a sentence.
    pub summary: String,
}

/// One ranking over the sample queries.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct RankingScore {
    /// Number of queries whose first result is wrong.
    pub false_first_hits: usize,
    /// Right answers among the first `recall_depth` results, divided by all that there are, or by
    /// `recall_depth` if there are more: the mean over the queries, 0 to 1.
    pub recall: f64,
}

/// The live ranking minus plain CLIP: the mean over the queries, with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct ScoreDifference {
    /// The mean difference per query.
    pub mean: f64,
    /// Lower bound of the interval.
    pub low: f64,
    /// Upper bound of the interval.
    pub high: f64,
    /// What it shows.
    pub verdict: ScoreVerdict,
}

/// What a difference shows: it is significant if its interval excludes 0 and p is below 0.05, corrected for
/// two differences (Holm).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreVerdict {
    /// The live ranking is better.
    Better,
    /// Plain CLIP is better.
    Worse,
    /// The queries do not show a difference.
    NotSignificant,
}
