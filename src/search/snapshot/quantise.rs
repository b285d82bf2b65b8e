//! Eight-bit codes of embeddings, with a proven bound of what they lose.
//!
//! A row **v** of a chunk is written as vⱼ = cⱼ + s·Dⱼ·xⱼ + eⱼ: the centre c and the unit D belong to
//! the chunk, the scale s to the row, the code x is a whole number in −127..=127, and e is what is lost.
//! CLIP's embeddings lie in a narrow cone around their mean and have a few dimensions that spread ten
//! times as far as the others: the centre takes the cone away, and the units keep those few dimensions
//! from wasting the range of all others.
//!
//! For a query **q** the scan computes r̃ = q·c + s·u·Σ tⱼxⱼ, where t are whole numbers with
//! qⱼDⱼ = u·tⱼ + fⱼ. By Cauchy–Schwarz, |q·v − r̃| ≤ ‖q‖·‖e‖ + ‖f‖·s·‖x‖, whatever the data. ‖e‖ is
//! stored for each row (rounded up), the largest s·‖x‖ for each chunk. t has up to 15 bits, so the
//! second part is small.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use half::f16;

/// Codes of a row are filled up to a multiple of this, so that kernels have no rest.
pub const CODE_ALIGNMENT: usize = 32;
/// Rows of a chunk from which its centre and units are learnt.
const MAX_SAMPLE_ROWS: usize = 8192;
/// Bounds arithmetic in f32, relative to the largest intermediate value.
const ROUNDING_SLACK: f32 = 2e-6;

/// Codes of the rows of one chunk.
#[derive(Debug)]
pub struct QuantisedVectors {
    dimension: usize,
    padded_dimension: usize,
    centre: Box<[f32]>,
    units: Box<[f32]>,
    /// `width` codes a row.
    codes: Box<[i8]>,
    /// s of each row.
    pub scales: Box<[f32]>,
    /// At least ‖e‖ of each row.
    pub error_norms: Box<[f32]>,
    /// At least s·‖x‖ of every row.
    max_code_norm: f32,
}

/// A query as one chunk's codes are multiplied with.
#[derive(Debug, Clone, Copy)]
pub struct QuantisedQuery {
    /// u.
    unit: f32,
    /// q·c.
    centre_dot: f32,
    /// ‖q‖.
    query_norm: f32,
    /// Bounds everything but ‖q‖·‖e‖.
    rounding_slack: f32,
}

impl QuantisedQuery {
    /// r̃ of a row with this scale whose codes gave this sum.
    #[inline(always)]
    pub fn approximate_score(&self, scale: f32, sum: i32) -> f32 {
        self.centre_dot + scale * self.unit * sum as f32
    }

    /// How far r̃ can be from the exact score of a row with this error.
    #[inline(always)]
    pub fn error_bound(&self, error: f32) -> f32 {
        self.query_norm * error + self.rounding_slack
    }
}

impl QuantisedVectors {
    /// Codes of rows of `dimension` values each.
    pub fn from_vectors(vectors: &[f16], dimension: usize) -> Self {
        let width = dimension.next_multiple_of(CODE_ALIGNMENT);
        let rows = vectors.len() / dimension.max(1);
        let (centre, unit) = learn_centre_and_units(vectors, dimension);
        let mut codes = vec![0i8; rows * width].into_boxed_slice();
        let (mut scale, mut error) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let mut max_code_norm = 0f64;
        let mut residual = vec![0f32; dimension];
        for (vector, codes) in vectors.chunks_exact(dimension).zip(codes.chunks_exact_mut(width)) {
            let mut peak = 0f32;
            for ((r, v), (c, unit)) in residual.iter_mut().zip(vector).zip(centre.iter().zip(&unit))
            {
                *r = (v.to_f32() - c) / unit;
                peak = peak.max(r.abs());
            }
            let s = if peak > 0.0 { peak / 127.0 } else { 1.0 };
            let (mut lost, mut length) = (0f64, 0f64);
            for j in 0..dimension {
                let code = (residual[j] / s).round().clamp(-127.0, 127.0);
                codes[j] = code as i8;
                length += f64::from(code) * f64::from(code);
                let written =
                    f64::from(centre[j]) + f64::from(s) * f64::from(unit[j]) * f64::from(code);
                lost += (f64::from(vector[j].to_f32()) - written).powi(2);
            }
            scale.push(s);
            error.push(round_up(lost.sqrt()));
            max_code_norm = max_code_norm.max(f64::from(s) * length.sqrt());
        }
        Self {
            dimension,
            padded_dimension: width,
            centre: centre.into(),
            units: unit.into(),
            codes,
            scales: scale.into(),
            error_norms: error.into(),
            max_code_norm: round_up(max_code_norm),
        }
    }

