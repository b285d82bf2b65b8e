//! Reads judged queries from files of JSON lines or CSV.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::judged_query::{JudgedQuery, Judgements, MAX_QUERIES};
use crate::evaluate::text_files::{describe_without_position, detect_delimiter};
use crate::record::ImageId;

/// Maximum number of problems that one error lists.
const MAX_REPORTED_PROBLEMS: usize = 20;
/// Maximum length of a query in characters; a text encoder reads at most 77 tokens.
const MAX_QUERY_CHARS: usize = 1_000;
/// Maximum number of judged images per query.
const MAX_JUDGED_IMAGES: usize = 100_000;

/// A file of queries that cannot be used. The message has one line per problem.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {}", format_problems(.problems, *.unreported_problems))]
pub struct QueryFileError {
    /// Name of the file.
    pub file: String,
    /// The first problems, each with its line number.
    pub problems: Vec<String>,
    /// Number of problems that are not listed.
    pub unreported_problems: usize,
}

fn format_problems(problems: &[String], unreported: usize) -> String {
    let mut text = problems.join("\n  ");
    if unreported > 0 {
        let _ = write!(text, "\n  and {unreported} more");
    }
    if problems.len() > 1 {
        format!("{} problems\n  {text}", problems.len() + unreported)
    } else {
        text
    }
}

/// The field `relevant` of a JSON line: image ids, or image ids with grades.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "relevant is a list of image ids, or an object of image id to grade")]
enum RelevantJson {
    Ids(Vec<IdJson>),
    Grades(GradePairs),
}

/// An image id, which may be a whole number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum IdJson {
    Text(String),
    Unsigned(u64),
    Signed(i64),
}

impl From<IdJson> for String {
    fn from(id: IdJson) -> Self {
        match id {
            IdJson::Text(id) => id,
            IdJson::Unsigned(id) => id.to_string(),
            IdJson::Signed(id) => id.to_string(),
        }
    }
}

/// Ids and grades of an object in their order; an id may occur twice, which a map would hide.
#[derive(Debug)]
struct GradePairs(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for GradePairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GradeVisitor;

        impl<'de> Visitor<'de> for GradeVisitor {
            type Value = GradePairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of image id to grade")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<GradePairs, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(GradePairs(pairs))
            }
        }

        deserializer.deserialize_map(GradeVisitor)
    }
}

/// One line of a JSON-lines file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with text")]
struct JudgedQueryJson {
    text: String,
    relevant: Option<RelevantJson>,
    group: Option<String>,
}

/// The columns that a CSV file may have.
const CSV_COLUMNS: [&str; 5] = ["text", "relevant", "image_id", "grade", "group"];

/// Collects the queries of a file, and its problems with their line numbers.
struct QueryCollector {
    file: String,
    /// What the numbers of problems count.
    numbered_unit: &'static str,
    queries: Vec<JudgedQuery>,
    /// Line number and index in `queries` of each text.
    line_and_index_by_text: HashMap<String, (usize, usize)>,
    problems: Vec<String>,
    unreported_problems: usize,
}

impl QueryCollector {
    fn new(file: &str) -> Self {
        Self {
            file: file.to_owned(),
            numbered_unit: "line",
            queries: Vec::new(),
            line_and_index_by_text: HashMap::new(),
            problems: Vec::new(),
            unreported_problems: 0,
        }
    }

    fn report_problem(&mut self, line: usize, problem: impl std::fmt::Display) {
        if self.problems.len() < MAX_REPORTED_PROBLEMS {
            self.problems.push(format!("{} {line}: {problem}", self.numbered_unit));
        } else {
            self.unreported_problems += 1;
        }
    }

    /// Returns the trimmed text; `None` if it is empty or too long, which is reported.
    fn parse_query_text(&mut self, line: usize, text: &str) -> Option<String> {
        let text = text.trim();
        let count = text.chars().count();
        if text.is_empty() {
            self.report_problem(line, "text is empty; write what is searched for");
            return None;
        }
        if count > MAX_QUERY_CHARS {
            self.report_problem(
                line,
                format!("text has {count} characters, more than {MAX_QUERY_CHARS}"),
            );
            return None;
        }
        Some(text.to_owned())
    }

