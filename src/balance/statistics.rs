//! Auxiliary scores of an image, and the statistics of them that normalisers need.
//!
//! For an image embedding **v** and K unit-length prompt embeddings **a**ⱼ the auxiliary scores are
//! aⱼ = **a**ⱼ·**v**. They depend on the image and the prompt set, never on a query, so that they are
//! computed once, when the image is ingested.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use std::fmt::{self, Write as _};

use pulp::{Arch, WithSimd};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How statistics are computed from the scores of an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StatisticsSettings {
    /// Number of the largest scores whose mean `nnn` subtracts.
    pub top_k: usize,
    /// Factor of the model's logit scale at which `softmax` computes the log-sum-exp: below 1, more prompts
    /// than the nearest ones count.
    pub temperature: f32,
}

impl StatisticsSettings {
    /// Largest k.
    pub const MAX_TOP_K: usize = 4_096;
    /// Smallest temperature. Towards 0 the log-sum-exp becomes the mean of all scores.
    pub const MIN_TEMPERATURE: f32 = 0.01;
    /// Largest temperature. At 10 the log-sum-exp is the largest score already.
    pub const MAX_TEMPERATURE: f32 = 10.0;

    /// Returns the settings with this k and the logit scale of the model itself.
    pub fn with_top_k(top_k: usize) -> Self {
        Self { top_k, temperature: 1.0 }
    }

    /// Returns the scale at which the log-sum-exp is computed by a model of this logit scale.
    pub fn softmax_scale(self, logit_scale: f32) -> f32 {
        self.temperature * logit_scale
    }

    /// Returns whether a temperature is within the limits.
    pub fn is_valid_temperature(temperature: f32) -> bool {
        (Self::MIN_TEMPERATURE..=Self::MAX_TEMPERATURE).contains(&temperature)
    }
}

/// Identifies how statistics were computed: prompt set, logit scale, the k of the top-k mean and the
/// temperature of the log-sum-exp.
///
/// It is readable (`demo@1:3f2a9c01d4e5:L100.0000:k16:t0.5`), because the stored table uses it as the key of
/// a map and users see it in answers. A temperature of 1 is left out.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct StatisticsKey(String);

impl StatisticsKey {
    /// Creates the key of the prompt set `name@version`, where `fingerprint` identifies its texts, for
    /// statistics by a model of this logit scale.
    pub fn new(
        name: &str,
        version: u32,
        fingerprint: &str,
        logit_scale: f32,
        settings: StatisticsSettings,
    ) -> Self {
        let short_fingerprint = fingerprint.get(..12).unwrap_or(fingerprint);
        let StatisticsSettings { top_k, temperature } = settings;
        let mut key = format!("{name}@{version}:{short_fingerprint}:L{logit_scale:.4}:k{top_k}");
        if temperature != 1.0 {
            let _ = write!(key, ":t{temperature}");
        }
        Self(key)
    }

    /// Wraps a key that was read from the table.
    pub fn from_stored(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Returns the text that is stored in the table.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StatisticsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Statistics of the auxiliary scores of one image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScoreStatistics {
    /// Number of prompts K; 0 stands for missing statistics.
    pub n: u32,
    /// Mean μ.
    pub mean: f32,
    /// Population standard deviation σ.
    pub std: f32,
    /// Smallest score.
    pub min: f32,
    /// Largest score.
    pub max: f32,
    /// log Σⱼ exp(t·L·aⱼ), where L is the logit scale and t the temperature of the key.
    pub lse: f32,
    /// Mean of the k largest scores; of all if K is less than k.
    pub topk_mean: f32,
}

/// Number of partial sums of a dot product.
const LANES: usize = 16;
/// Number of prompts whose scores are computed together: their partial sums fit into the registers, and
/// each block of the image embedding is loaded once for all of them.
const PROMPTS_PER_BLOCK: usize = 4;

/// Returns the dot product of two vectors of equal length, in f32.
///
/// The order of the additions is fixed (within 16 lanes, then over the lanes, then the remainder), so that
/// the same two vectors give the same bits in ingestion, reindexing and search, for any batch size.
pub fn dot_product(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [0f32; LANES];
    let (a_blocks, a_remainder) = a.as_chunks::<LANES>();
    let (b_blocks, b_remainder) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let remainder: f32 = a_remainder.iter().zip(b_remainder).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + remainder
}

/// Returns the scores aⱼ = **a**ⱼ·**v** of an image for all prompts, in the order of the prompts.
pub fn score_prompts(image: &[f32], prompts: &[Vec<f32>]) -> Vec<f32> {
    Arch::new().dispatch(PromptScoring { image, prompts })
}

/// Computes [`dot_product`] for all prompts, [`PROMPTS_PER_BLOCK`] at a time, with the same order of additions
/// and therefore with the same bits.
struct PromptScoring<'a> {
    image: &'a [f32],
    prompts: &'a [Vec<f32>],
}

impl WithSimd for PromptScoring<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Vec<f32> {
        let mut scores = Vec::with_capacity(self.prompts.len());
        let (blocks, remainder) = self.prompts.as_chunks::<PROMPTS_PER_BLOCK>();
        for block in blocks {
            scores.extend(score_prompt_block(self.image, block));
        }
        scores.extend(remainder.iter().map(|prompt| dot_product(prompt, self.image)));
        scores
    }
}

