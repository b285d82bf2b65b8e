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

pub(crate) mod backfill_plan;
mod file;
pub(crate) mod follower;
pub(crate) mod inventory;
mod key_index;
mod log;
pub mod maintenance;
pub(crate) mod overview;
mod schema;
pub(crate) mod statistics;
pub(crate) mod writer;

use std::collections::BTreeMap;

use deltalake_core::DeltaTableError;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::parquet::errors::ParquetError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use backfill_plan::{BackfillSource, LiveStatistics, PendingFile, StatisticsCoverage};
pub use follower::{Follower, SnapshotPart, TableChanges};
pub use inventory::{InventoryEntry, read_inventory};
pub use maintenance::compact::{CompactionMode, CompactionSummary, Compactor};
pub use maintenance::lease::MaintenanceLease;
pub use maintenance::verify::{IntegrityFinding, Severity, VerificationReport, verify_table};
pub use overview::{TableOverview, open_existing_writer};
pub use statistics::{
    BackfilledStatistics, StagedStatisticsFile, StatisticsTable, backfill_unit_id, embedding_hash,
};
pub use writer::{CommitSummary, PartitionBatch, TableWriter};

use crate::retry::{Classify, Disposition};
use crate::store::StoreError;
use crate::validate;

/// Where the catalogue is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TableOptions {
    /// The catalogue's folder: s3://bucket/prefix, gs://…, az://…, file:///folder or a path.
    pub url: String,
    /// Options of the store, for example `aws_region` or `aws_endpoint`. Credentials are better
    /// given by the provider's standard environment variables.
    pub store_options: BTreeMap<String, String>,
    /// How often a commit that meets another writer's, or a passing fault of the store, is tried,
    /// with growing pauses of at most 2 s.
    pub max_commit_attempts: u32,
    /// How often workers and query workers look whether the catalogue's state has changed, in
    /// milliseconds: one small request. A prompt set that is added is carried by new rows, and a
    /// promotion is served, within this time and what is in the pipeline.
    pub state_poll_ms: u64,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            url: "./catalogue".into(),
            store_options: BTreeMap::new(),
            max_commit_attempts: 100,
            state_poll_ms: 1_000,
        }
    }
}

impl TableOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = crate::store::parse_url(&self.url) {
            problems.push(format!("url: {error}"));
        }
        validate::check_range(
            &mut problems,
            "max_commit_attempts",
            self.max_commit_attempts.into(),
            1,
            1000,
        );
        validate::check_range(&mut problems, "state_poll_ms", self.state_poll_ms, 50, 60_000);
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
    #[error("{location}: {source}")]
    Delta {
        /// Which table.
        location: String,
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
    #[error(
        "{location}: there is no catalogue here; start a worker (`bsap ingest`), which makes it"
    )]
    NotFound {
        /// Where.
        location: String,
    },
    /// What is stored does not fit what this process was told to use.
    #[error("{property}: stored is {stored}, configured is {configured}. {remedy}")]
    Mismatch {
        /// Which property.
        property: &'static str,
        /// As stored.
        stored: String,
        /// As configured.
        configured: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Too many conflicts or passing faults in a row.
    #[error(
        "{location}: no commit went through in {attempts} attempts; the last fault was: {last_error}"
    )]
    AttemptsExhausted {
        /// Which table.
        location: String,
        /// How often it was tried.
        attempts: u32,
        /// The last fault.
        last_error: String,
    },
}

impl Classify for TableError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Delta { source, .. } => classify_delta_error(source),
            Self::AttemptsExhausted { .. } => Disposition::Retry,
            Self::Corrupt { .. } | Self::NotFound { .. } | Self::Mismatch { .. } => {
                Disposition::Fatal
            }
        }
    }
}

impl TableError {
    /// Whether a commit did not go through, as when another one was first.
    fn is_commit_conflict(&self) -> bool {
        let Self::Delta { source, .. } = self else { return false };
        let source = &**source;
        matches!(
            source,
            DeltaTableError::Transaction { .. } | DeltaTableError::VersionAlreadyExists(_)
        )
    }
}

fn classify_delta_error(error: &DeltaTableError) -> Disposition {
    match error {
        DeltaTableError::ObjectStore { source } => crate::store::classify_error(source),
        DeltaTableError::Transaction { source: TransactionError::ObjectStore { source } } => {
            crate::store::classify_error(source)
        }
        // What the Parquet writer calls external is its sink, the store.
        DeltaTableError::Parquet { source: ParquetError::External(_) } => Disposition::Retry,
        DeltaTableError::Transaction { .. }
        | DeltaTableError::VersionAlreadyExists(_)
        // The log was cleaned up past the loaded snapshot; the next attempt loads it anew.
        | DeltaTableError::InvalidVersion(_)
        | DeltaTableError::Kernel { .. }
        | DeltaTableError::KernelError(_)
        | DeltaTableError::Generic(_)
        | DeltaTableError::GenericError { .. }
        | DeltaTableError::Io { .. } => Disposition::Retry,
        _ => Disposition::Fatal,
    }
}

#[cfg(test)]
mod tests;
