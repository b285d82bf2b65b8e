//! Measures of one ranking whose relevant images are known. Pure functions; `interval` estimates
//! how certain their means are.

pub(crate) mod interval;
pub(crate) mod separation;

use interval::MeasureDirection;

/// Maximum cut-off.
pub const MAX_RANK_DEPTH: usize = 1_000;
/// Maximum number of cut-offs in one evaluation.
const MAX_CUTOFFS: usize = 8;

/// The ranks k down to which measures go, ascending: hit@k for each, all other measures at the
/// largest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cutoffs(Vec<usize>);

impl Default for Cutoffs {
    fn default() -> Self {
        Self(vec![1, 5, 10])
    }
}

impl TryFrom<&str> for Cutoffs {
    type Error = String;

    /// Parses `1,5,10`.
    fn try_from(text: &str) -> Result<Self, String> {
        let parse = |part: &str| {
            let number = part.trim().parse().ok().filter(|k| (1..=MAX_RANK_DEPTH).contains(k));
            number.ok_or_else(|| format!("{part:?} is not a number from 1 to {MAX_RANK_DEPTH}"))
        };
        let mut all = text.split(',').map(parse).collect::<Result<Vec<usize>, _>>()?;
        all.sort_unstable();
        all.dedup();
        if all.len() > MAX_CUTOFFS {
            return Err(format!("{} cut-offs; give at most {MAX_CUTOFFS}", all.len()));
        }
        Ok(Self(all))
    }
}

/// The grades of a query's ranked images.
#[derive(Debug, Clone)]
pub struct JudgedRanking<'a> {
    /// Grade of each top result, best result first: 0 is wrong or not judged, above 0 is relevant.
    pub top_grades: &'a [f64],
    /// Grades of all relevant images, largest first.
    pub ideal_grades: &'a [f64],
    /// Ranks of the relevant images in the whole ranking, from 1, ascending; those that are not ranked are
    /// missing.
    pub right_ranks: &'a [usize],
}

