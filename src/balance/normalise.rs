//! Normalisers: from the statistics of an image to its balanced score.
//!
//! Every normaliser ranks by scoreᵢ = αᵢ·sᵢ + βᵢ, where sᵢ is the raw cosine score of image i for the
//! query, and αᵢ and βᵢ come from the statistics of image i and constants of the catalogue, never from
//! the query. One scan over the catalogue therefore serves any of them.
//!
//! The formulas are this project's interpretation of BSAP (arXiv 2402.18400), inverted softmax (arXiv
//! 1702.03859) and Nearest Neighbor Normalization (EMNLP 2024). The papers' constants are not
//! reproduced here.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use pulp::WithSimd;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::real::Real;
use super::statistics::{ExactStatistics, ScoreStatistics};

/// Smallest divisor that a normaliser uses. Without it, an image whose auxiliary scores hardly differ
/// would get huge scores and rank at the top of every answer.
pub const MIN_SPREAD: f64 = 1e-3;

/// The formula that balances the raw score of an image against its auxiliary scores.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Normaliser {
    /// Plain CLIP: α = 1, β = 0.
    Raw,
    /// α = 1, β = −LSE/(t·L): softmax over the query and the prompts at temperature t; ranks like inverted
    /// softmax.
    Softmax,
    /// α = 1/σ, β = −μ/σ: how many standard deviations above the image's own mean.
    Zscore,
    /// α = 1/(max−min), β = −min/(max−min): position of the score in the image's own range.
    Range,
    /// α = 1, β = −λ·(mean of the k largest auxiliary scores): Nearest Neighbor Normalization.
    #[default]
    Nnn,
}

impl Normaliser {
    /// All normalisers, in the order in which users see them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Softmax, Self::Zscore, Self::Range, Self::Nnn];

    /// Returns the name in configuration, requests and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Softmax => "softmax",
            Self::Zscore => "zscore",
            Self::Range => "range",
            Self::Nnn => "nnn",
        }
    }
}

/// A normaliser with everything that it needs apart from the statistics of the image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BalanceParameters {
    /// Formula of α and β.
    pub normaliser: Normaliser,
    /// Weight w of the normalised score αs+β in the balanced score w·c·(αs+β) + w·m + (1−w)·s, 0 to 1 (after
    /// BSAP-H). 0 is plain CLIP, 1 is the normaliser alone.
    pub weight: f32,
    /// λ of `nnn`; the other normalisers ignore it.
    pub lambda: f32,
    /// Constants of the catalogue that bring normalised scores to the scale of raw scores, so that a
    /// weight has the same meaning for every normaliser.
    pub scale: ScaleConstants,
}

/// The constants c and m of the balanced score w·c·(αs+β) + w·m + (1−w)·s.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScaleConstants {
    /// Factor c: the median σ (`zscore`) or median max−min (`range`) of the catalogue, otherwise 1.
    pub factor: f32,
    /// Shift m: the median μ (`zscore`) or median minimum (`range`) of the catalogue, otherwise 0.
    pub shift: f32,
}

impl Default for ScaleConstants {
    fn default() -> Self {
        Self { factor: 1.0, shift: 0.0 }
    }
}

impl ScaleConstants {
    /// Computes the constants of `normaliser` from the statistics of all images of a catalogue. They are
    /// medians, so that a few outliers do not change them.
    pub fn from_catalogue(
        normaliser: Normaliser,
        catalogue: impl Iterator<Item = ScoreStatistics>,
    ) -> Self {
        let (factor, shift) = scale_of_catalogue(normaliser, catalogue.map(Moments::from));
        Self { factor, shift }
    }
}

/// The statistics that the formulas of the normalisers use.
#[derive(Clone, Copy)]
struct Moments<T> {
    mean: T,
    std: T,
    min: T,
    max: T,
    lse: T,
    topk_mean: T,
}

impl From<ScoreStatistics> for Moments<f32> {
    #[inline(always)]
    fn from(s: ScoreStatistics) -> Self {
        let ScoreStatistics { n: _, mean, std, min, max, lse, topk_mean } = s;
        Self { mean, std, min, max, lse, topk_mean }
    }
}

impl From<ExactStatistics> for Moments<f64> {
    fn from(s: ExactStatistics) -> Self {
        let ExactStatistics { n: _, mean, std, min, max, lse, topk_mean } = s;
        Self { mean, std, min, max, lse, topk_mean }
    }
}

