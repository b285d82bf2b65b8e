//! Why logs cannot be evaluated.

use std::io;

/// Maximum number of different queries per configuration. Sums of each are held in memory.
pub(super) const MAX_QUERIES_PER_CONFIGURATION: usize = 200_000;

/// Why logs cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum QueryLogError {
    /// A file cannot be read.
    #[error("--from-logs: {file}: {error}")]
    Read {
        /// Name of the file.
        file: String,
        /// Why it cannot be read.
        error: io::Error,
    },
    /// A configuration, named here, answered more than [`MAX_QUERIES_PER_CONFIGURATION`] queries.
    #[error(
        "--from-logs: more than {MAX_QUERIES_PER_CONFIGURATION} different queries of {0}; give the logs of a shorter time"
    )]
    TooManyQueries(String),
    /// The logs have no lines about answers.
    #[error(
        "--from-logs: no usable `shadow.compared` or `search` line among {lines} lines{}; give the JSON log of a query worker (log.format = \"json\", level info)",
        malformed.as_ref().map_or(String::new(), |first| format!(" ({first})"))
    )]
    NoUsableLines {
        /// Number of lines read.
        lines: u64,
        /// The problem of the first malformed line.
        malformed: Option<String>,
    },
}
