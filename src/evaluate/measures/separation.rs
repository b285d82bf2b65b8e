//! How well the score of the first result separates queries that some image answers from those that no
//! image answers. Pure functions.

use super::interval::ConfidenceInterval;

/// Quantile of the normal distribution for a 95 % interval.
const Z: f64 = 1.959_963_984_540_054;

/// Scores of first results.
#[derive(Debug, Clone, Default)]
pub struct FirstScores {
    /// Of queries that some image answers.
    pub answerable: Vec<f64>,
    /// Of queries that no image answers.
    pub unanswerable: Vec<f64>,
}

/// The area under the ROC curve, compared with that of the baseline on the same queries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SeparationComparison {
    /// Probability that the first result of an answerable query has a higher score than that of an
    /// unanswerable one: 0.5 separates nothing, 1 everything.
    pub auroc: ConfidenceInterval,
    /// Difference from the baseline; above 0 the queries are separated better.
    pub gain: ConfidenceInterval,
}

/// Compares how two configurations separate the same queries. Intervals are DeLong's (Biometrics, 1988),
/// that of the difference paired by query. Returns `None` if there are fewer than two queries of a kind.
pub fn compare_separation(
    new: &FirstScores,
    baseline: &FirstScores,
) -> Option<SeparationComparison> {
    if new.answerable.len() < 2 || new.unanswerable.len() < 2 {
        return None;
    }
    let (new, old) = (Placements::new(new), Placements::new(baseline));
    let difference = Placements {
        of_answerable: subtract(&new.of_answerable, &old.of_answerable),
        of_unanswerable: subtract(&new.of_unanswerable, &old.of_unanswerable),
    };
    let auroc = new.interval();
    let auroc = ConfidenceInterval { low: auroc.low.max(0.0), high: auroc.high.min(1.0), ..auroc };
    Some(SeparationComparison { auroc, gain: difference.interval() })
}

/// Share of the queries of the other kind on whose right side each query is; equal scores count half.
struct Placements {
    of_answerable: Vec<f64>,
    of_unanswerable: Vec<f64>,
}

impl Placements {
    fn new(scores: &FirstScores) -> Self {
        let sorted = |scores: &[f64]| {
            let mut sorted = scores.to_vec();
            sorted.sort_unstable_by(f64::total_cmp);
            sorted
        };
        let share_below = |sorted: &[f64], score: f64| {
            let below = sorted.partition_point(|other| *other < score);
            let equal = sorted.partition_point(|other| *other <= score) - below;
            (below as f64 + equal as f64 / 2.0) / sorted.len() as f64
        };
        let (answerable, unanswerable) = (sorted(&scores.answerable), sorted(&scores.unanswerable));
        let above = |score: &f64| share_below(&unanswerable, *score);
        let below = |score: &f64| 1.0 - share_below(&answerable, *score);
        Self {
            of_answerable: scores.answerable.iter().map(above).collect(),
            of_unanswerable: scores.unanswerable.iter().map(below).collect(),
        }
    }

    /// Returns the mean placement with its interval.
    fn interval(&self) -> ConfidenceInterval {
        let (mean, variance) = mean_and_variance(&self.of_answerable);
        let (_, other_variance) = mean_and_variance(&self.of_unanswerable);
        let half_width = Z
            * (variance / self.of_answerable.len() as f64
                + other_variance / self.of_unanswerable.len() as f64)
                .sqrt();
        ConfidenceInterval { mean, low: mean - half_width, high: mean + half_width }
    }
}

fn subtract(new: &[f64], old: &[f64]) -> Vec<f64> {
    new.iter().zip(old).map(|(new, old)| new - old).collect()
}

/// Returns the mean and the sample variance of at least two values.
fn mean_and_variance(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, squares / (count - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(answerable: &[f64], unanswerable: &[f64]) -> FirstScores {
        FirstScores { answerable: answerable.to_vec(), unanswerable: unanswerable.to_vec() }
    }

    #[test]
    fn the_area_is_the_share_of_pairs_in_the_right_order() {
        // Of the 12 pairs 8 are in order and one is equal.
        let plain = scores(&[0.2, 0.5, 0.6, 0.9], &[0.1, 0.5, 0.55]);
        let compared = compare_separation(&plain, &plain).unwrap();
        assert!((compared.auroc.mean - 8.5 / 12.0).abs() < 1e-12, "{compared:?}");
        assert!(compared.auroc.low < 8.5 / 12.0 && compared.auroc.high == 1.0, "{compared:?}");
        assert_eq!((compared.gain.mean, compared.gain.low, compared.gain.high), (0.0, 0.0, 0.0));
        let perfect = compare_separation(&scores(&[2.0, 3.0], &[0.0, 1.0]), &plain);
        assert_eq!(perfect.unwrap().auroc.mean, 1.0);
        assert_eq!(compare_separation(&scores(&[1.0], &[0.0, 0.5]), &plain), None);
    }

    #[test]
    fn a_difference_is_paired_by_query() {
        let spread = |i: u32| f64::from(i * 7919 % 1_000) / 1_000.0;
        let answerable: Vec<f64> = (0..300).map(|i| spread(i) + 0.3).collect();
        let unanswerable: Vec<f64> = (300..600).map(spread).collect();
        let old = scores(&answerable, &unanswerable);
        let lower: Vec<f64> = answerable.iter().map(|score| score - 0.05).collect();
        let compared = compare_separation(&scores(&lower, &unanswerable), &old).unwrap();
        assert!(compared.gain.mean < 0.0 && compared.gain.high < 0.0, "{compared:?}");
        let width = |i: ConfidenceInterval| i.high - i.low;
        assert!(width(compared.gain) < width(compared.auroc) / 3.0, "{compared:?}");
    }
}
