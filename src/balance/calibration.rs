//! Thresholds below which a hit is not to be trusted, and what they were measured on. Pure.
//!
//! They hold for one configuration (generation, prompt set, normaliser, weight, scale) and are stored
//! with it, so that they change when it does.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::statistics::ScoreStatistics;

/// Thresholds of one configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Calibration {
    /// Hits with a lower balanced score are more often wrong than was asked for; none where no
    /// threshold reaches it.
    pub min_score: Option<f32>,
    /// When a best hit says that nothing matches.
    pub no_match: Option<NoMatchRule>,
    /// When this was measured.
    pub measured_at: DateTime<Utc>,
    /// Fingerprint of the evaluation's report.
    pub evaluation_fingerprint: String,
    /// What was usual then; none where whole rankings were not looked at.
    #[serde(default)]
    pub baseline: Option<Baseline>,
}

/// How a configuration answered when it was calibrated: what a query worker compares with what it
/// sees now.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Baseline {
    /// Different queries that this was measured on.
    pub queries: usize,
    /// The images' statistics by the served prompt set; none for plain CLIP.
    pub score_moments: Option<StatisticsSummary>,
    /// How the queries were answered.
    #[serde(flatten)]
    pub answers: AnswerStats,
}

/// How different queries are answered by a configuration beside plain CLIP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AnswerStats {
    /// Share of the queries whose first hit is not that of plain CLIP.
    pub top_hit_changed: f64,
    /// Share of the queries that nothing matches; none without a rule.
    pub no_match: Option<f64>,
    /// Skewness of how often an image is first: 0 is even, far above 0 means that few images crowd
    /// out the others. It depends on how many queries are looked at.
    pub hubness: f64,
    /// The same by plain CLIP, over the same queries.
    pub hubness_raw: f64,
}

impl AnswerStats {
    /// Of queries, each with the first hit, that of plain CLIP, and whether nothing matches where
    /// that is known; `images` are in the catalogue. `None` where there are no queries or no images.
    pub fn from_answers<I: Eq + Hash>(
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
            top_hit_changed: moved as f64 / all as f64,
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
pub struct StatisticsSummary {
    /// How many images.
    pub images: usize,
    /// Mean of the images' mean auxiliary scores.
    pub mean: f64,
    /// Population standard deviation of the images' mean auxiliary scores.
    pub std_of_means: f64,
    /// Mean of the standard deviations of the images' auxiliary scores.
    pub mean_of_stds: f64,
}

impl StatisticsSummary {
    /// Over the images that have statistics; `None` where none has.
    pub fn from_statistics(all: impl Iterator<Item = ScoreStatistics>) -> Option<Self> {
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
            std_of_means: (squares / n - (sum / n).powi(2)).max(0.0).sqrt(),
            mean_of_stds: std / n,
        })
    }

    /// How far the mean has moved since `then`, in the spread that it had; none where that was 0.
    pub fn drift_from(&self, baseline: &Self) -> Option<f64> {
        (baseline.std_of_means > 0.0).then(|| (self.mean - baseline.mean) / baseline.std_of_means)
    }
}

/// The best hit of a query is not distinguishable from what unrelated texts reach where `signal` is
/// less than `below`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatchRule {
    /// What is compared.
    pub signal: NoMatchSignal,
    /// The threshold.
    pub threshold: f32,
}

/// What is compared of the best hit of a query.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum NoMatchSignal {
    /// Its balanced score.
    Score,
    /// How many standard deviations its balanced score stands above the mean of all images'.
    ZScore,
    /// `standout` · (1 + known)/2, where known is the share of the query's words that stand in the
    /// prompts of the served set: words that the catalogue's own texts do not use need a best hit
    /// that stands out up to twice as far. A text tower puts gibberish somewhere among the real
    /// texts, so that scores alone cannot tell it.
    VocabularyZScore,
}

impl NoMatchSignal {
    /// All, simplest first.
    pub const ALL: [Self; 3] = [Self::Score, Self::ZScore, Self::VocabularyZScore];

    /// As it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::ZScore => "z_score",
            Self::VocabularyZScore => "vocabulary_z_score",
        }
    }

    /// Its value for a query's best hit.
    pub fn value(self, hit: BestHitFeatures) -> f32 {
        let BestHitFeatures { score, background, known_word_share: known } = hit;
        let standout = (score - background.mean) / background.std.max(f32::MIN_POSITIVE);
        match self {
            Self::Score => score,
            Self::ZScore => standout,
            Self::VocabularyZScore => standout * f32::midpoint(1.0, known),
        }
    }
}

/// What signals are made of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BestHitFeatures {
    /// Balanced score of the best hit.
    pub score: f32,
    /// Balanced scores of all images.
    pub background: ScoreDistribution,
    /// Share of the query's words that the catalogue knows ([`Vocabulary::known`]).
    pub known_word_share: f32,
}

/// Moments of the balanced scores of one query over all scanned images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ScoreDistribution {
    /// Mean.
    pub mean: f32,
    /// Population standard deviation.
    pub std: f32,
}

