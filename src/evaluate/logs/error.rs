//! TODO

use std::io;

/// Most different queries of one configuration: of each, sums are held in memory.
pub(super) const MAX_QUERIES_PER_CONFIGURATION: usize = 200_000;

/// The logs cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum QueryLogError {
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
        "--from-logs: more than {MAX_QUERIES_PER_CONFIGURATION} different queries of {0}; give the logs of a shorter time"
    )]
    TooManyQueries(String),
    /// They say nothing of answers.
    #[error(
        "--from-logs: no `shadow` and no `search` line that counts among {lines} lines{}; give the JSON log of a query worker (log.format = \"json\", level info)",
        malformed.as_ref().map_or(String::new(), |first| format!(" ({first})"))
    )]
    NoUsableLines {
        /// Lines read.
        lines: u64,
        /// The first malformed one.
        malformed: Option<String>,
    },
}