impl<T: Real> Moments<T> {
    /// Returns σ, but at least [`MIN_SPREAD`].
    #[inline(always)]
    fn clamped_std(&self) -> T {
        self.std.maximum(T::from_f64(MIN_SPREAD))
    }

    /// Returns max − min, but at least [`MIN_SPREAD`].
    #[inline(always)]
    fn clamped_range(&self) -> T {
        (self.max - self.min).maximum(T::from_f64(MIN_SPREAD))
    }

    /// Returns α and β of a normaliser alone, without weight and scale constants.
    #[inline(always)]
    fn coefficients(&self, normaliser: Normaliser, lambda: T, softmax_scale: T) -> (T, T) {
        let one = T::from_f64(1.0);
        match normaliser {
            Normaliser::Raw => (one, T::from_f64(0.0)),
            Normaliser::Softmax => (one, -self.lse / softmax_scale),
            Normaliser::Zscore => {
                let std = self.clamped_std();
                (one / std, -self.mean / std)
            }
            Normaliser::Range => {
                let range = self.clamped_range();
                (one / range, -self.min / range)
            }
            Normaliser::Nnn => (one, -lambda * self.topk_mean),
        }
    }
}

/// Returns the constants c and m of a normaliser over all images of a catalogue.
fn scale_of_catalogue<T: Real>(
    normaliser: Normaliser,
    catalogue: impl Iterator<Item = Moments<T>>,
) -> (T, T) {
    let plain = (T::from_f64(1.0), T::from_f64(0.0));
    let (mut factors, mut shifts): (Vec<T>, Vec<T>) = match normaliser {
        Normaliser::Zscore => catalogue.map(|s| (s.clamped_std(), s.mean)).unzip(),
        Normaliser::Range => catalogue.map(|s| (s.clamped_range(), s.min)).unzip(),
        Normaliser::Raw | Normaliser::Softmax | Normaliser::Nnn => return plain,
    };
    match (median(&mut factors), median(&mut shifts)) {
        (Some(c), Some(m)) => (c, m),
        _ => plain,
    }
}

/// Returns α and β with weight and scale constants included.
#[inline(always)]
fn blend<T: Real>((alpha, beta): (T, T), w: T, (factor, shift): (T, T)) -> (T, T) {
    (w * factor * alpha + (T::from_f64(1.0) - w), w * (factor * beta + shift))
}

/// The affine function αs + β from the raw to the balanced score of one image. Its factor and shift
/// include weight and scale constants.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AffineTransform {
    /// Factor α of the raw score, with weight w and scale constant c included.
    pub alpha: f32,
    /// Shift β, with weight w and scale constants c and m included.
    pub beta: f32,
}

impl AffineTransform {
    /// Plain CLIP.
    pub const RAW: Self = Self { alpha: 1.0, beta: 0.0 };

    /// Returns the balanced score of a raw score.
    pub fn apply(self, raw: f32) -> f32 {
        self.alpha.mul_add(raw, self.beta)
    }
}

impl BalanceParameters {
    /// Plain CLIP.
    pub const RAW: Self = Self {
        normaliser: Normaliser::Raw,
        weight: 1.0,
        lambda: 1.0,
        scale: ScaleConstants { factor: 1.0, shift: 0.0 },
    };

    /// Returns α and β of an image with these statistics, weight and scale constants included.
    /// `softmax_scale` is the scale at which the log-sum-exp was computed.
    #[inline(always)]
    pub fn affine_transform(&self, s: &ScoreStatistics, softmax_scale: f32) -> AffineTransform {
        let moments = Moments::from(*s);
        let unscaled = moments.coefficients(self.normaliser, self.lambda, softmax_scale);
        let scale = (self.scale.factor, self.scale.shift);
        let (alpha, beta) = blend(unscaled, self.weight, scale);
        AffineTransform { alpha, beta }
    }

    /// Returns α and β of every image of a catalogue in f64, and the scale constants that they contain.
    /// The constants are computed from these statistics; `scale` is not used.
    pub fn exact_transforms(
        &self,
        catalogue: &[ExactStatistics],
        softmax_scale: f64,
    ) -> (Vec<ExactTransform>, ScaleConstants) {
        let moments = || catalogue.iter().map(|s| Moments::from(*s));
        let scale = scale_of_catalogue(self.normaliser, moments());
        let (weight, lambda) = (f64::from(self.weight), f64::from(self.lambda));
        let transform = |s: Moments<f64>| {
            let unscaled = s.coefficients(self.normaliser, lambda, softmax_scale);
            let (alpha, beta) = blend(unscaled, weight, scale);
            ExactTransform { alpha, beta }
        };
        let constants = ScaleConstants { factor: scale.0 as f32, shift: scale.1 as f32 };
        (moments().map(transform).collect(), constants)
    }
}