impl NoMatchRule {
    /// Whether nothing matches, by the best hit.
    pub fn is_no_match(&self, hit: BestHitFeatures) -> bool {
        self.signal.value(hit) < self.threshold
    }
}

/// The words of a catalogue's own texts: those of the served prompt set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary(HashSet<String>);

impl Vocabulary {
    /// The words of these texts.
    pub fn from_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self(texts.into_iter().flat_map(split_words).collect())
    }

    /// Share of the words of `text` that are known, 0 to 1; 0 where it has no word.
    pub fn known_word_share(&self, text: &str) -> f32 {
        let words = split_words(text);
        let known = words.iter().filter(|word| self.0.contains(*word)).count();
        known as f32 / words.len().max(1) as f32
    }
}

/// The words of a text in lower case, without the plural's s; in scripts that write no spaces between
/// words, each character.
fn split_words(text: &str) -> Vec<String> {
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
        let background = ScoreDistribution { mean: 0.2, std: 0.02 };
        let hit = |score, known| BestHitFeatures { score, background, known_word_share: known };
        let rule = |signal, below| NoMatchRule { signal, threshold: below };
        let score = rule(NoMatchSignal::Score, 0.25);
        let standout = rule(NoMatchSignal::ZScore, 3.0);
        let evidence = rule(NoMatchSignal::VocabularyZScore, 3.0);
        assert!(score.is_no_match(hit(0.24, 1.0)) && !score.is_no_match(hit(0.26, 0.0)));
        assert!(standout.is_no_match(hit(0.25, 1.0)) && !standout.is_no_match(hit(0.27, 0.0)));
        assert!(evidence.is_no_match(hit(0.31, 0.0)) && !evidence.is_no_match(hit(0.33, 0.0)));
        assert!(!evidence.is_no_match(hit(0.27, 1.0)), "all words known: as standout");
        let flat = ScoreDistribution { std: 0.0, ..background };
        assert!(!standout.is_no_match(BestHitFeatures { background: flat, ..hit(0.27, 1.0) }));
    }

    #[test]
    fn answer_stats_and_summary_match_the_formulas() {
        // Image 1 is first of three queries, 2 of one; 3 and 4 of none.
        let queries = [(1, 1, None), (1, 2, Some(true)), (1, 3, Some(false)), (2, 4, None)];
        let habits = AnswerStats::from_answers(queries.into_iter(), 4).unwrap();
        assert_eq!((habits.top_hit_changed, habits.no_match), (0.75, Some(0.5)));
        // scipy.stats.skew([3, 1, 0, 0]); plain CLIP is even.
        assert!((habits.hubness - 0.816_496_58).abs() < 1e-6, "{habits:?}");
        assert_eq!((habits.hubness_raw, habits.hubness_ratio()), (0.0, None));
        assert_eq!(AnswerStats::from_answers([(1, 1, None); 0].into_iter(), 4), None);

        let statistics = |mean, std, n| ScoreStatistics {
            n,
            mean,
            std,
            min: 0.0,
            max: 1.0,
            lse: 0.0,
            topk_mean: 0.0,
        };
        let then = [statistics(0.1, 0.02, 5), statistics(0.3, 0.04, 5), statistics(9.0, 9.0, 0)];
        let then = StatisticsSummary::from_statistics(then.into_iter()).unwrap();
        assert_eq!(then.images, 2);
        for (found, wanted) in
            [(then.mean, 0.2), (then.std_of_means, 0.1), (then.mean_of_stds, 0.03)]
        {
            assert!((found - wanted).abs() < 1e-7, "{then:?}");
        }
        let now =
            StatisticsSummary::from_statistics([statistics(0.35, 0.03, 5)].into_iter()).unwrap();
        assert!((now.drift_from(&then).unwrap() - 1.5).abs() < 1e-6);
        assert_eq!(then.drift_from(&now), None, "one image has no spread");
    }

    #[test]
    fn a_calibration_without_baseline_is_still_readable() {
        let old =
            r#"{"min_score":null,"no_match":null,"at":"2026-01-01T00:00:00Z","evaluation":"e"}"#;
        assert_eq!(serde_json::from_str::<Calibration>(old).unwrap().baseline, None);
    }

    #[test]
    fn words_are_known_whatever_their_number_or_case() {
        let known = Vocabulary::from_texts(["a red striped mug", "a T-shirt", "赤い靴"]);
        assert_eq!(known.known_word_share("Two red MUGS"), 2.0 / 3.0);
        assert_eq!(known.known_word_share("striped t-shirts!"), 1.0);
        assert_eq!(known.known_word_share("qwv xlkjh"), 0.0);
        assert_eq!(known.known_word_share("靴"), 1.0);
        assert_eq!(known.known_word_share("?!"), 0.0);
        assert_eq!(Vocabulary::from_texts(["a glass"]).known_word_share("glass"), 1.0);
    }
}