    /// Returns the grades by image id; `None` if an id or a grade is invalid, which is reported.
    fn parse_grades(
        &mut self,
        line: usize,
        pairs: impl IntoIterator<Item = (String, f64)>,
    ) -> Option<BTreeMap<ImageId, f64>> {
        let mut grades = BTreeMap::new();
        for (id, grade) in pairs {
            let id = match ImageId::new(&id) {
                Ok(id) => id,
                Err(invalid) => {
                    self.report_problem(line, format!("relevant: {invalid}"));
                    return None;
                }
            };
            if !grade.is_finite() || grade < 0.0 {
                self.report_problem(
                    line,
                    format!(
                        "relevant: the grade {grade} of {id} is not 0 (wrong) or more (how right)"
                    ),
                );
                return None;
            }
            if grades.insert(id.clone(), grade).is_some() {
                self.report_problem(line, format!("relevant: {id} is listed twice"));
                return None;
            }
        }
        if grades.len() > MAX_JUDGED_IMAGES {
            let count = grades.len();
            self.report_problem(
                line,
                format!("relevant: {count} images, more than {MAX_JUDGED_IMAGES}"),
            );
            return None;
        }
        Some(grades)
    }

    fn add_query(&mut self, line: usize, query: JudgedQuery) {
        let index = self.queries.len();
        if let Some((first_line, _)) = self.line_and_index_by_text.get(&query.text) {
            let unit = self.numbered_unit;
            let problem = format!("text {:?} is on {unit} {first_line} already", query.text);
            self.report_problem(line, problem);
            return;
        }
        if index == MAX_QUERIES {
            self.report_problem(line, format!("more than {MAX_QUERIES} queries; take a sample"));
            return;
        }
        self.line_and_index_by_text.insert(query.text.clone(), (line, index));
        self.queries.push(query);
    }

    fn into_queries(mut self) -> Result<Vec<JudgedQuery>, QueryFileError> {
        if self.problems.is_empty() && self.queries.is_empty() {
            self.problems.push("has no queries".into());
        }
        if self.problems.is_empty() {
            return Ok(self.queries);
        }
        Err(QueryFileError {
            file: self.file,
            problems: self.problems,
            unreported_problems: self.unreported_problems,
        })
    }
}

/// Returns the judgements that grades express: no grades mean that nothing matches, and grades of
/// wrong images alone say nothing about the images that were not judged.
fn judgements_from_grades(grades: BTreeMap<ImageId, f64>) -> Judgements {
    if grades.is_empty() {
        return Judgements::NoMatch;
    }
    let judged_only = !grades.values().any(|grade| *grade > 0.0);
    Judgements::Graded { grades, judged_only }
}

/// Reads JSON lines, or one JSON array of such objects, with `text` and, optionally, `relevant` (a list
/// of image ids, or an object of image id to grade; empty if nothing matches) and `group`. Errors name
/// the file as `file`.
pub fn queries_from_json_lines(
    content: &str,
    file: &str,
) -> Result<Vec<JudgedQuery>, QueryFileError> {
    let mut collector = QueryCollector::new(file);
    if content.trim_start().starts_with('[') {
        match serde_json::from_str::<Vec<JudgedQueryJson>>(content) {
            Ok(queries) => {
                collector.numbered_unit = "query";
                for (i, query) in queries.into_iter().enumerate() {
                    add_json_query(&mut collector, i + 1, query);
                }
            }
            Err(error) => collector.report_problem(error.line(), describe_without_position(&error)),
        }
        return collector.into_queries();
    }
    for (i, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = i + 1;
        match serde_json::from_str(line) {
            Ok(query) => add_json_query(&mut collector, number, query),
            Err(error) => collector.report_problem(number, describe_without_position(&error)),
        }
    }
    collector.into_queries()
}

fn add_json_query(collector: &mut QueryCollector, number: usize, parsed: JudgedQueryJson) {
    let Some(text) = collector.parse_query_text(number, &parsed.text) else { return };
    let judgements = match parsed.relevant {
        None => Judgements::Unjudged,
        Some(relevant) => {
            let grades = match relevant {
                RelevantJson::Ids(ids) => {
                    collector.parse_grades(number, ids.into_iter().map(|id| (id.into(), 1.0)))
                }
                RelevantJson::Grades(GradePairs(pairs)) => collector.parse_grades(number, pairs),
            };
            let Some(grades) = grades else { return };
            judgements_from_grades(grades)
        }
    };
    let group = parsed.group.filter(|group| !group.trim().is_empty());
    collector.add_query(number, JudgedQuery { text, group, judgements });
}

