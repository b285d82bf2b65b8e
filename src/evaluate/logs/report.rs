//! TODO

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

/// Queries that change most, of each candidate.
pub(super) const MAX_SHOWN_QUERIES: usize = 20;
/// Different queries below which nothing counts as measured: resampling fewer says little.
pub(super) const MIN_DISTINCT_QUERIES: usize = 20;

/// What the logs tell.
#[derive(Debug, Clone, Serialize)]
pub struct QueryLogReport {
    /// SHA-256 over the lines that it rests on.
    pub fingerprint: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Version of this program.
    pub version: String,
    /// The files.
    pub log_files: Vec<String>,
    /// Time of the first line that counts.
    pub from: Option<DateTime<Utc>>,
    /// Time of the last.
    pub to: Option<DateTime<Utc>>,
    /// Lines read.
    pub lines: u64,
    /// Of them, lines of other events, later pages of an answer, and answers that are no configuration's:
    /// to requests that said themselves how, and to pictures.
    pub skipped: u64,
    /// Of them, lines that could not be used.
    pub malformed: u64,
    /// The first of those, with file and line number.
    pub problems: Vec<String>,
    /// Candidates that were computed in the shadow.
    pub shadow_comparisons: Vec<ShadowComparison>,
    /// Configurations that answered.
    pub answers: Vec<ConfigurationAnswers>,
    /// In plain words.
    pub verdict: String,
}

/// How a candidate would have answered, beside the live configuration, query by query.
#[derive(Debug, Clone, Serialize)]
pub struct ShadowComparison {
    /// The live configuration's name.
    pub live: String,
    /// The candidate's name.
    pub candidate: String,
    /// Answers that were compared.
    pub compared: u64,
    /// Different queries among them.
    pub queries: usize,
    /// Of those, queries with any answer that differs.
    pub changed_queries: usize,
    /// Share of the answers with another first result.
    pub top_hit_changed: ConfidenceInterval,
    /// Mean share of results that both have.
    pub overlap: ConfidenceInterval,
    /// Share of the answers that are the same in every place.
    pub identical: ConfidenceInterval,
    /// Answers by their share of common results: from 0, 0.1, … 0.9, and exactly 1.
    pub overlap_histogram: [u64; OVERLAP_BINS],
    /// Whether a difference is measurable; none where there are too few queries to say.
    pub differs: Option<bool>,
    /// Queries that change most.
    pub most_changed_queries: Vec<ChangedQuery>,
}

/// A query whose answers differ.
#[derive(Debug, Clone, Serialize)]
pub struct ChangedQuery {
    /// As the log names it.
    pub query_hash: String,
    /// Its text, where the log has it (`log.query_text`).
    pub text: Option<String>,
    /// Answers that were compared.
    pub compared: u64,
    /// Mean share of common results.
    pub overlap: f64,
    /// Share of its answers with another first result.
    pub top_hit_changed: f64,
}

/// What a configuration answered.
#[derive(Debug, Clone, Serialize)]
pub struct ConfigurationAnswers {
    /// Its name.
    pub configuration: String,
    /// Answers.
    pub answers: u64,
    /// Different queries among them.
    pub queries: usize,
    /// Share of the results that stand elsewhere than plain CLIP puts them.
    pub reranked: Option<ConfidenceInterval>,
    /// Share of the answers whose first result plain CLIP does not put first.
    pub top_hit_changed: Option<ConfidenceInterval>,
    /// Share of the answers that say that nothing matches; none where no rule was calibrated.
    pub no_match: Option<ConfidenceInterval>,
    /// Mean milliseconds of the pass over the catalogue.
    pub scan_ms: Option<ConfidenceInterval>,
    /// Judgements that users sent.
    pub feedback: usize,
    /// Share of those that are "wrong", with Wilson's interval.
    pub wrong: Option<ConfidenceInterval>,
}

