//! Queries, and what is known of their right answers: JSON lines, CSV, stored feedback.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Deserialize;

use crate::record::ImageId;
use crate::serve::feedback::{Feedback, Said};

/// Most queries of one evaluation: every one is ranked under every configuration.
pub const MAX_QUERIES: usize = 20_000;
/// Most problems that are told at once.
const MAX_PROBLEMS: usize = 20;
/// Longest query, in characters; a text tower reads 77 tokens at most.
const MAX_CHARS: usize = 1_000;
/// Most right images that a query may name.
const MAX_RIGHT: usize = 100_000;

/// A query.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// What is typed.
    pub text: String,
    /// Results are told apart by it; none belongs to no group.
    pub group: Option<String>,
    /// What is known of its right answers.
    pub truth: Truth,
}

/// What is known of a query's right answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Truth {
    /// Nothing.
    Unknown,
    /// No image of the catalogue matches.
    NoMatch,
    /// The grades of images.
    Graded {
        /// Above 0 is right, and more right the higher; 0 is wrong.
        grades: BTreeMap<ImageId, f64>,
        /// Whether only these images are looked at, because of all others it is not known whether
        /// they are right ("condensed lists"; Sakai, SIGIR 2007). Else all others are wrong.
        condensed: bool,
    },
}

/// What is wrong with a file of queries; every problem at once, a line each.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {}", listed(.problems, *.more))]
pub struct QueriesError {
    /// The file.
    pub file: String,
    /// What is wrong, with line numbers, the first twenty.
    pub problems: Vec<String>,
    /// How many more problems there are.
    pub more: usize,
}

fn listed(problems: &[String], more: usize) -> String {
    let mut text = problems.join("\n  ");
    if more > 0 {
        let _ = write!(text, "\n  and {more} more");
    }
    if problems.len() > 1 { format!("{} problems\n  {text}", problems.len() + more) } else { text }
}

/// Right images as JSON lines have them: ids alone, or ids with grades.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "relevant is a list of image ids, or an object of image id to grade")]
enum Relevant {
    Ids(Vec<String>),
    Grades(BTreeMap<String, f64>),
}

/// A line of a JSON-lines file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    text: String,
    relevant: Option<Relevant>,
    group: Option<String>,
}

/// Columns of a CSV file.
const KNOWN: [&str; 5] = ["text", "relevant", "image_id", "grade", "group"];

/// Collects queries and problems, with the lines that they come from.
struct Reader {
    file: String,
    asked: Vec<Asked>,
    lines: HashMap<String, (usize, usize)>,
    problems: Vec<String>,
    more: usize,
}

impl Reader {
    fn new(file: &str) -> Self {
        Self {
            file: file.to_owned(),
            asked: Vec::new(),
            lines: HashMap::new(),
            problems: Vec::new(),
            more: 0,
        }
    }

    fn problem(&mut self, line: usize, problem: impl std::fmt::Display) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(format!("line {line}: {problem}"));
        } else {
            self.more += 1;
        }
    }

    /// The text as it is asked; `None` where it cannot be.
    fn text(&mut self, line: usize, text: &str) -> Option<String> {
        let text = text.trim();
        let count = text.chars().count();
        if text.is_empty() {
            self.problem(line, "text is empty; say what is looked for");
            return None;
        }
        if count > MAX_CHARS {
            self.problem(line, format!("text has {count} characters, more than {MAX_CHARS}"));
            return None;
        }
        Some(text.to_owned())
    }

    /// The grades of ids that are ids; `None` where one is not.
    fn grades(
        &mut self,
        line: usize,
        pairs: impl IntoIterator<Item = (String, f64)>,
    ) -> Option<BTreeMap<ImageId, f64>> {
        let mut grades = BTreeMap::new();
        for (id, grade) in pairs {
            let id = match ImageId::new(&id) {
                Ok(id) => id,
                Err(invalid) => {
                    self.problem(line, format!("relevant: {invalid}"));
                    return None;
                }
            };
            if !grade.is_finite() || grade < 0.0 {
                self.problem(
                    line,
                    format!(
                        "relevant: the grade {grade} of {id} is not 0 (wrong) or more (how right)"
                    ),
                );
                return None;
            }
            if grades.insert(id.clone(), grade).is_some() {
                self.problem(line, format!("relevant: {id} stands twice"));
                return None;
            }
        }
        if grades.len() > MAX_RIGHT {
            let count = grades.len();
            self.problem(line, format!("relevant: {count} images, more than {MAX_RIGHT}"));
            return None;
        }
        Some(grades)
    }

    fn push(&mut self, line: usize, asked: Asked) {
        let place = self.asked.len();
        if let Some((known, _)) = self.lines.get(&asked.text) {
            let problem = format!("text {:?} stands on line {known} already", asked.text);
            self.problem(line, problem);
            return;
        }
        if place == MAX_QUERIES {
            self.problem(line, format!("more than {MAX_QUERIES} queries; take a sample"));
            return;
        }
        self.lines.insert(asked.text.clone(), (line, place));
        self.asked.push(asked);
    }

    fn done(mut self) -> Result<Vec<Asked>, QueriesError> {
        if self.problems.is_empty() && self.asked.is_empty() {
            self.problems.push("has no queries".into());
        }
        if self.problems.is_empty() {
            return Ok(self.asked);
        }
        Err(QueriesError { file: self.file, problems: self.problems, more: self.more })
    }
}

