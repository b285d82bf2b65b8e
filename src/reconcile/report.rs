//! The counts of a comparison.

use chrono::{DateTime, Utc};
use serde::Serialize;

/// Counts of one comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReconcileReport {
    /// URL or file name of what the table was compared with.
    pub target: String,
    /// When the listing started.
    pub listing_started_at: Option<DateTime<Utc>>,
    /// Objects or ids in the listing.
    pub listed: u64,
    /// Images of the target that are stored.
    pub stored: u64,
    /// Images that do not differ.
    pub unchanged: u64,
    /// Differences that are so recent that their events may still be in transit.
    pub too_recent: u64,
    /// Listed, not stored.
    pub new: u64,
    /// Stored, but changed since then.
    pub changed: u64,
    /// Stored, not listed.
    pub removed: u64,
    /// New objects whose extension is not that of an image.
    pub ignored: u64,
    /// Listed images that an event deleted after their last change.
    pub deleted: u64,
    /// New objects whose id belongs to an image from another address.
    pub id_conflicts: u64,
    /// New images whose key cannot be announced: it cannot be written as an address, or is no image id.
    pub unaddressable: u64,
    /// Differences that no event can repair.
    pub unrepairable: u64,
    /// Deletes among the events that repair differences.
    pub delete_events: u64,
    /// Images whose sequence is not the time of their event, although `--sequence-is-time` claims it.
    pub sequence_mismatches: u64,
    /// Repair events that were sent.
    pub published: u64,
    /// Deletes that were not sent, because the object still exists.
    pub skipped_deletes: u64,
}

impl ReconcileReport {
    /// Returns the number of differences.
    pub fn difference_count(&self) -> u64 {
        self.new + self.changed + self.removed
    }
}
