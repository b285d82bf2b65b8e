//! What is asked, and why it may not be answered.

pub(crate) mod embed;
pub(crate) mod filter;

use std::borrow::Cow;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsKey;
use crate::clip::ClipError;
use crate::record::hex;
use filter::Filter;

/// Most texts of a mixture.
pub const MAX_TEXTS: usize = 16;

/// What is asked. Whatever is not said is answered as the catalogue's state says.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// What is looked for.
    pub input: Input,
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
    pub trace: Option<(String, String)>,
    /// Name of the API key that asks, for the log.
    pub by: Option<String>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    pub configuration: Option<String>,
    /// What the caller is told apart by, for the candidate's share: the same key is always answered
    /// by the same configuration.
    pub key: Option<String>,
}

/// What is looked for.
#[derive(Debug, Clone)]
pub enum Input {
    /// What a text describes.
    Text(String),
    /// What several texts describe together: the sum of their unit embeddings, each times its weight.
    Texts(Vec<WeightedText>),
    /// What is like an image of the catalogue.
    Image(String),
    /// What is like a picture: the bytes of its file.
    Picture(Vec<u8>),
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
    #[serde(default = "one")]
    pub weight: f32,
}

fn one() -> f32 {
    1.0
}

/// Hits below it are left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number or \"calibrated\"")]
pub enum MinScore {
    /// A balanced score.
    Score(f32),
    /// The one that is calibrated for the configuration that answers.
    Calibrated(CalibratedScore),
}

/// A threshold that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CalibratedScore {
    /// From the catalogue's state.
    Calibrated,
}

/// A question that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// Why, and what would be right.
        reason: String,
    },
    /// The snapshot is not whole yet.
    #[error("the catalogue is still being loaded; try again in a moment")]
    NotReady,
    /// How queries are answered names a prompt set that is not there: no other one stands in for it.
    #[error(
        "prompt set {0} is served, but not among the catalogue's as this model computes them; store it anew (bsap reindex statistics), then serve that (bsap candidate set, bsap promote)"
    )]
    SetMissing(StatisticsKey),
    /// No live image has this id.
    #[error("image {0:?} is not in the catalogue")]
    NoImage(String),
    /// The version of the catalogue that a cursor belongs to is not held any more.
    #[error(
        "cursor: table version {version} is not held here any more (search.cursor_seconds, search.cursor_mib), or never was; ask again without a cursor"
    )]
    CursorExpired {
        /// Of the table.
        version: u64,
    },
    /// As many queries wait as may.
    #[error("{0} queries wait already (search.waiting)")]
    Busy(usize),
    /// The caller left, or the engine stops.
    #[error("the query was given up")]
    GivenUp,
    /// A tower failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

impl QueryError {
    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

/// How long the parts of an answer took, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Embedding the query, or finding it among those that are remembered.
    pub text_ms: f64,
    /// Waiting for a pass over the catalogue that other queries share.
    pub wait_ms: f64,
    /// That pass.
    pub scan_ms: f64,
    /// From its bounds to exact scores and places.
    pub rank_ms: f64,
}

impl Query {
    /// The same question to the one configuration that a candidate's generation has.
    pub(crate) fn as_live(&self) -> Self {
        Self { configuration: None, key: None, ..self.clone() }
    }

    /// Whether it says itself how it is to be answered, and so belongs to no share.
    pub(crate) fn is_own(&self) -> bool {
        self.prompt_set.is_some()
            || self.normaliser.is_some()
            || self.weight.is_some()
            || self.lambda.is_some()
    }
}

impl Default for Input {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl From<&str> for Input {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Input {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Input {
    /// Its name in requests and in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Texts(_) => "texts",
            Self::Image(_) => "image_id",
            Self::Picture(_) => "image",
            Self::Vector(_) => "vector",
        }
    }

    /// Whether it is a picture: auxiliary prompts are texts, and what they say of an image's scores
    /// with texts does not hold for its scores with pictures.
    pub fn is_picture(&self) -> bool {
        matches!(self, Self::Image(_) | Self::Picture(_))
    }

    /// What people and logs recognise it by: its text, the id, or a hash.
    pub fn described(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) => text.into(),
            Self::Texts(texts) => {
                let one = |t: &WeightedText| format!("{} × {}", t.weight, t.text);
                texts.iter().map(one).collect::<Vec<_>>().join(" + ").into()
            }
            Self::Image(id) => format!("image {id}").into(),
            Self::Picture(bytes) => format!("picture {}", hex(&Sha256::digest(bytes))).into(),
            Self::Vector(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                format!("vector {}", hex(&Sha256::digest(bytes))).into()
            }
        }
    }

    /// Its texts.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::Texts(texts) => texts.iter().map(|t| t.text.as_str()).collect(),
            Self::Image(_) | Self::Picture(_) | Self::Vector(_) => Vec::new(),
        }
    }
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
