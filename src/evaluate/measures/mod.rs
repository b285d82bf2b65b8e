//! Measures of one ranking whose right answers are known. Pure.

pub(crate) mod interval;

use interval::MeasureDirection;

/// Largest cut-off: how far down a ranking is ever looked.
pub const MAX_RANK_DEPTH: usize = 1_000;
/// Most cut-offs of one evaluation.
const MAX_CUTOFFS: usize = 8;

/// How far down a ranking is looked: hit@k for each, everything else at the largest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cutoffs(Vec<usize>);

impl Default for Cutoffs {
    fn default() -> Self {
        Self(vec![1, 5, 10])
    }
}

impl TryFrom<&str> for Cutoffs {
    type Error = String;

    /// From `1,5,10`.
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

/// A query's ranking seen through its judgements.
#[derive(Debug, Clone)]
pub struct JudgedRanking<'a> {
    /// Grade of each of the best results, best first: 0 is wrong or not judged, above is right.
    pub grades: &'a [f64],
    /// Grades of all right images, largest first.
    pub ideal_grades: &'a [f64],
    /// Place of the first right image in the whole ranking, from 1; none where it was not found.
    pub first_right_rank: Option<usize>,
}

impl Cutoffs {
    /// How many results the measures look at.
    pub fn depth(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Names of the measures, in the order of [`Cutoffs::measure`].
    pub fn measure_names(&self) -> Vec<String> {
        let k = self.depth();
        let mut names: Vec<String> = self.0.iter().map(|k| format!("hit@{k}")).collect();
        names.extend(
            ["recall", "capped recall", "precision", "nDCG"].map(|name| format!("{name}@{k}")),
        );
        names.extend(["MRR".to_owned(), FALSE_HIT_MEASURE.to_owned()]);
        names
    }

    /// What is better of the measure of this name.
    pub fn direction(name: &str) -> MeasureDirection {
        if name == FALSE_HIT_MEASURE { MeasureDirection::Lower } else { MeasureDirection::Higher }
    }

    /// Measures of a ranking, each 0 to 1:
    ///
    /// - hit@k: 1 where one of the first k is right;
    /// - recall@k: right ones among the first k, of all right ones;
    /// - capped recall@k: the same, of min(k, all right ones);
    /// - precision@k: right ones among the first k, of k;
    /// - nDCG@k: Σ grade/log₂(place+1) over the first k, of the best possible (Järvelin and
    ///   Kekäläinen, 2002; linear gain, as trec_eval has it);
    /// - MRR: 1/place of the first right one in the whole ranking;
    /// - false hit: 1 where the first result is wrong, the confident mistake that a user sees first.
    ///
    /// `None` where there is no right image: such a query tells nothing.
    pub fn measure(&self, ranking: &JudgedRanking) -> Option<Vec<f64>> {
        let JudgedRanking { grades, ideal_grades: ideal, first_right_rank: first } = ranking;
        let total = ideal.iter().filter(|grade| **grade > 0.0).count();
        if total == 0 {
            return None;
        }
        let within = |k: usize| grades.iter().take(k).filter(|grade| **grade > 0.0).count();
        let truth = |is: bool| f64::from(u8::from(is));
        let k = self.depth();
        let found = within(k) as f64;
        let mut values: Vec<f64> = self.0.iter().map(|k| truth(within(*k) > 0)).collect();
        values.extend([
            found / total as f64,
            found / total.min(k) as f64,
            found / k as f64,
            discounted_cumulative_gain(grades, k) / discounted_cumulative_gain(ideal, k),
            first.map_or(0.0, |place| 1.0 / place as f64),
            truth(within(1) == 0),
        ]);
        Some(values)
    }
}

/// Name of the measure that false hits are counted by.
pub const FALSE_HIT_MEASURE: &str = "false hit";

/// Discounted cumulative gain of the first `k`.
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
            grades: &grades,
            ideal_grades: &[2.0, 1.0, 1.0],
            first_right_rank: Some(2),
        };
        let values = Cutoffs::default().measure(&ranking).unwrap();
        assert_eq!(values.len(), Cutoffs::default().measure_names().len());
        let best = 2.0 + 1.0 / 3f64.log2() + 0.5;
        for (name, expected) in [
            ("hit@1", 0.0),
            ("hit@5", 1.0),
            ("hit@10", 1.0),
            ("recall@10", 2.0 / 3.0),
            ("precision@10", 0.2),
            ("nDCG@10", (1.0 / 3f64.log2() + 2.0 / 5f64.log2()) / best),
            ("MRR", 0.5),
            ("false hit", 1.0),
        ] {
            assert!((measure_value(&values, name) - expected).abs() < 1e-12, "{name}");
        }
    }

    #[test]
    fn more_right_ones_than_places() {
        let (grades, ideal) = ([1.0; 10], [1.0; 500]);
        let ranking =
            JudgedRanking { grades: &grades, ideal_grades: &ideal, first_right_rank: Some(1) };
        let values = Cutoffs::default().measure(&ranking).unwrap();
        assert_eq!(measure_value(&values, "capped recall@10"), 1.0);
        assert_eq!(measure_value(&values, "recall@10"), 0.02);
        let nothing = JudgedRanking { grades: &[0.0], ideal_grades: &[], first_right_rank: None };
        assert!(Cutoffs::default().measure(&nothing).is_none());
    }

    #[test]
    fn cutoffs_are_checked() {
        assert_eq!(Cutoffs::try_from("10, 1,10").unwrap(), Cutoffs(vec![1, 10]));
        for wrong in ["", "0", "x", "1001", "1,2,3,4,5,6,7,8,9"] {
            assert!(Cutoffs::try_from(wrong).is_err(), "{wrong}");
        }
    }
}
