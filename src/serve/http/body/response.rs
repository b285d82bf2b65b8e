//! The bodies of successful responses, and the events of the change feed.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::normalise::Normaliser;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::diagnosis::redact::redact_addresses;
use crate::search::{
    Explanation, Hit, ImageMetadata, NoMatchVerdict, QueryInput, ScoredPrompt, SearchResults,
    Snapshot, SnapshotImageChange, Timings,
};
use crate::serve::result_judge::{ImageJudge, ResultJudge, SampleScore};

/// The response to a search: the rankings by plain CLIP and by balanced scores, from one scan.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SearchResponse {
    /// Version of the table that was searched.
    pub table_version: u64,
    /// Generation of that table.
    pub generation: String,
    /// Name of the configuration that answered.
    #[serde(default)]
    pub configuration: String,
    /// Key of the prompt set whose statistics were used.
    pub prompt_set: StatisticsKey,
    /// Normaliser that was used.
    pub normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// Number of images in the catalogue.
    pub scanned: usize,
    /// Number of images that were ranked: those that pass the filter.
    pub matched: usize,
    /// How long the parts of the search took.
    pub timings: Timings,
    /// The best images by balanced score.
    pub hits: Vec<SearchHit>,
    /// The best images by raw score.
    pub raw_hits: Vec<SearchHit>,
    /// Why the rankings may be unreliable, and what of the query the text encoder did not read: what
    /// comes after its context length, and characters outside of its vocabulary. Null if there is no
    /// known reason.
    pub warning: Option<String>,
    /// Whether the best hit scores no better than hits of unrelated texts do; null if no threshold
    /// is calibrated for such a query, and on later pages.
    pub no_match: Option<NoMatchVerdict>,
    /// Minimum balanced score of `hits`; null if the request set none.
    pub min_score: Option<f32>,
    /// Send it as `cursor` to get the next page; null on the last page.
    pub next_cursor: Option<String>,
    /// Number of images in the catalogue that are right answers, filtered or not. Only a server that knows
    /// what its images show has it, and only for a text whose right answers it knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right_images: Option<usize>,
}

impl SearchResponse {
    /// Converts the results of a search.
    pub fn new(results: &SearchResults) -> Self {
        Self {
            table_version: results.table_version,
            generation: results.serving_snapshot.generation_id.clone(),
            configuration: results.configuration_name.clone(),
            prompt_set: results.prompt_set.statistics_key.clone(),
            normaliser: results.balance.normaliser,
            weight: results.balance.weight,
            lambda: results.balance.lambda,
            scanned: results.scanned_image_count,
            matched: results.matched_image_count,
            timings: results.timings,
            hits: results.hits.iter().map(SearchHit::new).collect(),
            raw_hits: results.raw_hits.iter().map(SearchHit::new).collect(),
            warning: results.warning.clone(),
            no_match: results.no_match_verdict.clone(),
            min_score: results.min_score,
            next_cursor: results.next_cursor.clone(),
            right_images: None,
        }
    }

    /// Marks which hits are right answers. `results` are those of this response.
    #[must_use]
    pub fn with_right_answers(
        mut self,
        results: &SearchResults,
        right_answers: &RightAnswers,
    ) -> Self {
        let mark = |(hit, result): (&mut SearchHit, &Hit)| {
            hit.right = Some((right_answers.judge)(&result.image_metadata));
        };
        self.hits.iter_mut().zip(&results.hits).for_each(mark);
        self.raw_hits.iter_mut().zip(&results.raw_hits).for_each(mark);
        self.right_images = Some(right_answers.count);
        self
    }
}

/// The right answers to a text.
pub struct RightAnswers {
    judge: ImageJudge,
    count: usize,
}

impl RightAnswers {
    /// Counts the right answers in `snapshot`; `None` if those to this query are not known.
    pub fn count(judge: &dyn ResultJudge, query: &QueryInput, snapshot: &Snapshot) -> Option<Self> {
        let QueryInput::Text(text) = query else { return None };
        let judge = judge.judge_text(text)?;
        let count = snapshot.images().filter(|image| judge(image)).count();
        Some(Self { judge, count })
    }
}

/// The newest images of the catalogue.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NewestImagesResponse {
    /// Version of the table that was read.
    pub table_version: u64,
    /// The images that were embedded last, newest first.
    pub images: Vec<ImageInfo>,
}

/// Both rankings over sample queries.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SampleScoreResponse {
    /// Whether this server knows which results are right, as that of the demo does.
    pub known: bool,
    /// Null if it does not, and if no image is a right answer to any of its sample queries.
    pub score: Option<SampleScore>,
}

/// An image with its scores and ranks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SearchHit {
    /// What is known of the image.
    #[serde(flatten)]
    pub image: ImageInfo,
    /// Score of plain CLIP: cosine similarity of query and image.
    pub raw_score: f32,
    /// Rank by `raw_score`, from 1.
    pub raw_rank: usize,
    /// Balanced score: `alpha` · `raw_score` + `beta`.
    pub score: f32,
    /// Rank by `score`, from 1.
    pub rank: usize,
    /// Factor of this image, weight and scale included; the same for every query.
    pub alpha: f32,
    /// Shift of this image, weight and scale included; the same for every query.
    pub beta: f32,
    /// Whether it is a right answer; only if the response has `right_images`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right: Option<bool>,
}

