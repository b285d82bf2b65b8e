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
mod error;
mod file;
pub(crate) mod follower;
mod generation;
pub(crate) mod inventory;
mod key_index;
mod log;
pub mod maintenance;
mod options;
pub(crate) mod overview;
mod schema;
pub(crate) mod statistics;
pub(crate) mod writer;

pub use backfill_plan::{BackfillSource, LiveStatistics, PendingFile, StatisticsCoverage};
pub use error::TableError;
pub use follower::{Follower, SnapshotPart, TableChanges};
pub use generation::Generation;
pub use inventory::{InventoryEntry, read_inventory};
pub use maintenance::compact::{CompactionMode, CompactionSummary, Compactor};
pub use maintenance::lease::MaintenanceLease;
pub use maintenance::verify::{IntegrityFinding, Severity, VerificationReport, verify_table};
pub use options::{MaintenanceOptions, TableOptions};
pub use overview::{TableOverview, open_existing_writer};
pub use statistics::{
    BackfilledStatistics, StagedStatisticsFile, StatisticsTable, backfill_unit_id, embedding_hash,
};
pub use writer::{CommitSummary, PartitionBatch, TableWriter};

#[cfg(test)]
pub(crate) mod tests;
