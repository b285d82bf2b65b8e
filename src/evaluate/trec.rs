//! Rankings and judgements in the formats of TREC, so that rankings of any program can be measured,
//! and ours by any other.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Serialize;

use super::compare::{Corpus, ImageGrades, QueryRanking};
use super::judgements::QueryFileError;
use super::measures::interval::{
    MeasureComparison, RESAMPLING_SEED, compare_measures, correct_by_holm,
};
use super::measures::{Cutoffs, JudgedRanking};

/// Problems that are told at once.
const MAX_REPORTED_PROBLEMS: usize = 20;

/// Judgements: query to image to grade.
pub type Qrels = BTreeMap<String, HashMap<String, f64>>;
/// Rankings: query to images and scores, best first.
pub type Run = BTreeMap<String, Vec<(String, f64)>>;

/// Reads a file line by line, and collects what is wrong with it.
fn parse_lines(
    content: &str,
    file: &str,
    mut line: impl FnMut(&[&str]) -> Result<(), String>,
) -> Result<(), QueryFileError> {
    let (mut problems, mut more) = (Vec::new(), 0);
    for (i, text) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields: Vec<&str> = text.split_whitespace().collect();
        if let Err(problem) = line(&fields) {
            if problems.len() < MAX_REPORTED_PROBLEMS {
                problems.push(format!("line {}: {problem}", i + 1));
            } else {
                more += 1;
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(QueryFileError { file: file.to_owned(), problems, unreported_problems: more })
}

fn parse_number(name: &str, text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| format!("{name} {text:?} is not a number"))
}

/// Reads judgements: `query 0 image grade` a line. A grade below 0 counts as 0, as in `trec_eval`.
pub fn parse_qrels(content: &str, file: &str) -> Result<Qrels, QueryFileError> {
    let mut all = Qrels::new();
    parse_lines(content, file, |fields| {
        let [query, _, image, grade] = fields else {
            return Err(format!("has {} fields, not the 4: query 0 image grade", fields.len()));
        };
        let grade = parse_number("grade", grade)?.max(0.0);
        let known = all.entry((*query).to_owned()).or_default().insert((*image).to_owned(), grade);
        known.map_or(Ok(()), |_| Err(format!("{image} was judged for {query} already")))
    })?;
    Ok(all)
}

/// Reads rankings: `query Q0 image rank score tag` a line. The score decides; ties go by image id.
pub fn parse_run(content: &str, file: &str) -> Result<Run, QueryFileError> {
    let mut all: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    parse_lines(content, file, |fields| {
        let [query, _, image, _, score, _] = fields else {
            return Err(format!(
                "has {} fields, not the 6: query Q0 image rank score tag",
                fields.len()
            ));
        };
        let score = parse_number("score", score)?;
        let known = all.entry((*query).to_owned()).or_default().insert((*image).to_owned(), score);
        known.map_or(Ok(()), |_| Err(format!("{image} was ranked for {query} already")))
    })?;
    let sorted = |(query, images): (String, BTreeMap<String, f64>)| {
        let mut ranking: Vec<(String, f64)> = images.into_iter().collect();
        // Images come by their ids, and the order of equal ones stays.
        ranking.sort_by(|a, b| b.1.total_cmp(&a.1));
        (query, ranking)
    };
    Ok(all.into_iter().map(sorted).collect())
}

/// What a run is worth, over all queries with a right image; one that a run does not have counts as
/// nothing found.
#[derive(Debug, Clone, Serialize)]
pub struct MeasuredRun {
    /// Name of the run.
    pub name: String,
    /// Queries that have a right image.
    pub queries: usize,
    /// A column a measure; gains are over the first run, p corrected for the number of runs.
    pub columns: Vec<MeasureComparison>,
    /// Values of each query, in the order of the measures.
    pub by_query: BTreeMap<String, Vec<f64>>,
}

/// Measures runs; the first is the baseline.
pub fn measure_runs(runs: &[(String, Run)], qrels: &Qrels, cutoffs: &Cutoffs) -> Vec<MeasuredRun> {
    let by_query = |run: &Run| {
        let measure_query = |(query, grades): (&String, &HashMap<String, f64>)| {
            let empty = Vec::new();
            let ranking = run.get(query).unwrap_or(&empty);
            let grade = |(image, _): &(String, f64)| grades.get(image).copied().unwrap_or(0.0);
            let own: Vec<f64> = ranking.iter().map(grade).collect();
            let mut ideal: Vec<f64> = grades.values().copied().filter(|g| *g > 0.0).collect();
            ideal.sort_unstable_by(|a, b| b.total_cmp(a));
            let first = own.iter().position(|grade| *grade > 0.0).map(|i| i + 1);
            let values = cutoffs.measure(&JudgedRanking {
                grades: &own,
                ideal_grades: &ideal,
                first_right_rank: first,
            })?;
            Some((query.clone(), values))
        };
        qrels.iter().filter_map(measure_query).collect::<BTreeMap<String, Vec<f64>>>()
    };
    let values: Vec<BTreeMap<String, Vec<f64>>> =
        runs.iter().map(|(_, run)| by_query(run)).collect();
    let rows = |of: &'_ BTreeMap<String, Vec<f64>>| of.values().cloned().collect::<Vec<_>>();
    let Some(baseline) = values.first().map(rows) else { return Vec::new() };
    let baseline: Vec<&[f64]> = baseline.iter().map(Vec::as_slice).collect();
    let mut measured: Vec<MeasuredRun> = runs
        .iter()
        .zip(values)
        .map(|((name, _), by_query)| {
            let own: Vec<&[f64]> = by_query.values().map(Vec::as_slice).collect();
            let columns = compare_measures(&own, &baseline, RESAMPLING_SEED);
            MeasuredRun { name: name.clone(), queries: own.len(), columns, by_query }
        })
        .collect();
    for measure in 0..cutoffs.measure_names().len() {
        let p_value = |m: &MeasuredRun| m.columns.get(measure).map(|column| column.p_value);
        let p: Vec<f64> = measured.iter().skip(1).filter_map(p_value).collect();
        for (other, corrected) in measured.iter_mut().skip(1).zip(correct_by_holm(&p)) {
            other.columns[measure].p_value = corrected;
        }
    }
    measured
}

/// A configuration's rankings as a run; queries are named by their number, from 1.
pub fn format_run(
    rankings: &[Vec<QueryRanking>],
    queries: usize,
    corpus: &Corpus,
    configuration: usize,
) -> String {
    let mut text = String::new();
    for (number, row) in rankings.iter().take(queries).enumerate() {
        for (place, (picture, score)) in row[configuration].top.iter().enumerate() {
            let id = &corpus.images[*picture as usize].image_id;
            let _ = writeln!(
                text,
                "{} Q0 {} {} {score:.9} bsap",
                number + 1,
                escape_id(id.as_str()),
                place + 1
            );
        }
    }
    text
}

/// Judgements of the queries, named by their number, from 1.
pub fn format_qrels(image_grades: &[ImageGrades], corpus: &Corpus) -> String {
    let mut text = String::new();
    for (number, right) in image_grades.iter().enumerate() {
        for (picture, grade) in &right.grades {
            let id = &corpus.images[*picture as usize].image_id;
            let _ = writeln!(text, "{} 0 {} {grade}", number + 1, escape_id(id.as_str()));
        }
    }
    text
}

/// The formats divide fields by spaces.
fn escape_id(id: &str) -> String {
    id.replace('%', "%25").replace(' ', "%20")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_measured_beside_the_first() {
        let qrels = parse_qrels("1 0 a 1\n1 0 b 2\n2 0 c 1\n3 0 d 0\n", "q").unwrap();
        let first = parse_run("1 Q0 x 1 0.9 t\n1 Q0 a 2 0.5 t\n2 Q0 c 1 0.3 t\n", "r").unwrap();
        let second = parse_run("1 Q0 b 9 0.9 t\n1 Q0 x 2 0.5 t\n", "r").unwrap();
        let runs = [("first".to_owned(), first), ("second".to_owned(), second)];
        let measured = measure_runs(&runs, &qrels, &Cutoffs::default());
        assert_eq!(measured[0].queries, 2, "a query without a right image tells nothing");
        assert_eq!(measured[0].by_query["1"][0], 0.0);
        assert_eq!(measured[1].by_query["1"][0], 1.0);
        assert_eq!(measured[1].by_query["2"][0], 0.0, "a query that is missing found nothing");
        assert_eq!(measured[1].columns[0].gain.mean, 0.0);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_with_its_line() {
        let error = parse_run("1 Q0 x 1 high t\n\n1 2\n", "r.run").unwrap_err().to_string();
        for word in ["r.run", "line 1: score \"high\"", "line 3: has 2 fields"] {
            assert!(error.contains(word), "{error}");
        }
        let error = parse_qrels("1 0 a 1\n1 0 a 1\n", "q").unwrap_err().to_string();
        assert!(error.contains("line 2: a was judged"), "{error}");
    }
}
