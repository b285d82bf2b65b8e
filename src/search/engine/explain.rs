//! Why an image ranks where it does.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;

use crate::balance::normalise::{Affine, Balance};
use crate::balance::statistics::Statistics;
use crate::prompts::EmbeddedSet;
use crate::search::query::Input;
use crate::search::scan::rank::Hit;
use crate::search::snapshot::Served;

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
    pub statistics: Option<Statistics>,
    /// All prompts with its scores, strongest first.
    pub prompts: Vec<ScoredPrompt>,
    /// Images scanned.
    pub scanned: usize,
    /// Normaliser, weight and constants that were used.
    pub balance: Balance,
    /// Prompt set that was used.
    pub set: Arc<EmbeddedSet>,
    /// What was served when it was explained.
    pub served: Arc<Served>,
    /// Name of the configuration that is explained, one of `served`.
    pub configuration: String,
    /// In plain words.
    pub sentence: String,
}

/// Whether the balance leaves the score as it is.
fn balance_is_raw(hit: &Hit) -> bool {
    hit.affine == Affine { alpha: 1.0, beta: 0.0 }
}

/// The explanation in plain words.
pub fn sentence(
    input: &Input,
    hit: &Hit,
    statistics: Option<&Statistics>,
    prompts: &[ScoredPrompt],
    ranked: usize,
) -> String {
    let Some(s) = statistics else {
        return "This image has no statistics for the prompt set, so its raw score counts as it is.".into();
    };
    if input.is_picture() && balance_is_raw(hit) {
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
