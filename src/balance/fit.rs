//! How well a bank of auxiliary prompts fits the queries of a catalogue, without judgements.
//!
//! A bank corrects each image by the mean of the image's k best scores for its prompts. The same can be
//! computed from queries that nobody judged. [`BankFit`] is the correlation of both corrections over the
//! images: a bank that raises and lowers other images than the queries do corrects the wrong ones.
//! [`concentration`] shows a bank that describes little more than what is searched: it penalises the right
//! answers most.

use std::fmt;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Number of an image's best scores whose mean is its correction.
pub const CORRECTION_TOP_K: usize = 16;
/// Smallest number of distinct queries from which a fit is computed: from fewer, the fit of the same bank
/// is much lower (0.81 from 16 queries, 0.94 from 499).
pub const MIN_FIT_QUERIES: usize = 64;
/// Number of bootstrap samples of an interval.
const BOOTSTRAP_RESAMPLES: usize = 200;
/// Seed of all samples, so that the same corrections give the same interval.
const SEED: u64 = 1;
/// Largest number of images whose corrections are resampled.
const MAX_SAMPLED_IMAGES: usize = 2_000;
/// Number of an image's best queries from which corrections are resampled. A resample leaves out a third
/// of the queries and repeats others: among 64 there are practically always enough.
pub const RESAMPLED_QUERIES: usize = 64;
/// Largest correlation that Fisher's z is computed of: that of 1 is infinite.
const MAX_CORRELATION: f64 = 0.999_999;

/// Pearson's correlation between the corrections of a bank and of queries, over the images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BankFit {
    /// The correlation, −1 to 1.
    pub value: f64,
    /// Lower bound of its 95 % interval, by a bootstrap over the queries.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
    /// Number of queries from which it was computed.
    pub queries: usize,
}

impl fmt::Display for BankFit {
    /// Writes the correlation and its interval: `0.92 (0.87 to 0.94)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2} to {:.2})", self.value, self.low, self.high)
    }
}

/// An image with the queries for which it has the best scores.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledImage {
    /// Its index.
    pub image: usize,
    /// Score and index of its [`RESAMPLED_QUERIES`] best queries, best first; of all if there are fewer.
    pub best_queries: Vec<(f32, u32)>,
}

/// Returns the images whose corrections are resampled for the interval of a fit: all of them if there are
/// few, otherwise the same random ones every time.
pub fn sample_images(images: usize) -> Vec<usize> {
    sample_indices(images, MAX_SAMPLED_IMAGES)
}

