//! The report on what logs show of a candidate and of the configurations that answered.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sha2::Digest;

use super::error::QueryLogError;
use super::reader::{AnswerSums, OVERLAP_BINS, QueryLogReader, ShadowSums, SumsByQuery};
use crate::evaluate::measures::interval::{
    ConfidenceInterval, RESAMPLING_SEED, bootstrap_clustered_ratio, wilson_interval,
};
use crate::evaluate::report::format_percent;
use crate::record::to_hex;

/// Maximum number of most-changed queries per candidate.
pub(super) const MAX_SHOWN_QUERIES: usize = 20;
/// Minimum number of different queries for a conclusion: resampling fewer shows little.
pub(super) const MIN_DISTINCT_QUERIES: usize = 20;

/// What logs show; serialised, it is the JSON report.
#[derive(Debug, Clone, Serialize)]
pub struct QueryLogReport {
    /// SHA-256 over the lines that were used, in hexadecimal.
    pub fingerprint: String,
    /// When the report was made.
    pub created_at: DateTime<Utc>,
    /// Version of this program.
    pub version: String,
    /// Names of the files read.
    pub log_files: Vec<String>,
    /// Timestamp of the earliest line that was used.
    pub from: Option<DateTime<Utc>>,
    /// Timestamp of the latest line that was used.
    pub to: Option<DateTime<Utc>>,
    /// Number of lines read.
    pub lines: u64,
    /// Number of lines of other events, of later pages of an answer, and of answers that do not
    /// depend on a configuration: to requests with overrides and to images.
    pub skipped: u64,
    /// Number of malformed lines.
    pub malformed: u64,
    /// The first malformed lines: file, line number and reason.
    pub problems: Vec<String>,
    /// Candidates that answered shadow queries.
    pub shadow_comparisons: Vec<ShadowComparison>,
    /// Configurations that answered users' queries.
    pub answers: Vec<ConfigurationAnswers>,
    /// The result in words.
    pub verdict: String,
}

/// How a candidate would have answered the queries that the live configuration answered.
#[derive(Debug, Clone, Serialize)]
pub struct ShadowComparison {
    /// Name of the live configuration.
    pub live: String,
    /// Name of the candidate.
    pub candidate: String,
    /// Number of answers compared.
    pub compared: u64,
    /// Number of different queries among them.
    pub queries: usize,
    /// Number of queries with any answer that differs.
    pub changed_queries: usize,
    /// Share of the answers with another first result.
    pub top_hit_changed: ConfidenceInterval,
    /// Mean share of results that both answers have.
    pub overlap: ConfidenceInterval,
    /// Share of the answers with the same results in the same order.
    pub identical: ConfidenceInterval,
    /// Number of answers by overlap: [0, 0.1), [0.1, 0.2), … [0.9, 1) and exactly 1.
    pub overlap_histogram: [u64; OVERLAP_BINS],
    /// Whether a difference is significant; `None` if there are too few queries.
    pub differs: Option<bool>,
    /// The queries whose answers differ most.
    pub most_changed_queries: Vec<ChangedQuery>,
}

/// A query whose answers differ.
#[derive(Debug, Clone, Serialize)]
pub struct ChangedQuery {
    /// Hash of the query, as logged.
    pub query_hash: String,
    /// The query's text, if the log has it (`log.query_text`).
    pub text: Option<String>,
    /// Number of answers compared.
    pub compared: u64,
    /// Mean share of results that both answers have.
    pub overlap: f64,
    /// Share of the answers with another first result.
    pub top_hit_changed: f64,
}

/// How a configuration answered its share of the queries.
#[derive(Debug, Clone, Serialize)]
pub struct ConfigurationAnswers {
    /// Name of the configuration.
    pub configuration: String,
    /// Number of answers.
    pub answers: u64,
    /// Number of different queries among them.
    pub queries: usize,
    /// Share of the results at another rank than plain CLIP gives them.
    pub reranked: Option<ConfidenceInterval>,
    /// Share of the answers with another first result than plain CLIP's.
    pub top_hit_changed: Option<ConfidenceInterval>,
    /// Share of the answers that say that nothing matches; `None` if no rule was calibrated.
    pub no_match: Option<ConfidenceInterval>,
    /// Mean duration of the scan over the catalogue, in milliseconds.
    pub scan_ms: Option<ConfidenceInterval>,
    /// Number of verdicts that users sent.
    pub feedback: usize,
    /// Share of "wrong" among these verdicts, with Wilson's interval.
    pub wrong: Option<ConfidenceInterval>,
}

impl QueryLogReader {
    /// Evaluates all lines that were read.
    pub fn into_report(self) -> Result<QueryLogReport, QueryLogError> {
        if self.shadow_sums.is_empty() && self.answer_sums.is_empty() {
            let malformed = self.problems.into_iter().next();
            return Err(QueryLogError::NoUsableLines { lines: self.line_count, malformed });
        }
        let shadow_comparisons: Vec<ShadowComparison> = self
            .shadow_sums
            .into_iter()
            .filter_map(|((live, candidate), (queries, histogram))| {
                summarise_shadow(live, candidate, &queries, histogram, &self.query_texts)
            })
            .collect();
        let answers = self.answer_sums.into_iter().map(|(name, queries)| {
            let feedback = self.feedback_counts.get(&name).copied().unwrap_or_default();
            summarise_answers(name, &queries, feedback)
        });
        let mut report = QueryLogReport {
            fingerprint: to_hex(&self.hasher.finalize()),
            created_at: Utc::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            log_files: self.log_files,
            from: self.first_line_at,
            to: self.last_line_at,
            lines: self.line_count,
            skipped: self.skipped_lines,
            malformed: self.malformed_lines,
            problems: self.problems,
            shadow_comparisons,
            answers: answers.collect(),
            verdict: String::new(),
        };
        report.verdict = describe_verdict(&report);
        Ok(report)
    }
}