impl SearchHit {
    fn new(hit: &Hit) -> Self {
        Self {
            image: ImageInfo::new(&hit.image_metadata),
            raw_score: hit.reported_raw_score(),
            raw_rank: hit.raw_rank,
            score: hit.reported_score(),
            rank: hit.rank,
            alpha: hit.affine.alpha,
            beta: hit.affine.beta,
            right: None,
        }
    }
}

/// An image of the catalogue.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ImageInfo {
    /// Its id in the catalogue.
    pub image_id: String,
    /// Where it was fetched from, without secrets: user and signature are hidden. Null if it came
    /// without an address.
    pub uri: Option<String>,
    /// Address of its picture, relative to the server's own; null if `uri` is.
    pub picture: Option<String>,
    /// Declared attributes and their values.
    pub attributes: BTreeMap<String, String>,
    /// Sequence of its newest event, which orders the versions of an image.
    pub sequence: String,
    /// When the image changed, according to its newest event; null if the event does not say.
    pub event_time: Option<DateTime<Utc>>,
    /// When the image was embedded.
    pub embedded_at: DateTime<Utc>,
    /// SHA-256 of the image's bytes, in hexadecimal; empty if it was embedded elsewhere.
    pub content_hash: String,
    /// Width in pixels; 0 if it was embedded elsewhere.
    pub width: u32,
    /// Height in pixels; 0 if it was embedded elsewhere.
    pub height: u32,
}

impl ImageInfo {
    /// Converts what the snapshot has of an image.
    pub fn new(image: &ImageMetadata) -> Self {
        Self {
            image_id: image.image_id.to_string(),
            uri: image.uri.as_deref().map(|uri| redact_addresses(uri).into_owned()),
            picture: picture_address(image),
            attributes: redact_attributes(&image.attributes),
            sequence: image.version.sequence.as_str().to_owned(),
            event_time: image.event_time,
            embedded_at: image.embedded_at,
            content_hash: image.content_hash.clone(),
            width: image.width,
            height: image.height,
        }
    }
}

/// Returns the attributes without the secrets of addresses in them.
fn redact_attributes(attributes: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let redacted = |text: &str| redact_addresses(text).into_owned();
    attributes.iter().map(|(name, text)| (name.clone(), redacted(text))).collect()
}

/// Returns the address of an image's picture, relative to the server's own, which a proxy may have
/// changed; `None` if the picture cannot be fetched. The id is in the query, because proxies change or
/// refuse paths with an encoded `/` or with `\`. A hash of the content is in it, so that browsers may
/// cache the picture.
fn picture_address(image: &ImageMetadata) -> Option<String> {
    image.uri.as_ref()?;
    let hash = image.content_hash.get(..12).unwrap_or_default();
    let mut parameters = url::form_urlencoded::Serializer::new(String::new());
    parameters.append_pair("id", image.image_id.as_str()).append_pair("v", hash);
    Some(format!("v1/images/picture?{}", parameters.finish()))
}

/// Why an image has its rank.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ExplainResponse {
    hit: SearchHit,
    statistics: Option<ScoreStatistics>,
    prompts: Vec<ScoredPrompt>,
    scanned: usize,
    explanation: String,
    generation: String,
    configuration: String,
    prompt_set: StatisticsKey,
    normaliser: Normaliser,
    weight: f32,
}

impl From<Explanation> for ExplainResponse {
    fn from(explanation: Explanation) -> Self {
        Self {
            hit: SearchHit::new(&explanation.hit),
            statistics: explanation.statistics,
            prompts: explanation.scored_prompts,
            scanned: explanation.scanned_image_count,
            explanation: explanation.summary,
            generation: explanation.serving_snapshot.generation_id.clone(),
            configuration: explanation.configuration_name,
            prompt_set: explanation.prompt_set.statistics_key.clone(),
            normaliser: explanation.balance.normaliser,
            weight: explanation.balance.weight,
        }
    }
}

/// A change of an image, as the change feed sends it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChangeEvent {
    image_id: String,
    /// `upsert` or `delete`.
    operation: &'static str,
    /// Whether the catalogue did not have the image before.
    is_new: bool,
    picture: Option<String>,
    title: Option<String>,
    /// When the image changed, according to the event; null if the event does not say, and if the
    /// image was deleted.
    event_time: Option<DateTime<Utc>>,
    table_version: u64,
    /// When this query worker applied the change, RFC 3339.
    searchable_at: String,
}

impl From<&SnapshotImageChange> for ChangeEvent {
    fn from(change: &SnapshotImageChange) -> Self {
        let after = change.image_after.as_deref();
        // A deleted image is shown with the title that it had.
        let titled = after.or(change.image_before.as_deref());
        let title = titled.and_then(|image| image.attributes.get("title"));
        let title = title.map(|title| redact_addresses(title).into_owned());
        Self {
            image_id: change.image_id.to_string(),
            operation: if after.is_some() { "upsert" } else { "delete" },
            is_new: change.image_before.is_none(),
            picture: after.and_then(picture_address),
            title,
            event_time: after.and_then(|image| image.event_time),
            table_version: change.table_version,
            searchable_at: Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
        }
    }
}
