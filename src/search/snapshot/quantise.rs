//! Eight-bit codes of embeddings, with a proven bound on the error of a score computed from them.
//!
//! A row **v** of a chunk is written as vⱼ = cⱼ + s·Dⱼ·xⱼ + eⱼ. The centre c and the units D belong to
//! the chunk, the scale s to the row, the code x is a whole number in −127..=127, and e is the
//! quantisation error. CLIP's embeddings lie in a narrow cone around their mean, and a few of their
//! dimensions spread ten times as far as the others. Subtracting the centre removes the cone, and the
//! units keep those few dimensions from wasting the range of all others.
//!
//! For a query **q** the scan computes r̃ = q·c + s·u·Σ tⱼxⱼ, where the t are whole numbers with
//! qⱼDⱼ = u·tⱼ + fⱼ. By Cauchy–Schwarz, |q·v − r̃| ≤ ‖q‖·‖e‖ + ‖f‖·s·‖x‖ for any data. ‖e‖ is stored
//! for each row (rounded up), the largest s·‖x‖ for each chunk. t has up to 15 bits, so that the
//! second term is small.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use half::f16;

/// The codes of a row are padded with zeros to a multiple of this, so that kernels have no remainder.
pub const CODE_ALIGNMENT: usize = 32;
/// Maximum number of rows of a chunk from which its centre and units are learnt.
const MAX_SAMPLE_ROWS: usize = 8192;
/// Bound on the rounding error of f32 arithmetic, relative to the largest intermediate value.
const ROUNDING_SLACK: f32 = 2e-6;

/// Codes of the rows of one chunk. The symbols are those of the module documentation.
#[derive(Debug)]
pub struct QuantisedVectors {
    dimension: usize,
    padded_dimension: usize,
    /// c, `dimension` values.
    centre: Box<[f32]>,
    /// D, `dimension` values.
    units: Box<[f32]>,
    /// x, `padded_dimension` values per row.
    codes: Box<[i8]>,
    /// s, one per row.
    pub scales: Box<[f32]>,
    /// ‖e‖, rounded up, one per row.
    pub error_norms: Box<[f32]>,
    /// The largest s·‖x‖ of all rows, rounded up.
    max_code_norm: f32,
}

/// The constants of a query for one chunk; its whole numbers t are kept separately.
#[derive(Debug, Clone, Copy)]
pub struct QuantisedQuery {
    /// u.
    unit: f32,
    /// q·c.
    centre_dot: f32,
    /// ‖q‖.
    query_norm: f32,
    /// Bounds all errors except ‖q‖·‖e‖: the rounding of the query to t, and f32 arithmetic.
    rounding_slack: f32,
}

impl QuantisedQuery {
    /// Returns r̃ of a row with scale s for which Σ tⱼxⱼ is `sum`.
    #[inline(always)]
    pub fn approximate_score(&self, scale: f32, sum: i32) -> f32 {
        self.centre_dot + scale * self.unit * sum as f32
    }

    /// Returns how far r̃ can be from the exact score of a row with this ‖e‖.
    #[inline(always)]
    pub fn error_bound(&self, error_norm: f32) -> f32 {
        self.query_norm * error_norm + self.rounding_slack
    }
}

impl QuantisedVectors {
    /// Quantises rows of `dimension` values each.
    pub fn from_vectors(vectors: &[f16], dimension: usize) -> Self {
        let padded_dimension = dimension.next_multiple_of(CODE_ALIGNMENT);
        let rows = vectors.len() / dimension.max(1);
        let (centre, units) = learn_centre_and_units(vectors, dimension);
        let mut codes = vec![0i8; rows * padded_dimension].into_boxed_slice();
        let (mut scales, mut error_norms) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let mut max_code_norm = 0f64;
        let mut residual = vec![0f32; dimension];
        let code_rows = codes.chunks_exact_mut(padded_dimension);
        for (vector, codes) in vectors.chunks_exact(dimension).zip(code_rows) {
            let mut peak = 0f32;
            let centred = centre.iter().zip(&units);
            for ((r, v), (c, unit)) in residual.iter_mut().zip(vector).zip(centred) {
                *r = (v.to_f32() - c) / unit;
                peak = peak.max(r.abs());
            }
            let s = if peak > 0.0 { peak / 127.0 } else { 1.0 };
            // ‖e‖² and ‖x‖².
            let (mut error_squared, mut code_squared) = (0f64, 0f64);
            for j in 0..dimension {
                let code = (residual[j] / s).round().clamp(-127.0, 127.0);
                codes[j] = code as i8;
                code_squared += f64::from(code) * f64::from(code);
                let decoded =
                    f64::from(centre[j]) + f64::from(s) * f64::from(units[j]) * f64::from(code);
                error_squared += (f64::from(vector[j].to_f32()) - decoded).powi(2);
            }
            scales.push(s);
            error_norms.push(round_up(error_squared.sqrt()));
            max_code_norm = max_code_norm.max(f64::from(s) * code_squared.sqrt());
        }
        Self {
            dimension,
            padded_dimension,
            centre: centre.into(),
            units: units.into(),
            codes,
            scales: scales.into(),
            error_norms: error_norms.into(),
            max_code_norm: round_up(max_code_norm),
        }
    }

    /// Returns the number of codes per row, including the padding.
    pub fn padded_dimension(&self) -> usize {
        self.padded_dimension
    }

    /// Returns the codes of rows `from..to`.
    pub fn codes_of_rows(&self, from: usize, to: usize) -> &[i8] {
        &self.codes[from * self.padded_dimension..to * self.padded_dimension]
    }