/// [`AffineTransform`] before α and β are rounded to f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExactTransform {
    /// Factor α of the raw score.
    pub alpha: f64,
    /// Shift β.
    pub beta: f64,
}

impl ExactTransform {
    /// Plain CLIP.
    pub const RAW: Self = Self { alpha: 1.0, beta: 0.0 };

    /// Returns the balanced score of a raw score.
    pub fn apply(self, raw: f64) -> f64 {
        self.alpha * raw + self.beta
    }
}

/// Computes α and β of many images, bit for bit as [`BalanceParameters::affine_transform`] does; 1 and 0
/// for images without statistics.
pub struct AffineTransformKernel<'a> {
    /// Normaliser, weight and constants.
    pub balance: BalanceParameters,
    /// Statistics of each image.
    pub statistics: &'a [ScoreStatistics],
    /// The scale at which the log-sum-exps were computed.
    pub softmax_scale: f32,
    /// Receives α and β, one each per image.
    pub alpha_beta: [&'a mut [f32]; 2],
}

impl WithSimd for AffineTransformKernel<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let balance = self.balance;
        // One loop per normaliser, so that no loop branches on the formula.
        match balance.normaliser {
            Normaliser::Raw => {
                self.compute_all(BalanceParameters { normaliser: Normaliser::Raw, ..balance });
            }
            Normaliser::Softmax => {
                self.compute_all(BalanceParameters { normaliser: Normaliser::Softmax, ..balance });
            }
            Normaliser::Zscore => {
                self.compute_all(BalanceParameters { normaliser: Normaliser::Zscore, ..balance });
            }
            Normaliser::Range => {
                self.compute_all(BalanceParameters { normaliser: Normaliser::Range, ..balance });
            }
            Normaliser::Nnn => {
                self.compute_all(BalanceParameters { normaliser: Normaliser::Nnn, ..balance });
            }
        }
    }
}

impl AffineTransformKernel<'_> {
    #[inline(always)]
    fn compute_all(self, balance: BalanceParameters) {
        let [alpha, beta] = self.alpha_beta;
        for ((s, alpha), beta) in self.statistics.iter().zip(alpha).zip(beta) {
            let affine = balance.affine_transform(s, self.softmax_scale);
            (*alpha, *beta) = if s.n == 0 { (1.0, 0.0) } else { (affine.alpha, affine.beta) };
        }
    }
}

