//! Thresholds below which a hit is not to be trusted, and what they were measured on. Pure.
//!
//! They hold for one configuration (generation, prompt set, normaliser, weight, scale) and are stored
//! with it, so that they change when it does.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::statistics::Statistics;

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
    /// What was usual then; none where whole rankings were not looked at.
    #[serde(default)]
    pub usual: Option<Usual>,
}

/// How a configuration answered when it was calibrated: what a query worker compares with what it
/// sees now.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Usual {
    /// Different queries that this was measured on.
    pub queries: usize,
    /// The images' statistics by the served prompt set; none for plain CLIP.
    pub statistics: Option<Moments>,
    /// How the queries were answered.
    #[serde(flatten)]
    pub answers: Habits,
}

/// How different queries are answered by a configuration beside plain CLIP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Habits {
    /// Share of the queries whose first hit is not that of plain CLIP.
    pub first_moved: f64,
    /// Share of the queries that nothing matches; none without a rule.
    pub no_match: Option<f64>,
    /// Skewness of how often an image is first: 0 is even, far above 0 means that few images crowd
    /// out the others. It depends on how many queries are looked at.
    pub hubness: f64,
    /// The same by plain CLIP, over the same queries.
    pub hubness_raw: f64,
}

impl Habits {
    /// Of queries, each with the first hit, that of plain CLIP, and whether nothing matches where
    /// that is known; `images` are in the catalogue. `None` where there are no queries or no images.
    pub fn of<I: Eq + Hash>(
        queries: impl Iterator<Item = (I, I, Option<bool>)>,
        images: usize,
    ) -> Option<Self> {
        let (mut first, mut first_raw) = (HashMap::new(), HashMap::new());
        let (mut all, mut moved, mut judged, mut nothing) = (0u64, 0u64, 0u64, 0u64);
        for (hit, raw, no_match) in queries {
            all += 1;
            moved += u64::from(hit != raw);
            judged += u64::from(no_match.is_some());
            nothing += u64::from(no_match == Some(true));
            *first.entry(hit).or_default() += 1;
            *first_raw.entry(raw).or_default() += 1;
        }
        (all > 0 && images > 0).then(|| Self {
            first_moved: moved as f64 / all as f64,
            no_match: (judged > 0).then(|| nothing as f64 / judged as f64),
            hubness: skewness(first.into_values(), images),
            hubness_raw: skewness(first_raw.into_values(), images),
        })
    }

    /// Hubness over that of plain CLIP, which does not depend on how many queries are looked at;
    /// none where plain CLIP's is 0 or less.
    pub fn hubness_ratio(&self) -> Option<f64> {
        (self.hubness_raw > 0.0).then(|| self.hubness / self.hubness_raw)
    }
}

/// Skewness of `counts` of images among `images`, those that are not counted being 0 (Radovanović et
/// al., JMLR 2010).
pub fn skewness(counts: impl Iterator<Item = u32>, images: usize) -> f64 {
    let counts: Vec<f64> = counts.map(f64::from).collect();
    let images = images.max(counts.len()).max(1) as f64;
    let mean = counts.iter().sum::<f64>() / images;
    let moment = |power: i32| {
        let found: f64 = counts.iter().map(|n| (n - mean).powi(power)).sum();
        (found + (images - counts.len() as f64) * (-mean).powi(power)) / images
    };
    let deviation = moment(2).sqrt();
    if deviation > 0.0 { moment(3) / deviation.powi(3) } else { 0.0 }
}

/// The statistics of all images, summed up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Moments {
    /// How many images.
    pub images: usize,
    /// Mean of the images' mean auxiliary scores.
    pub mean: f64,
    /// Population standard deviation of the images' mean auxiliary scores.
    pub spread: f64,
    /// Mean of the standard deviations of the images' auxiliary scores.
    pub std: f64,
}

impl Moments {
    /// Over the images that have statistics; `None` where none has.
    pub fn of(all: impl Iterator<Item = Statistics>) -> Option<Self> {
        let (mut images, mut sum, mut squares, mut std) = (0usize, 0f64, 0f64, 0f64);
        for statistics in all.filter(|s| s.n > 0) {
            let mean = f64::from(statistics.mean);
            images += 1;
            sum += mean;
            squares += mean * mean;
            std += f64::from(statistics.std);
        }
        let n = images as f64;
        (images > 0).then(|| Self {
            images,
            mean: sum / n,
            spread: (squares / n - (sum / n).powi(2)).max(0.0).sqrt(),
            std: std / n,
        })
    }

    /// How far the mean has moved since `then`, in the spread that it had; none where that was 0.
    pub fn drift(&self, then: &Self) -> Option<f64> {
        (then.spread > 0.0).then(|| (self.mean - then.mean) / then.spread)
    }
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
    fn habits_and_moments_are_those_of_the_formulas() {
        // Image 1 is first of three queries, 2 of one; 3 and 4 of none.
        let queries = [(1, 1, None), (1, 2, Some(true)), (1, 3, Some(false)), (2, 4, None)];
        let habits = Habits::of(queries.into_iter(), 4).unwrap();
        assert_eq!((habits.first_moved, habits.no_match), (0.75, Some(0.5)));
        // scipy.stats.skew([3, 1, 0, 0]); plain CLIP is even.
        assert!((habits.hubness - 0.816_496_58).abs() < 1e-6, "{habits:?}");
        assert_eq!((habits.hubness_raw, habits.hubness_ratio()), (0.0, None));
        assert_eq!(Habits::of([(1, 1, None); 0].into_iter(), 4), None);

        let statistics = |mean, std, n| Statistics {
            n,
            mean,
            std,
            min: 0.0,
            max: 1.0,
            lse: 0.0,
            topk_mean: 0.0,
        };
        let then = [statistics(0.1, 0.02, 5), statistics(0.3, 0.04, 5), statistics(9.0, 9.0, 0)];
        let then = Moments::of(then.into_iter()).unwrap();
        assert_eq!(then.images, 2);
        for (found, wanted) in [(then.mean, 0.2), (then.spread, 0.1), (then.std, 0.03)] {
            assert!((found - wanted).abs() < 1e-7, "{then:?}");
        }
        let now = Moments::of([statistics(0.35, 0.03, 5)].into_iter()).unwrap();
        assert!((now.drift(&then).unwrap() - 1.5).abs() < 1e-6);
        assert_eq!(then.drift(&now), None, "one image has no spread");
    }

    #[test]
    fn a_calibration_of_before_still_reads() {
        let old =
            r#"{"min_score":null,"no_match":null,"at":"2026-01-01T00:00:00Z","evaluation":"e"}"#;
        assert_eq!(serde_json::from_str::<Calibration>(old).unwrap().usual, None);
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