impl Cutoffs {
    /// Returns the largest cut-off: the number of results that a ranking must have.
    pub fn depth(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Returns the names of the measures, in the order of [`Cutoffs::measure_ranking`].
    pub fn measure_names(&self) -> Vec<String> {
        let k = self.depth();
        let mut names: Vec<String> = self.0.iter().map(|k| format!("hit@{k}")).collect();
        names.extend(
            ["recall", "capped recall", "precision", "nDCG"].map(|name| format!("{name}@{k}")),
        );
        names.extend([MAP_MEASURE, "MRR", FALSE_HIT_MEASURE].map(str::to_owned));
        names
    }

    /// Returns whether higher or lower values of a measure are better.
    pub fn measure_direction(name: &str) -> MeasureDirection {
        if name == FALSE_HIT_MEASURE { MeasureDirection::Lower } else { MeasureDirection::Higher }
    }

    /// Returns the measures of a ranking, each 0 to 1:
    ///
    /// - hit@k: 1 if one of the first k results is relevant;
    /// - recall@k: relevant images among the first k, divided by all relevant images;
    /// - capped recall@k: the same, divided by at most k;
    /// - precision@k: relevant images among the first k, divided by k;
    /// - nDCG@k: Σ grade/log₂(rank+1) over the first k, divided by the largest possible sum
    ///   (Järvelin and Kekäläinen, 2002; linear gain, as in trec_eval);
    /// - MAP: average precision over the whole ranking, the mean over all relevant images of how many of
    ///   the images down to and including it are relevant, divided by its rank;
    /// - MRR: 1/rank of the first relevant image in the whole ranking;
    /// - false hit: 1 if the first result is wrong, which is the mistake that a user sees first.
    ///
    /// Returns `None` if there is no relevant image, because these measures are then undefined.
    pub fn measure_ranking(&self, ranking: &JudgedRanking) -> Option<Vec<f64>> {
        let JudgedRanking { top_grades: grades, ideal_grades: ideal, right_ranks } = ranking;
        let total = ideal.iter().filter(|grade| **grade > 0.0).count();
        if total == 0 {
            return None;
        }
        let relevant_in_first =
            |k: usize| grades.iter().take(k).filter(|grade| **grade > 0.0).count();
        let as_number = |is_true: bool| f64::from(u8::from(is_true));
        let k = self.depth();
        let relevant = relevant_in_first(k) as f64;
        let mut values: Vec<f64> =
            self.0.iter().map(|k| as_number(relevant_in_first(*k) > 0)).collect();
        values.extend([
            relevant / total as f64,
            relevant / total.min(k) as f64,
            relevant / k as f64,
            discounted_cumulative_gain(grades, k) / discounted_cumulative_gain(ideal, k),
            average_precision(right_ranks, total),
            right_ranks.first().map_or(0.0, |rank| 1.0 / *rank as f64),
            as_number(relevant_in_first(1) == 0),
        ]);
        Some(values)
    }
}

/// Name of the mean average precision.
pub const MAP_MEASURE: &str = "MAP";
/// Name of the measure that counts wrong first results.
pub const FALSE_HIT_MEASURE: &str = "false hit";

/// Returns the average precision of a ranking that has relevant images at these ranks, of `total`.
fn average_precision(right_ranks: &[usize], total: usize) -> f64 {
    let precision = |(i, rank): (usize, &usize)| (i + 1) as f64 / *rank as f64;
    right_ranks.iter().enumerate().map(precision).sum::<f64>() / total as f64
}

/// Returns the discounted cumulative gain of the first `k` grades.
fn discounted_cumulative_gain(grades: &[f64], k: usize) -> f64 {
    let discounted = |(i, grade): (usize, &f64)| grade / ((i + 2) as f64).log2();
    grades.iter().take(k).enumerate().map(discounted).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure_value(values: &[f64], name: &str) -> f64 {
        let names = Cutoffs::default().measure_names();
        values[names.iter().position(|n| n == name).unwrap()]
    }

    #[test]
    fn measures_of_a_known_ranking() {
        let grades = [0.0, 1.0, 0.0, 2.0];
        let ranking = JudgedRanking {
            top_grades: &grades,
            ideal_grades: &[2.0, 1.0, 1.0],
            right_ranks: &[2, 4, 40],
        };
        let values = Cutoffs::default().measure_ranking(&ranking).unwrap();
        assert_eq!(values.len(), Cutoffs::default().measure_names().len());
        let best = 2.0 + 1.0 / 3f64.log2() + 0.5;
        for (name, expected) in [
            ("hit@1", 0.0),
            ("hit@5", 1.0),
            ("hit@10", 1.0),
            ("recall@10", 2.0 / 3.0),
            ("precision@10", 0.2),
            ("nDCG@10", (1.0 / 3f64.log2() + 2.0 / 5f64.log2()) / best),
            ("MAP", (1.0 / 2.0 + 2.0 / 4.0 + 3.0 / 40.0) / 3.0),
            ("MRR", 0.5),
            ("false hit", 1.0),
        ] {
            assert!((measure_value(&values, name) - expected).abs() < 1e-12, "{name}");
        }
    }

    #[test]
    fn capped_recall_is_1_if_all_results_are_relevant_and_there_are_more() {
        let (grades, ideal) = ([1.0; 10], [1.0; 500]);
        let ranking =
            JudgedRanking { top_grades: &grades, ideal_grades: &ideal, right_ranks: &[1] };
        let values = Cutoffs::default().measure_ranking(&ranking).unwrap();
        assert_eq!(measure_value(&values, "capped recall@10"), 1.0);
        assert_eq!(measure_value(&values, "recall@10"), 0.02);
        let without_relevant =
            JudgedRanking { top_grades: &[0.0], ideal_grades: &[], right_ranks: &[] };
        assert!(Cutoffs::default().measure_ranking(&without_relevant).is_none());
    }

    #[test]
    fn cutoffs_are_checked() {
        assert_eq!(Cutoffs::try_from("10, 1,10").unwrap(), Cutoffs(vec![1, 10]));
        for wrong in ["", "0", "x", "1001", "1,2,3,4,5,6,7,8,9"] {
            assert!(Cutoffs::try_from(wrong).is_err(), "{wrong}");
        }
    }
}
