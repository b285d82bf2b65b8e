//! A query and what it looks for.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::filter::Filter;
use crate::balance::normalise::Normaliser;
use crate::record::to_hex;

/// Most texts of a mixture.
pub const MAX_WEIGHTED_TEXTS: usize = 16;

/// What is asked. Whatever is not said is answered as the catalogue's state says.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// What is looked for.
    pub input: QueryInput,
    /// How many results.
    pub k: Option<usize>,
    /// Key, name or name@version of a prompt set; the newest version of a name.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// Which images may be found; none: all.
    pub filter: Option<Filter>,
    /// Balanced score that a hit must have.
    pub min_score: Option<MinScore>,
    /// Where an earlier answer ended, as it said.
    pub cursor: Option<String>,
    /// Whether the image of [`Input::Image`] may be a hit of itself.
    pub include_self: bool,
    /// Ids of the trace and of the span that the question belongs to, for the log.
    pub trace_ids: Option<(String, String)>,
    /// Name of the API key that asks, for the log.
    pub api_key_name: Option<String>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    pub configuration: Option<String>,
    /// What the caller is told apart by, for the candidate's share: the same key is always answered
    /// by the same configuration.
    pub traffic_key: Option<String>,
}

/// What is looked for.
#[derive(Debug, Clone)]
pub enum QueryInput {
    /// What a text describes.
    Text(String),
    /// What several texts describe together: the sum of their unit embeddings, each times its weight.
    WeightedTexts(Vec<WeightedText>),
    /// What is like an image of the catalogue.
    ImageId(String),
    /// What is like a picture: the bytes of its file.
    ImageBytes(Vec<u8>),
    /// What is near an embedding of the same model, of any length.
    Vector(Vec<f32>),
}

/// A text of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightedText {
    /// The text.
    pub text: String,
    /// How much it counts, -100 to 100; below 0 it is to be avoided.
    #[serde(default = "default_text_weight")]
    pub weight: f32,
}

fn default_text_weight() -> f32 {
    1.0
}

/// Hits below it are left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number or \"calibrated\"")]
pub enum MinScore {
    /// A balanced score.
    Score(f32),
    /// The one that is calibrated for the configuration that answers.
    Calibrated(CalibratedThreshold),
}

/// A threshold that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CalibratedThreshold {
    /// From the catalogue's state.
    Calibrated,
}

impl Query {
    /// The same question to the one configuration that a candidate's generation has.
    pub(crate) fn without_routing(&self) -> Self {
        Self { configuration: None, traffic_key: None, ..self.clone() }
    }

    /// Whether it says itself how it is to be answered, and so belongs to no share.
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
    /// Its name in requests and in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::WeightedTexts(_) => "texts",
            Self::ImageId(_) => "image_id",
            Self::ImageBytes(_) => "image",
            Self::Vector(_) => "vector",
        }
    }

    /// Whether it is a picture: auxiliary prompts are texts, and what they say of an image's scores
    /// with texts does not hold for its scores with pictures.
    pub fn is_image(&self) -> bool {
        matches!(self, Self::ImageId(_) | Self::ImageBytes(_))
    }

    /// What people and logs recognise it by: its text, the id, or a hash.
    pub fn description(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) => text.into(),
            Self::WeightedTexts(texts) => {
                let one = |t: &WeightedText| format!("{} × {}", t.weight, t.text);
                texts.iter().map(one).collect::<Vec<_>>().join(" + ").into()
            }
            Self::ImageId(id) => format!("image {id}").into(),
            Self::ImageBytes(bytes) => format!("picture {}", to_hex(&Sha256::digest(bytes))).into(),
            Self::Vector(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                format!("vector {}", to_hex(&Sha256::digest(bytes))).into()
            }
        }
    }

    /// Its texts.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::WeightedTexts(texts) => texts.iter().map(|t| t.text.as_str()).collect(),
            Self::ImageId(_) | Self::ImageBytes(_) | Self::Vector(_) => Vec::new(),
        }
    }
}