/// Returns the scores of an image for four prompts.
#[inline(always)]
fn score_prompt_block(
    image: &[f32],
    prompts: &[Vec<f32>; PROMPTS_PER_BLOCK],
) -> [f32; PROMPTS_PER_BLOCK] {
    let (image_blocks, image_remainder) = image.as_chunks::<LANES>();
    let split_prompts = prompts.each_ref().map(|prompt| prompt.as_chunks::<LANES>());
    let [a, b, c, d] = split_prompts.map(|(blocks, _)| blocks);
    let mut sums = [[0f32; LANES]; PROMPTS_PER_BLOCK];
    for ((((x, a), b), c), d) in image_blocks.iter().zip(a).zip(b).zip(c).zip(d) {
        for (sum, y) in sums.iter_mut().zip([a, b, c, d]) {
            for lane in 0..LANES {
                // Not a fused multiply-add, which rounds once, because `dot_product` rounds twice.
                sum[lane] += y[lane] * x[lane];
            }
        }
    }
    let mut scores = [0f32; PROMPTS_PER_BLOCK];
    for ((score, sum), (_, remainder)) in scores.iter_mut().zip(&sums).zip(split_prompts) {
        let remainder: f32 = remainder.iter().zip(image_remainder).map(|(x, y)| x * y).sum();
        *score = sum.iter().sum::<f32>() + remainder;
    }
    scores
}

impl ScoreStatistics {
    /// Whether all values are finite, as those of finite scores are.
    pub fn is_finite(&self) -> bool {
        let values = [self.mean, self.std, self.min, self.max, self.lse, self.topk_mean];
        values.iter().all(|value| value.is_finite())
    }

    /// Computes the statistics of the auxiliary scores of one image, with the mean of the `top_k` largest
    /// scores (at least 1, at most all) and the log-sum-exp at `softmax_scale`. Returns `None` if there
    /// are no scores.
    ///
    /// Sums are computed in f64, because the spread of the scores is small compared with their mean.
    pub fn from_scores(scores: &[f32], softmax_scale: f32, top_k: usize) -> Option<Self> {
        let mut sorted: Vec<f32> = scores.to_vec();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let exact = ExactStatistics::from_partitioned(&sorted, f64::from(softmax_scale), top_k)?;
        Some(Self {
            n: exact.n,
            mean: exact.mean as f32,
            std: exact.std as f32,
            min: exact.min as f32,
            max: exact.max as f32,
            lse: exact.lse as f32,
            topk_mean: exact.topk_mean as f32,
        })
    }
}

/// [`ScoreStatistics`] before they are rounded to f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExactStatistics {
    /// Number of prompts K.
    pub n: u32,
    /// Mean μ.
    pub mean: f64,
    /// Population standard deviation σ.
    pub std: f64,
    /// Smallest score.
    pub min: f64,
    /// Largest score.
    pub max: f64,
    /// Log-sum-exp, as in [`ScoreStatistics`].
    pub lse: f64,
    /// Mean of the k largest scores; of all if K is less than k.
    pub topk_mean: f64,
}