impl QueryLogReader {
    /// What all logs tell together.
    pub fn into_report(self) -> Result<QueryLogReport, QueryLogError> {
        if self.shadow_sums.is_empty() && self.answer_sums.is_empty() {
            let malformed = self.problems.into_iter().next();
            return Err(QueryLogError::NoUsableLines { lines: self.line_count, malformed });
        }
        let shadows: Vec<ShadowComparison> = self
            .shadow_sums
            .into_iter()
            .filter_map(|((live, candidate), (queries, overlaps))| {
                summarise_shadow(live, candidate, &queries, overlaps, &self.query_texts)
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
            log_files: self.sources,
            from: self.first_line_at,
            to: self.last_line_at,
            lines: self.line_count,
            skipped: self.skipped_lines,
            malformed: self.malformed_lines,
            problems: self.problems,
            shadow_comparisons: shadows,
            answers: answers.collect(),
            verdict: String::new(),
        };
        report.verdict = describe_verdict(&report);
        Ok(report)
    }
}

/// In an order of their own: samples do not depend on that of a hash map.
fn sort_by_hash<T>(queries: &SumsByQuery<T>) -> Vec<(&str, &T)> {
    let mut sorted: Vec<(&str, &T)> = queries.iter().map(|(hash, q)| (hash.as_str(), q)).collect();
    sorted.sort_unstable_by_key(|(hash, _)| *hash);
    sorted
}

fn summarise_shadow(
    live: String,
    candidate: String,
    queries: &SumsByQuery<ShadowSums>,
    overlaps: [u64; OVERLAP_BINS],
    texts: &HashMap<String, String>,
) -> Option<ShadowComparison> {
    let queries = sort_by_hash(queries);
    let bootstrap_ratio = |sum: fn(&ShadowSums) -> f64| {
        let clusters: Vec<(f64, u64)> = queries.iter().map(|(_, q)| (sum(q), q.count)).collect();
        bootstrap_clustered_ratio(&clusters, RESAMPLING_SEED)
    };
    let first_changed = bootstrap_ratio(|q| q.first_changed as f64)?;
    let overlap = bootstrap_ratio(|q| q.overlap_sum)?;
    let same = bootstrap_ratio(|q| q.identical as f64)?;
    let changed = queries.iter().filter(|(_, q)| q.identical < q.count);
    let mut most: Vec<ChangedQuery> = changed
        .map(|(hash, q)| ChangedQuery {
            query_hash: (*hash).to_owned(),
            text: texts.get(*hash).cloned(),
            compared: q.count,
            overlap: q.overlap_sum / q.count as f64,
            top_hit_changed: q.first_changed as f64 / q.count as f64,
        })
        .collect();
    most.sort_by(|a, b| {
        let order =
            a.overlap.total_cmp(&b.overlap).then(b.top_hit_changed.total_cmp(&a.top_hit_changed));
        order.then(b.compared.cmp(&a.compared))
    });
    let changed = most.len();
    most.truncate(MAX_SHOWN_QUERIES);
    Some(ShadowComparison {
        live,
        candidate,
        compared: queries.iter().map(|(_, q)| q.count).sum(),
        queries: queries.len(),
        changed_queries: changed,
        differs: (queries.len() >= MIN_DISTINCT_QUERIES).then_some(same.high < 1.0),
        top_hit_changed: first_changed,
        overlap,
        identical: same,
        overlap_histogram: overlaps,
        most_changed_queries: most,
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
        answers: queries.iter().map(|(_, q)| q.count).sum(),
        queries: queries.len(),
        reranked: bootstrap_ratio(|q| (q.moved as f64, q.results)),
        top_hit_changed: bootstrap_ratio(|q| (q.first_moved as f64, q.first_moved_known)),
        no_match: bootstrap_ratio(|q| (q.no_match as f64, q.no_match_known)),
        scan_ms: bootstrap_ratio(|q| (q.scan_ms_sum, q.count)),
        feedback,
        wrong: wilson_interval(wrong, feedback),
    }
}

/// In plain words.
fn describe_verdict(report: &QueryLogReport) -> String {
    let mut parts = Vec::new();
    for shadow in &report.shadow_comparisons {
        let ShadowComparison {
            live,
            candidate,
            compared,
            queries,
            top_hit_changed: first_changed,
            overlap,
            ..
        } = shadow;
        let on = format!("On {compared} answers to {queries} different queries, {candidate}");
        parts.push(match shadow.differs {
            None => format!(
                "{on} was compared with {live}: too few to tell anything; {MIN_DISTINCT_QUERIES} different queries are the least."
            ),
            Some(false) => {
                let max_hidden_share = wilson_interval(shadow.changed_queries, *queries).map_or(1.0, |i| i.high);
                format!(
                    "{on} makes no measurable difference to {live}; with so many queries, another answer to up to {} of them could hide.",
                    format_percent(max_hidden_share)
                )
            }
            Some(true) => format!(
                "{on} changes the first result of {live} in {} ({} to {}) and shares {} of the results ({} to {}).",
                format_percent(first_changed.mean),
                format_percent(first_changed.low),
                format_percent(first_changed.high),
                format_percent(overlap.mean),
                format_percent(overlap.low),
                format_percent(overlap.high)
            ),
        });
    }
    if report.shadow_comparisons.is_empty() {
        parts.push("No candidate was computed in the shadow: `bsap candidate set … --shadow 0.1` has one compared on the queries that come.".into());
    } else {
        parts.push("A log does not know which answer is better: have the queries that change most judged, and measure with --queries.".into());
    }
    if report.malformed > 0 {
        parts.push(format!("{} lines could not be used.", report.malformed));
    }
    parts.join(" ")
}
