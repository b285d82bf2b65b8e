//! Reading the logs: sums over the lines of each query.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, Read as _};

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::{MAX_QUERIES_PER_CONFIGURATION, QueryLogError};
use crate::telemetry::event;

/// Longest line that is read, in bytes; a longer one is malformed.
pub(super) const MAX_LINE_BYTES: u64 = 1 << 20;
/// Malformed lines that are told; the others are counted.
const MAX_REPORTED_MALFORMED: usize = 20;

/// Shares of common results are counted by tenths; the last is 1, all the same.
pub(super) const OVERLAP_BINS: usize = 11;

/// A `shadow` line, as far as it is used.
#[derive(Deserialize)]
struct ShadowLine {
    query_hash: String,
    configuration: String,
    candidate: String,
    overlap: f64,
    reranked: u64,
    top_hit_changed: bool,
}

/// A `search` line, as far as it is used.
#[derive(Deserialize)]
struct SearchLine {
    query_hash: String,
    query: Option<String>,
    configuration: String,
    /// Missing in logs of older query workers.
    #[serde(default)]
    overrides: bool,
    input: Option<String>,
    results: u64,
    #[serde(default)]
    offset: u64,
    reranked: u64,
    top_hit_changed: Option<bool>,
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
pub(super) struct ShadowSums {
    pub count: u64,
    pub overlap_sum: f64,
    pub first_changed: u64,
    pub identical: u64,
}

#[derive(Default)]
pub(super) struct AnswerSums {
    pub count: u64,
    pub results: u64,
    pub moved: u64,
    pub first_moved_known: u64,
    pub first_moved: u64,
    pub no_match_known: u64,
    pub no_match: u64,
    pub scan_ms_sum: f64,
}

pub(super) type SumsByQuery<T> = HashMap<String, T>;

/// Collects lines.
#[derive(Default)]
pub struct QueryLogReader {
    pub(super) sources: Vec<String>,
    pub(super) first_line_at: Option<DateTime<Utc>>,
    pub(super) last_line_at: Option<DateTime<Utc>>,
    pub(super) line_count: u64,
    pub(super) skipped_lines: u64,
    pub(super) malformed_lines: u64,
    pub(super) problems: Vec<String>,
    pub(super) hasher: Sha256,
    pub(super) shadow_sums:
        BTreeMap<(String, String), (SumsByQuery<ShadowSums>, [u64; OVERLAP_BINS])>,
    pub(super) answer_sums: BTreeMap<String, SumsByQuery<AnswerSums>>,
    /// Judgements by configuration: how many, and how many "wrong".
    pub(super) feedback_counts: BTreeMap<String, (usize, usize)>,
    pub(super) query_texts: HashMap<String, String>,
}

impl QueryLogReader {
    /// Reads a log to its end. Lines that cannot be used are counted, and told with their numbers.
    pub fn read_log(&mut self, mut log: impl BufRead, file: &str) -> Result<(), QueryLogError> {
        self.sources.push(file.to_owned());
        let failed = |error| QueryLogError::Read { file: file.to_owned(), error };
        let mut line = Vec::new();
        for number in 1u64.. {
            line.clear();
            let read =
                (&mut log).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).map_err(failed)?;
            if read == 0 {
                break;
            }
            self.line_count += 1;
            let used = if read as u64 == MAX_LINE_BYTES && line.last() != Some(&b'\n') {
                log.skip_until(b'\n').map_err(failed)?;
                Err(LineError::Malformed(format!("is longer than {MAX_LINE_BYTES} bytes")))
            } else {
                self.add_line(line.trim_ascii())
            };
            match used {
                Ok(true) => self.hasher.update(&line),
                Ok(false) => self.skipped_lines += 1,
                Err(LineError::TooManyQueries(name)) => {
                    return Err(QueryLogError::TooManyQueries(name));
                }
                Err(LineError::Malformed(problem)) => {
                    self.malformed_lines += 1;
                    if self.problems.len() < MAX_REPORTED_MALFORMED {
                        self.problems.push(format!("{file}: line {number}: {problem}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether a line counts.
    fn add_line(&mut self, line: &[u8]) -> Result<bool, LineError> {
        if line.is_empty() {
            return Ok(false);
        }
        let value: Value =
            serde_json::from_slice(line).map_err(|e| malformed_line("is not JSON", &e))?;
        if !value.is_object() {
            return Err(LineError::Malformed("is not a JSON object".into()));
        }
        let at = value["timestamp"].as_str().and_then(|at| at.parse::<DateTime<Utc>>().ok());
        let counts = match value["event"].as_str() {
            Some(event::SHADOW_COMPARED) => self.add_shadow_line(
                serde_json::from_value(value)
                    .map_err(|e| malformed_line(event::SHADOW_COMPARED, &e))?,
            )?,
            Some(event::SEARCH) => self.add_search_line(
                serde_json::from_value(value).map_err(|e| malformed_line(event::SEARCH, &e))?,
            )?,
            Some(event::FEEDBACK) => self.add_feedback_line(
                serde_json::from_value(value).map_err(|e| malformed_line(event::FEEDBACK, &e))?,
            ),
            _ => false,
        };
        if let Some(at) = at.filter(|_| counts) {
            self.first_line_at = Some(self.first_line_at.map_or(at, |from| from.min(at)));
            self.last_line_at = Some(self.last_line_at.map_or(at, |to| to.max(at)));
        }
        Ok(counts)
    }

    fn add_shadow_line(&mut self, line: ShadowLine) -> Result<bool, LineError> {
        if !(0.0..=1.0).contains(&line.overlap) {
            return Err(LineError::Malformed(format!(
                "shadow: overlap {} is no share",
                line.overlap
            )));
        }
        let name = line.candidate.clone();
        let key = (line.configuration, line.candidate);
        let (queries, overlaps) = self.shadow_sums.entry(key).or_default();
        let query = sums_for_query(queries, line.query_hash, &name)?;
        query.count += 1;
        query.overlap_sum += line.overlap;
        query.first_changed += u64::from(line.top_hit_changed);
        query.identical += u64::from(line.overlap >= 1.0 && line.reranked == 0);
        overlaps[(line.overlap * 10.0) as usize] += 1;
        Ok(true)
    }

    fn add_search_line(&mut self, line: SearchLine) -> Result<bool, LineError> {
        // How these were answered is not what the configuration says: the request said it, or a picture
        // was asked, which plain CLIP answers.
        let foreign = line.overrides || matches!(line.input.as_deref(), Some("image" | "image_id"));
        if line.offset > 0 || foreign {
            return Ok(false);
        }
        if line.reranked > line.results {
            let problem =
                format!("search: moved is {}, of {} results", line.reranked, line.results);
            return Err(LineError::Malformed(problem));
        }
        if let Some(text) =
            line.query.filter(|_| self.query_texts.len() < MAX_QUERIES_PER_CONFIGURATION)
        {
            self.query_texts.entry(line.query_hash.clone()).or_insert(text);
        }
        let queries = self.answer_sums.entry(line.configuration.clone()).or_default();
        let query = sums_for_query(queries, line.query_hash, &line.configuration)?;
        query.count += 1;
        query.results += line.results;
        query.first_moved_known += u64::from(line.top_hit_changed.is_some());
        query.first_moved += u64::from(line.top_hit_changed == Some(true));
        query.moved += line.reranked;
        query.no_match_known += u64::from(line.no_match.is_some());
        query.no_match += u64::from(line.no_match == Some(true));
        query.scan_ms_sum += line.scan_ms;
        Ok(true)
    }

    fn add_feedback_line(&mut self, line: FeedbackLine) -> bool {
        let Some(configuration) = line.configuration else { return false };
        let (all, wrong) = self.feedback_counts.entry(configuration).or_default();
        *all += 1;
        *wrong += usize::from(line.verdict == "wrong");
        true
    }
}

/// Why a line does not count though it should.
enum LineError {
    /// It is malformed.
    Malformed(String),
    /// It is of one query too many of this configuration.
    TooManyQueries(String),
}

fn malformed_line(what: &str, error: &serde_json::Error) -> LineError {
    // Its own position is within the line, which is told already.
    let error = error.to_string();
    LineError::Malformed(format!("{what}: {}", error.split(" at line ").next().unwrap_or_default()))
}

/// The sums of a query.
fn sums_for_query<'a, T: Default>(
    queries: &'a mut SumsByQuery<T>,
    hash: String,
    configuration: &str,
) -> Result<&'a mut T, LineError> {
    if queries.len() >= MAX_QUERIES_PER_CONFIGURATION && !queries.contains_key(&hash) {
        return Err(LineError::TooManyQueries(configuration.to_owned()));
    }
    Ok(queries.entry(hash).or_default())
}
