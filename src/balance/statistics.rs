//! Auxiliary scores of an image and the statistics that normalisers need of them. Pure.
//!
//! For an image embedding **v** and K unit-length prompt embeddings **a**ⱼ the auxiliary scores
//! are aⱼ = **a**ⱼ·**v**. They depend on the image and the prompt set alone, never on a query, so
//! they are computed once, when the image arrives.

// What is dispatched at run time must be inlined into the dispatch to be compiled for the machine.
#![allow(clippy::inline_always)]

use std::fmt;

use pulp::{Arch, WithSimd};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which statistics these are: prompt set, logit scale and top-k together.
///
/// Readable on purpose (`demo@1:3f2a9c01d4e5:L100.0000:k8`), since it stands in the stored table as
/// the key of a map and in answers to users.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct StatisticsKey(String);

impl StatisticsKey {
    /// The key of the set `name@version` with the fingerprint `fingerprint` of its texts, at the
    /// logit scale `scale`, with the mean of the `top_k` largest scores.
    pub fn new(name: &str, version: u32, fingerprint: &str, scale: f32, top_k: usize) -> Self {
        let short = fingerprint.get(..12).unwrap_or(fingerprint);
        Self(format!("{name}@{version}:{short}:L{scale:.4}:k{top_k}"))
    }

    /// As stored in the table.
    pub fn from_stored(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The text that is stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StatisticsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is kept of one image's auxiliary scores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScoreStatistics {
    /// How many prompts, K.
    pub n: u32,
    /// Mean score μ.
    pub mean: f32,
    /// Population standard deviation σ.
    pub std: f32,
    /// Smallest score.
    pub min: f32,
    /// Largest score.
    pub max: f32,
    /// log Σⱼ exp(L·aⱼ), at the key's logit scale L.
    pub lse: f32,
    /// Mean of the k largest scores, k ≤ K.
    pub topk_mean: f32,
}

/// Sums that run side by side in a dot product.
const LANES: usize = 16;
/// Prompts whose scores are computed together: their sums fit into the registers, and a piece of the
/// image is loaded once for all of them.
const PROMPT_BLOCK: usize = 4;

/// Dot product of two vectors of equal length, in f32.
///
/// The order of the additions is fixed (16 lanes, then the lanes, then the rest), so that the same
/// two vectors give the same bits in ingestion, reindexing and search, whatever the batch.
pub fn dot_product(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The scores aⱼ = **a**ⱼ·**v** of an image against every prompt, in the prompts' order.
pub fn score_prompts(image: &[f32], prompts: &[Vec<f32>]) -> Vec<f32> {
    Arch::new().dispatch(PromptScoring { image, prompts })
}

/// Computes what [`dot`] gives for every prompt, in the same order of additions and so to the bit,
/// some prompts at a time.
struct PromptScoring<'a> {
    image: &'a [f32],
    prompts: &'a [Vec<f32>],
}

impl WithSimd for PromptScoring<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Vec<f32> {
        let mut scores = Vec::with_capacity(self.prompts.len());
        let (blocks, rest) = self.prompts.as_chunks::<PROMPT_BLOCK>();
        for block in blocks {
            scores.extend(score_prompt_block(self.image, block));
        }
        scores.extend(rest.iter().map(|prompt| dot_product(prompt, self.image)));
        scores
    }
}

#[inline(always)]
fn score_prompt_block(image: &[f32], prompts: &[Vec<f32>; PROMPT_BLOCK]) -> [f32; PROMPT_BLOCK] {
    let (pieces, image_rest) = image.as_chunks::<LANES>();
    let split = prompts.each_ref().map(|prompt| prompt.as_chunks::<LANES>());
    let [a, b, c, d] = split.map(|(pieces, _)| pieces);
    let mut sums = [[0f32; LANES]; PROMPT_BLOCK];
    for ((((x, a), b), c), d) in pieces.iter().zip(a).zip(b).zip(c).zip(d) {
        for (sum, y) in sums.iter_mut().zip([a, b, c, d]) {
            for lane in 0..LANES {
                // Never fused: a fused product rounds once, `dot` rounds twice.
                sum[lane] += y[lane] * x[lane];
            }
        }
    }
    let mut scores = [0f32; PROMPT_BLOCK];
    for ((score, sum), (_, rest)) in scores.iter_mut().zip(&sums).zip(split) {
        let rest: f32 = rest.iter().zip(image_rest).map(|(x, y)| x * y).sum();
        *score = sum.iter().sum::<f32>() + rest;
    }
    scores
}

impl ScoreStatistics {
    /// Statistics of the auxiliary scores of one image, at logit scale `scale`, with the mean of
    /// the `top_k` largest (at least 1, at most all). `None` where there are no scores.
    ///
    /// Sums run in f64: the spread of the scores is small beside their mean.
    pub fn from_scores(scores: &[f32], scale: f32, top_k: usize) -> Option<Self> {
        let n = scores.len();
        let mut sorted: Vec<f32> = scores.to_vec();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let (max, min) = (*sorted.first()?, *sorted.last()?);
        let mean = sum_as_f64(&sorted) / n as f64;
        let variance =
            sorted.iter().map(|s| (f64::from(*s) - mean).powi(2)).sum::<f64>() / n as f64;
        let top = &sorted[..top_k.clamp(1, n)];
        let scale = f64::from(scale);
        let peak = scale * f64::from(max);
        let exponentials: f64 = sorted.iter().map(|s| (scale * f64::from(*s) - peak).exp()).sum();
        Some(Self {
            n: n as u32,
            mean: mean as f32,
            std: variance.sqrt() as f32,
            min,
            max,
            lse: (peak + exponentials.ln()) as f32,
            topk_mean: (sum_as_f64(top) / top.len() as f64) as f32,
        })
    }
}

fn sum_as_f64(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_known_scores() {
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