/// Returns `max_count` of the indices below `count`, ascending: all of them if there are not more, otherwise
/// the same random ones every time.
pub(crate) fn sample_indices(count: usize, max_count: usize) -> Vec<usize> {
    if count <= max_count {
        return (0..count).collect();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut sampled = rand::seq::index::sample(&mut rng, count, max_count).into_vec();
    sampled.sort_unstable();
    sampled
}

impl BankFit {
    /// Computes the fit from the correction of each image by the bank and by `query_count` distinct
    /// queries; `sample` are the images of [`sample_images`]. Returns `None` for fewer than
    /// [`MIN_FIT_QUERIES`] queries or three images, or if one of the corrections is the same for all.
    pub fn from_corrections(
        by_bank: &[f64],
        by_queries: &[f64],
        query_count: usize,
        sample: &[SampledImage],
    ) -> Option<Self> {
        if query_count < MIN_FIT_QUERIES || by_bank.len() < 3 {
            return None;
        }
        debug_assert_eq!(by_bank.len(), by_queries.len());
        let value = correlation(by_bank, by_queries)?;
        let bank_of_sample: Vec<f64> = sample.iter().map(|image| by_bank[image.image]).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut draw = |_| {
            let mut counts = vec![0u32; query_count];
            (0..query_count).for_each(|_| counts[rng.random_range(0..query_count)] += 1);
            let resampled: Vec<f64> =
                sample.iter().map(|image| resampled_correction(image, &counts)).collect();
            correlation(&bank_of_sample, &resampled).map(fisher_z)
        };
        let mut samples: Vec<f64> = (0..BOOTSTRAP_RESAMPLES).filter_map(&mut draw).collect();
        samples.sort_unstable_by(f64::total_cmp);
        let percentile = |per_mille: usize| samples.get(samples.len() * per_mille / 1_000).copied();
        // Queries that are drawn twice lower the correlation of every sample, so that the samples tell how
        // wide the interval is, and not where it lies.
        let bound = |per_mille: usize| {
            let deviation = percentile(per_mille).zip(percentile(500)).map_or(0.0, |(a, b)| a - b);
            (fisher_z(value) + deviation).tanh()
        };
        let (low, high) = (bound(25).min(value), bound(975).max(value));
        Some(Self { value, low, high, queries: query_count })
    }
}

fn fisher_z(correlation: f64) -> f64 {
    correlation.clamp(-MAX_CORRELATION, MAX_CORRELATION).atanh()
}

/// Returns the correction of an image if query q occurred `counts[q]` times.
fn resampled_correction(image: &SampledImage, counts: &[u32]) -> f64 {
    let (mut sum, mut taken) = (0.0, 0);
    for (score, query) in &image.best_queries {
        let count = counts[*query as usize].min(CORRECTION_TOP_K as u32 - taken);
        sum += f64::from(*score) * f64::from(count);
        taken += count;
        if taken == CORRECTION_TOP_K as u32 {
            break;
        }
    }
    sum / f64::from(taken.max(1))
}

/// Returns Pearson's correlation; `None` if x or y does not vary.
fn correlation(x: &[f64], y: &[f64]) -> Option<f64> {
    let (x_mean, y_mean) = (mean(x)?, mean(y)?);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (x, y) = (x - x_mean, y - y_mean);
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    let correlation = xy / (xx * yy).sqrt();
    let vary = varies(xx / x.len() as f64, x_mean) && varies(yy / y.len() as f64, y_mean);
    (vary && correlation.is_finite()).then(|| correlation.clamp(-1.0, 1.0))
}

/// Returns how far the corrections of first results lie above those of all images: the mean of the
/// correction of each query's first image by plain CLIP, minus the mean over the catalogue, in standard
/// deviations over the catalogue. Returns `None` for fewer than [`MIN_FIT_QUERIES`] queries, or if all
/// corrections are equal.
pub fn concentration(by_bank: &[f64], first_images: &[usize]) -> Option<f64> {
    let of_first: Vec<f64> = first_images.iter().filter_map(|i| by_bank.get(*i)).copied().collect();
    concentration_of_corrections(by_bank, &of_first)
}

/// Returns the [`concentration`] from the corrections of the catalogue's images, or of a random part of
/// them, and from those of the first image of each query.
pub fn concentration_of_corrections(by_bank: &[f64], of_first_images: &[f64]) -> Option<f64> {
    if of_first_images.len() < MIN_FIT_QUERIES {
        return None;
    }
    let catalogue_mean = mean(by_bank)?;
    let variance = mean_of(by_bank.iter().map(|c| (c - catalogue_mean).powi(2)), by_bank.len())?;
    let first_mean = mean(of_first_images)?;
    varies(variance, catalogue_mean).then(|| (first_mean - catalogue_mean) / variance.sqrt())
}

/// Returns whether a variance is more than the rounding errors of equal values.
fn varies(variance: f64, mean: f64) -> bool {
    variance > (mean * 1e-9).powi(2)
}

fn mean(values: &[f64]) -> Option<f64> {
    mean_of(values.iter().copied(), values.len())
}

fn mean_of(values: impl Iterator<Item = f64>, count: usize) -> Option<f64> {
    (count > 0).then(|| values.sum::<f64>() / count as f64)
}

/// The [`CORRECTION_TOP_K`] largest scores of each of some images, collected one score at a time.
#[derive(Debug, Clone)]
pub struct LargestScores {
    /// By image, ascending; −∞ until there are as many scores.
    largest: Vec<[f32; CORRECTION_TOP_K]>,
    /// What a score must exceed to be kept, by image: the smallest of them, or that of another collection.
    thresholds: Vec<f32>,
    scores_per_image: usize,
}

impl LargestScores {
    /// Creates empty collections for `images` images.
    pub fn new(images: usize) -> Self {
        let largest = vec![[f32::NEG_INFINITY; CORRECTION_TOP_K]; images];
        Self { largest, thresholds: vec![f32::NEG_INFINITY; images], scores_per_image: 0 }
    }

    /// Returns, by image, what a further score must exceed to be kept.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Adds a score of an image.
    pub fn insert(&mut self, image: usize, score: f32) {
        // Each place takes the score, its own or the next one's value: without branches, which would be
        // mispredicted.
        let largest = &mut self.largest[image];
        let kept = *largest;
        for (i, place) in largest.iter_mut().enumerate() {
            let next = kept.get(i + 1).copied().unwrap_or(f32::INFINITY);
            *place = kept[i].max(score).min(next);
        }
        self.thresholds[image] = self.thresholds[image].max(largest[0]);
    }

    /// Leaves out from now on what is not among the largest scores of another collection of the same images,
    /// and says so to the others: `shared` are the highest thresholds of all of them.
    pub fn share_thresholds(&mut self, shared: &mut [f32]) {
        for (threshold, shared) in self.thresholds.iter_mut().zip(shared) {
            *threshold = threshold.max(*shared);
            *shared = *threshold;
        }
    }

    /// Counts scores that every image was given, whether they were kept or not.
    pub fn count_scores(&mut self, per_image: usize) {
        self.scores_per_image += per_image;
    }

    /// Adds the scores that another collection has of the same images.
    pub fn merge(&mut self, other: &Self) {
        for (image, scores) in other.largest.iter().enumerate() {
            for score in scores {
                self.insert(image, *score);
            }
        }
        self.scores_per_image += other.scores_per_image;
    }

    /// Returns the correction of each image: the mean of its largest scores; of all if there are fewer.
    /// Nothing if no scores were counted.
    pub fn corrections(&self) -> Vec<f64> {
        let kept = self.scores_per_image.min(CORRECTION_TOP_K);
        if kept == 0 {
            return Vec::new();
        }
        let correction = |scores: &[f32; CORRECTION_TOP_K]| {
            let largest = scores[CORRECTION_TOP_K - kept..].iter();
            largest.map(|score| f64::from(*score)).sum::<f64>() / kept as f64
        };
        self.largest.iter().map(correction).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Corrections of `n` images by a bank and by `q` queries that agree with it but for noise, and the
    /// sample from which the interval is computed.
    fn corrections(n: usize, q: usize, noise: f64) -> (Vec<f64>, Vec<f64>, Vec<SampledImage>) {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let bank: Vec<f64> = (0..n).map(|_| rng.random_range(0.2..0.3)).collect();
        let mut by_queries = Vec::new();
        let mut sample = Vec::new();
        for (image, correction) in bank.iter().enumerate() {
            let mut best: Vec<(f32, u32)> = (0..q as u32)
                .map(|query| ((correction + noise * rng.random_range(-0.1..0.1)) as f32, query))
                .collect();
            best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            by_queries
                .push(best[..16].iter().map(|(score, _)| f64::from(*score)).sum::<f64>() / 16.0);
            best.truncate(RESAMPLED_QUERIES);
            sample.push(SampledImage { image, best_queries: best });
        }
        (bank, by_queries, sample)
    }

    #[test]
    fn the_fit_is_pearsons_correlation() {
        // numpy.corrcoef([1, 2, 3, 5], [2, 1, 4, 6])[0, 1]
        let fit = BankFit::from_corrections(&[1.0, 2.0, 3.0, 5.0], &[2.0, 1.0, 4.0, 6.0], 64, &[]);
        assert!((fit.unwrap().value - 0.902_243_638_678).abs() < 1e-9, "{fit:?}");
    }

    #[test]
    fn the_interval_contains_the_fit_and_narrows_with_more_queries() {
        let width = |queries: usize| {
            let (bank, by_queries, sample) = corrections(40, queries, 4.0);
            let fit = BankFit::from_corrections(&bank, &by_queries, queries, &sample).unwrap();
            assert!(fit.low < fit.value && fit.value < fit.high, "{fit:?}");
            assert_eq!(fit.queries, queries);
            fit.high - fit.low
        };
        let (few, many) = (width(64), width(1_024));
        assert!(many < few, "{few} {many}");
    }

    #[test]
    fn few_queries_few_images_and_equal_corrections_give_no_fit() {
        let (bank, by_queries, sample) = corrections(10, 64, 0.5);
        let fit = |by_queries: &[f64], queries: usize| {
            BankFit::from_corrections(&bank, by_queries, queries, &sample)
        };
        assert!(fit(&by_queries, MIN_FIT_QUERIES - 1).is_none());
        assert!(fit(&by_queries, MIN_FIT_QUERIES).is_some());
        assert!(fit(&[0.1; 10], MIN_FIT_QUERIES).is_none());
        assert!(BankFit::from_corrections(&[0.1, 0.2], &[0.2, 0.3], 64, &[]).is_none());
    }

    #[test]
    fn the_sample_of_a_large_catalogue_is_the_same_every_time() {
        assert_eq!(sample_images(3), [0, 1, 2]);
        let sample = sample_images(1_000_000);
        assert_eq!(sample.len(), MAX_SAMPLED_IMAGES);
        assert_eq!(sample, sample_images(1_000_000));
        assert!(sample.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn concentration_counts_deviations_from_the_mean_of_the_catalogue() {
        let by_bank = [0.1, 0.2, 0.3, 0.4];
        // The mean is 0.25, the population standard deviation √0.0125.
        let expected = (0.4 - 0.25) / 0.0125f64.sqrt();
        assert!((concentration(&by_bank, &[3; 64]).unwrap() - expected).abs() < 1e-9);
        assert!(concentration(&by_bank, &[0, 1, 2, 3].repeat(16)).unwrap().abs() < 1e-9);
        assert_eq!(concentration(&by_bank, &[3; 63]), None);
        assert_eq!(concentration(&[0.5; 4], &[0; 64]), None);
    }

    #[test]
    fn the_largest_scores_are_kept_in_any_order_and_over_collections() {
        let scores: Vec<f32> = (0..100u16).map(|i| f32::from(i * 37 % 101)).collect();
        let mut sorted = scores.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let expected = sorted[84..].iter().sum::<f32>() / 16.0;
        let (first, second) = scores.split_at(30);
        let collect = |scores: &[f32]| {
            let mut largest = LargestScores::new(1);
            for score in scores {
                largest.insert(0, *score);
            }
            largest.count_scores(scores.len());
            largest
        };
        let mut merged = collect(first);
        merged.merge(&collect(second));
        assert_eq!(merged.corrections(), collect(&scores).corrections());
        assert!((merged.corrections()[0] - f64::from(expected)).abs() < 1e-9);
        assert_eq!(merged.thresholds(), [sorted[84]]);
        assert_eq!(collect(&[0.25, 0.75]).corrections(), [0.5], "fewer scores than are kept");
        assert!(LargestScores::new(3).corrections().is_empty());
    }
}