/// What grades say: none, that nothing matches; those of wrong images alone, nothing of all others.
fn graded(grades: BTreeMap<ImageId, f64>) -> Truth {
    if grades.is_empty() {
        return Truth::NoMatch;
    }
    let condensed = !grades.values().any(|grade| *grade > 0.0);
    Truth::Graded { grades, condensed }
}

/// Reads JSON lines: `text`, and where known `relevant` (a list of image ids, or an object of image
/// id to grade; empty where nothing matches) and `group`. `file` is named in errors.
pub fn from_json_lines(content: &str, file: &str) -> Result<Vec<Asked>, QueriesError> {
    let mut reader = Reader::new(file);
    for (i, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = i + 1;
        let parsed: Line = match serde_json::from_str(line) {
            Ok(parsed) => parsed,
            Err(error) => {
                // Its own position is within the line, which is told already.
                let error = error.to_string();
                let error = error.split(" at line ").next().unwrap_or_default();
                reader.problem(number, error);
                continue;
            }
        };
        let Some(text) = reader.text(number, &parsed.text) else { continue };
        let truth = match parsed.relevant {
            None => Truth::Unknown,
            Some(relevant) => {
                let grades = match relevant {
                    Relevant::Ids(ids) => {
                        reader.grades(number, ids.into_iter().map(|id| (id, 1.0)))
                    }
                    Relevant::Grades(grades) => reader.grades(number, grades),
                };
                let Some(grades) = grades else { continue };
                graded(grades)
            }
        };
        let group = parsed.group.filter(|group| !group.trim().is_empty());
        reader.push(number, Asked { text, group, truth });
    }
    reader.done()
}

/// Reads CSV with a header. Either a row a query: `text`, `relevant` (image ids divided by `|`, each
/// with `=grade` where graded; the column missing: not known, the field empty: nothing matches),
/// `group`; or a row a judgement: `text`, `image_id`, `grade` (1 where missing), `group`.
pub fn from_csv(content: &str, file: &str) -> Result<Vec<Asked>, QueriesError> {
    let mut reader = Reader::new(file);
    let mut table = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(content.as_bytes());
    let header = match table.headers() {
        Ok(header) => header.clone(),
        Err(error) => {
            reader.problem(1, error);
            return reader.done();
        }
    };
    for name in header.iter().filter(|name| !KNOWN.contains(name)) {
        let problem = format!("column {name:?} is not one of {}", KNOWN.join(", "));
        reader.problem(1, problem);
    }
    let place = |name: &str| header.iter().position(|column| column == name);
    let (text, relevant, image) = (place("text"), place("relevant"), place("image_id"));
    if text.is_none() || relevant.is_some() && image.is_some() {
        reader.problem(1, "a column text is needed, with relevant (a row a query) or with image_id (a row a judgement)");
    }
    if !reader.problems.is_empty() {
        return reader.done();
    }
    for record in table.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let line = error.position().map_or(0, csv::Position::line) as usize;
                reader.problem(line, csv_reason(&error));
                continue;
            }
        };
        let line = record.position().map_or(0, csv::Position::line) as usize;
        let field = |column: Option<usize>| column.and_then(|i| record.get(i)).unwrap_or_default();
        let Some(text) = reader.text(line, field(text)) else { continue };
        let group = Some(field(place("group")).to_owned()).filter(|group| !group.is_empty());
        if image.is_some() {
            let grade = match field(place("grade")) {
                "" => Ok(1.0),
                grade => grade.parse::<f64>(),
            };
            let Ok(grade) = grade else {
                let problem = format!("grade {:?} is not a number", field(place("grade")));
                reader.problem(line, problem);
                continue;
            };
            let pair = (field(image).to_owned(), grade);
            let Some(grades) = reader.grades(line, [pair]) else { continue };
            judgement(&mut reader, line, text, group, grades);
            continue;
        }
        let truth = if relevant.is_none() {
            Truth::Unknown
        } else {
            let pairs = pairs(field(relevant));
            let Some(grades) = reader.grades(line, pairs) else { continue };
            graded(grades)
        };
        reader.push(line, Asked { text, group, truth });
    }
    reader.done()
}

