//! Thresholds below which a hit is not trustworthy, and the baseline measured together with them.
//!
//! They are valid for one configuration (generation, prompt set, normaliser, weight, scale) and are
//! stored with it, so that they are replaced together with it.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::statistics::ScoreStatistics;

/// Thresholds of one configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Calibration {
    /// Smallest balanced score of hits that meet the target false-hit rate of the evaluation. `None` if
    /// no threshold meets it.
    pub min_score: Option<f32>,
    /// Rule by which nothing matches a query, judged by its best hit.
    pub no_match: Option<NoMatchRule>,
    /// When this was measured.
    pub measured_at: DateTime<Utc>,
    /// Fingerprint of the report of the evaluation.
    pub evaluation_fingerprint: String,
    /// How queries were answered at that time; `None` if the evaluation did not rank the whole catalogue.
    #[serde(default)]
    pub baseline: Option<Baseline>,
}

/// How a configuration answered queries when it was calibrated. Query workers compare their recent
/// answers with it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Baseline {
    /// Number of different queries that were measured.
    pub queries: usize,
    /// Summary of the statistics of all images for the served prompt set; `None` for plain CLIP.
    pub score_moments: Option<StatisticsSummary>,
    /// How the queries were answered.
    #[serde(flatten)]
    pub answers: AnswerStats,
}

/// How a configuration answers different queries, compared with plain CLIP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AnswerStats {
    /// Share of the queries whose first hit is not that of plain CLIP, 0 to 1.
    pub top_hit_changed: f64,
    /// Share of the queries that nothing matches, 0 to 1; `None` without a rule.
    pub no_match: Option<f64>,
    /// Skewness of how often each image is the first hit: 0 if this is even, far above 0 if few images
    /// crowd out the others. It depends on the number of queries.
    pub hubness: f64,
    /// Hubness of plain CLIP for the same queries.
    pub hubness_raw: f64,
}

impl AnswerStats {
    /// Computes the stats of answers, each given by its first hit, the first hit by plain CLIP, and
    /// whether nothing matches, if that is known. `images` is the size of the catalogue. Returns `None`
    /// if there are no answers or no images.
    pub fn from_answers<I: Eq + Hash>(
        answers: impl Iterator<Item = (I, I, Option<bool>)>,
        images: usize,
    ) -> Option<Self> {
        let (mut first_hit_counts, mut first_raw_hit_counts) = (HashMap::new(), HashMap::new());
        let (mut total, mut changed, mut judged, mut no_matches) = (0u64, 0u64, 0u64, 0u64);
        for (first_hit, first_raw_hit, no_match) in answers {
            total += 1;
            changed += u64::from(first_hit != first_raw_hit);
            judged += u64::from(no_match.is_some());
            no_matches += u64::from(no_match == Some(true));
            *first_hit_counts.entry(first_hit).or_default() += 1;
            *first_raw_hit_counts.entry(first_raw_hit).or_default() += 1;
        }
        (total > 0 && images > 0).then(|| Self {
            top_hit_changed: changed as f64 / total as f64,
            no_match: (judged > 0).then(|| no_matches as f64 / judged as f64),
            hubness: skewness(first_hit_counts.into_values(), images),
            hubness_raw: skewness(first_raw_hit_counts.into_values(), images),
        })
    }

    /// Returns the hubness relative to that of plain CLIP, which does not depend on the number of
    /// queries. Returns `None` if the hubness of plain CLIP is not above 0.
    pub fn hubness_ratio(&self) -> Option<f64> {
        (self.hubness_raw > 0.0).then(|| self.hubness / self.hubness_raw)
    }
}

/// Returns the skewness of the counts of `images` images (Radovanović et al., JMLR 2010). Images that are
/// missing in `counts` count 0.
pub fn skewness(counts: impl Iterator<Item = u32>, images: usize) -> f64 {
    let counts: Vec<f64> = counts.map(f64::from).collect();
    let images = images.max(counts.len()).max(1) as f64;
    let mean = counts.iter().sum::<f64>() / images;
    let moment = |power: i32| {
        let counted: f64 = counts.iter().map(|n| (n - mean).powi(power)).sum();
        (counted + (images - counts.len() as f64) * (-mean).powi(power)) / images
    };
    let deviation = moment(2).sqrt();
    if deviation > 0.0 { moment(3) / deviation.powi(3) } else { 0.0 }
}

/// Summary of the statistics of all images for one prompt set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatisticsSummary {
    /// Number of images that have statistics.
    pub images: usize,
    /// Mean of the images' mean auxiliary scores.
    pub mean: f64,
    /// Population standard deviation of the images' mean auxiliary scores.
    pub std_of_means: f64,
    /// Mean of the standard deviations of the images' auxiliary scores.
    pub mean_of_stds: f64,
}

