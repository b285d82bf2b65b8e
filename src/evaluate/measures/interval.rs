//! Confidence intervals and significance tests. Pure functions; the same seed gives the same
//! result.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

/// Number of bootstrap samples per interval.
const BOOTSTRAP_RESAMPLES: usize = 1_000;
/// Number of random sign assignments per test; the smallest possible p is about 0.0005.
const RANDOMISATION_ASSIGNMENTS: usize = 2_000;
/// Tolerance when sums are compared: sums of the same numbers in another order differ in the last
/// digits.
const SUM_TOLERANCE: f64 = 1e-9;
/// Seed of all samples, fixed so that a report can be reproduced to the last digit.
pub const RESAMPLING_SEED: u64 = 1;

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ConfidenceInterval {
    /// The mean over all samples, not resampled.
    pub mean: f64,
    /// Lower bound of the interval.
    pub low: f64,
    /// Upper bound of the interval.
    pub high: f64,
}

impl ConfidenceInterval {
    /// Returns whether 0 is outside the interval.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }

    /// Multiplies mean and bounds by `factor`.
    pub fn scaled_by(&self, factor: f64) -> Self {
        let (a, b) = (self.low * factor, self.high * factor);
        Self { mean: self.mean * factor, low: a.min(b), high: a.max(b) }
    }
}

/// Whether higher or lower values of a measure are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MeasureDirection {
    /// Higher is better.
    Higher,
    /// Lower is better.
    Lower,
}

/// One measure over a set of queries, compared with the baseline's ranking of the same queries.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MeasureComparison {
    /// Mean over the queries.
    pub value: ConfidenceInterval,
    /// Mean difference from the baseline per query; above 0 the value is higher. Because it is
    /// paired, its interval is far narrower than that of a difference of two means.
    pub gain: ConfidenceInterval,
    /// Probability of a difference at least as large by chance: two-sided paired randomisation test
    /// (Fisher; Smucker et al., CIKM 2007).
    pub p_value: f64,
}

/// Returns the mean of `values` with its percentile bootstrap interval (Efron, 1979); `None` if
/// there are no values.
pub fn bootstrap_mean(values: &[f64], seed: u64) -> Option<ConfidenceInterval> {
    let rows: Vec<&[f64]> = values.iter().map(std::slice::from_ref).collect();
    bootstrap_columns(&rows, 1, seed).into_iter().next()
}

/// Returns the sum of the values divided by the sum of the counts, with its percentile bootstrap
/// interval. Each cluster is a pair of value and count. Whole clusters are drawn, because the
/// observations within one are not independent (Davison & Hinkley, 1997, §3.8). Returns `None` if
/// all counts are 0.
pub fn bootstrap_clustered_ratio(clusters: &[(f64, u64)], seed: u64) -> Option<ConfidenceInterval> {
    let ratio = |(value, count): (f64, u64)| value / count as f64;
    let add = |a: (f64, u64), b: &(f64, u64)| (a.0 + b.0, a.1 + b.1);
    let counted: Vec<_> = clusters.iter().copied().filter(|(_, count)| *count > 0).collect();
    if counted.is_empty() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draw_cluster = || counted[rng.random_range(0..counted.len())];
    let resample = |_| ratio((0..counted.len()).fold((0.0, 0), |sum, _| add(sum, &draw_cluster())));
    let mut ratios: Vec<f64> = (0..BOOTSTRAP_RESAMPLES).map(resample).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let mean = ratio(counted.iter().fold((0.0, 0), add));
    Some(ConfidenceInterval { mean, low: lower_bound(&ratios), high: upper_bound(&ratios) })
}

/// Returns the 2.5th percentile of sorted bootstrap samples.
fn lower_bound(samples: &[f64]) -> f64 {
    samples[BOOTSTRAP_RESAMPLES * 25 / 1_000]
}

/// Returns the 97.5th percentile of sorted bootstrap samples.
fn upper_bound(samples: &[f64]) -> f64 {
    samples[BOOTSTRAP_RESAMPLES * 975 / 1_000 - 1]
}

