//! The bodies of requests.

use chrono::Utc;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::balance::normalise::Normaliser;
use crate::ingest::decode::decode_image_text;
use crate::search::{Filter, MinScore, Query, QueryError, QueryInput, WeightedText};
use crate::serve::feedback::{Feedback, FeedbackVerdict, MAX_TEXT_CHARS};

/// Maximum of `limit` of a list of the newest images.
pub const MAX_NEWEST_IMAGES: usize = 100;

/// The parameters of a list of the newest images.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewestImagesRequest {
    limit: usize,
}

impl NewestImagesRequest {
    /// Returns the maximum number of images.
    pub fn limit(&self) -> Result<usize, QueryError> {
        if (1..=MAX_NEWEST_IMAGES).contains(&self.limit) {
            return Ok(self.limit);
        }
        let reason = format!("{} is not between 1 and {MAX_NEWEST_IMAGES}", self.limit);
        Err(QueryError::invalid_field("limit", reason))
    }
}

/// A search. Exactly one of `text`, `texts`, `image_id`, `image` and `vector` says what to search
/// for. Settings that are missing have the values of the configuration that answers.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SearchRequest {
    /// Search for images that match a text.
    text: Option<String>,
    /// Search for images that match several texts together.
    texts: Option<Vec<WeightedText>>,
    /// Search for images that are similar to this image of the catalogue.
    image_id: Option<String>,
    /// Search for images that are similar to this picture: the bytes of its file in base64, or a
    /// `data:` address.
    image: Option<String>,
    /// Search for images whose embeddings are close to this embedding of the same model; its length
    /// (norm) does not matter.
    vector: Option<Vec<f32>>,
    /// Maximum number of hits.
    k: Option<usize>,
    /// Only images that pass this filter are ranked.
    filter: Option<Filter>,
    /// Minimum balanced score of a hit: a number, or `calibrated`.
    min_score: Option<MinScore>,
    /// `next_cursor` of the response to the same search: requests its next page.
    cursor: Option<String>,
    /// Whether the image `image_id` may be a hit itself.
    #[serde(default)]
    include_self: bool,
    prompt_set: Option<String>,
    normaliser: Option<Normaliser>,
    weight: Option<f32>,
    lambda: Option<f32>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    configuration: Option<String>,
    /// Identifies the caller for the candidate's share of the traffic: requests with the same key
    /// are answered by the same configuration. It is hashed, not stored.
    traffic_key: Option<String>,
}

impl TryFrom<SearchRequest> for Query {
    type Error = QueryError;

    fn try_from(request: SearchRequest) -> Result<Self, QueryError> {
        let SearchRequest { text, texts, image_id, image, vector, .. } = request;
        Ok(Self {
            input: QueryFields { text, texts, image_id, image, vector }.into_input("image_id")?,
            k: request.k,
            prompt_set: request.prompt_set,
            normaliser: request.normaliser,
            weight: request.weight,
            lambda: request.lambda,
            filter: request.filter,
            min_score: request.min_score,
            cursor: request.cursor,
            include_self: request.include_self,
            trace_and_span_id: None,
            api_key_name: None,
            requested_configuration: request.configuration,
            traffic_key: request.traffic_key,
        })
    }
}

/// Asks why an image has its rank. Exactly one of `text`, `texts`, `query_image_id`, `image` and
/// `vector` is the query. Settings that are missing have the values of the configuration that
/// answers.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// The image whose rank is explained.
    image_id: String,
    /// As in a search.
    text: Option<String>,
    /// As in a search.
    texts: Option<Vec<WeightedText>>,
    /// `image_id` of a search.
    query_image_id: Option<String>,
    /// As in a search.
    image: Option<String>,
    /// As in a search.
    vector: Option<Vec<f32>>,
    /// Only images that pass this filter are ranked.
    filter: Option<Filter>,
    prompt_set: Option<String>,
    normaliser: Option<Normaliser>,
    weight: Option<f32>,
    lambda: Option<f32>,
    /// Which configuration is explained: `live`, `candidate`, or the name of one of them.
    configuration: Option<String>,
}

impl ExplainRequest {
    /// Returns the query and the id of the image to explain.
    pub fn into_query_and_image_id(self) -> Result<(Query, String), QueryError> {
        let Self { text, texts, query_image_id, image, vector, .. } = self;
        let query = Query {
            input: QueryFields { text, texts, image_id: query_image_id, image, vector }
                .into_input("query_image_id")?,
            filter: self.filter,
            prompt_set: self.prompt_set,
            normaliser: self.normaliser,
            weight: self.weight,
            lambda: self.lambda,
            requested_configuration: self.configuration,
            ..Query::default()
        };
        Ok((query, self.image_id))
    }
}

/// The fields of a request of which exactly one is the query.
pub(super) struct QueryFields {
    pub text: Option<String>,
    pub texts: Option<Vec<WeightedText>>,
    pub image_id: Option<String>,
    pub image: Option<String>,
    pub vector: Option<Vec<f32>>,
}

impl QueryFields {
    /// Returns the only input; an error if there are several, or none. `image_id_field` is the name that the request
    /// has for `image_id`.
    pub fn into_input(self, image_id_field: &str) -> Result<QueryInput, QueryError> {
        let inputs = [
            self.text.map(QueryInput::Text),
            self.texts.map(QueryInput::WeightedTexts),
            self.image_id.map(QueryInput::ImageId),
            self.image.as_deref().map(decode_picture).transpose()?,
            self.vector.map(QueryInput::Vector),
        ];
        let inputs: Vec<QueryInput> = inputs.into_iter().flatten().collect();
        let names: Vec<&str> = inputs.iter().map(QueryInput::kind_name).collect();
        let found = if names.is_empty() { "none".into() } else { names.join(" and ") };
        let single: Result<[QueryInput; 1], _> = inputs.try_into();
        single.map(|[input]| input).map_err(|_| QueryError::InvalidField {
            field: "text",
            reason: format!("exactly one of text, texts, {image_id_field}, image and vector says what to look for, and there is {found}"),
        })
    }
}

fn decode_picture(text: &str) -> Result<QueryInput, QueryError> {
    decode_image_text(text)
        .map(QueryInput::ImageBytes)
        .map_err(|reason| QueryError::invalid_field("image", reason))
}

/// A user's verdict on one result.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedbackRequest {
    /// The text that was searched for, 1 to 1,000 characters.
    text: String,
    /// The image of the result.
    image_id: String,
    /// Whether the image matches the text.
    verdict: FeedbackVerdict,
    /// The user's reason, at most 1,000 characters.
    note: Option<String>,
    /// `configuration` of the response that had the result.
    configuration: Option<String>,
}

impl FeedbackRequest {
    /// Validates the texts and returns the feedback to store, without the name of the API key.
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
