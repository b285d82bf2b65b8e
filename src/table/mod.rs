//! The stored tables: everything that is known of every image, on object storage.
//!
//! A catalogue is a folder on object storage:
//!
//! ```text
//! state/00000000000000000001.json        revisions of the catalogue's state; the newest counts
//! generations/<id>/images/               Delta Lake table, one row per accepted event, append-only
//! generations/<id>/statistics/           Delta Lake table, statistics of older rows by newer prompt sets
//! reindex-claims/<unit>.json             which process computes which of those statistics
//! replicas/<id>.json                     what each query worker serves
//! maintenance/00000000000000000001.json  which worker maintains the tables
//! ```
//!
//! One atomic commit holds rows and the Kafka positions up to which they were consumed, so that each
//! offset is committed at most once, whichever writer wins.

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
mod positions;
mod schema;
pub(crate) mod statistics;
pub(crate) mod writer;

pub use backfill_plan::{BackfillSource, LiveStatistics, PendingBackfillFile, StatisticsCoverage};
pub use error::TableError;
pub use follower::{Follower, SnapshotPart, TableChanges};
pub use generation::Generation;
pub use inventory::{InventoryEntry, read_inventory};
pub use maintenance::compact::{CompactionMode, CompactionSummary, Compactor};
pub use maintenance::lease::MaintenanceLease;
pub use maintenance::verify::{
    IntegrityFinding, OtherwiseDecodedImage, Severity, VerificationReport, VerificationRules,
    verify_table,
};
pub use options::{MaintenanceOptions, TableOptions};
pub use overview::{TableOverview, open_existing_writer};
pub use statistics::{
    BackfilledStatistics, StagedStatisticsFile, StatisticsTable, backfill_unit_id, embedding_hash,
};
pub use writer::{CommitSummary, PartitionBatch, TableWriter};

#[cfg(test)]
pub(crate) mod tests;