/// Reads CSV with a header, separated by commas, semicolons or tabs, in one of two forms. One row per
/// query: `text`, `relevant` (image ids separated by `|`, each optionally with `=grade`; without the
/// column queries are unjudged, an empty field means that nothing matches), `group`. One row per
/// judgement: `text`, `image_id`, `grade` (1 if missing), `group`.
pub fn queries_from_csv(content: &str, file: &str) -> Result<Vec<JudgedQuery>, QueryFileError> {
    let mut collector = QueryCollector::new(file);
    let delimiter = detect_delimiter(content.as_bytes(), &CSV_COLUMNS);
    let mut table = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .trim(csv::Trim::All)
        .from_reader(content.as_bytes());
    let header = match table.headers() {
        Ok(header) => header.clone(),
        Err(error) => {
            collector.report_problem(1, error);
            return collector.into_queries();
        }
    };
    for name in header.iter().filter(|name| !CSV_COLUMNS.contains(name)) {
        let problem = format!("column {name:?} is not one of {}", CSV_COLUMNS.join(", "));
        collector.report_problem(1, problem);
    }
    let column_index = |name: &str| header.iter().position(|column| column == name);
    let (text, relevant, image) =
        (column_index("text"), column_index("relevant"), column_index("image_id"));
    if text.is_none() || relevant.is_some() && image.is_some() {
        collector.report_problem(1, "a column text is needed, with relevant (one row per query) or with image_id (one row per judgement)");
    }
    if !collector.problems.is_empty() {
        return collector.into_queries();
    }
    for record in table.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let line = error.position().map_or(0, csv::Position::line) as usize;
                collector.report_problem(line, describe_csv_error(&error));
                continue;
            }
        };
        let line = record.position().map_or(0, csv::Position::line) as usize;
        let field = |column: Option<usize>| column.and_then(|i| record.get(i)).unwrap_or_default();
        let Some(text) = collector.parse_query_text(line, field(text)) else { continue };
        let group = Some(field(column_index("group")).to_owned()).filter(|group| !group.is_empty());
        if image.is_some() {
            let grade = match field(column_index("grade")) {
                "" => Ok(1.0),
                grade => grade.parse::<f64>(),
            };
            let Ok(grade) = grade else {
                let problem = format!("grade {:?} is not a number", field(column_index("grade")));
                collector.report_problem(line, problem);
                continue;
            };
            let pair = (field(image).to_owned(), grade);
            let Some(grades) = collector.parse_grades(line, [pair]) else { continue };
            merge_grades(&mut collector, line, text, group, grades);
            continue;
        }
        let judgements = if relevant.is_none() {
            Judgements::Unjudged
        } else {
            let pairs = parse_graded_ids(field(relevant));
            let Some(grades) = collector.parse_grades(line, pairs) else { continue };
            judgements_from_grades(grades)
        };
        collector.add_query(line, JudgedQuery { text, group, judgements });
    }
    collector.into_queries()
}

fn describe_csv_error(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!(
                "has {len} fields, the header {expected_len}; quote fields that hold the separator"
            )
        }
        _ => error.to_string(),
    }
}

/// Parses `a|b=2` into pairs of id and grade. An id may contain `=`: only a number after the last
/// `=` is a grade.
fn parse_graded_ids(field: &str) -> Vec<(String, f64)> {
    let ids = field.split('|').map(str::trim).filter(|part| !part.is_empty());
    let pair = |part: &str| {
        let grade = part.rsplit_once('=').and_then(|(id, g)| Some((id, g.parse::<f64>().ok()?)));
        grade.map_or_else(|| (part.to_owned(), 1.0), |(id, grade)| (id.to_owned(), grade))
    };
    ids.map(pair).collect()
}

