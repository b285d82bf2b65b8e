//! Measures of a ranking whose right answers are known. Pure.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

/// How far down a ranking is looked.
pub const DEPTH: usize = 10;
/// Samples drawn for an interval.
const RESAMPLES: usize = 1_000;

/// What the ranking for one query is worth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measures {
    /// 1 where the first result is right.
    pub hit_at_1: f64,
    /// 1 where one of the first five is right.
    pub hit_at_5: f64,
    /// 1 where one of the first ten is right.
    pub hit_at_10: f64,
    /// Right ones among the first ten, of all that could be there: min(10, right ones in all).
    pub recall_at_10: f64,
    /// Right ones among the first ten, of ten.
    pub precision_at_10: f64,
    /// 1 where the first result is wrong: the confident mistake that a user sees first.
    pub false_hit: f64,
}

impl Measures {
    /// Names, in the order of [`Measures::values`].
    pub const NAMES: [&str; 6] =
        ["hit@1", "hit@5", "hit@10", "recall@10", "precision@10", "false hit"];

    /// From whether each of the best results is right, best first, and how many right ones there
    /// are in all. `None` where there is no right one: such a query tells nothing.
    pub fn of(right: &[bool], total: usize) -> Option<Self> {
        if total == 0 {
            return None;
        }
        let within = |depth: usize| right.iter().take(depth).filter(|r| **r).count();
        let hit = |depth: usize| f64::from(u8::from(within(depth) > 0));
        let found = within(DEPTH) as f64;
        Some(Self {
            hit_at_1: hit(1),
            hit_at_5: hit(5),
            hit_at_10: hit(10),
            recall_at_10: found / total.min(DEPTH) as f64,
            precision_at_10: found / DEPTH as f64,
            false_hit: 1.0 - hit(1),
        })
    }

    /// The values, in the order of [`Measures::NAMES`].
    pub fn values(&self) -> [f64; 6] {
        [
            self.hit_at_1,
            self.hit_at_5,
            self.hit_at_10,
            self.recall_at_10,
            self.precision_at_10,
            self.false_hit,
        ]
    }
}

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The mean of `values` with its percentile bootstrap interval (Efron, 1979); the same seed gives
/// the same. `None` where there are no values.
pub fn bootstrap(values: &[f64], seed: u64) -> Option<Interval> {
    let mean = |sum: f64| sum / values.len() as f64;
    if values.is_empty() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| mean((0..values.len()).map(|_| values[rng.random_range(0..values.len())]).sum()))
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    Some(Interval {
        mean: mean(values.iter().sum()),
        low: means[RESAMPLES * 25 / 1_000],
        high: means[RESAMPLES * 975 / 1_000 - 1],
    })
}

/// A way to rank over a set of queries, beside another way over the same queries.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Queries that have a right answer.
    pub queries: usize,
    /// Means, in the order of [`Measures::NAMES`].
    pub measures: Vec<Interval>,
    /// Mean gain over the other way, query by query, in the same order: above 0 is more. Being
    /// paired, it is far narrower than the difference of two means.
    pub gains: Vec<Interval>,
}

impl Summary {
    /// Summarises `measured` beside `baseline`, the same queries in the same order.
    pub fn of(measured: &[Measures], baseline: &[Measures], seed: u64) -> Self {
        debug_assert_eq!(measured.len(), baseline.len());
        let column = |all: &[Measures], m: usize| -> Vec<f64> {
            all.iter().map(|measures| measures.values()[m]).collect()
        };
        let names = 0..Measures::NAMES.len();
        let mean = |m| bootstrap(&column(measured, m), seed);
        let gain = |m| {
            let pairs = column(measured, m).into_iter().zip(column(baseline, m));
            bootstrap(&pairs.map(|(new, old)| new - old).collect::<Vec<f64>>(), seed)
        };
        Self {
            queries: measured.len(),
            measures: names.clone().filter_map(mean).collect(),
            gains: names.filter_map(gain).collect(),
        }
    }
}

/// Indices of the `depth` largest scores, best first; ties go to the smaller index.
pub fn best(scores: &[f32], depth: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if depth < order.len() {
        order.select_nth_unstable_by(depth, by_score);
        order.truncate(depth);
    }
    order.sort_unstable_by(by_score);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_of_a_known_ranking() {
        let m = Measures::of(&[false, true, false, true], 3).unwrap();
        assert_eq!((m.hit_at_1, m.hit_at_5, m.hit_at_10), (0.0, 1.0, 1.0));
        assert!((m.recall_at_10 - 2.0 / 3.0).abs() < 1e-12);
        assert!((m.precision_at_10 - 0.2).abs() < 1e-12);
        assert_eq!(Measures::of(&[true; 10], 500).unwrap().recall_at_10, 1.0);
        assert!(Measures::of(&[false], 0).is_none());
    }

    #[test]
    fn a_gain_is_paired() {
        let measured = |first: bool| Measures::of(&[first, true], 1).unwrap();
        let old: Vec<Measures> = (0..400).map(|i| measured(i % 2 == 0)).collect();
        let new: Vec<Measures> = (0..400).map(|i| measured(i % 2 == 0 || i % 20 == 1)).collect();
        let summary = Summary::of(&new, &old, 1);
        let (mean, gain) = (summary.measures[0], summary.gains[0]);
        assert_eq!(summary.queries, 400);
        assert!((gain.mean - 0.05).abs() < 1e-9 && gain.low > 0.0, "{gain:?}");
        assert!(gain.high - gain.low < (mean.high - mean.low) / 1.5, "{gain:?} {mean:?}");
        assert!((summary.gains[5].mean + 0.05).abs() < 1e-9, "the false hits fell");
    }

    #[test]
    fn an_interval_holds_the_mean_and_shrinks_with_more_queries() {
        let width = |n: usize| {
            let values: Vec<f64> = (0..n).map(|i| (i % 2) as f64).collect();
            let i = bootstrap(&values, 1).unwrap();
            assert!(i.low <= i.mean && i.mean <= i.high);
            i.high - i.low
        };
        assert!(width(1_000) < width(50) / 2.0);
        assert!(bootstrap(&[], 1).is_none());
    }

    #[test]
    fn the_best_come_first() {
        assert_eq!(best(&[0.1, 0.5, 0.5, 0.9], 3), [3, 1, 2]);
        assert_eq!(best(&[0.1], 3), [0]);
    }
}
