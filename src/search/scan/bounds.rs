//! Bounds of the scores of a group of rows.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use pulp::WithSimd;

use crate::search::snapshot::{QuantisedQuery, ROWS_PER_GROUP};

/// Values that are folded at one time: the widest vector there is.
const SIMD_LANES: usize = 16;
/// Bounds arithmetic of scores in f32, relative to the terms.
const ROUNDING_SLACK: f32 = 1e-6;

/// Of balanced scores.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScoreSums {
    pub count: usize,
    pub sum: f64,
    pub sum_of_squares: f64,
}

impl ScoreSums {
    pub fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_of_squares += other.sum_of_squares;
    }
}

/// Scores of a group and how far they may be off.
pub struct ScoreBounds {
    pub raw_scores: [f32; ROWS_PER_GROUP],
    pub balanced_scores: [f32; ROWS_PER_GROUP],
    /// Balanced, raw.
    pub lower: [[f32; ROWS_PER_GROUP]; 2],
    pub upper: [[f32; ROWS_PER_GROUP]; 2],
    pub max_low: [f32; 2],
    pub max_high: [f32; 2],
}

impl Default for ScoreBounds {
    fn default() -> Self {
        let zeros = [0.0; ROWS_PER_GROUP];
        let most = [f32::NEG_INFINITY; 2];
        Self {
            raw_scores: zeros,
            balanced_scores: zeros,
            lower: [zeros; 2],
            upper: [zeros; 2],
            max_low: most,
            max_high: most,
        }
    }
}

impl ScoreBounds {
    /// Takes the rows out that may not be found.
    #[inline(always)]
    fn exclude_rows(&mut self, word: u64, n: usize) {
        if word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                for values in self.lower.iter_mut().chain(&mut self.upper) {
                    values[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Moments of the scores of the rows of `word`. Clears those of the others.
    #[inline(always)]
    fn sum_scores(&mut self, word: u64, n: usize) -> ScoreSums {
        if word == 0 {
            return ScoreSums::default();
        }
        if word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                self.balanced_scores[i] = 0.0;
            }
        }
        let (mut sum, mut squares) = ([0f32; SIMD_LANES], [0f32; SIMD_LANES]);
        let (whole, rest) = self.balanced_scores[..n].as_chunks::<SIMD_LANES>();
        for part in whole {
            for lane in 0..SIMD_LANES {
                sum[lane] += part[lane];
                squares[lane] += part[lane] * part[lane];
            }
        }
        for score in rest {
            sum[0] += score;
            squares[0] += score * score;
        }
        ScoreSums {
            count: word.count_ones() as usize,
            sum: f64::from(sum.iter().sum::<f32>()),
            sum_of_squares: f64::from(squares.iter().sum::<f32>()),
        }
    }
}

/// The word of a group of `n` rows that has them all.
fn full_bitmap_word(n: usize) -> u64 {
    if n == ROWS_PER_GROUP { u64::MAX } else { (1 << n) - 1 }
}

pub struct BoundsKernel<'a> {
    pub bounds: &'a mut ScoreBounds,
    pub query: &'a QuantisedQuery,
    pub code_sums: &'a [i32],
    pub scales: &'a [f32],
    pub error_norms: &'a [f32],
    pub alpha: &'a [f32; ROWS_PER_GROUP],
    pub beta: &'a [f32; ROWS_PER_GROUP],
    /// Rows that may be found.
    pub bitmap_word: u64,
    /// Rows that the background is made of.
    pub background_word: u64,
}

impl WithSimd for BoundsKernel<'_> {
    type Output = ScoreSums;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> ScoreSums {
        let n = self.code_sums.len().min(ROWS_PER_GROUP);
        let (sums, scale, error) =
            (&self.code_sums[..n], &self.scales[..n], &self.error_norms[..n]);
        let out = self.bounds;
        for i in 0..n {
            let raw = self.query.approximate_score(scale[i], sums[i]);
            let error_bound = self.query.error_bound(error[i]);
            let (score, width) = with_error(self.alpha[i], self.beta[i], raw, error_bound);
            out.raw_scores[i] = raw;
            out.balanced_scores[i] = score;
            out.lower[0][i] = score - width;
            out.upper[0][i] = score + width;
            out.lower[1][i] = raw - error_bound;
            out.upper[1][i] = raw + error_bound;
        }
        let moments = out.sum_scores(self.background_word, n);
        out.exclude_rows(self.bitmap_word, n);
        out.max_low = [max_value(&out.lower[0][..n]), max_value(&out.lower[1][..n])];
        out.max_high = [max_value(&out.upper[0][..n]), max_value(&out.upper[1][..n])];
        moments
    }
}

/// The balanced score of an approximate raw score, and how far it can be off.
#[inline(always)]
pub fn with_error(alpha: f32, beta: f32, raw: f32, error_bound: f32) -> (f32, f32) {
    let scaled = alpha * raw;
    (scaled + beta, alpha.abs() * error_bound + ROUNDING_SLACK * (scaled.abs() + beta.abs()))
}

#[inline(always)]
fn max_value(values: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; SIMD_LANES];
    let (whole, rest) = values.as_chunks::<SIMD_LANES>();
    for part in whole {
        for lane in 0..SIMD_LANES {
            max[lane] = if part[lane] > max[lane] { part[lane] } else { max[lane] };
        }
    }
    max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}