/// Sorts queries by hash, so that samples do not depend on the order of the hash map.
fn sort_by_hash<T>(queries: &SumsByQuery<T>) -> Vec<(&str, &T)> {
    let mut sorted: Vec<(&str, &T)> = queries.iter().map(|(hash, q)| (hash.as_str(), q)).collect();
    sorted.sort_unstable_by_key(|(hash, _)| *hash);
    sorted
}

fn summarise_shadow(
    live: String,
    candidate: String,
    queries: &SumsByQuery<ShadowSums>,
    overlap_histogram: [u64; OVERLAP_BINS],
    texts: &HashMap<String, String>,
) -> Option<ShadowComparison> {
    let queries = sort_by_hash(queries);
    let bootstrap_ratio = |sum: fn(&ShadowSums) -> f64| {
        let clusters: Vec<(f64, u64)> =
            queries.iter().map(|(_, q)| (sum(q), q.line_count)).collect();
        bootstrap_clustered_ratio(&clusters, RESAMPLING_SEED)
    };
    let top_hit_changed = bootstrap_ratio(|q| q.top_hit_changed_lines as f64)?;
    let overlap = bootstrap_ratio(|q| q.overlap_sum)?;
    let identical = bootstrap_ratio(|q| q.identical_lines as f64)?;
    let changed = queries.iter().filter(|(_, q)| q.identical_lines < q.line_count);
    let mut changed: Vec<ChangedQuery> = changed
        .map(|(hash, q)| ChangedQuery {
            query_hash: (*hash).to_owned(),
            text: texts.get(*hash).cloned(),
            compared: q.line_count,
            overlap: q.overlap_sum / q.line_count as f64,
            top_hit_changed: q.top_hit_changed_lines as f64 / q.line_count as f64,
        })
        .collect();
    changed.sort_by(|a, b| {
        let order =
            a.overlap.total_cmp(&b.overlap).then(b.top_hit_changed.total_cmp(&a.top_hit_changed));
        order.then(b.compared.cmp(&a.compared))
    });
    let changed_queries = changed.len();
    changed.truncate(MAX_SHOWN_QUERIES);
    Some(ShadowComparison {
        live,
        candidate,
        compared: queries.iter().map(|(_, q)| q.line_count).sum(),
        queries: queries.len(),
        changed_queries,
        differs: (queries.len() >= MIN_DISTINCT_QUERIES).then_some(identical.high < 1.0),
        top_hit_changed,
        overlap,
        identical,
        overlap_histogram,
        most_changed_queries: changed,
    })
}

fn summarise_answers(
    configuration: String,
    queries: &SumsByQuery<AnswerSums>,
    (feedback, wrong): (usize, usize),
) -> ConfigurationAnswers {
    let queries = sort_by_hash(queries);
    let bootstrap_ratio = |ratio: fn(&AnswerSums) -> (f64, u64)| {
        let clusters: Vec<(f64, u64)> = queries.iter().map(|(_, q)| ratio(q)).collect();
        bootstrap_clustered_ratio(&clusters, RESAMPLING_SEED)
    };
    ConfigurationAnswers {
        configuration,
        answers: queries.iter().map(|(_, q)| q.line_count).sum(),
        queries: queries.len(),
        reranked: bootstrap_ratio(|q| (q.reranked_results as f64, q.result_count)),
        top_hit_changed: bootstrap_ratio(|q| {
            (q.top_hit_changed_lines as f64, q.top_hit_reporting_lines)
        }),
        no_match: bootstrap_ratio(|q| (q.no_match_lines as f64, q.no_match_reporting_lines)),
        scan_ms: bootstrap_ratio(|q| (q.scan_ms_sum, q.line_count)),
        feedback,
        wrong: wilson_interval(wrong, feedback),
    }
}

fn describe_verdict(report: &QueryLogReport) -> String {
    let mut parts = Vec::new();
    for shadow in &report.shadow_comparisons {
        let ShadowComparison {
            live, candidate, compared, queries, top_hit_changed, overlap, ..
        } = shadow;
        let subject = format!("On {compared} answers to {queries} different queries, {candidate}");
        parts.push(match shadow.differs {
            None => format!(
                "{subject} was compared with {live}: too few queries for a conclusion, which takes at least {MIN_DISTINCT_QUERIES} different ones."
            ),
            Some(false) => {
                let max_hidden_share = wilson_interval(shadow.changed_queries, *queries).map_or(1.0, |i| i.high);
                format!(
                    "{subject} makes no measurable difference to {live}; with so many queries, another answer to up to {} of them could hide.",
                    format_percent(max_hidden_share)
                )
            }
            Some(true) => format!(
                "{subject} changes the first result of {live} in {} ({} to {}) and shares {} of the results ({} to {}).",
                format_percent(top_hit_changed.mean),
                format_percent(top_hit_changed.low),
                format_percent(top_hit_changed.high),
                format_percent(overlap.mean),
                format_percent(overlap.low),
                format_percent(overlap.high)
            ),
        });
    }
    if report.shadow_comparisons.is_empty() {
        parts.push("No candidate answered shadow queries: `bsap candidate set … --shadow 0.1` compares one on the queries of users.".into());
    } else {
        parts.push("A log does not show which answer is better: have the queries that change most judged, and measure with --queries.".into());
    }
    if report.malformed > 0 {
        parts.push(format!("{} lines are malformed.", report.malformed));
    }
    parts.join(" ")
}
