//! What the logs of query workers tell of a candidate beside what is live: no catalogue, no model.
//!
//! `shadow` lines say how the candidate would have answered the very query that the live configuration
//! answered; `search` lines what each configuration answered to its own share of the queries. Lines of
//! one query are not independent, so intervals resample queries with all of their lines.

pub(crate) mod reader;
pub(crate) mod shown;

use std::collections::HashMap;
use std::io;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sha2::Digest;

use super::measures::interval::{Interval, SEED, clustered, share};
use super::report::percent;
use crate::record::hex;

pub use reader::Reader;
use reader::{Answered, Compared, Queries};
pub use shown::{html, terminal};

/// Most different queries of one configuration: of each, sums are held in memory.
const MAX_QUERIES: usize = 200_000;
/// Queries that change most, of each candidate.
const SHOWN: usize = 20;
/// Different queries below which nothing counts as measured: resampling fewer says little.
const MIN_QUERIES: usize = 20;
/// Shares of common results are counted by tenths; the last is 1, all the same.
const TENTHS: usize = 11;

/// The logs cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// A file cannot be read.
    #[error("--from-logs: {file}: {error}")]
    Read {
        /// Which.
        file: String,
        /// Why.
        error: io::Error,
    },
    /// Memory is bounded.
    #[error(
        "--from-logs: more than {MAX_QUERIES} different queries of {0}; give the logs of a shorter time"
    )]
    TooMany(String),
    /// They say nothing of answers.
    #[error(
        "--from-logs: no `shadow` and no `search` line that counts among {lines} lines{}; give the JSON log of a query worker (log.format = \"json\", level info)",
        malformed.as_ref().map_or(String::new(), |first| format!(" ({first})"))
    )]
    Nothing {
        /// Lines read.
        lines: u64,
        /// The first malformed one.
        malformed: Option<String>,
    },
}

/// What the logs tell.
#[derive(Debug, Clone, Serialize)]
pub struct LogReport {
    /// SHA-256 over the lines that it rests on.
    pub fingerprint: String,
    /// When it was made.
    pub at: DateTime<Utc>,
    /// Version of this program.
    pub version: String,
    /// The files.
    pub sources: Vec<String>,
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
    pub shadows: Vec<Shadow>,
    /// Configurations that answered.
    pub answers: Vec<Answers>,
    /// In plain words.
    pub verdict: String,
}

/// How a candidate would have answered, beside the live configuration, query by query.
#[derive(Debug, Clone, Serialize)]
pub struct Shadow {
    /// The live configuration's name.
    pub live: String,
    /// The candidate's name.
    pub candidate: String,
    /// Answers that were compared.
    pub compared: u64,
    /// Different queries among them.
    pub queries: usize,
    /// Of those, queries with any answer that differs.
    pub changed: usize,
    /// Share of the answers with another first result.
    pub first_changed: Interval,
    /// Mean share of results that both have.
    pub overlap: Interval,
    /// Share of the answers that are the same in every place.
    pub same: Interval,
    /// Answers by their share of common results: from 0, 0.1, … 0.9, and exactly 1.
    pub overlaps: [u64; TENTHS],
    /// Whether a difference is measurable; none where there are too few queries to say.
    pub differs: Option<bool>,
    /// Queries that change most.
    pub most: Vec<Changed>,
}

/// A query whose answers differ.
#[derive(Debug, Clone, Serialize)]
pub struct Changed {
    /// As the log names it.
    pub query_hash: String,
    /// Its text, where the log has it (`log.query_text`).
    pub text: Option<String>,
    /// Answers that were compared.
    pub compared: u64,
    /// Mean share of common results.
    pub overlap: f64,
    /// Share of its answers with another first result.
    pub first_changed: f64,
}

/// What a configuration answered.
#[derive(Debug, Clone, Serialize)]
pub struct Answers {
    /// Its name.
    pub configuration: String,
    /// Answers.
    pub answers: u64,
    /// Different queries among them.
    pub queries: usize,
    /// Share of the results that stand elsewhere than plain CLIP puts them.
    pub moved: Option<Interval>,
    /// Share of the answers whose first result plain CLIP does not put first.
    pub first_moved: Option<Interval>,
    /// Share of the answers that say that nothing matches; none where no rule was calibrated.
    pub no_match: Option<Interval>,
    /// Mean milliseconds of the pass over the catalogue.
    pub scan_ms: Option<Interval>,
    /// Judgements that users sent.
    pub feedback: usize,
    /// Share of those that are "wrong", with Wilson's interval.
    pub wrong: Option<Interval>,
}