    /// Quantises `query` and appends its whole numbers t, as many as a row has codes, to `integers`.
    pub fn quantise_query(&self, query: &[f32], integers: &mut Vec<i16>) -> QuantisedQuery {
        // A larger t could make the i32 sum of a row overflow.
        let overflow_limit = f64::from(i32::MAX) / (127.0 * self.padded_dimension as f64);
        let max_integer = overflow_limit.floor().min(f64::from(i16::MAX));
        let scaled = || query.iter().zip(&self.units).map(|(q, d)| f64::from(*q) * f64::from(*d));
        let peak = scaled().map(f64::abs).fold(0.0, f64::max);
        let unit = if peak > 0.0 { (peak / max_integer) as f32 } else { 1.0 };
        let (mut centre_dot, mut query_squared) = (0f64, 0f64);
        // ‖f‖² and ‖qD‖².
        let (mut error_squared, mut scaled_squared) = (0f64, 0f64);
        for (value, (query, centre)) in scaled().zip(query.iter().zip(&self.centre)) {
            let integer = (value / f64::from(unit)).round().clamp(-max_integer, max_integer);
            integers.push(integer as i16);
            error_squared += (value - f64::from(unit) * integer).powi(2);
            scaled_squared += value * value;
            centre_dot += f64::from(*query) * f64::from(*centre);
            query_squared += f64::from(*query).powi(2);
        }
        integers.resize(integers.len() + self.padded_dimension - self.dimension, 0);
        let largest_value =
            centre_dot.abs() as f32 + self.max_code_norm * 1.01 * round_up(scaled_squared.sqrt());
        QuantisedQuery {
            unit,
            centre_dot: centre_dot as f32,
            query_norm: round_up(query_squared.sqrt()),
            rounding_slack: round_up(error_squared.sqrt()) * self.max_code_norm
                + ROUNDING_SLACK * largest_value,
        }
    }

    /// Returns the bytes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.codes.len() + 4 * (self.scales.len() + self.error_norms.len() + 2 * self.dimension)
    }
}

/// Returns an f32 that is not less than `value`.
fn round_up(value: f64) -> f32 {
    ((value * (1.0 + 1e-6)) as f32).next_up()
}

/// Returns the centre and the units: the mean of each dimension, and its standard deviation but at
/// least that of the median dimension. A dimension that spreads far gets a coarser unit; no dimension
/// gets a finer unit than the median one.
fn learn_centre_and_units(vectors: &[f16], dimension: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = vectors.len() / dimension.max(1);
    let step = rows.div_ceil(MAX_SAMPLE_ROWS).max(1);
    let (mut sum, mut squares, mut n) = (vec![0f64; dimension], vec![0f64; dimension], 0f64);
    for row in vectors.chunks_exact(dimension.max(1)).step_by(step) {
        n += 1.0;
        for ((sum, squares), v) in sum.iter_mut().zip(&mut squares).zip(row) {
            let v = v.to_f64();
            *sum += v;
            *squares += v * v;
        }
    }
    let n = n.max(1.0);
    let centre: Vec<f32> = sum.iter().map(|s| (s / n) as f32).collect();
    let spread =
        |(squares, sum): (&f64, &f64)| (squares / n - (sum / n).powi(2)).max(0.0).sqrt() as f32;
    let spreads: Vec<f32> = squares.iter().zip(&sum).map(spread).collect();
    let mut sorted = spreads.clone();
    sorted.sort_unstable_by(f32::total_cmp);
    let median = sorted.get(dimension / 2).copied().unwrap_or(1.0);
    let median = if median > 1e-6 { median } else { 1.0 };
    (centre, spreads.iter().map(|s| s.max(median)).collect())
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::search::snapshot::dot_products::compute_dot_products;

    /// The bound holds for any data, including outlier dimensions and constant rows.
    #[test]
    fn no_score_error_exceeds_its_bound() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for dimension in [1, 5, 32, 100, 512] {
            let spread = |j: usize| if j % 37 == 3 { 3.0 } else { 0.05 };
            let mut vector = |shift: f32| -> Vec<f32> {
                (0..dimension).map(|j| shift + spread(j) * rng.random_range(-1f32..1.0)).collect()
            };
            let mut rows: Vec<Vec<f32>> = (0..50).map(|_| vector(0.2)).collect();
            rows.push(vec![0.0; dimension]);
            let stored: Vec<f16> = rows.iter().flatten().map(|v| f16::from_f32(*v)).collect();
            let quantised = QuantisedVectors::from_vectors(&stored, dimension);
            for scale in [1e-3, 1.0, 30.0] {
                let query: Vec<f32> = vector(-0.1).iter().map(|v| v * scale).collect();
                let mut integers = Vec::new();
                let quantised_query = quantised.quantise_query(&query, &mut integers);
                let mut sums = vec![0; rows.len()];
                compute_dot_products(
                    quantised.codes_of_rows(0, rows.len()),
                    &integers,
                    quantised.padded_dimension(),
                    &mut sums,
                );
                for (i, row) in stored.chunks_exact(dimension).enumerate() {
                    let exact: f64 =
                        row.iter().zip(&query).map(|(v, q)| v.to_f64() * f64::from(*q)).sum();
                    let score = quantised_query.approximate_score(quantised.scales[i], sums[i]);
                    let error = (f64::from(score) - exact).abs();
                    let bound = quantised_query.error_bound(quantised.error_norms[i]);
                    assert!(error <= bound.into(), "{dimension} {i}: {error} > {bound}");
                }
            }
        }
    }
}