impl StatisticsSummary {
    /// Summarises the images that have statistics. Returns `None` if no image has statistics.
    pub fn from_statistics(all: impl Iterator<Item = ScoreStatistics>) -> Option<Self> {
        let (mut images, mut sum, mut sum_of_squares, mut sum_of_stds) = (0usize, 0f64, 0f64, 0f64);
        for statistics in all.filter(|s| s.n > 0) {
            let mean = f64::from(statistics.mean);
            images += 1;
            sum += mean;
            sum_of_squares += mean * mean;
            sum_of_stds += f64::from(statistics.std);
        }
        let n = images as f64;
        (images > 0).then(|| Self {
            images,
            mean: sum / n,
            std_of_means: (sum_of_squares / n - (sum / n).powi(2)).max(0.0).sqrt(),
            mean_of_stds: sum_of_stds / n,
        })
    }

    /// Returns how far the mean has moved from that of `baseline`, in standard deviations of the image
    /// means of `baseline`. Returns `None` if these do not vary.
    pub fn mean_drift_from(&self, baseline: &Self) -> Option<f64> {
        (baseline.std_of_means > 0.0).then(|| (self.mean - baseline.mean) / baseline.std_of_means)
    }
}

/// If `signal` is below `threshold`, the best hit of a query is not distinguishable from best hits of
/// unrelated texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoMatchRule {
    /// Signal that is compared with the threshold.
    pub signal: NoMatchSignal,
    /// Smallest value of the signal for which something matches.
    pub threshold: f32,
}

/// A number that is computed from the best hit of a query.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum NoMatchSignal {
    /// Balanced score of the hit.
    Score,
    /// Number of standard deviations by which the balanced score of the hit exceeds the mean of all
    /// images.
    ZScore,
    /// `z_score` · (1 + known)/2, where known is the share of the query's words that occur in the
    /// prompts of the served set. A query of unknown words needs a best hit with up to twice the
    /// z-score. Text encoders embed gibberish among real texts, so that scores alone cannot detect it.
    VocabularyZScore,
}

impl NoMatchSignal {
    /// All signals, simplest first.
    pub const ALL: [Self; 3] = [Self::Score, Self::ZScore, Self::VocabularyZScore];

    /// Returns the name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::ZScore => "z_score",
            Self::VocabularyZScore => "vocabulary_z_score",
        }
    }

    /// Returns the value of the signal for a best hit.
    pub fn value(self, hit: BestHitFeatures) -> f32 {
        let BestHitFeatures { score, background, known_word_share } = hit;
        let z_score = (score - background.mean) / background.std.max(f32::MIN_POSITIVE);
        match self {
            Self::Score => score,
            Self::ZScore => z_score,
            Self::VocabularyZScore => z_score * f32::midpoint(1.0, known_word_share),
        }
    }
}

/// The inputs of all signals.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BestHitFeatures {
    /// Balanced score of the best hit.
    pub score: f32,
    /// Distribution of the balanced scores of all images.
    pub background: ScoreDistribution,
    /// Share of the query's words that the vocabulary knows ([`Vocabulary::known_word_share`]).
    pub known_word_share: f32,
}

/// Distribution of the balanced scores of one query over all scanned images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ScoreDistribution {
    /// Mean of the scores.
    pub mean: f32,
    /// Population standard deviation of the scores.
    pub std: f32,
}

impl NoMatchRule {
    /// Returns whether nothing matches, judged by the best hit.
    pub fn is_no_match(&self, hit: BestHitFeatures) -> bool {
        self.signal.value(hit) < self.threshold
    }
}

/// The words that describe a catalogue: those of the served prompt set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary(HashSet<String>);

impl Vocabulary {
    /// Collects the words of all texts.
    pub fn from_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self(texts.into_iter().flat_map(split_words).collect())
    }

    /// Returns the share of the words of `text` that are in the vocabulary, 0 to 1; 0 if `text` has no
    /// words.
    pub fn known_word_share(&self, text: &str) -> f32 {
        let words = split_words(text);
        let known_words = words.iter().filter(|word| self.0.contains(*word)).count();
        known_words as f32 / words.len().max(1) as f32
    }
}