    /// Codes a row, those of filling up among them.
    pub fn padded_dimension(&self) -> usize {
        self.padded_dimension
    }

    /// The codes of rows `from..to`.
    pub fn codes_of_rows(&self, from: usize, to: usize) -> &[i8] {
        &self.codes[from * self.padded_dimension..to * self.padded_dimension]
    }

    /// Makes `query` ready and appends its whole numbers, as many as a row has codes, to `integers`.
    pub fn quantise_query(&self, query: &[f32], integers: &mut Vec<i16>) -> QuantisedQuery {
        let max_integer = f64::from(i32::MAX) / (127.0 * self.padded_dimension as f64);
        let most = max_integer.floor().min(f64::from(i16::MAX));
        let units = || query.iter().zip(&self.units).map(|(q, d)| f64::from(*q) * f64::from(*d));
        let peak = units().map(f64::abs).fold(0.0, f64::max);
        let unit = if peak > 0.0 { (peak / most) as f32 } else { 1.0 };
        let (mut base, mut norm, mut lost, mut length) = (0f64, 0f64, 0f64, 0f64);
        for (value, (query, centre)) in units().zip(query.iter().zip(&self.centre)) {
            let whole = (value / f64::from(unit)).round().clamp(-most, most);
            integers.push(whole as i16);
            lost += (value - f64::from(unit) * whole).powi(2);
            length += value * value;
            base += f64::from(*query) * f64::from(*centre);
            norm += f64::from(*query).powi(2);
        }
        integers.resize(integers.len() + self.padded_dimension - self.dimension, 0);
        let slack = round_up(lost.sqrt()) * self.max_code_norm
            + ROUNDING_SLACK
                * (base.abs() as f32 + self.max_code_norm * 1.01 * round_up(length.sqrt()));
        QuantisedQuery {
            unit,
            centre_dot: base as f32,
            query_norm: round_up(norm.sqrt()),
            rounding_slack: slack,
        }
    }

    /// Bytes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.codes.len() + 4 * (self.scales.len() + self.error_norms.len() + 2 * self.dimension)
    }
}

/// Not less than `value`, in f32.
fn round_up(value: f64) -> f32 {
    ((value * (1.0 + 1e-6)) as f32).next_up()
}

/// The mean of each dimension, and its spread, but not less than the median dimension's: an
/// outlier dimension gets a coarser unit, no dimension a finer one than most.
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
    let spread = |(s, sum): (&f64, &f64)| (s / n - (sum / n).powi(2)).max(0.0).sqrt() as f32;
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

    /// The bound holds for any data, outlier dimensions and constant rows among them.
    #[test]
    fn no_score_is_further_off_than_its_bound() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for dimension in [1, 5, 32, 100, 512] {
            let spread = |j: usize| if j % 37 == 3 { 3.0 } else { 0.05 };
            let mut vector = |shift: f32| -> Vec<f32> {
                (0..dimension).map(|j| shift + spread(j) * rng.random_range(-1f32..1.0)).collect()
            };
            let mut rows: Vec<Vec<f32>> = (0..50).map(|_| vector(0.2)).collect();
            rows.push(vec![0.0; dimension]);
            let stored: Vec<f16> = rows.iter().flatten().map(|v| f16::from_f32(*v)).collect();
            let codes = QuantisedVectors::from_vectors(&stored, dimension);
            for scale in [1e-3, 1.0, 30.0] {
                let query: Vec<f32> = vector(-0.1).iter().map(|v| v * scale).collect();
                let mut integers = Vec::new();
                let prepared = codes.quantise_query(&query, &mut integers);
                let mut sums = vec![0; rows.len()];
                compute_dot_products(
                    codes.codes_of_rows(0, rows.len()),
                    &integers,
                    codes.padded_dimension(),
                    &mut sums,
                );
                for (i, row) in stored.chunks_exact(dimension).enumerate() {
                    let exact: f64 =
                        row.iter().zip(&query).map(|(v, q)| v.to_f64() * f64::from(*q)).sum();
                    let off = (f64::from(prepared.approximate_score(codes.scales[i], sums[i]))
                        - exact)
                        .abs();
                    let bound = f64::from(prepared.error_bound(codes.error_norms[i]));
                    assert!(off <= bound, "{dimension} {i}: {off} > {bound}");
                }
            }
        }
    }
}