/// Adds grades to a query that may have others already.
fn merge_grades(
    collector: &mut QueryCollector,
    line: usize,
    text: String,
    group: Option<String>,
    grades: BTreeMap<ImageId, f64>,
) {
    let Some((_, index)) = collector.line_and_index_by_text.get(&text).copied() else {
        collector.add_query(
            line,
            JudgedQuery { text, group, judgements: judgements_from_grades(grades) },
        );
        return;
    };
    let known = &mut collector.queries[index];
    let Judgements::Graded { grades: all, judged_only } = &mut known.judgements else {
        return;
    };
    let judged_twice = grades.keys().find(|id| all.contains_key(id)).cloned();
    let group_differs = known.group != group;
    *judged_only &= !grades.values().any(|grade| *grade > 0.0);
    all.extend(grades);
    if let Some(id) = judged_twice {
        collector.report_problem(line, format!("{id} was judged for this text already"));
    } else if group_differs {
        collector.report_problem(line, "group differs from that of the text's other rows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judgements(pairs: &[(&str, f64)]) -> Judgements {
        let grades = pairs.iter().map(|(id, g)| (ImageId::new(id).unwrap(), *g)).collect();
        Judgements::Graded { grades, judged_only: false }
    }

    #[test]
    fn json_lines_and_both_forms_of_csv_give_the_same_queries() {
        let json = r#"{"text":"a red mug","relevant":["1","2"],"group":"mugs"}
{"text":"stripes, many","relevant":{"3":2,"4":1}}

{"text":"taxes","relevant":[]}"#;
        let row_per_query =
            "text,relevant,group\na red mug,1|2,mugs\n\"stripes, many\",3=2|4,\ntaxes,,\n";
        let row_per_judgement = "text,image_id,grade,group\na red mug,1,,mugs\na red mug,2,1,mugs\n\"stripes, many\",3,2,\n\"stripes, many\",4,1,\n";
        let json = queries_from_json_lines(json, "q.jsonl").unwrap();
        assert_eq!(json, queries_from_csv(row_per_query, "q.csv").unwrap());
        assert_eq!(json[..2], queries_from_csv(row_per_judgement, "q.csv").unwrap());
        assert_eq!(json[0].group.as_deref(), Some("mugs"));
        assert_eq!(json[1].judgements, judgements(&[("3", 2.0), ("4", 1.0)]));
        assert_eq!(json[2].judgements, Judgements::NoMatch);
        for separator in [";", "\t"] {
            let other = row_per_judgement.replace(',', separator);
            assert_eq!(json[..1], queries_from_csv(&other, "q.csv").unwrap()[..1]);
        }
        let array = r#"[{"text": "a red mug", "relevant": [1, "2"], "group": "mugs"},
            {"text": "stripes, many", "relevant": {"3": 2, "4": 1}},
            {"text": "taxes", "relevant": []}]"#;
        assert_eq!(json, queries_from_json_lines(array, "q.json").unwrap());
        let log = queries_from_csv("text\na hat\n", "log.csv").unwrap();
        assert_eq!(log[0].judgements, Judgements::Unjudged);
    }

    #[test]
    fn wrong_images_alone_do_not_say_that_nothing_matches() {
        let json =
            queries_from_json_lines(r#"{"text":"a mug","relevant":{"1":0,"2":0}}"#, "q").unwrap();
        let grades = ["1", "2"].map(|id| (ImageId::new(id).unwrap(), 0.0)).into();
        assert_eq!(json[0].judgements, Judgements::Graded { grades, judged_only: true });
        assert_eq!(json, queries_from_csv("text,relevant\na mug,1=0|2=0\n", "q").unwrap());
        assert_eq!(
            json,
            queries_from_csv("text,image_id,grade\na mug,1,0\na mug,2,0\n", "q").unwrap()
        );
        let one_right = r#"{"text":"a mug","relevant":{"1":0,"2":1}}"#;
        let one_right = queries_from_json_lines(one_right, "q").unwrap();
        assert_eq!(one_right[0].judgements, judgements(&[("1", 0.0), ("2", 1.0)]));
    }

    #[test]
    fn all_problems_are_reported_at_once_with_their_lines() {
        let json = r#"{"text":"a"}
{"text":" "}
{"text":"a"}
{"txt":"b"}
{"text":"c","relevant":{"x":-1}}
{"text":"d","relevant":[""]}
{"text":"e","relevant":"x"}
nonsense"#;
        let error = queries_from_json_lines(json, "q.jsonl").unwrap_err();
        assert_eq!(error.problems.len(), 7, "{error}");
        let text = error.to_string();
        for word in [
            "q.jsonl: 7 problems",
            "line 2: text is empty",
            "line 1 already",
            "txt",
            "-1 of x",
            "line 6: relevant",
            "list of image ids",
            "line 8",
        ] {
            assert!(text.contains(word), "{word}:\n{text}");
        }
        for (json, named) in [
            (
                r#"{"text":"a","relevant":{"x":1,"y":2,"x":0}}"#,
                "line 1: relevant: x is listed twice",
            ),
            (r#"{"text":"a","relevant":[1,"1"]}"#, "line 1: relevant: 1 is listed twice"),
            (r#"{"text":"a","relevant":[1.5]}"#, "list of image ids"),
            (r#"[{"text":"a"},{"text":""},{"text":"a"}]"#, "query 2: text is empty"),
            (r#"[{"text":"a"},{"text":"a"}]"#, "query 2: text \"a\" is on query 1"),
            ("[{\"text\":\"a\"},\n{\"txt\":1}]", "line 2: unknown field"),
            ("[\"a\"]", "an object with text"),
        ] {
            let text = queries_from_json_lines(json, "q.json").unwrap_err().to_string();
            assert!(text.contains(named), "{json}: {text}");
        }
        let many = "{}\n".repeat(100);
        let error = queries_from_json_lines(&many, "q.jsonl").unwrap_err();
        assert_eq!((error.problems.len(), error.unreported_problems), (20, 80));
        for (csv, named) in [
            ("text,colour\na,red\n", "column \"colour\""),
            ("image_id\n1\n", "a column text"),
            ("text,image_id,grade\na,1,high\n", "line 2: grade \"high\""),
            ("text,image_id\na,1\na,1\n", "line 3: 1 was judged"),
            ("text,relevant\na,1,2\n", "line 2: has 3 fields"),
            ("text\n", "no queries"),
        ] {
            let text = queries_from_csv(csv, "q.csv").unwrap_err().to_string();
            assert!(text.contains(named), "{csv:?}: {text}");
        }
    }
}
