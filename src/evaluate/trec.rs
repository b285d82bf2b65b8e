//! Rankings and judgements in the formats of TREC, so that rankings of any program can be measured,
//! and ours by any other.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Serialize;

use super::compare::rank::{Ranked, Right};
use super::compare::world::World;
use super::judgements::asked::QueriesError;
use super::measures::interval::{Column, SEED, columns, holm};
use super::measures::{Cutoffs, Judged};

/// Problems that are told at once.
const MAX_PROBLEMS: usize = 20;

/// Judgements: query to image to grade.
pub type Qrels = BTreeMap<String, HashMap<String, f64>>;
/// Rankings: query to images and scores, best first.
pub type Run = BTreeMap<String, Vec<(String, f64)>>;

/// Reads a file line by line, and collects what is wrong with it.
fn read(
    content: &str,
    file: &str,
    mut line: impl FnMut(&[&str]) -> Result<(), String>,
) -> Result<(), QueriesError> {
    let (mut problems, mut more) = (Vec::new(), 0);
    for (i, text) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields: Vec<&str> = text.split_whitespace().collect();
        if let Err(problem) = line(&fields) {
            if problems.len() < MAX_PROBLEMS {
                problems.push(format!("line {}: {problem}", i + 1));
            } else {
                more += 1;
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(QueriesError { file: file.to_owned(), problems, more })
}

fn number(name: &str, text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| format!("{name} {text:?} is not a number"))
}

/// Reads judgements: `query 0 image grade` a line. A grade below 0 counts as 0, as in `trec_eval`.
pub fn qrels(content: &str, file: &str) -> Result<Qrels, QueriesError> {
    let mut all = Qrels::new();
    read(content, file, |fields| {
        let [query, _, image, grade] = fields else {
            return Err(format!("has {} fields, not the 4: query 0 image grade", fields.len()));
        };
        let grade = number("grade", grade)?.max(0.0);
        let known = all.entry((*query).to_owned()).or_default().insert((*image).to_owned(), grade);
        known.map_or(Ok(()), |_| Err(format!("{image} was judged for {query} already")))
    })?;
    Ok(all)
}

/// Reads rankings: `query Q0 image rank score tag` a line. The score decides; ties go by image id.
pub fn run(content: &str, file: &str) -> Result<Run, QueriesError> {
    let mut all: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    read(content, file, |fields| {
        let [query, _, image, _, score, _] = fields else {
            return Err(format!(
                "has {} fields, not the 6: query Q0 image rank score tag",
                fields.len()
            ));
        };
        let score = number("score", score)?;
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
pub struct Measured {
    /// Name of the run.
    pub name: String,
    /// Queries that have a right image.
    pub queries: usize,
    /// A column a measure; gains are over the first run, p corrected for the number of runs.
    pub columns: Vec<Column>,
    /// Values of each query, in the order of the measures.
    pub by_query: BTreeMap<String, Vec<f64>>,
}

/// Measures runs; the first is the baseline.
pub fn measure(runs: &[(String, Run)], qrels: &Qrels, cutoffs: &Cutoffs) -> Vec<Measured> {
    let by_query = |run: &Run| {
        let of = |(query, grades): (&String, &HashMap<String, f64>)| {
            let empty = Vec::new();
            let ranking = run.get(query).unwrap_or(&empty);
            let grade = |(image, _): &(String, f64)| grades.get(image).copied().unwrap_or(0.0);
            let own: Vec<f64> = ranking.iter().map(grade).collect();
            let mut ideal: Vec<f64> = grades.values().copied().filter(|g| *g > 0.0).collect();
            ideal.sort_unstable_by(|a, b| b.total_cmp(a));
            let first = own.iter().position(|grade| *grade > 0.0).map(|i| i + 1);
            let values = cutoffs.measure(&Judged { grades: &own, ideal: &ideal, first })?;
            Some((query.clone(), values))
        };
        qrels.iter().filter_map(of).collect::<BTreeMap<String, Vec<f64>>>()
    };
    let values: Vec<BTreeMap<String, Vec<f64>>> =
        runs.iter().map(|(_, run)| by_query(run)).collect();
    let rows = |of: &'_ BTreeMap<String, Vec<f64>>| of.values().cloned().collect::<Vec<_>>();
    let Some(baseline) = values.first().map(rows) else { return Vec::new() };
    let baseline: Vec<&[f64]> = baseline.iter().map(Vec::as_slice).collect();
    let mut measured: Vec<Measured> = runs
        .iter()
        .zip(values)
        .map(|((name, _), by_query)| {
            let own: Vec<&[f64]> = by_query.values().map(Vec::as_slice).collect();
            let columns = columns(&own, &baseline, SEED);
            Measured { name: name.clone(), queries: own.len(), columns, by_query }
        })
        .collect();
    for measure in 0..cutoffs.names().len() {
        let of = |m: &Measured| m.columns.get(measure).map(|column| column.p);
        let p: Vec<f64> = measured.iter().skip(1).filter_map(of).collect();
        for (other, corrected) in measured.iter_mut().skip(1).zip(holm(&p)) {
            other.columns[measure].p = corrected;
        }
    }
    measured
}

/// A configuration's rankings as a run; queries are named by their number, from 1.
pub fn write_run(
    ranked: &[Vec<Ranked>],
    queries: usize,
    world: &World,
    configuration: usize,
) -> String {
    let mut text = String::new();
    for (number, row) in ranked.iter().take(queries).enumerate() {
        for (place, (picture, score)) in row[configuration].best.iter().enumerate() {
            let id = &world.pictures[*picture as usize].image_id;
            let _ = writeln!(
                text,
                "{} Q0 {} {} {score:.9} bsap",
                number + 1,
                word(id.as_str()),
                place + 1
            );
        }
    }
    text
}

/// Judgements of the queries, named by their number, from 1.
pub fn write_qrels(right: &[Right], world: &World) -> String {
    let mut text = String::new();
    for (number, right) in right.iter().enumerate() {
        for (picture, grade) in &right.grades {
            let id = &world.pictures[*picture as usize].image_id;
            let _ = writeln!(text, "{} 0 {} {grade}", number + 1, word(id.as_str()));
        }
    }
    text
}

/// The formats divide fields by spaces.
fn word(id: &str) -> String {
    id.replace('%', "%25").replace(' ', "%20")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_measured_beside_the_first() {
        let qrels = qrels("1 0 a 1\n1 0 b 2\n2 0 c 1\n3 0 d 0\n", "q").unwrap();
        let first = run("1 Q0 x 1 0.9 t\n1 Q0 a 2 0.5 t\n2 Q0 c 1 0.3 t\n", "r").unwrap();
        let second = run("1 Q0 b 9 0.9 t\n1 Q0 x 2 0.5 t\n", "r").unwrap();
        let runs = [("first".to_owned(), first), ("second".to_owned(), second)];
        let measured = measure(&runs, &qrels, &Cutoffs::default());
        assert_eq!(measured[0].queries, 2, "a query without a right image tells nothing");
        assert_eq!(measured[0].by_query["1"][0], 0.0);
        assert_eq!(measured[1].by_query["1"][0], 1.0);
        assert_eq!(measured[1].by_query["2"][0], 0.0, "a query that is missing found nothing");
        assert_eq!(measured[1].columns[0].gain.mean, 0.0);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_with_its_line() {
        let error = run("1 Q0 x 1 high t\n\n1 2\n", "r.run").unwrap_err().to_string();
        for word in ["r.run", "line 1: score \"high\"", "line 3: has 2 fields"] {
            assert!(error.contains(word), "{error}");
        }
        let error = qrels("1 0 a 1\n1 0 a 1\n", "q").unwrap_err().to_string();
        assert!(error.contains("line 2: a was judged"), "{error}");
    }
}
