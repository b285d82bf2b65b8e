//! Reading the logs: sums over the lines of each query.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, Read as _};

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{LogsError, MAX_QUERIES, TENTHS};
use crate::telemetry::event;

/// Longest line that is read, in bytes; a longer one is malformed.
pub(super) const MAX_LINE: u64 = 1 << 20;
/// Malformed lines that are told; the others are counted.
const MAX_MALFORMED: usize = 20;

/// A `shadow` line, as far as it is used.
#[derive(Deserialize)]
struct ShadowLine {
    query_hash: String,
    configuration: String,
    candidate: String,
    overlap: f64,
    moved: u64,
    top_changed: bool,
}

/// A `search` line, as far as it is used.
#[derive(Deserialize)]
struct SearchLine {
    query_hash: String,
    query: Option<String>,
    configuration: String,
    /// Missing in logs of older query workers.
    #[serde(default)]
    own: bool,
    input: Option<String>,
    results: u64,
    #[serde(default)]
    offset: u64,
    moved: u64,
    first_moved: Option<bool>,
    no_match: Option<bool>,
    scan_ms: f64,
}

/// A `feedback` line, as far as it is used.
#[derive(Deserialize)]
struct FeedbackLine {
    verdict: String,
    configuration: Option<String>,
}

/// Sums over the lines of one query.
#[derive(Default)]
pub(super) struct Compared {
    pub count: u64,
    pub overlap: f64,
    pub first_changed: u64,
    pub same: u64,
}

#[derive(Default)]
pub(super) struct Answered {
    pub count: u64,
    pub results: u64,
    pub moved: u64,
    pub first: u64,
    pub first_moved: u64,
    pub judged: u64,
    pub no_match: u64,
    pub scan_ms: f64,
}

pub(super) type Queries<T> = HashMap<String, T>;

/// Collects lines.
#[derive(Default)]
pub struct Reader {
    pub(super) sources: Vec<String>,
    pub(super) from: Option<DateTime<Utc>>,
    pub(super) to: Option<DateTime<Utc>>,
    pub(super) lines: u64,
    pub(super) skipped: u64,
    pub(super) malformed: u64,
    pub(super) problems: Vec<String>,
    pub(super) hasher: Sha256,
    pub(super) shadows: BTreeMap<(String, String), (Queries<Compared>, [u64; TENTHS])>,
    pub(super) answers: BTreeMap<String, Queries<Answered>>,
    /// Judgements by configuration: how many, and how many "wrong".
    pub(super) feedback: BTreeMap<String, (usize, usize)>,
    pub(super) texts: HashMap<String, String>,
}

