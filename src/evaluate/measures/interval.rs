//! How sure a mean or a difference is. Pure; the same seed gives the same.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

/// Samples drawn for an interval.
const BOOTSTRAP_RESAMPLES: usize = 1_000;
/// Random assignments drawn for a test: p can be told down to 0.0005.
const RANDOMISATION_ASSIGNMENTS: usize = 2_000;
/// Sums of the same numbers in another order differ in the last digits.
const SUM_TOLERANCE: f64 = 1e-9;
/// Decides all samples, so that a report can be made again to the last digit.
pub const RESAMPLING_SEED: u64 = 1;

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ConfidenceInterval {
    /// The mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl ConfidenceInterval {
    /// Whether 0 lies outside.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }

    /// Both ends and the mean times `factor`.
    pub fn scaled_by(&self, factor: f64) -> Self {
        let (a, b) = (self.low * factor, self.high * factor);
        Self { mean: self.mean * factor, low: a.min(b), high: a.max(b) }
    }
}

/// What is better of a measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MeasureDirection {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// One measure over a set of queries, beside another way to rank the same queries.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MeasureComparison {
    /// Mean over the queries.
    pub value: ConfidenceInterval,
    /// Mean difference to the other way, query by query: above 0 is more. Being paired, it is far
    /// narrower than the difference of two means.
    pub gain: ConfidenceInterval,
    /// How often a difference as large comes about by chance: paired randomisation test, two-sided
    /// (Fisher; Smucker et al., CIKM 2007).
    pub p_value: f64,
}

/// The mean of `values` with its percentile bootstrap interval (Efron, 1979). `None` where there
/// are no values.
pub fn bootstrap_mean(values: &[f64], seed: u64) -> Option<ConfidenceInterval> {
    let rows: Vec<&[f64]> = values.iter().map(std::slice::from_ref).collect();
    bootstrap_columns(&rows, 1, seed).into_iter().next()
}

/// The ratio of the sums of `clusters`, (value, count) each, with its percentile interval: clusters are
/// drawn whole, since what is in one is not independent (Davison & Hinkley, 1997, §3.8). `None` where
/// nothing is counted.
pub fn bootstrap_clustered_ratio(clusters: &[(f64, u64)], seed: u64) -> Option<ConfidenceInterval> {
    let ratio = |(value, count): (f64, u64)| value / count as f64;
    let add = |a: (f64, u64), b: &(f64, u64)| (a.0 + b.0, a.1 + b.1);
    let counted: Vec<_> = clusters.iter().copied().filter(|(_, count)| *count > 0).collect();
    if counted.is_empty() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut drawn = || counted[rng.random_range(0..counted.len())];
    let sample = |_| ratio((0..counted.len()).fold((0.0, 0), |sum, _| add(sum, &drawn())));
    let mut ratios: Vec<f64> = (0..BOOTSTRAP_RESAMPLES).map(sample).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let mean = ratio(counted.iter().fold((0.0, 0), add));
    Some(ConfidenceInterval { mean, low: lower_bound(&ratios), high: upper_bound(&ratios) })
}

/// Ends of the 95 % interval among sorted samples.
fn lower_bound(samples: &[f64]) -> f64 {
    samples[BOOTSTRAP_RESAMPLES * 25 / 1_000]
}

fn upper_bound(samples: &[f64]) -> f64 {
    samples[BOOTSTRAP_RESAMPLES * 975 / 1_000 - 1]
}

/// Every measure of `measured` beside `baseline`: a row a query, the same queries in the same order,
/// the same measures in each row. Empty where there are no queries.
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
    let p = randomisation_p_values(&differences, width, seed);
    let all = values.into_iter().zip(gains).zip(p);
    all.map(|((value, gain), p)| MeasureComparison { value, gain, p_value: p }).collect()
}

/// Intervals of the means of `width` columns. All columns see the same samples of rows.
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

/// Two-sided p of the means of `width` columns of paired differences: if the two ways were the same,
/// each difference could as well have the other sign.
fn randomisation_p_values(rows: &[&[f64]], width: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let sum = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>().abs();
    let observed: Vec<f64> = (0..width).map(sum).collect();
    let mut as_large = vec![1usize; width];
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
        for (count, (sum, observed)) in as_large.iter_mut().zip(sums.iter().zip(&observed)) {
            *count += usize::from(sum.abs() >= observed - SUM_TOLERANCE);
        }
    }
    as_large
        .into_iter()
        .map(|count| count as f64 / (RANDOMISATION_ASSIGNMENTS + 1) as f64)
        .collect()
}

/// Holm's correction (1979): p values of several comparisons, so that the chance of one false
/// discovery among all stays as stated.
pub fn correct_by_holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_unstable_by(|a, b| p[*a].total_cmp(&p[*b]));
    let mut corrected = vec![0.0; p.len()];
    let mut largest = 0f64;
    for (place, i) in order.into_iter().enumerate() {
        largest = largest.max(p[i] * (p.len() - place) as f64).min(1.0);
        corrected[i] = largest;
    }
    corrected
}

/// A share with its 95 % interval by Wilson's score (1927), which holds for small counts and for
/// shares near 0 and 1. `None` where there is nothing to count.
pub fn wilson_interval(count: usize, total: usize) -> Option<ConfidenceInterval> {
    const Z: f64 = 1.959_963_984_540_054;
    if total == 0 {
        return None;
    }
    let (n, mean) = (total as f64, count as f64 / total as f64);
    let middle = (mean + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some(ConfidenceInterval { mean, low: (middle - half).max(0.0), high: (middle + half).min(1.0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gain_is_paired() {
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
        // 5 % of 200 are 10; 22 or more would come about once in two thousand such tests.
        assert!((1..22).contains(&significant), "{significant}");
    }

    #[test]
    fn an_interval_holds_the_mean_and_shrinks_with_more_queries() {
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
    fn repeated_queries_make_nothing_surer() {
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
            "single lines: the plain bootstrap"
        );
        assert!(
            bootstrap_clustered_ratio(&[(0.0, 0)], 1).is_none()
                && bootstrap_clustered_ratio(&[], 1).is_none()
        );
    }

    #[test]
    fn corrections_and_shares_are_those_of_the_books() {
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
