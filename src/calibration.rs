//! Thresholds below which a hit is not to be trusted, and what they were measured on. Pure.
//!
//! They hold for one configuration (generation, prompt set, normaliser, weight, scale) and are stored
//! with it, so that they change when it does.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Thresholds of one configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Calibration {
    /// Hits with a lower balanced score are more often wrong than was asked for; none where no
    /// threshold reaches it.
    pub min_score: Option<f32>,
    /// When a best hit says that nothing matches.
    pub no_match: Option<NoMatch>,
    /// When this was measured.
    pub at: DateTime<Utc>,
    /// Fingerprint of the evaluation's report.
    pub evaluation: String,
}

/// The best hit of a query is not distinguishable from what unrelated texts reach where `signal` is
/// less than `below`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatch {
    /// What is compared.
    pub signal: Signal,
    /// The threshold.
    pub below: f32,
}

/// What is compared of the best hit of a query.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// Its balanced score.
    Score,
    /// How many standard deviations its balanced score stands above the mean of all images'.
    Standout,
    /// `standout` · (1 + known)/2, where known is the share of the query's words that stand in the
    /// prompts of the served set: words that the catalogue's own texts do not use need a best hit
    /// that stands out up to twice as far. A text tower puts gibberish somewhere among the real
    /// texts, so that scores alone cannot tell it.
    Evidence,
}

impl Signal {
    /// All, simplest first.
    pub const ALL: [Self; 3] = [Self::Score, Self::Standout, Self::Evidence];

    /// As it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::Standout => "standout",
            Self::Evidence => "evidence",
        }
    }

    /// Its value for a query's best hit.
    pub fn of(self, hit: BestHit) -> f32 {
        let BestHit { score, background, known } = hit;
        let standout = (score - background.mean) / background.std.max(f32::MIN_POSITIVE);
        match self {
            Self::Score => score,
            Self::Standout => standout,
            Self::Evidence => standout * f32::midpoint(1.0, known),
        }
    }
}

/// What signals are made of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BestHit {
    /// Balanced score of the best hit.
    pub score: f32,
    /// Balanced scores of all images.
    pub background: Background,
    /// Share of the query's words that the catalogue knows ([`Vocabulary::known`]).
    pub known: f32,
}

/// Moments of the balanced scores of one query over all scanned images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Background {
    /// Mean.
    pub mean: f32,
    /// Population standard deviation.
    pub std: f32,
}

impl NoMatch {
    /// Whether nothing matches, by the best hit.
    pub fn holds(&self, hit: BestHit) -> bool {
        self.signal.of(hit) < self.below
    }
}

/// The words of a catalogue's own texts: those of the served prompt set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary(HashSet<String>);

impl Vocabulary {
    /// The words of these texts.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self(texts.into_iter().flat_map(words).collect())
    }

    /// Share of the words of `text` that are known, 0 to 1; 0 where it has no word.
    pub fn known(&self, text: &str) -> f32 {
        let words = words(text);
        let known = words.iter().filter(|word| self.0.contains(*word)).count();
        known as f32 / words.len().max(1) as f32
    }
}

/// The words of a text in lower case, without the plural's s; in scripts that write no spaces between
/// words, each character.
fn words(text: &str) -> Vec<String> {
    let unspaced = |c: &char| matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}' | '\u{e00}'..='\u{e7f}');
    let lower = text.to_lowercase();
    let mut words: Vec<String> = lower.chars().filter(unspaced).map(String::from).collect();
    let joins = |c: char| c.is_alphanumeric() && !unspaced(&c) || c == '-' || c == '\'';
    for word in lower.split(|c| !joins(c)) {
        let word = word.trim_matches(['-', '\'']);
        let plural = word.chars().count() > 3 && word.ends_with('s') && !word.ends_with("ss");
        let word = if plural { &word[..word.len() - 1] } else { word };
        if !word.is_empty() {
            words.push(word.to_owned());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_decides_what_is_compared() {
        let background = Background { mean: 0.2, std: 0.02 };
        let hit = |score, known| BestHit { score, background, known };
        let rule = |signal, below| NoMatch { signal, below };
        let score = rule(Signal::Score, 0.25);
        let standout = rule(Signal::Standout, 3.0);
        let evidence = rule(Signal::Evidence, 3.0);
        assert!(score.holds(hit(0.24, 1.0)) && !score.holds(hit(0.26, 0.0)));
        assert!(standout.holds(hit(0.25, 1.0)) && !standout.holds(hit(0.27, 0.0)));
        assert!(evidence.holds(hit(0.31, 0.0)) && !evidence.holds(hit(0.33, 0.0)));
        assert!(!evidence.holds(hit(0.27, 1.0)), "all words known: as standout");
        let flat = Background { std: 0.0, ..background };
        assert!(!standout.holds(BestHit { background: flat, ..hit(0.27, 1.0) }));
    }

    #[test]
    fn words_are_known_whatever_their_number_or_case() {
        let known = Vocabulary::of(["a red striped mug", "a T-shirt", "赤い靴"]);
        assert_eq!(known.known("Two red MUGS"), 2.0 / 3.0);
        assert_eq!(known.known("striped t-shirts!"), 1.0);
        assert_eq!(known.known("qwv xlkjh"), 0.0);
        assert_eq!(known.known("靴"), 1.0);
        assert_eq!(known.known("?!"), 0.0);
        assert_eq!(Vocabulary::of(["a glass"]).known("glass"), 1.0);
    }
}