fn csv_reason(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} fields, the header {expected_len}; quote fields that hold a comma")
        }
        _ => error.to_string(),
    }
}

/// `a|b=2` as pairs of id and grade. An id may hold `=` itself: only a number after the last one is a
/// grade.
fn pairs(field: &str) -> Vec<(String, f64)> {
    let ids = field.split('|').map(str::trim).filter(|part| !part.is_empty());
    let pair = |part: &str| {
        let grade = part.rsplit_once('=').and_then(|(id, g)| Some((id, g.parse::<f64>().ok()?)));
        grade.map_or_else(|| (part.to_owned(), 1.0), |(id, grade)| (id.to_owned(), grade))
    };
    ids.map(pair).collect()
}

/// Adds one judgement of a query that may have others.
fn judgement(
    reader: &mut Reader,
    line: usize,
    text: String,
    group: Option<String>,
    grades: BTreeMap<ImageId, f64>,
) {
    let Some((_, place)) = reader.lines.get(&text).copied() else {
        reader.push(line, Asked { text, group, truth: graded(grades) });
        return;
    };
    let known = &mut reader.asked[place];
    let Truth::Graded { grades: all, condensed } = &mut known.truth else { return };
    let twice = grades.keys().find(|id| all.contains_key(id)).cloned();
    let other = known.group != group;
    *condensed &= !grades.values().any(|grade| *grade > 0.0);
    all.extend(grades);
    if let Some(id) = twice {
        reader.problem(line, format!("{id} was judged for this text already"));
    } else if other {
        reader.problem(line, "group differs from that of the text's other rows");
    }
}

