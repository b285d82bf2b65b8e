//! Requests and answers as JSON has them.

use std::collections::BTreeMap;

use base64::Engine as _;
use chrono::{DateTime, SecondsFormat, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::normalise::Normaliser;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::search::{
    Explanation, Filter, Hit, ImageMetadata, MinScore, NoMatchVerdict, Query, QueryError,
    QueryInput, ScoredPrompt, SearchResults, SnapshotChange, Timings, WeightedText,
};
use crate::serve::feedback::{Feedback, FeedbackVerdict, MAX_TEXT_CHARS};

/// What is looked for, exactly one of these, and how it is answered. What is left out of the latter is
/// answered as the catalogue is served.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SearchRequest {
    /// What a text describes.
    text: Option<String>,
    /// What several texts describe together.
    texts: Option<Vec<WeightedText>>,
    /// What is like this image of the catalogue.
    image_id: Option<String>,
    /// What is like this picture: a file's bytes in base64.
    image: Option<String>,
    /// What is near this embedding of the same model, of any length.
    vector: Option<Vec<f32>>,
    /// How many results.
    k: Option<usize>,
    /// Which images may be found.
    filter: Option<Filter>,
    /// Balanced score that a hit must have: a number, or `calibrated`.
    min_score: Option<MinScore>,
    /// `next_cursor` of an answer to the same question: its next page.
    cursor: Option<String>,
    /// Whether the image `image_id` may be a hit of itself.
    #[serde(default)]
    include_self: bool,
    prompt_set: Option<String>,
    normaliser: Option<Normaliser>,
    weight: Option<f32>,
    lambda: Option<f32>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    configuration: Option<String>,
    /// What the caller is told apart by, for the candidate's share; it is hashed, not stored.
    traffic_key: Option<String>,
}

impl TryFrom<SearchRequest> for Query {
    type Error = QueryError;

    fn try_from(request: SearchRequest) -> Result<Self, QueryError> {
        let SearchRequest { text, texts, image_id, image, vector, .. } = request;
        Ok(Self {
            input: require_single_input(
                "image_id",
                [
                    text.map(QueryInput::Text),
                    texts.map(QueryInput::WeightedTexts),
                    image_id.map(QueryInput::ImageId),
                    image.map(decode_picture).transpose()?,
                    vector.map(QueryInput::Vector),
                ],
            )?,
            k: request.k,
            prompt_set: request.prompt_set,
            normaliser: request.normaliser,
            weight: request.weight,
            lambda: request.lambda,
            filter: request.filter,
            min_score: request.min_score,
            cursor: request.cursor,
            include_self: request.include_self,
            trace_ids: None,
            api_key_name: None,
            configuration: request.configuration,
            traffic_key: request.traffic_key,
        })
    }
}

/// A question about one image. What is left out is answered as the catalogue is served.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// The image whose place is explained.
    image_id: String,
    /// What a text describes.
    text: Option<String>,
    /// What several texts describe together.
    texts: Option<Vec<WeightedText>>,
    /// What is like this image of the catalogue.
    query_image_id: Option<String>,
    /// What is like this picture: a file's bytes in base64.
    image: Option<String>,
    /// What is near this embedding of the same model, of any length.
    vector: Option<Vec<f32>>,
    /// Which images it is ranked among.
    filter: Option<Filter>,
    prompt_set: Option<String>,
    normaliser: Option<Normaliser>,
    weight: Option<f32>,
    lambda: Option<f32>,
    /// Which configuration is explained: `live`, `candidate`, or the name of one of them.
    configuration: Option<String>,
}

impl ExplainRequest {
    /// The question, and the image that it is about.
    pub fn into_query_and_image_id(self) -> Result<(Query, String), QueryError> {
        let Self { text, texts, query_image_id, image, vector, .. } = self;
        let query = Query {
            input: require_single_input(
                "query_image_id",
                [
                    text.map(QueryInput::Text),
                    texts.map(QueryInput::WeightedTexts),
                    query_image_id.map(QueryInput::ImageId),
                    image.map(decode_picture).transpose()?,
                    vector.map(QueryInput::Vector),
                ],
            )?,
            filter: self.filter,
            prompt_set: self.prompt_set,
            normaliser: self.normaliser,
            weight: self.weight,
            lambda: self.lambda,
            configuration: self.configuration,
            ..Query::default()
        };
        Ok((query, self.image_id))
    }
}