impl Reader {
    /// What all logs tell together.
    pub fn report(self) -> Result<LogReport, LogsError> {
        if self.shadows.is_empty() && self.answers.is_empty() {
            let malformed = self.problems.into_iter().next();
            return Err(LogsError::Nothing { lines: self.lines, malformed });
        }
        let shadows: Vec<Shadow> = self
            .shadows
            .into_iter()
            .filter_map(|((live, candidate), (queries, overlaps))| {
                shadow(live, candidate, &queries, overlaps, &self.texts)
            })
            .collect();
        let answers = self.answers.into_iter().map(|(name, queries)| {
            let feedback = self.feedback.get(&name).copied().unwrap_or_default();
            answers(name, &queries, feedback)
        });
        let mut report = LogReport {
            fingerprint: hex(&self.hasher.finalize()),
            at: Utc::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sources: self.sources,
            from: self.from,
            to: self.to,
            lines: self.lines,
            skipped: self.skipped,
            malformed: self.malformed,
            problems: self.problems,
            shadows,
            answers: answers.collect(),
            verdict: String::new(),
        };
        report.verdict = verdict(&report);
        Ok(report)
    }
}

/// In an order of their own: samples do not depend on that of a hash map.
fn sorted<T>(queries: &Queries<T>) -> Vec<(&str, &T)> {
    let mut sorted: Vec<(&str, &T)> = queries.iter().map(|(hash, q)| (hash.as_str(), q)).collect();
    sorted.sort_unstable_by_key(|(hash, _)| *hash);
    sorted
}

fn shadow(
    live: String,
    candidate: String,
    queries: &Queries<Compared>,
    overlaps: [u64; TENTHS],
    texts: &HashMap<String, String>,
) -> Option<Shadow> {
    let queries = sorted(queries);
    let of = |sum: fn(&Compared) -> f64| {
        let clusters: Vec<(f64, u64)> = queries.iter().map(|(_, q)| (sum(q), q.count)).collect();
        clustered(&clusters, SEED)
    };
    let first_changed = of(|q| q.first_changed as f64)?;
    let overlap = of(|q| q.overlap)?;
    let same = of(|q| q.same as f64)?;
    let changed = queries.iter().filter(|(_, q)| q.same < q.count);
    let mut most: Vec<Changed> = changed
        .map(|(hash, q)| Changed {
            query_hash: (*hash).to_owned(),
            text: texts.get(*hash).cloned(),
            compared: q.count,
            overlap: q.overlap / q.count as f64,
            first_changed: q.first_changed as f64 / q.count as f64,
        })
        .collect();
    most.sort_by(|a, b| {
        let by = a.overlap.total_cmp(&b.overlap).then(b.first_changed.total_cmp(&a.first_changed));
        by.then(b.compared.cmp(&a.compared))
    });
    let changed = most.len();
    most.truncate(SHOWN);
    Some(Shadow {
        live,
        candidate,
        compared: queries.iter().map(|(_, q)| q.count).sum(),
        queries: queries.len(),
        changed,
        differs: (queries.len() >= MIN_QUERIES).then_some(same.high < 1.0),
        first_changed,
        overlap,
        same,
        overlaps,
        most,
    })
}

fn answers(
    configuration: String,
    queries: &Queries<Answered>,
    (feedback, wrong): (usize, usize),
) -> Answers {
    let queries = sorted(queries);
    let of = |ratio: fn(&Answered) -> (f64, u64)| {
        let clusters: Vec<(f64, u64)> = queries.iter().map(|(_, q)| ratio(q)).collect();
        clustered(&clusters, SEED)
    };
    Answers {
        configuration,
        answers: queries.iter().map(|(_, q)| q.count).sum(),
        queries: queries.len(),
        moved: of(|q| (q.moved as f64, q.results)),
        first_moved: of(|q| (q.first_moved as f64, q.first)),
        no_match: of(|q| (q.no_match as f64, q.judged)),
        scan_ms: of(|q| (q.scan_ms, q.count)),
        feedback,
        wrong: share(wrong, feedback),
    }
}

/// In plain words.
fn verdict(report: &LogReport) -> String {
    let mut parts = Vec::new();
    for shadow in &report.shadows {
        let Shadow { live, candidate, compared, queries, first_changed, overlap, .. } = shadow;
        let on = format!("On {compared} answers to {queries} different queries, {candidate}");
        parts.push(match shadow.differs {
            None => format!(
                "{on} was compared with {live}: too few to tell anything; {MIN_QUERIES} different queries are the least."
            ),
            Some(false) => {
                let most = share(shadow.changed, *queries).map_or(1.0, |i| i.high);
                format!(
                    "{on} makes no measurable difference to {live}; with so many queries, another answer to up to {} of them could hide.",
                    percent(most)
                )
            }
            Some(true) => format!(
                "{on} changes the first result of {live} in {} ({} to {}) and shares {} of the results ({} to {}).",
                percent(first_changed.mean),
                percent(first_changed.low),
                percent(first_changed.high),
                percent(overlap.mean),
                percent(overlap.low),
                percent(overlap.high)
            ),
        });
    }
    if report.shadows.is_empty() {
        parts.push("No candidate was computed in the shadow: `bsap candidate set … --shadow 0.1` has one compared on the queries that come.".into());
    } else {
        parts.push("A log does not know which answer is better: have the queries that change most judged, and measure with --queries.".into());
    }
    if report.malformed > 0 {
        parts.push(format!("{} lines could not be used.", report.malformed));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests;
