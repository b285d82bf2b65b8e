//! The stored table: what is known of every image, on object storage.
//!
//! A catalogue is a folder on object storage:
//!
//! ```text
//! state/00000000000000000001.json     revisions of the catalogue's state, newest wins
//! generations/<model>/images/         Delta Lake table, one row an accepted event, append-only
//! generations/<model>/statistics/     the same, statistics of older rows by newer prompt sets
//! claims/<unit>.json                  who computes which of them at the moment
//! readers/<id>.json                   what each query worker serves
//! upkeep/00000000000000000001.json    who tidies the tables at the moment
//! ```
//!
//! A commit holds rows and the Kafka positions up to which they were consumed, in one atomic write,
//! so that each offset is committed at most once, whoever wins.

pub(crate) mod backfill;
mod file;
pub(crate) mod follow;
pub(crate) mod inventory;
mod keys;
mod log;
pub mod maintenance;
pub(crate) mod overview;
mod schema;
pub(crate) mod statistics;
pub(crate) mod write;

use std::collections::BTreeMap;

use deltalake_core::DeltaTableError;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::parquet::errors::ParquetError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use backfill::{Coverage, Pending, Stored, Survey};
pub use follow::{Changes, Follower, Part};
pub use inventory::{Entry, inventory};
pub use maintenance::compact::{Compacted, Compactor, Depth};
pub use maintenance::lease::Lease;
pub use maintenance::verify::{Finding, Severity, Verified, verify};
pub use overview::{Overview, positions};
pub use statistics::{Backfilled, StagedUnit, StatisticsTable, embedding_hash, unit};
pub use write::{Committed, PartitionBatch, Writer};

use crate::retry::{Decide, Verdict};
use crate::store::StoreError;
use crate::validate;

/// Where the catalogue is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The catalogue's folder: s3://bucket/prefix, gs://…, az://…, file:///folder or a path.
    pub url: String,
    /// Options of the store, for example `aws_region` or `aws_endpoint`. Credentials are better
    /// given by the provider's standard environment variables.
    pub store_options: BTreeMap<String, String>,
    /// How often a commit that meets another writer's, or a passing fault of the store, is tried,
    /// with growing pauses of at most 2 s.
    pub commit_attempts: u32,
    /// How often workers and query workers look whether the catalogue's state has changed, in
    /// milliseconds: one small request. A prompt set that is added is carried by new rows, and a
    /// promotion is served, within this time and what is in the pipeline.
    pub state_poll_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: "./catalogue".into(),
            store_options: BTreeMap::new(),
            commit_attempts: 100,
            state_poll_ms: 1_000,
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = crate::store::parse(&self.url) {
            problems.push(format!("url: {error}"));
        }
        validate::range(&mut problems, "commit_attempts", self.commit_attempts.into(), 1, 1000);
        validate::range(&mut problems, "state_poll_ms", self.state_poll_ms, 50, 60_000);
        problems
    }
}

/// Why the table cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The Delta log or a data file cannot be read or written.
    #[error("{place}: {source}")]
    Delta {
        /// Which table.
        place: String,
        /// Why.
        source: Box<DeltaTableError>,
    },
    /// A file does not hold what it should.
    #[error("{file}: {reason}; it is not read as data")]
    Corrupt {
        /// The object.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no catalogue at this place.
    #[error("{place}: there is no catalogue here; start a worker (`bsap ingest`), which makes it")]
    Missing {
        /// Where.
        place: String,
    },
    /// What is stored does not fit what this process was told to use.
    #[error("{what}: stored is {stored}, configured is {configured}. {remedy}")]
    Mismatch {
        /// Which property.
        what: &'static str,
        /// As stored.
        stored: String,
        /// As configured.
        configured: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Too many conflicts or passing faults in a row.
    #[error("{place}: no commit went through in {attempts} attempts; the last fault was: {last}")]
    Exhausted {
        /// Which table.
        place: String,
        /// How often it was tried.
        attempts: u32,
        /// The last fault.
        last: String,
    },
}

impl Decide for TableError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Store(error) => error.verdict(),
            Self::Delta { source, .. } => delta_verdict(source),
            Self::Exhausted { .. } => Verdict::Retry,
            Self::Corrupt { .. } | Self::Missing { .. } | Self::Mismatch { .. } => Verdict::Fatal,
        }
    }
}

impl TableError {
    /// Whether a commit did not go through, as when another one was first.
    fn is_commit(&self) -> bool {
        let Self::Delta { source, .. } = self else { return false };
        let source = &**source;
        matches!(
            source,
            DeltaTableError::Transaction { .. } | DeltaTableError::VersionAlreadyExists(_)
        )
    }
}

fn delta_verdict(error: &DeltaTableError) -> Verdict {
    match error {
        DeltaTableError::ObjectStore { source } => crate::store::verdict(source),
        DeltaTableError::Transaction { source: TransactionError::ObjectStore { source } } => {
            crate::store::verdict(source)
        }
        // What the Parquet writer calls external is its sink, the store.
        DeltaTableError::Parquet { source: ParquetError::External(_) } => Verdict::Retry,
        DeltaTableError::Transaction { .. }
        | DeltaTableError::VersionAlreadyExists(_)
        // The log was cleaned up past the loaded snapshot; the next attempt loads it anew.
        | DeltaTableError::InvalidVersion(_)
        | DeltaTableError::Kernel { .. }
        | DeltaTableError::KernelError(_)
        | DeltaTableError::Generic(_)
        | DeltaTableError::GenericError { .. }
        | DeltaTableError::Io { .. } => Verdict::Retry,
        _ => Verdict::Fatal,
    }
}

#[cfg(test)]
mod tests;