impl ExactStatistics {
    /// Computes the statistics of scores of which the `top_k` largest come first, the largest at the head.
    /// Returns `None` if there are none.
    pub fn from_partitioned<T: Copy + Into<f64>>(
        scores: &[T],
        softmax_scale: f64,
        top_k: usize,
    ) -> Option<Self> {
        let n = scores.len();
        let max: f64 = (*scores.first()?).into();
        let min = scores.iter().map(|s| (*s).into()).fold(max, f64::min);
        let mean = sum_as_f64(scores) / n as f64;
        let variance = scores.iter().map(|s| ((*s).into() - mean).powi(2)).sum::<f64>() / n as f64;
        let top = &scores[..top_k.clamp(1, n)];
        let peak = softmax_scale * max;
        let exponentials: f64 =
            scores.iter().map(|s| (softmax_scale * (*s).into() - peak).exp()).sum();
        Some(Self {
            n: n as u32,
            mean,
            std: variance.sqrt(),
            min,
            max,
            lse: peak + exponentials.ln(),
            topk_mean: sum_as_f64(top) / top.len() as f64,
        })
    }
}

fn sum_as_f64<T: Copy + Into<f64>>(values: &[T]) -> f64 {
    values.iter().map(|value| (*value).into()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_match_values_computed_by_hand() {
        let s = ScoreStatistics::from_scores(&[0.1, 0.3, 0.2, 0.4], 10.0, 2).unwrap();
        assert_eq!((s.n, s.min, s.max), (4, 0.1, 0.4));
        assert!((s.mean - 0.25).abs() < 1e-7);
        assert!((s.std - 0.111_803_4).abs() < 1e-6);
        assert!((s.topk_mean - 0.35).abs() < 1e-7);
        let lse = [1f64, 3.0, 2.0, 4.0].map(f64::exp).iter().sum::<f64>().ln();
        assert!((f64::from(s.lse) - lse).abs() < 1e-5);
    }

    #[test]
    fn the_order_of_prompts_does_not_matter_and_large_scales_do_not_overflow() {
        let a = ScoreStatistics::from_scores(&[0.31, 0.12, 0.27], 100.0, 8).unwrap();
        let b = ScoreStatistics::from_scores(&[0.27, 0.31, 0.12], 100.0, 8).unwrap();
        assert_eq!(a, b);
        assert!(ScoreStatistics::from_scores(&[1.0; 3], 1e6, 1).unwrap().lse.is_finite());
        assert!(ScoreStatistics::from_scores(&[], 100.0, 1).is_none());
    }

    #[test]
    fn a_key_names_every_temperature_but_the_models_own() {
        let key = |temperature| {
            let settings = StatisticsSettings { top_k: 16, temperature };
            StatisticsKey::new("demo", 1, "3f2a9c01d4e5ff", 100.0, settings)
        };
        assert_eq!(key(1.0).as_str(), "demo@1:3f2a9c01d4e5:L100.0000:k16");
        assert_eq!(key(0.5).as_str(), "demo@1:3f2a9c01d4e5:L100.0000:k16:t0.5");
        assert_ne!(key(0.25), key(0.2));
    }

    #[test]
    fn a_low_temperature_counts_all_scores_and_a_high_one_the_largest() {
        let scores = [0.1, 0.3, 0.2, 0.4];
        let correction =
            |scale: f32| ScoreStatistics::from_scores(&scores, scale, 1).unwrap().lse / scale;
        // log Σ exp(x·a)/x is ln(K)/x + the mean for x towards 0, and the largest score for a large x.
        let x = 0.01;
        assert!((correction(x) - (4f32.ln() / x + 0.25)).abs() < 1e-2, "{}", correction(x));
        assert!((correction(1_000.0) - 0.4).abs() < 1e-4);
    }

    #[test]
    fn scores_equal_dot_products_bit_for_bit_for_every_length_and_count() {
        let sample_value = |i: usize| ((i * 2_654_435_761) % 10_007) as f32 / 10_007.0 - 0.5;
        for (dimension, count) in [(1, 1), (15, 3), (16, 4), (77, 7), (512, 64), (513, 65)] {
            let image: Vec<f32> = (0..dimension).map(sample_value).collect();
            let prompts: Vec<Vec<f32>> = (0..count)
                .map(|p| (0..dimension).map(|i| sample_value(i + 31 * p + 7)).collect())
                .collect();
            let plain: Vec<u32> =
                prompts.iter().map(|p| dot_product(p, &image).to_bits()).collect();
            let scores: Vec<u32> =
                score_prompts(&image, &prompts).iter().map(|s| s.to_bits()).collect();
            assert_eq!(scores, plain, "{dimension} × {count}");
        }
    }

    #[test]
    fn dot_product_agrees_with_the_plain_sum() {
        let a: Vec<f32> = (0..77).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..77).map(|i| (i as f32 * 0.11).cos()).collect();
        let plain: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        assert!((f64::from(dot_product(&a, &b)) - plain).abs() < 1e-5);
    }
}