/// Returns the median, the upper one of two; `None` if there are no values.
fn median<T: Real>(values: &mut [T]) -> Option<T> {
    if values.is_empty() {
        return None;
    }
    let middle = values.len() / 2;
    Some(*values.select_nth_unstable_by(middle, T::compare).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGIT_SCALE: f32 = 100.0;

    fn sample_statistics() -> Vec<ScoreStatistics> {
        let scores = [[0.20, 0.22, 0.24], [0.10, 0.25, 0.40], [0.30, 0.31, 0.32]];
        scores.iter().map(|s| ScoreStatistics::from_scores(s, LOGIT_SCALE, 2).unwrap()).collect()
    }

    fn parameters_with(normaliser: Normaliser, weight: f32) -> BalanceParameters {
        BalanceParameters {
            normaliser,
            weight,
            lambda: 0.5,
            scale: ScaleConstants::from_catalogue(normaliser, sample_statistics().into_iter()),
        }
    }

    #[test]
    fn batch_of_transforms_equals_single_transforms() {
        let mut statistics: Vec<ScoreStatistics> =
            sample_statistics().into_iter().cycle().take(67).collect();
        statistics[5] = ScoreStatistics { n: 0, ..statistics[5] };
        for normaliser in Normaliser::ALL {
            let balance = parameters_with(normaliser, 0.3);
            let (mut alpha, mut beta) = (vec![0.0; 67], vec![0.0; 67]);
            let transforms = AffineTransformKernel {
                balance,
                statistics: &statistics,
                softmax_scale: LOGIT_SCALE,
                alpha_beta: [&mut alpha, &mut beta],
            };
            pulp::Arch::new().dispatch(transforms);
            for (i, s) in statistics.iter().enumerate() {
                let single = balance.affine_transform(s, LOGIT_SCALE);
                let single = if s.n == 0 { (1.0, 0.0) } else { (single.alpha, single.beta) };
                assert_eq!((alpha[i], beta[i]), single, "{normaliser:?} {i}");
            }
        }
    }

    #[test]
    fn weight_zero_is_plain_clip_for_every_normaliser() {
        for normaliser in Normaliser::ALL {
            for s in sample_statistics() {
                let affine = parameters_with(normaliser, 0.0).affine_transform(&s, LOGIT_SCALE);
                assert_eq!((affine.alpha, affine.beta), (1.0, 0.0), "{normaliser:?}");
            }
        }
    }

    /// The probability σ(L·s − LSE) of inverted softmax ranks as the affine form does.
    #[test]
    fn softmax_ranks_like_the_probability() {
        let raw = [0.27, 0.31, 0.33];
        let (mut by_affine, mut by_probability) = (vec![0, 1, 2], vec![0, 1, 2]);
        let images = sample_statistics();
        let affine = |i: usize| {
            parameters_with(Normaliser::Softmax, 1.0)
                .affine_transform(&images[i], LOGIT_SCALE)
                .apply(raw[i])
        };
        let probability = |i: usize| {
            let z = f64::from(LOGIT_SCALE * raw[i]) - f64::from(images[i].lse);
            1.0 / (1.0 + (-z).exp())
        };
        by_affine.sort_by(|a, b| affine(*b).total_cmp(&affine(*a)));
        by_probability.sort_by(|a, b| probability(*b).total_cmp(&probability(*a)));
        assert_eq!(by_affine, by_probability);
    }

    #[test]
    fn zscore_counts_deviations_and_range_maps_to_zero_and_one() {
        let s = sample_statistics()[1];
        let z = BalanceParameters {
            scale: ScaleConstants::default(),
            ..parameters_with(Normaliser::Zscore, 1.0)
        };
        assert!((z.affine_transform(&s, LOGIT_SCALE).apply(s.mean + s.std) - 1.0).abs() < 1e-4);
        let r = BalanceParameters {
            scale: ScaleConstants::default(),
            ..parameters_with(Normaliser::Range, 1.0)
        };
        assert!((r.affine_transform(&s, LOGIT_SCALE).apply(s.max) - 1.0).abs() < 1e-4);
        assert!(r.affine_transform(&s, LOGIT_SCALE).apply(s.min).abs() < 1e-4);
    }

    #[test]
    fn an_image_with_equal_auxiliary_scores_gets_no_huge_score() {
        let flat = ScoreStatistics::from_scores(&[0.2; 4], LOGIT_SCALE, 2).unwrap();
        for normaliser in Normaliser::ALL {
            let affine = parameters_with(normaliser, 1.0).affine_transform(&flat, LOGIT_SCALE);
            assert!(affine.alpha.is_finite() && affine.alpha <= 1.0 / MIN_SPREAD as f32);
            assert!(affine.beta.is_finite());
        }
    }

    #[test]
    fn exact_transforms_round_to_the_served_ones() {
        let scores = [[0.20f32, 0.22, 0.24], [0.10, 0.25, 0.40], [0.30, 0.31, 0.32]];
        let exact: Vec<ExactStatistics> = scores
            .iter()
            .map(|scores| {
                let mut sorted = scores.to_vec();
                sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                ExactStatistics::from_partitioned(&sorted, f64::from(LOGIT_SCALE), 2).unwrap()
            })
            .collect();
        for normaliser in Normaliser::ALL {
            let balance = parameters_with(normaliser, 0.3);
            let (transforms, constants) = balance.exact_transforms(&exact, f64::from(LOGIT_SCALE));
            assert!((constants.factor - balance.scale.factor).abs() < 1e-6, "{normaliser:?}");
            for (transform, s) in transforms.iter().zip(sample_statistics()) {
                let served = balance.affine_transform(&s, LOGIT_SCALE);
                assert!((transform.alpha - f64::from(served.alpha)).abs() < 1e-4, "{normaliser:?}");
                assert!((transform.beta - f64::from(served.beta)).abs() < 1e-4, "{normaliser:?}");
                let raw = 0.3;
                assert_eq!(transform.apply(raw), transform.alpha * raw + transform.beta);
            }
        }
    }
}