/// The only one of `given`.
fn require_single_input(
    image_id_field: &str,
    given: [Option<QueryInput>; 5],
) -> Result<QueryInput, QueryError> {
    let given: Vec<QueryInput> = given.into_iter().flatten().collect();
    let names: Vec<&str> = given.iter().map(QueryInput::name).collect();
    let found = if names.is_empty() { "none".into() } else { names.join(" and ") };
    let one: Result<[QueryInput; 1], _> = given.try_into();
    one.map(|[one]| one).map_err(|_| QueryError::InvalidField {
        field: "text",
        reason: format!("exactly one of text, texts, {image_id_field}, image and vector says what to look for, and there is {found}"),
    })
}

fn decode_picture(base64: String) -> Result<QueryInput, QueryError> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64);
    bytes.map(QueryInput::ImageBytes).map_err(|e| QueryError::InvalidField {
        field: "image",
        reason: format!("is not base64: {e}"),
    })
}

/// What a user says of one result.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedbackRequest {
    /// The query, 1 to 1,000 characters.
    text: String,
    /// The image that was found.
    image_id: String,
    /// Whether it matches.
    verdict: FeedbackVerdict,
    /// Why, in the user's words, at most 1,000 characters.
    note: Option<String>,
    /// `configuration` of the answer.
    configuration: Option<String>,
}

impl FeedbackRequest {
    /// What is stored.
    pub fn try_into_feedback(self) -> Result<Feedback, QueryError> {
        let check_length = |field, text: &str| {
            let count = text.chars().count();
            let reason = format!("has {count} characters, more than {MAX_TEXT_CHARS}");
            if count > MAX_TEXT_CHARS {
                Err(QueryError::InvalidField { field, reason })
            } else {
                Ok(())
            }
        };
        check_length("text", &self.text)?;
        check_length("note", self.note.as_deref().unwrap_or_default())?;
        check_length("configuration", self.configuration.as_deref().unwrap_or_default())?;
        if self.text.trim().is_empty() {
            let reason = "is empty; say what was looked for".into();
            return Err(QueryError::InvalidField { field: "text", reason });
        }
        Ok(Feedback {
            received_at: Some(Utc::now()),
            text: self.text.trim().to_owned(),
            image_id: self.image_id,
            verdict: self.verdict,
            note: self.note.filter(|note| !note.trim().is_empty()),
            configuration: self.configuration,
            api_key_name: None,
        })
    }
}

/// The answer to a search: plain CLIP and balanced, from one scan.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SearchResponse {
    /// Version of the table.
    pub table_version: u64,
    /// Generation of the table.
    pub generation: String,
    /// Name of the configuration that made this answer.
    #[serde(default)]
    pub configuration: String,
    /// Statistics that were used.
    pub prompt_set: StatisticsKey,
    /// Formula that was used.
    pub normaliser: Normaliser,
    /// Weight of the balanced score.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// Images in the catalogue.
    pub scanned: usize,
    /// Images that were ranked: those that the filter lets through.
    pub matched: usize,
    /// How long it took.
    pub timings: Timings,
    /// Best by balanced score.
    pub hits: Vec<SearchHit>,
    /// Best by raw score.
    pub raw_hits: Vec<SearchHit>,
    /// Why the answer is not to be trusted; none where nothing speaks against it.
    pub warning: Option<String>,
    /// Whether the best hit is no better than what unrelated texts reach; none where nothing is
    /// calibrated for such a query, and on later pages.
    pub no_match: Option<NoMatchVerdict>,
    /// The balanced score that `hits` had to have.
    pub min_score: Option<f32>,
    /// To be sent as `cursor` for the next page; none after the last.
    pub next_cursor: Option<String>,
}

impl SearchResponse {
    /// The answer for `results`.
    pub fn new(results: &SearchResults) -> Self {
        Self {
            table_version: results.table_version,
            generation: results.serving_snapshot.generation_id.clone(),
            configuration: results.configuration.clone(),
            prompt_set: results.prompt_set.statistics_key.clone(),
            normaliser: results.balance.normaliser,
            weight: results.balance.weight,
            lambda: results.balance.lambda,
            scanned: results.scanned,
            matched: results.matched,
            timings: results.timings,
            hits: results.hits.iter().map(SearchHit::new).collect(),
            raw_hits: results.raw_hits.iter().map(SearchHit::new).collect(),
            warning: results.warning.clone(),
            no_match: results.no_match.clone(),
            min_score: results.min_score,
            next_cursor: results.next_cursor.clone(),
        }
    }
}

