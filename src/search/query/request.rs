//! A query: its input and the settings that it may override.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::filter::Filter;
use crate::balance::normalise::Normaliser;
use crate::record::to_hex;

/// Maximum number of weighted texts in a query.
pub const MAX_WEIGHTED_TEXTS: usize = 16;

/// A search query. Fields that are `None` take their value from the configuration that answers.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// What to look for.
    pub input: QueryInput,
    /// Number of results.
    pub k: Option<usize>,
    /// Key, name or name@version of a prompt set; a name alone means its newest version.
    pub prompt_set: Option<String>,
    /// Formula that balances raw scores.
    pub normaliser: Option<Normaliser>,
    /// Weight of the normalised score in the balanced score, 0 to 1.
    pub weight: Option<f32>,
    /// λ of the normaliser `nnn`, 0 to 10.
    pub lambda: Option<f32>,
    /// Condition that images must fulfil; `None` allows all images.
    pub filter: Option<Filter>,
    /// Smallest balanced score of a hit.
    pub min_score: Option<MinScore>,
    /// Cursor of an earlier answer, which this page continues.
    pub cursor: Option<String>,
    /// Whether the image of [`QueryInput::ImageId`] may be among the hits.
    pub include_self: bool,
    /// Ids of the trace and of the span that the query belongs to, for the log.
    pub trace_and_span_id: Option<(String, String)>,
    /// Name of the API key of the caller, for the log.
    pub api_key_name: Option<String>,
    /// Configuration that must answer: `live`, `candidate`, or the name of one of them.
    pub requested_configuration: Option<String>,
    /// Identifies the caller for the candidate's share of the traffic: the same key is always
    /// answered by the same configuration.
    pub traffic_key: Option<String>,
}

/// What to look for.
#[derive(Debug, Clone)]
pub enum QueryInput {
    /// Images that match a text.
    Text(String),
    /// Images that match the sum of the unit embeddings of several texts, each times its weight.
    WeightedTexts(Vec<WeightedText>),
    /// Images similar to an image of the catalogue, given by id.
    ImageId(String),
    /// Images similar to a picture, given by the bytes of its file.
    ImageBytes(Vec<u8>),
    /// Images near an embedding of the same model; it need not have length 1.
    Vector(Vec<f32>),
}

/// A text of a weighted sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightedText {
    /// Text that is embedded.
    pub text: String,
    /// Weight of the text, -100 to 100. A negative weight moves away from what the text describes.
    #[serde(default = "default_text_weight")]
    pub weight: f32,
}

fn default_text_weight() -> f32 {
    1.0
}

/// Hits with a lower balanced score are left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number or \"calibrated\"")]
pub enum MinScore {
    /// A balanced score.
    Score(f32),
    /// The threshold that is calibrated for the configuration that answers.
    Calibrated(CalibratedThreshold),
}

/// A threshold that was measured by an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CalibratedThreshold {
    /// The calibrated minimum score in the catalogue's state.
    Calibrated,
}

impl Query {
    /// Returns the same query for the engine of another generation, which has only one configuration.
    pub(crate) fn without_routing(&self) -> Self {
        Self { requested_configuration: None, traffic_key: None, ..self.clone() }
    }

    /// Returns whether the query sets its own prompt set, normaliser, weight or λ. Such a query is not
    /// part of the candidate's share.
    pub(crate) fn has_overrides(&self) -> bool {
        self.prompt_set.is_some()
            || self.normaliser.is_some()
            || self.weight.is_some()
            || self.lambda.is_some()
    }
}

impl Default for QueryInput {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl From<&str> for QueryInput {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for QueryInput {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl QueryInput {
    /// Returns the name of this kind of input in requests and in the log.
    pub fn kind_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::WeightedTexts(_) => "texts",
            Self::ImageId(_) => "image_id",
            Self::ImageBytes(_) => "image",
            Self::Vector(_) => "vector",
        }
    }

    /// Returns whether the query is an image. Such a query is not balanced by default: auxiliary
    /// prompts are texts, and what they say about an image's scores for texts does not hold for its
    /// scores for images.
    pub fn is_image(&self) -> bool {
        matches!(self, Self::ImageId(_) | Self::ImageBytes(_))
    }

    /// Returns what identifies the input for people and in logs: the text, the id, or a hash.
    pub fn description(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) => text.into(),
            Self::WeightedTexts(texts) => {
                let describe = |t: &WeightedText| format!("{} × {}", t.weight, t.text);
                texts.iter().map(describe).collect::<Vec<_>>().join(" + ").into()
            }
            Self::ImageId(id) => format!("image {id}").into(),
            Self::ImageBytes(bytes) => format!("picture {}", to_hex(&Sha256::digest(bytes))).into(),
            Self::Vector(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                format!("vector {}", to_hex(&Sha256::digest(bytes))).into()
            }
        }
    }

    /// Returns the texts of the input, in order; none for other kinds of input.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::WeightedTexts(texts) => texts.iter().map(|t| t.text.as_str()).collect(),
            Self::ImageId(_) | Self::ImageBytes(_) | Self::Vector(_) => Vec::new(),
        }
    }
}