/// Compares every measure of `measured` with `baseline`. Both have one row per query, with the same
/// queries in the same order and the same measures in each row. Returns one comparison per measure;
/// none if there are no queries.
pub fn compare_measures(
    measured: &[&[f64]],
    baseline: &[&[f64]],
    seed: u64,
) -> Vec<MeasureComparison> {
    debug_assert_eq!(measured.len(), baseline.len());
    let width = measured.first().map_or(0, |row| row.len());
    let differences: Vec<Vec<f64>> = measured
        .iter()
        .zip(baseline)
        .map(|(new, old)| new.iter().zip(*old).map(|(new, old)| new - old).collect())
        .collect();
    let differences: Vec<&[f64]> = differences.iter().map(Vec::as_slice).collect();
    let values = bootstrap_columns(measured, width, seed);
    let gains = bootstrap_columns(&differences, width, seed);
    let p_values = randomisation_p_values(&differences, width, seed);
    let columns = values.into_iter().zip(gains).zip(p_values);
    columns.map(|((value, gain), p_value)| MeasureComparison { value, gain, p_value }).collect()
}

/// Returns the intervals of the means of `width` columns. The same samples of rows are used for all
/// columns.
fn bootstrap_columns(rows: &[&[f64]], width: usize, seed: u64) -> Vec<ConfidenceInterval> {
    if rows.is_empty() {
        return Vec::new();
    }
    let count = rows.len() as f64;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means = vec![Vec::with_capacity(BOOTSTRAP_RESAMPLES); width];
    for _ in 0..BOOTSTRAP_RESAMPLES {
        let mut sums = vec![0.0; width];
        for _ in 0..rows.len() {
            let row = rows[rng.random_range(0..rows.len())];
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        means.iter_mut().zip(sums).for_each(|(means, sum)| means.push(sum / count));
    }
    let interval = |(column, mut means): (usize, Vec<f64>)| {
        means.sort_unstable_by(f64::total_cmp);
        ConfidenceInterval {
            mean: rows.iter().map(|row| row[column]).sum::<f64>() / count,
            low: lower_bound(&means),
            high: upper_bound(&means),
        }
    };
    means.into_iter().enumerate().map(interval).collect()
}

/// Returns the two-sided p values of the means of `width` columns of paired differences. If the two
/// rankings were equally good, each difference could as well have the other sign.
fn randomisation_p_values(rows: &[&[f64]], width: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let sum = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>().abs();
    let observed: Vec<f64> = (0..width).map(sum).collect();
    // The observed assignment counts too, so that p is never 0.
    let mut at_least_as_large = vec![1usize; width];
    for _ in 0..RANDOMISATION_ASSIGNMENTS {
        let mut sums = vec![0.0; width];
        let mut bits = 0u64;
        for (i, row) in rows.iter().enumerate() {
            if i % 64 == 0 {
                bits = rng.random();
            }
            let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
            bits >>= 1;
            sums.iter_mut().zip(*row).for_each(|(sum, value)| *sum += sign * value);
        }
        let counts = at_least_as_large.iter_mut();
        for (count, (sum, observed)) in counts.zip(sums.iter().zip(&observed)) {
            *count += usize::from(sum.abs() >= observed - SUM_TOLERANCE);
        }
    }
    at_least_as_large
        .into_iter()
        .map(|count| count as f64 / (RANDOMISATION_ASSIGNMENTS + 1) as f64)
        .collect()
}

/// Corrects the p values of several comparisons by Holm's method (1979), which bounds the
/// probability of any false discovery among all of them.
pub fn correct_by_holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_unstable_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let mut corrected = vec![0.0; p_values.len()];
    let mut largest = 0f64;
    for (smaller, i) in order.into_iter().enumerate() {
        largest = largest.max(p_values[i] * (p_values.len() - smaller) as f64).min(1.0);
        corrected[i] = largest;
    }
    corrected
}