/// Queries from stored feedback, oldest first: JSON lines with `text`, `image_id` and `verdict`
/// (`right` or `wrong`); the last word on an image counts. Lines that are none are counted, not
/// refused: feedback comes from everywhere.
pub fn from_feedback<'a>(lines: impl Iterator<Item = &'a str>) -> (Vec<Asked>, usize) {
    let mut texts: Vec<String> = Vec::new();
    let mut said: HashMap<String, BTreeMap<ImageId, f64>> = HashMap::new();
    let mut unusable = 0;
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let Some((feedback, id)) = serde_json::from_str::<Feedback>(line)
            .ok()
            .and_then(|feedback| ImageId::new(&feedback.image_id).ok().map(|id| (feedback, id)))
        else {
            unusable += 1;
            continue;
        };
        let text = feedback.text.trim().to_owned();
        if text.is_empty() || !said.contains_key(&text) && texts.len() == MAX_QUERIES {
            unusable += 1;
            continue;
        }
        let grade = f64::from(u8::from(feedback.verdict == Said::Right));
        said.entry(text.clone())
            .or_insert_with(|| {
                texts.push(text);
                BTreeMap::new()
            })
            .insert(id, grade);
    }
    let asked = texts.into_iter().map(|text| {
        let grades = said.remove(&text).unwrap_or_default();
        Asked { text, group: None, truth: Truth::Graded { grades, condensed: true } }
    });
    (asked.collect(), unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(pairs: &[(&str, f64)]) -> Truth {
        let grades = pairs.iter().map(|(id, g)| (ImageId::new(id).unwrap(), *g)).collect();
        Truth::Graded { grades, condensed: false }
    }

    #[test]
    fn json_lines_and_both_forms_of_csv_say_the_same() {
        let json = r#"{"text":"a red mug","relevant":["1","2"],"group":"mugs"}
{"text":"stripes, many","relevant":{"3":2,"4":1}}

{"text":"taxes","relevant":[]}"#;
        let wide = "text,relevant,group\na red mug,1|2,mugs\n\"stripes, many\",3=2|4,\ntaxes,,\n";
        let long = "text,image_id,grade,group\na red mug,1,,mugs\na red mug,2,1,mugs\n\"stripes, many\",3,2,\n\"stripes, many\",4,1,\n";
        let json = from_json_lines(json, "q.jsonl").unwrap();
        assert_eq!(json, from_csv(wide, "q.csv").unwrap());
        assert_eq!(json[..2], from_csv(long, "q.csv").unwrap());
        assert_eq!(json[0].group.as_deref(), Some("mugs"));
        assert_eq!(json[1].truth, truth(&[("3", 2.0), ("4", 1.0)]));
        assert_eq!(json[2].truth, Truth::NoMatch);
        let log = from_csv("text\na hat\n", "log.csv").unwrap();
        assert_eq!(log[0].truth, Truth::Unknown);
    }

    #[test]
    fn wrong_images_alone_do_not_say_that_nothing_matches() {
        let json = from_json_lines(r#"{"text":"a mug","relevant":{"1":0,"2":0}}"#, "q").unwrap();
        let grades = ["1", "2"].map(|id| (ImageId::new(id).unwrap(), 0.0)).into();
        assert_eq!(json[0].truth, Truth::Graded { grades, condensed: true });
        assert_eq!(json, from_csv("text,relevant\na mug,1=0|2=0\n", "q").unwrap());
        assert_eq!(json, from_csv("text,image_id,grade\na mug,1,0\na mug,2,0\n", "q").unwrap());
        let one_right = r#"{"text":"a mug","relevant":{"1":0,"2":1}}"#;
        let one_right = from_json_lines(one_right, "q").unwrap();
        assert_eq!(one_right[0].truth, truth(&[("1", 0.0), ("2", 1.0)]));
    }

    #[test]
    fn every_problem_is_told_at_once_with_its_line() {
        let json = r#"{"text":"a"}
{"text":" "}
{"text":"a"}
{"txt":"b"}
{"text":"c","relevant":{"x":-1}}
{"text":"d","relevant":[""]}
{"text":"e","relevant":"x"}
nonsense"#;
        let error = from_json_lines(json, "q.jsonl").unwrap_err();
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
        let many = "{}\n".repeat(100);
        let error = from_json_lines(&many, "q.jsonl").unwrap_err();
        assert_eq!((error.problems.len(), error.more), (20, 80));
        for (csv, named) in [
            ("text,colour\na,red\n", "column \"colour\""),
            ("image_id\n1\n", "a column text"),
            ("text,image_id,grade\na,1,high\n", "line 2: grade \"high\""),
            ("text,image_id\na,1\na,1\n", "line 3: 1 was judged"),
            ("text,relevant\na,1,2\n", "line 2: has 3 fields"),
            ("text\n", "no queries"),
        ] {
            let text = from_csv(csv, "q.csv").unwrap_err().to_string();
            assert!(text.contains(named), "{csv:?}: {text}");
        }
    }

    #[test]
    fn the_last_word_on_an_image_counts_and_only_judged_images_are_looked_at() {
        let lines = [
            r#"{"at":"2026-01-01T00:00:00Z","text":"a mug","image_id":"1","verdict":"right"}"#,
            r#"{"at":"2026-01-02T00:00:00Z","text":"a mug","image_id":"2","verdict":"wrong"}"#,
            r#"{"at":"2026-01-03T00:00:00Z","text":"a mug","image_id":"1","verdict":"wrong"}"#,
            "broken",
        ];
        let (asked, unusable) = from_feedback(lines.into_iter());
        assert_eq!((asked.len(), unusable), (1, 1));
        let Truth::Graded { grades, condensed: true } = &asked[0].truth else { panic!() };
        assert_eq!(grades.values().copied().collect::<Vec<_>>(), [0.0, 0.0]);
    }
}
