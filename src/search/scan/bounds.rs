//! Lower and upper bounds of the raw and balanced scores of a group of rows.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use pulp::WithSimd;

use crate::search::snapshot::{QuantisedQuery, ROWS_PER_GROUP};

/// Number of values that are combined at a time, as many as fit into an AVX-512 register.
const SIMD_LANES: usize = 16;
/// Bound on the rounding error of f32 arithmetic on scores, relative to the terms.
const ROUNDING_SLACK: f32 = 1e-6;

/// Sums over balanced scores, from which mean and variance follow.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScoreSums {
    pub count: usize,
    pub sum: f64,
    pub sum_of_squares: f64,
}

impl ScoreSums {
    /// Adds the sums over other rows.
    pub fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_of_squares += other.sum_of_squares;
    }
}

/// Approximate scores of the rows of a group, and their bounds. The arrays of two hold the balanced
/// scores first, then the raw scores.
pub struct ScoreBounds {
    pub raw_scores: [f32; ROWS_PER_GROUP],
    pub balanced_scores: [f32; ROWS_PER_GROUP],
    pub lower: [[f32; ROWS_PER_GROUP]; 2],
    pub upper: [[f32; ROWS_PER_GROUP]; 2],
    /// Largest lower bound of the group.
    pub max_lower: [f32; 2],
    /// Largest upper bound of the group.
    pub max_upper: [f32; 2],
}

impl Default for ScoreBounds {
    fn default() -> Self {
        let zeros = [0.0; ROWS_PER_GROUP];
        let no_rows = [f32::NEG_INFINITY; 2];
        Self {
            raw_scores: zeros,
            balanced_scores: zeros,
            lower: [zeros; 2],
            upper: [zeros; 2],
            max_lower: no_rows,
            max_upper: no_rows,
        }
    }
}

impl ScoreBounds {
    /// Excludes the rows outside of `bitmap_word` by setting their bounds to −∞.
    #[inline(always)]
    fn exclude_rows_outside(&mut self, bitmap_word: u64, n: usize) {
        if bitmap_word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| bitmap_word >> i & 1 == 0) {
                for values in self.lower.iter_mut().chain(&mut self.upper) {
                    values[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Sums the balanced scores of the rows of `bitmap_word`. Sets the scores of the others to 0.
    #[inline(always)]
    fn sum_scores(&mut self, bitmap_word: u64, n: usize) -> ScoreSums {
        if bitmap_word == 0 {
            return ScoreSums::default();
        }
        if bitmap_word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| bitmap_word >> i & 1 == 0) {
                self.balanced_scores[i] = 0.0;
            }
        }
        let (mut sum, mut squares) = ([0f32; SIMD_LANES], [0f32; SIMD_LANES]);
        let (blocks, remainder) = self.balanced_scores[..n].as_chunks::<SIMD_LANES>();
        for block in blocks {
            for lane in 0..SIMD_LANES {
                sum[lane] += block[lane];
                squares[lane] += block[lane] * block[lane];
            }
        }
        for score in remainder {
            sum[0] += score;
            squares[0] += score * score;
        }
        ScoreSums {
            count: bitmap_word.count_ones() as usize,
            sum: f64::from(sum.iter().sum::<f32>()),
            sum_of_squares: f64::from(squares.iter().sum::<f32>()),
        }
    }
}

/// Returns the bitmap word of all `n` rows of a group.
fn full_bitmap_word(n: usize) -> u64 {
    if n == ROWS_PER_GROUP { u64::MAX } else { (1 << n) - 1 }
}

/// Computes the scores and bounds of the rows of a group, and sums the scores of some of them.
pub struct BoundsKernel<'a> {
    pub bounds: &'a mut ScoreBounds,
    pub query: &'a QuantisedQuery,
    /// Dot products of the codes with the query, one per row.
    pub code_sums: &'a [i32],
    pub scales: &'a [f32],
    pub error_norms: &'a [f32],
    pub alpha: &'a [f32; ROWS_PER_GROUP],
    pub beta: &'a [f32; ROWS_PER_GROUP],
    /// Rows that may be hits.
    pub bitmap_word: u64,
    /// Rows whose scores are summed.
    pub background_word: u64,
}

impl WithSimd for BoundsKernel<'_> {
    type Output = ScoreSums;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> ScoreSums {
        let n = self.code_sums.len().min(ROWS_PER_GROUP);
        // Slices of equal length, so that the loop below has no bounds checks.
        let (code_sums, scales, error_norms) =
            (&self.code_sums[..n], &self.scales[..n], &self.error_norms[..n]);
        let out = self.bounds;
        for i in 0..n {
            let raw = self.query.approximate_score(scales[i], code_sums[i]);
            let error_bound = self.query.error_bound(error_norms[i]);
            let (score, score_error) = with_error(self.alpha[i], self.beta[i], raw, error_bound);
            out.raw_scores[i] = raw;
            out.balanced_scores[i] = score;
            out.lower[0][i] = score - score_error;
            out.upper[0][i] = score + score_error;
            out.lower[1][i] = raw - error_bound;
            out.upper[1][i] = raw + error_bound;
        }
        let sums = out.sum_scores(self.background_word, n);
        out.exclude_rows_outside(self.bitmap_word, n);
        out.max_lower = [max_value(&out.lower[0][..n]), max_value(&out.lower[1][..n])];
        out.max_upper = [max_value(&out.upper[0][..n]), max_value(&out.upper[1][..n])];
        sums
    }
}

/// Returns the balanced score of an approximate raw score, and how far it can be from the exact one.
#[inline(always)]
pub fn with_error(alpha: f32, beta: f32, raw: f32, error_bound: f32) -> (f32, f32) {
    let scaled = alpha * raw;
    (scaled + beta, alpha.abs() * error_bound + ROUNDING_SLACK * (scaled.abs() + beta.abs()))
}

/// Returns the largest value; −∞ if there are none.
#[inline(always)]
fn max_value(values: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; SIMD_LANES];
    let (blocks, remainder) = values.as_chunks::<SIMD_LANES>();
    for block in blocks {
        for lane in 0..SIMD_LANES {
            max[lane] = if block[lane] > max[lane] { block[lane] } else { max[lane] };
        }
    }
    max.iter().chain(remainder).copied().fold(f32::NEG_INFINITY, f32::max)
}
