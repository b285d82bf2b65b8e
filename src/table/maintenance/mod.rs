//! Maintenance of tables: compaction, removal of old files, verification, and the schedule by which
//! workers do the first two.

pub(crate) mod compact;
mod compaction_plan;
pub(crate) mod lease;
pub mod schedule;
pub mod vacuum;
pub(crate) mod verify;