/// One image and its scores.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SearchHit {
    /// The image.
    #[serde(flatten)]
    pub image: ImageInfo,
    /// Cosine of query and image: plain CLIP.
    pub raw_score: f32,
    /// Place in the ranking of plain CLIP, from 1.
    pub raw_rank: usize,
    /// Balanced score: alpha · `raw_score` + beta.
    pub score: f32,
    /// Place in the balanced ranking, from 1.
    pub rank: usize,
    /// The image's own factor.
    pub alpha: f32,
    /// The image's own shift.
    pub beta: f32,
}

impl SearchHit {
    fn new(hit: &Hit) -> Self {
        Self {
            image: ImageInfo::new(&hit.image),
            raw_score: hit.raw_score,
            raw_rank: hit.raw_rank,
            score: hit.score,
            rank: hit.rank,
            alpha: hit.affine.alpha,
            beta: hit.affine.beta,
        }
    }
}

/// What is known of one live image.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ImageInfo {
    /// The catalogue's name of it.
    pub image_id: String,
    /// Where it was fetched from; none where its bytes came in the event.
    pub uri: Option<String>,
    /// Path of its picture on this server.
    pub picture: Option<String>,
    /// Declared attributes.
    pub attributes: BTreeMap<String, String>,
    /// Its version.
    pub sequence: String,
    /// When the change happened, where known.
    pub event_time: Option<DateTime<Utc>>,
    /// When it was embedded.
    pub embedded_at: DateTime<Utc>,
    /// SHA-256 of its bytes.
    pub content_hash: String,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl ImageInfo {
    /// The answer for a live image.
    pub fn new(entry: &ImageMetadata) -> Self {
        Self {
            image_id: entry.image_id.to_string(),
            uri: entry.uri.clone(),
            picture: picture_path(entry),
            attributes: entry.attributes.clone(),
            sequence: entry.version.sequence.as_str().to_owned(),
            event_time: entry.event_time,
            embedded_at: entry.embedded_at,
            content_hash: entry.content_hash.clone(),
            width: entry.width,
            height: entry.height,
        }
    }
}

/// Where the picture is shown. The hash makes the address change when the picture does, so that
/// browsers may keep it.
fn picture_path(entry: &ImageMetadata) -> Option<String> {
    entry.uri.as_ref()?;
    let mut id = url::Url::parse("path:///").ok()?;
    id.path_segments_mut().ok()?.push(entry.image_id.as_str());
    let hash = entry.content_hash.get(..12).unwrap_or_default();
    Some(format!("/v1/images{}/picture?v={hash}", id.path()))
}

/// Why an image ranks where it does.
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
            scanned: explanation.scanned,
            explanation: explanation.summary,
            generation: explanation.serving_snapshot.generation_id.clone(),
            configuration: explanation.configuration,
            prompt_set: explanation.prompt_set.statistics_key.clone(),
            normaliser: explanation.balance.normaliser,
            weight: explanation.balance.weight,
        }
    }
}

/// A change of the catalogue, for the feed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChangeEvent {
    image_id: String,
    operation: &'static str,
    /// Whether the image was not there before.
    is_new: bool,
    picture: Option<String>,
    title: Option<String>,
    /// When the change happened, where its event said so; none of a deleted image.
    event_time: Option<DateTime<Utc>>,
    table_version: u64,
    searchable_at: String,
}

impl From<&SnapshotChange> for ChangeEvent {
    fn from(change: &SnapshotChange) -> Self {
        let entry = change.after.as_deref();
        // A deleted image is still called by its title.
        let named = entry.or(change.before.as_deref());
        let title = named.and_then(|e| e.attributes.get("title").cloned());
        Self {
            image_id: change.image_id.to_string(),
            operation: if entry.is_some() { "upsert" } else { "delete" },
            is_new: change.before.is_none(),
            picture: entry.and_then(picture_path),
            title,
            event_time: entry.and_then(|e| e.event_time),
            table_version: change.table_version,
            searchable_at: Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
        }
    }
}
