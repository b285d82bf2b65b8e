//! Reads logs and sums their lines by query.

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::{MAX_QUERIES_PER_CONFIGURATION, QueryLogError};
use crate::evaluate::log_lines::{MAX_LINE_BYTES, for_each_line};
use crate::evaluate::text_files::describe_without_position;
use crate::telemetry::event;

/// Maximum number of malformed lines that are listed; further ones are counted.
const MAX_REPORTED_MALFORMED: usize = 20;

/// Number of bins of overlap: [0, 0.1), [0.1, 0.2), … [0.9, 1) and exactly 1.
pub(super) const OVERLAP_BINS: usize = 11;

/// The fields of a `shadow.compared` line that are used.
#[derive(Deserialize)]
struct ShadowLine {
    query_hash: String,
    configuration: String,
    candidate: String,
    overlap: f64,
    reranked: u64,
    top_hit_changed: bool,
}

/// The fields of a `search` line that are used.
#[derive(Deserialize)]
struct SearchLine {
    query_hash: String,
    query: Option<String>,
    configuration: String,
    /// Query workers of older versions do not log it.
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

/// The fields of a `feedback` line that are used.
#[derive(Deserialize)]
struct FeedbackLine {
    verdict: String,
    configuration: Option<String>,
}

/// Sums over the `shadow.compared` lines of one query.
#[derive(Default)]
pub(super) struct ShadowSums {
    pub line_count: u64,
    pub overlap_sum: f64,
    /// Lines on which the first result changed.
    pub top_hit_changed_lines: u64,
    /// Lines on which no result changed.
    pub identical_lines: u64,
}

/// Sums over the `search` lines of one query.
#[derive(Default)]
pub(super) struct AnswerSums {
    pub line_count: u64,
    pub result_count: u64,
    /// Results at another rank than plain CLIP gives them.
    pub reranked_results: u64,
    /// Lines that say whether plain CLIP has the same first result.
    pub top_hit_reporting_lines: u64,
    /// Lines on which plain CLIP has another first result.
    pub top_hit_changed_lines: u64,
    /// Lines that say whether anything matches.
    pub no_match_reporting_lines: u64,
    /// Lines on which nothing matches.
    pub no_match_lines: u64,
    pub scan_ms_sum: f64,
}

/// Sums by query hash.
pub(super) type SumsByQuery<T> = HashMap<String, T>;

/// Sums the lines of all logs that it reads; [`QueryLogReader::into_report`] evaluates them.
#[derive(Default)]
pub struct QueryLogReader {
    pub(super) log_files: Vec<String>,
    pub(super) first_line_at: Option<DateTime<Utc>>,
    pub(super) last_line_at: Option<DateTime<Utc>>,
    pub(super) line_count: u64,
    pub(super) skipped_lines: u64,
    pub(super) malformed_lines: u64,
    pub(super) problems: Vec<String>,
    pub(super) hasher: Sha256,
    /// Sums and overlap histogram by live configuration and candidate.
    pub(super) shadow_sums:
        BTreeMap<(String, String), (SumsByQuery<ShadowSums>, [u64; OVERLAP_BINS])>,
    /// Sums by configuration.
    pub(super) answer_sums: BTreeMap<String, SumsByQuery<AnswerSums>>,
    /// Number of verdicts, and how many of them are "wrong", by configuration.
    pub(super) feedback_counts: BTreeMap<String, (usize, usize)>,
    /// Texts by query hash.
    pub(super) query_texts: HashMap<String, String>,
}

impl QueryLogReader {
    /// Reads a log to its end. Malformed lines are counted and listed with their numbers.
    pub fn read_log(&mut self, log: impl BufRead, file: &str) -> Result<(), QueryLogError> {
        self.log_files.push(file.to_owned());
        let failed = |error| QueryLogError::Read { file: file.to_owned(), error };
        for_each_line(log, failed, |number, line| {
            self.line_count += 1;
            let is_used = line.map_or_else(
                || Err(LineError::Malformed(format!("is longer than {MAX_LINE_BYTES} bytes"))),
                |line| self.add_line(line.trim_ascii()),
            );
            match is_used {
                Ok(true) => self.hasher.update(line.unwrap_or_default()),
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
            Ok(())
        })
    }

    /// Adds a line to the sums; returns whether it was used.
    fn add_line(&mut self, line: &[u8]) -> Result<bool, LineError> {
        if line.is_empty() {
            return Ok(false);
        }
        let value: Value =
            serde_json::from_slice(line).map_err(|e| malformed_line_error("is not JSON", &e))?;
        if !value.is_object() {
            return Err(LineError::Malformed("is not a JSON object".into()));
        }
        let timestamp = value["timestamp"].as_str().and_then(|t| t.parse::<DateTime<Utc>>().ok());
        let is_used = match value["event"].as_str() {
            Some(event::SHADOW_COMPARED) => self.add_shadow_line(
                serde_json::from_value(value)
                    .map_err(|e| malformed_line_error(event::SHADOW_COMPARED, &e))?,
            )?,
            Some(event::SEARCH) => self.add_search_line(
                serde_json::from_value(value)
                    .map_err(|e| malformed_line_error(event::SEARCH, &e))?,
            )?,
            Some(event::FEEDBACK) => self.add_feedback_line(
                serde_json::from_value(value)
                    .map_err(|e| malformed_line_error(event::FEEDBACK, &e))?,
            ),
            _ => false,
        };
        if let Some(time) = timestamp.filter(|_| is_used) {
            self.first_line_at = Some(self.first_line_at.map_or(time, |first| first.min(time)));
            self.last_line_at = Some(self.last_line_at.map_or(time, |last| last.max(time)));
        }
        Ok(is_used)
    }

    fn add_shadow_line(&mut self, line: ShadowLine) -> Result<bool, LineError> {
        if !(0.0..=1.0).contains(&line.overlap) {
            let problem =
                format!("{}: overlap {} is not a share", event::SHADOW_COMPARED, line.overlap);
            return Err(LineError::Malformed(problem));
        }
        let name = line.candidate.clone();
        let key = (line.configuration, line.candidate);
        let (queries, overlaps) = self.shadow_sums.entry(key).or_default();
        let query = sums_for_query(queries, line.query_hash, &name)?;
        query.line_count += 1;
        query.overlap_sum += line.overlap;
        query.top_hit_changed_lines += u64::from(line.top_hit_changed);
        query.identical_lines += u64::from(line.overlap >= 1.0 && line.reranked == 0);
        overlaps[(line.overlap * 10.0) as usize] += 1;
        Ok(true)
    }

    fn add_search_line(&mut self, line: SearchLine) -> Result<bool, LineError> {
        // These answers do not depend on the configuration: the request overrode it, or searched
        // with an image, which is always ranked by plain CLIP.
        let ignores_configuration =
            line.overrides || matches!(line.input.as_deref(), Some("image" | "image_id"));
        if line.offset > 0 || ignores_configuration {
            return Ok(false);
        }
        if line.reranked > line.results {
            let problem =
                format!("search: reranked is {}, of {} results", line.reranked, line.results);
            return Err(LineError::Malformed(problem));
        }
        if let Some(text) =
            line.query.filter(|_| self.query_texts.len() < MAX_QUERIES_PER_CONFIGURATION)
        {
            self.query_texts.entry(line.query_hash.clone()).or_insert(text);
        }
        let queries = self.answer_sums.entry(line.configuration.clone()).or_default();
        let query = sums_for_query(queries, line.query_hash, &line.configuration)?;
        query.line_count += 1;
        query.result_count += line.results;
        query.top_hit_reporting_lines += u64::from(line.top_hit_changed.is_some());
        query.top_hit_changed_lines += u64::from(line.top_hit_changed == Some(true));
        query.reranked_results += line.reranked;
        query.no_match_reporting_lines += u64::from(line.no_match.is_some());
        query.no_match_lines += u64::from(line.no_match == Some(true));
        query.scan_ms_sum += line.scan_ms;
        Ok(true)
    }

    fn add_feedback_line(&mut self, line: FeedbackLine) -> bool {
        let Some(configuration) = line.configuration else { return false };
        let (total, wrong) = self.feedback_counts.entry(configuration).or_default();
        *total += 1;
        *wrong += usize::from(line.verdict == "wrong");
        true
    }
}

/// Why a line cannot be used.
enum LineError {
    /// The line is malformed, for this reason.
    Malformed(String),
    /// The configuration of this name has too many queries.
    TooManyQueries(String),
}

fn malformed_line_error(context: &str, error: &serde_json::Error) -> LineError {
    LineError::Malformed(format!("{context}: {}", describe_without_position(error)))
}

/// Returns the sums of a query, which are 0 for a new one.
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