/// Splits a text into words in lower case, without a plural s. In scripts without spaces between words,
/// each character counts as a word.
fn split_words(text: &str) -> Vec<String> {
    let is_unspaced_script = |c: &char| matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}' | '\u{e00}'..='\u{e7f}');
    let lower = text.to_lowercase();
    let mut words: Vec<String> =
        lower.chars().filter(is_unspaced_script).map(String::from).collect();
    let is_in_word =
        |c: char| c.is_alphanumeric() && !is_unspaced_script(&c) || c == '-' || c == '\'';
    for word in lower.split(|c| !is_in_word(c)) {
        let word = word.trim_matches(['-', '\'']);
        let is_plural = word.chars().count() > 3 && word.ends_with('s') && !word.ends_with("ss");
        let word = if is_plural { &word[..word.len() - 1] } else { word };
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
    fn each_signal_compares_its_own_value() {
        let background = ScoreDistribution { mean: 0.2, std: 0.02 };
        let hit = |score, known| BestHitFeatures { score, background, known_word_share: known };
        let rule = |signal, threshold| NoMatchRule { signal, threshold };
        let score = rule(NoMatchSignal::Score, 0.25);
        let z_score = rule(NoMatchSignal::ZScore, 3.0);
        let vocabulary_z_score = rule(NoMatchSignal::VocabularyZScore, 3.0);
        assert!(score.is_no_match(hit(0.24, 1.0)) && !score.is_no_match(hit(0.26, 0.0)));
        assert!(z_score.is_no_match(hit(0.25, 1.0)) && !z_score.is_no_match(hit(0.27, 0.0)));
        assert!(vocabulary_z_score.is_no_match(hit(0.31, 0.0)));
        assert!(!vocabulary_z_score.is_no_match(hit(0.33, 0.0)));
        assert!(!vocabulary_z_score.is_no_match(hit(0.27, 1.0)), "all words known: the z-score");
        let flat = ScoreDistribution { std: 0.0, ..background };
        assert!(!z_score.is_no_match(BestHitFeatures { background: flat, ..hit(0.27, 1.0) }));
    }

    #[test]
    fn answer_stats_and_summary_match_the_formulas() {
        // Image 1 is the first hit of three queries, image 2 of one, images 3 and 4 of none.
        let answers = [(1, 1, None), (1, 2, Some(true)), (1, 3, Some(false)), (2, 4, None)];
        let stats = AnswerStats::from_answers(answers.into_iter(), 4).unwrap();
        assert_eq!((stats.top_hit_changed, stats.no_match), (0.75, Some(0.5)));
        // scipy.stats.skew([3, 1, 0, 0]). For plain CLIP each image is first once.
        assert!((stats.hubness - 0.816_496_58).abs() < 1e-6, "{stats:?}");
        assert_eq!((stats.hubness_raw, stats.hubness_ratio()), (0.0, None));
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
        let statistics_of_images =
            [statistics(0.1, 0.02, 5), statistics(0.3, 0.04, 5), statistics(9.0, 9.0, 0)];
        let baseline =
            StatisticsSummary::from_statistics(statistics_of_images.into_iter()).unwrap();
        assert_eq!(baseline.images, 2);
        for (actual, expected) in
            [(baseline.mean, 0.2), (baseline.std_of_means, 0.1), (baseline.mean_of_stds, 0.03)]
        {
            assert!((actual - expected).abs() < 1e-7, "{baseline:?}");
        }
        let current =
            StatisticsSummary::from_statistics([statistics(0.35, 0.03, 5)].into_iter()).unwrap();
        assert!((current.mean_drift_from(&baseline).unwrap() - 1.5).abs() < 1e-6);
        assert_eq!(baseline.mean_drift_from(&current), None, "one image has no spread");
    }

    #[test]
    fn a_calibration_without_baseline_is_still_readable() {
        let stored = r#"{"min_score":null,"no_match":null,"measured_at":"2026-01-01T00:00:00Z","evaluation_fingerprint":"e"}"#;
        assert_eq!(serde_json::from_str::<Calibration>(stored).unwrap().baseline, None);
    }

    #[test]
    fn words_are_known_in_singular_plural_and_any_case() {
        let vocabulary = Vocabulary::from_texts(["a red striped mug", "a T-shirt", "赤い靴"]);
        assert_eq!(vocabulary.known_word_share("Two red MUGS"), 2.0 / 3.0);
        assert_eq!(vocabulary.known_word_share("striped t-shirts!"), 1.0);
        assert_eq!(vocabulary.known_word_share("qwv xlkjh"), 0.0);
        assert_eq!(vocabulary.known_word_share("靴"), 1.0);
        assert_eq!(vocabulary.known_word_share("?!"), 0.0);
        assert_eq!(Vocabulary::from_texts(["a glass"]).known_word_share("glass"), 1.0);
    }
}