/// Returns a share with its 95 % interval by Wilson's score (1927), which is valid for small counts
/// and for shares near 0 and 1. Returns `None` if `total` is 0.
pub fn wilson_interval(count: usize, total: usize) -> Option<ConfidenceInterval> {
    const Z: f64 = 1.959_963_984_540_054;
    if total == 0 {
        return None;
    }
    let (n, mean) = (total as f64, count as f64 / total as f64);
    let centre = (mean + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half_width =
        Z / (1.0 + Z * Z / n) * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n)).sqrt();
    let (low, high) = ((centre - half_width).max(0.0), (centre + half_width).min(1.0));
    Some(ConfidenceInterval { mean, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_paired_gain_is_narrower_than_that_of_the_mean() {
        let old: Vec<[f64; 1]> = (0..400).map(|i| [f64::from(u8::from(i % 2 == 0))]).collect();
        let new: Vec<[f64; 1]> =
            (0..400).map(|i| [f64::from(u8::from(i % 2 == 0 || i % 20 == 1))]).collect();
        let slices = |all: &'static [[f64; 1]]| all.iter().map(|row| row.as_slice()).collect();
        let (old, new): (Vec<&[f64]>, Vec<&[f64]>) = (slices(old.leak()), slices(new.leak()));
        let column = compare_measures(&new, &old, 1)[0];
        assert!((column.gain.mean - 0.05).abs() < 1e-9 && column.gain.low > 0.0, "{column:?}");
        let width = |i: ConfidenceInterval| i.high - i.low;
        assert!(width(column.gain) < width(column.value) / 1.5, "{column:?}");
        assert!(column.p_value < 0.001, "{column:?}");
        let same = compare_measures(&old, &old, 1)[0];
        assert_eq!((same.gain.mean, same.p_value), (0.0, 1.0));
    }

    #[test]
    fn a_difference_by_chance_is_not_significant_more_often_than_stated() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let significant = (0..200)
            .filter(|seed| {
                let rows: Vec<[f64; 1]> =
                    (0..40).map(|_| [rng.random_range(-1.0..1.0f64)]).collect();
                let rows: Vec<&[f64]> = rows.iter().map(|r| r.as_slice()).collect();
                randomisation_p_values(&rows, 1, *seed)[0] < 0.05
            })
            .count();
        // 5 % of 200 are 10; 22 or more occur about once in two thousand such tests.
        assert!((1..22).contains(&significant), "{significant}");
    }

    #[test]
    fn an_interval_contains_the_mean_and_shrinks_with_more_queries() {
        let width = |n: usize| {
            let values: Vec<f64> = (0..n).map(|i| (i % 2) as f64).collect();
            let i = bootstrap_mean(&values, 1).unwrap();
            assert!(i.low <= i.mean && i.mean <= i.high);
            i.high - i.low
        };
        assert!(width(1_000) < width(50) / 2.0);
        assert!(bootstrap_mean(&[], 1).is_none());
    }

    #[test]
    fn repeated_queries_do_not_narrow_the_interval() {
        let width = |clusters: &[(f64, u64)]| {
            let i = bootstrap_clustered_ratio(clusters, 1).unwrap();
            assert!((i.mean - 0.5).abs() < 1e-12, "{i:?}");
            i.high - i.low
        };
        let once: Vec<_> = (0..100).map(|i| (f64::from(i % 2), 1)).collect();
        let often: Vec<_> = once.iter().map(|(value, _)| (value * 50.0, 50)).collect();
        assert!((width(&once) - width(&often)).abs() < 1e-12);
        let lines: Vec<f64> = once.iter().map(|(value, _)| *value).collect();
        assert_eq!(
            bootstrap_clustered_ratio(&once, 1),
            bootstrap_mean(&lines, 1),
            "clusters of one are the plain bootstrap"
        );
        assert!(
            bootstrap_clustered_ratio(&[(0.0, 0)], 1).is_none()
                && bootstrap_clustered_ratio(&[], 1).is_none()
        );
    }

    #[test]
    fn holm_and_wilson_agree_with_published_values() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-3, "{a} {b}");
        for (corrected, expected) in
            correct_by_holm(&[0.01, 0.04, 0.03]).iter().zip([0.03, 0.06, 0.06])
        {
            close(*corrected, expected);
        }
        // statsmodels.stats.proportion.proportion_confint(5, 100, method="wilson")
        let wilson = wilson_interval(5, 100).unwrap();
        close(wilson.low, 0.02154);
        close(wilson.high, 0.11175);
        assert_eq!(wilson_interval(0, 10).unwrap().low, 0.0);
        assert!(wilson_interval(0, 0).is_none());
    }
}
