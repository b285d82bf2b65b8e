//! Rankings and judgements in the formats of TREC, so that rankings of other programs can be
//! measured here, and ours by other programs.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Serialize;

use super::compare::{CorpusImage, ImageGrades, QueryRanking};
use super::judgements::QueryFileError;
use super::measures::interval::{
    MeasureComparison, RESAMPLING_SEED, compare_measures, correct_by_holm,
};
use super::measures::{Cutoffs, JudgedRanking};

/// Maximum number of problems that one error lists.
const MAX_REPORTED_PROBLEMS: usize = 20;
/// Largest factor of grades in judgements that are written.
const MAX_GRADE_FACTOR: f64 = 1000.0;

/// Judgements: grade by image id, by query.
pub type Qrels = BTreeMap<String, HashMap<String, f64>>;
/// Rankings: image ids and scores, best first, by query.
pub type TrecRun = BTreeMap<String, TrecRanking>;
/// The images of one query with their scores, best first.
pub type TrecRanking = Vec<(String, f32)>;

/// Returns whether a character separates the fields of a line in `trec_eval`, which knows ASCII alone:
/// an id may contain other spaces.
fn separates_fields(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\u{b}' | '\u{c}' | '\r')
}

/// Parses the fields of each line with `parse_fields` and collects the problems.
fn parse_lines(
    content: &str,
    file: &str,
    mut parse_fields: impl FnMut(&[&str]) -> Result<(), String>,
) -> Result<(), QueryFileError> {
    let (mut problems, mut unreported_problems) = (Vec::new(), 0);
    for (i, text) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields = text.split(separates_fields).filter(|field| !field.is_empty());
        let fields: Vec<&str> = fields.collect();
        if let Err(problem) = parse_fields(&fields) {
            if problems.len() < MAX_REPORTED_PROBLEMS {
                problems.push(format!("line {}: {problem}", i + 1));
            } else {
                unreported_problems += 1;
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(QueryFileError { file: file.to_owned(), problems, unreported_problems })
}

fn parse_number(name: &str, text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| format!("{name} {text:?} is not a number"))
}

/// Parses judgements: one line `query 0 image grade` each. Grades below 0 count as 0, as in
/// `trec_eval`.
pub fn parse_qrels(content: &str, file: &str) -> Result<Qrels, QueryFileError> {
    let mut all = Qrels::new();
    parse_lines(content, file, |fields| {
        let [query, _, image, grade] = fields else {
            return Err(format!("has {} fields, not the 4: query 0 image grade", fields.len()));
        };
        let grade = parse_number("grade", grade)?.max(0.0);
        let previous =
            all.entry((*query).to_owned()).or_default().insert((*image).to_owned(), grade);
        previous.map_or(Ok(()), |_| Err(format!("{image} was judged for {query} already")))
    })?;
    Ok(all)
}

/// Parses rankings: one line `query Q0 image rank score tag` each. As in `trec_eval`, the rank is
/// ignored, scores are rounded to f32, and equal ones are ordered by image id, the greatest first.
pub fn parse_run(content: &str, file: &str) -> Result<TrecRun, QueryFileError> {
    let mut all: BTreeMap<String, BTreeMap<String, f32>> = BTreeMap::new();
    parse_lines(content, file, |fields| {
        let [query, _, image, _, score, _] = fields else {
            return Err(format!(
                "has {} fields, not the 6: query Q0 image rank score tag",
                fields.len()
            ));
        };
        // Zero is added so that -0.0 equals 0.0.
        let score = parse_number("score", score)? as f32 + 0.0;
        let previous =
            all.entry((*query).to_owned()).or_default().insert((*image).to_owned(), score);
        previous.map_or(Ok(()), |_| Err(format!("{image} was ranked for {query} already")))
    })?;
    let sort_by_score = |(query, images): (String, BTreeMap<String, f32>)| {
        // The map yields images by id, and the sort is stable.
        let mut ranking: TrecRanking = images.into_iter().rev().collect();
        ranking.sort_by(|a, b| b.1.total_cmp(&a.1));
        (query, ranking)
    };
    Ok(all.into_iter().map(sort_by_score).collect())
}

/// Measures of a run over all queries with a relevant image. A query that the run does not have
/// counts as one whose relevant images were not found.
#[derive(Debug, Clone, Serialize)]
pub struct MeasuredTrecRun {
    /// Name of the run.
    pub name: String,
    /// Number of queries that have a relevant image.
    pub queries: usize,
    /// Number of results with the score of an earlier result of their query: their order is that of
    /// their ids.
    pub tied_results: usize,
    /// One comparison with the first run per measure; p is corrected for the number of runs.
    pub columns: Vec<MeasureComparison>,
    /// Values by query, in the order of the measures.
    pub by_query: BTreeMap<String, Vec<f64>>,
}

/// Measures runs and compares each with the first one.
pub fn measure_runs(
    runs: &[(String, TrecRun)],
    qrels: &Qrels,
    cutoffs: &Cutoffs,
) -> Vec<MeasuredTrecRun> {
    let measure_run = |run: &TrecRun| {
        let measure_query = |(query, grades): (&String, &HashMap<String, f64>)| {
            let empty = Vec::new();
            let ranking = run.get(query).unwrap_or(&empty);
            let grade = |(image, _): &(String, f32)| grades.get(image).copied().unwrap_or(0.0);
            let ranked_grades: Vec<f64> = ranking.iter().map(grade).collect();
            let mut ideal: Vec<f64> = grades.values().copied().filter(|g| *g > 0.0).collect();
            ideal.sort_unstable_by(|a, b| b.total_cmp(a));
            let is_right = |(i, grade): (usize, &f64)| (*grade > 0.0).then_some(i + 1);
            let right_ranks: Vec<usize> =
                ranked_grades.iter().enumerate().filter_map(is_right).collect();
            let values = cutoffs.measure_ranking(&JudgedRanking {
                top_grades: &ranked_grades,
                ideal_grades: &ideal,
                right_ranks: &right_ranks,
            })?;
            Some((query.clone(), values))
        };
        qrels.iter().filter_map(measure_query).collect::<BTreeMap<String, Vec<f64>>>()
    };
    let values: Vec<BTreeMap<String, Vec<f64>>> =
        runs.iter().map(|(_, run)| measure_run(run)).collect();
    let rows =
        |by_query: &'_ BTreeMap<String, Vec<f64>>| by_query.values().cloned().collect::<Vec<_>>();
    let Some(baseline) = values.first().map(rows) else { return Vec::new() };
    let baseline: Vec<&[f64]> = baseline.iter().map(Vec::as_slice).collect();
    let mut measured: Vec<MeasuredTrecRun> = runs
        .iter()
        .zip(values)
        .map(|((name, run), by_query)| {
            let rows: Vec<&[f64]> = by_query.values().map(Vec::as_slice).collect();
            let columns = compare_measures(&rows, &baseline, RESAMPLING_SEED);
            let tied_results = count_tied_results(run);
            MeasuredTrecRun {
                name: name.clone(),
                queries: rows.len(),
                tied_results,
                columns,
                by_query,
            }
        })
        .collect();
    for measure in 0..cutoffs.measure_names().len() {
        let p_value = |m: &MeasuredTrecRun| m.columns.get(measure).map(|column| column.p_value);
        let p: Vec<f64> = measured.iter().skip(1).filter_map(p_value).collect();
        for (other, corrected) in measured.iter_mut().skip(1).zip(correct_by_holm(&p)) {
            other.columns[measure].p_value = corrected;
        }
    }
    measured
}

fn count_tied_results(run: &TrecRun) -> usize {
    run.values().map(|ranking| ranking.windows(2).filter(|w| w[0].1 == w[1].1).count()).sum()
}

/// Formats a configuration's rankings as a run; a query's name is its number, from 1. The scores of a
/// query fall strictly, so that no program orders equal ones in its own way: of two equal scores the
/// second is written as the next smaller f32.
pub fn format_run(
    rankings: &[Vec<QueryRanking>],
    queries: usize,
    images: &[CorpusImage],
    configuration: usize,
) -> String {
    let mut text = String::new();
    for (number, row) in rankings.iter().take(queries).enumerate() {
        let mut previous = f32::INFINITY;
        for (index, (position, score)) in row[configuration].top_results.iter().enumerate() {
            let id = &images[*position as usize].image_id;
            // Zero is added so that there is no -0.0.
            let score = score.min(previous.next_down()) + 0.0;
            previous = score;
            let _ = writeln!(
                text,
                "{} Q0 {} {} {score:?} bsap",
                number + 1,
                escape_id(id.as_str()),
                index + 1
            );
        }
    }
    text
}

/// Formats the judgements of the queries; a query's name is its number, from 1. Grades are written as
/// whole numbers, as other programs require: all are multiplied by the same power of ten, which changes
/// no measure.
pub fn format_qrels(image_grades: &[ImageGrades], images: &[CorpusImage]) -> String {
    let grades = image_grades.iter().flat_map(|judged| &judged.grades_by_position);
    let factor = whole_number_factor(&grades.map(|(_, grade)| *grade));
    let mut text = String::new();
    for (number, judged) in image_grades.iter().enumerate() {
        for (position, grade) in &judged.grades_by_position {
            let id = &images[*position as usize].image_id;
            // A right image stays one.
            let smallest = if *grade > 0.0 { 1.0 } else { 0.0 };
            let grade = (grade * factor).round().max(smallest);
            let _ = writeln!(text, "{} 0 {} {grade}", number + 1, escape_id(id.as_str()));
        }
    }
    text
}

/// Returns the smallest power of ten that makes whole numbers of all grades, at most
/// [`MAX_GRADE_FACTOR`].
fn whole_number_factor(grades: &(impl Iterator<Item = f64> + Clone)) -> f64 {
    let mut factor = 1.0;
    let is_whole = |scaled: f64| (scaled - scaled.round()).abs() <= 1e-9 * scaled.abs();
    while factor < MAX_GRADE_FACTOR && !grades.clone().all(|grade| is_whole(grade * factor)) {
        factor *= 10.0;
    }
    factor
}

/// Escapes what separates fields or lines for other programs: all spaces of Unicode, as Python splits
/// lines, and control characters. `%` is escaped too, so that ids stay different.
fn escape_id(id: &str) -> String {
    let mut escaped = String::with_capacity(id.len());
    for c in id.chars() {
        if c == '%' || c == '\u{feff}' || c.is_whitespace() || c.is_control() {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                let _ = write!(escaped, "%{byte:02X}");
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::calibration::{BestHitFeatures, ScoreDistribution};
    use crate::record::{Attributes, ImageId};

    #[test]
    fn runs_are_compared_with_the_first() {
        let qrels = parse_qrels("1 0 a 1\n1 0 b 2\n2 0 c 1\n3 0 d 0\n", "q").unwrap();
        let first = parse_run("1 Q0 x 1 0.9 t\n1 Q0 a 2 0.5 t\n2 Q0 c 1 0.3 t\n", "r").unwrap();
        let second = parse_run("1 Q0 b 9 0.9 t\n1 Q0 x 2 0.5 t\n", "r").unwrap();
        let runs = [("first".to_owned(), first), ("second".to_owned(), second)];
        let measured = measure_runs(&runs, &qrels, &Cutoffs::default());
        assert_eq!(measured[0].queries, 2, "a query without a relevant image is not measured");
        assert_eq!(measured[0].by_query["1"][0], 0.0);
        assert_eq!(measured[1].by_query["1"][0], 1.0);
        assert_eq!(measured[1].by_query["2"][0], 0.0, "a query that is missing found nothing");
        assert_eq!(measured[1].columns[0].gain.mean, 0.0);
    }

    #[test]
    fn equal_scores_are_ordered_as_in_trec_eval_and_counted() {
        let run = "1 Q0 a 1 0.5 t\n1 Q0 b 2 0.50000000001 t\n1 Q0 c 3 0 t\n1 Q0 d 4 -0.0 t\n";
        let run = parse_run(run, "r").unwrap();
        let ids: Vec<&str> = run["1"].iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["b", "a", "d", "c"]);
        let qrels = parse_qrels("1 0 a 1\n", "q").unwrap();
        let measured = measure_runs(&[("r".into(), run)], &qrels, &Cutoffs::default());
        assert_eq!(measured[0].tied_results, 2);
    }

    /// Returns images with these ids, and one ranking of all of them with these scores.
    fn ranked(ids: &[&str], scores: &[f32]) -> (Vec<CorpusImage>, Vec<Vec<QueryRanking>>) {
        let images = ids.iter().map(|id| CorpusImage {
            image_id: ImageId::new(*id).unwrap(),
            uri: None,
            attributes: Attributes::new(),
        });
        let ranking = QueryRanking {
            top_results: (0..).zip(scores.iter().copied()).collect(),
            right_ranks: Vec::new(),
            best_hit_features: BestHitFeatures {
                score: scores.first().copied().unwrap_or_default(),
                background: ScoreDistribution { mean: 0.0, std: 1.0 },
                known_word_share: 0.0,
            },
        };
        (images.collect(), vec![vec![ranking]])
    }

    #[test]
    fn runs_that_are_written_are_read_in_the_same_order() {
        let ids = ["a", "b", "a\u{a0}b", "a\u{2028}b", "100% c", "100%25 c", "é\u{feff}"];
        let scores = [0.75, 0.75, 0.75, 0.0, -0.0, 0.0, -1.0];
        let (images, rankings) = ranked(&ids, &scores);
        let run = format_run(&rankings, 1, &images, 0);
        assert!(!run.contains(" -0.0 "), "{run}");
        assert!(run.lines().all(|line| line.split_whitespace().count() == 6), "{run}");
        let read = &parse_run(&run, "r").unwrap()["1"];
        let read: Vec<&str> = read.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(read, ids.map(escape_id));
        assert_eq!(read[2..6], ["a%C2%A0b", "a%E2%80%A8b", "100%25%20c", "100%2525%20c"]);
        let written: Vec<f32> =
            run.lines().map(|line| line.split(' ').nth(4).unwrap().parse().unwrap()).collect();
        assert!(written.windows(2).all(|pair| pair[0] > pair[1]), "{run}");
    }

    #[test]
    fn written_grades_are_whole_numbers() {
        let (images, _) = ranked(&["a", "b", "c"], &[]);
        let format = |grades: [f64; 3]| {
            let grades_by_position = (0..).zip(grades).collect();
            format_qrels(&[ImageGrades { grades_by_position, judged_only: false }], &images)
        };
        assert_eq!(format([2.0, 1.0, 0.0]), "1 0 a 2\n1 0 b 1\n1 0 c 0\n");
        assert_eq!(format([2.0, 0.25, 0.1]), "1 0 a 200\n1 0 b 25\n1 0 c 10\n");
        assert_eq!(format([1.0, 1.0 / 3.0, 1e-9]), "1 0 a 1000\n1 0 b 333\n1 0 c 1\n");
    }

    #[test]
    fn problems_of_a_file_are_reported_with_their_lines() {
        let error = parse_run("1 Q0 x 1 high t\n\n1 2\n", "r.run").unwrap_err().to_string();
        for word in ["r.run", "line 1: score \"high\"", "line 3: has 2 fields"] {
            assert!(error.contains(word), "{error}");
        }
        let error = parse_qrels("1 0 a 1\n1 0 a 1\n", "q").unwrap_err().to_string();
        assert!(error.contains("line 2: a was judged"), "{error}");
    }
}