impl Reader {
    /// Reads a log to its end. Lines that cannot be used are counted, and told with their numbers.
    pub fn read(&mut self, mut log: impl BufRead, file: &str) -> Result<(), LogsError> {
        self.sources.push(file.to_owned());
        let failed = |error| LogsError::Read { file: file.to_owned(), error };
        let mut line = Vec::new();
        for number in 1u64.. {
            line.clear();
            let read = (&mut log).take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)?;
            if read == 0 {
                break;
            }
            self.lines += 1;
            let used = if read as u64 == MAX_LINE && line.last() != Some(&b'\n') {
                log.skip_until(b'\n').map_err(failed)?;
                Err(Unusable::Line(format!("is longer than {MAX_LINE} bytes")))
            } else {
                self.line(line.trim_ascii())
            };
            match used {
                Ok(true) => self.hasher.update(&line),
                Ok(false) => self.skipped += 1,
                Err(Unusable::TooMany(name)) => return Err(LogsError::TooMany(name)),
                Err(Unusable::Line(problem)) => {
                    self.malformed += 1;
                    if self.problems.len() < MAX_MALFORMED {
                        self.problems.push(format!("{file}: line {number}: {problem}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether a line counts.
    fn line(&mut self, line: &[u8]) -> Result<bool, Unusable> {
        if line.is_empty() {
            return Ok(false);
        }
        let value: Value =
            serde_json::from_slice(line).map_err(|e| malformed("is not JSON", &e))?;
        if !value.is_object() {
            return Err(Unusable::Line("is not a JSON object".into()));
        }
        let at = value["timestamp"].as_str().and_then(|at| at.parse::<DateTime<Utc>>().ok());
        let counts = match value["event"].as_str() {
            Some(event::SHADOW) => self
                .shadow(serde_json::from_value(value).map_err(|e| malformed(event::SHADOW, &e))?)?,
            Some(event::SEARCH) => self
                .search(serde_json::from_value(value).map_err(|e| malformed(event::SEARCH, &e))?)?,
            Some(event::FEEDBACK) => self
                .judged(serde_json::from_value(value).map_err(|e| malformed(event::FEEDBACK, &e))?),
            _ => false,
        };
        if let Some(at) = at.filter(|_| counts) {
            self.from = Some(self.from.map_or(at, |from| from.min(at)));
            self.to = Some(self.to.map_or(at, |to| to.max(at)));
        }
        Ok(counts)
    }

    fn shadow(&mut self, line: ShadowLine) -> Result<bool, Unusable> {
        if !(0.0..=1.0).contains(&line.overlap) {
            return Err(Unusable::Line(format!("shadow: overlap {} is no share", line.overlap)));
        }
        let name = line.candidate.clone();
        let key = (line.configuration, line.candidate);
        let (queries, overlaps) = self.shadows.entry(key).or_default();
        let query = of(queries, line.query_hash, &name)?;
        query.count += 1;
        query.overlap += line.overlap;
        query.first_changed += u64::from(line.top_changed);
        query.same += u64::from(line.overlap >= 1.0 && line.moved == 0);
        overlaps[(line.overlap * 10.0) as usize] += 1;
        Ok(true)
    }

    fn search(&mut self, line: SearchLine) -> Result<bool, Unusable> {
        // How these were answered is not what the configuration says: the request said it, or a picture
        // was asked, which plain CLIP answers.
        let foreign = line.own || matches!(line.input.as_deref(), Some("image" | "image_id"));
        if line.offset > 0 || foreign {
            return Ok(false);
        }
        if line.moved > line.results {
            let problem = format!("search: moved is {}, of {} results", line.moved, line.results);
            return Err(Unusable::Line(problem));
        }
        if let Some(text) = line.query.filter(|_| self.texts.len() < MAX_QUERIES) {
            self.texts.entry(line.query_hash.clone()).or_insert(text);
        }
        let queries = self.answers.entry(line.configuration.clone()).or_default();
        let query = of(queries, line.query_hash, &line.configuration)?;
        query.count += 1;
        query.results += line.results;
        query.first += u64::from(line.first_moved.is_some());
        query.first_moved += u64::from(line.first_moved == Some(true));
        query.moved += line.moved;
        query.judged += u64::from(line.no_match.is_some());
        query.no_match += u64::from(line.no_match == Some(true));
        query.scan_ms += line.scan_ms;
        Ok(true)
    }

    fn judged(&mut self, line: FeedbackLine) -> bool {
        let Some(configuration) = line.configuration else { return false };
        let (all, wrong) = self.feedback.entry(configuration).or_default();
        *all += 1;
        *wrong += usize::from(line.verdict == "wrong");
        true
    }
}

/// Why a line does not count though it should.
enum Unusable {
    /// It is malformed.
    Line(String),
    /// It is of one query too many of this configuration.
    TooMany(String),
}

fn malformed(what: &str, error: &serde_json::Error) -> Unusable {
    // Its own position is within the line, which is told already.
    let error = error.to_string();
    Unusable::Line(format!("{what}: {}", error.split(" at line ").next().unwrap_or_default()))
}

/// The sums of a query.
fn of<'a, T: Default>(
    queries: &'a mut Queries<T>,
    hash: String,
    configuration: &str,
) -> Result<&'a mut T, Unusable> {
    if queries.len() >= MAX_QUERIES && !queries.contains_key(&hash) {
        return Err(Unusable::TooMany(configuration.to_owned()));
    }
    Ok(queries.entry(hash).or_default())
}
