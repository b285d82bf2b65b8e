//! Reasons why a query is not answered.

use crate::balance::statistics::StatisticsKey;
use crate::clip::ClipError;

/// A query that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// A field of the request is invalid.
    #[error("{field}: {reason}")]
    InvalidField {
        /// Name of the field, as in the request.
        field: &'static str,
        /// Why the value is invalid, and what would be valid.
        reason: String,
    },
    /// The whole table has not been loaded yet.
    #[error("the catalogue is still being loaded; try again in a moment")]
    NotReady,
    /// The served configuration names a prompt set that is not available; no other set is substituted.
    #[error(
        "prompt set {0} is served, but is not among the prompt sets of the catalogue as this model computes them; store it again (bsap reindex statistics), then serve that version (bsap candidate set, bsap promote)"
    )]
    PromptSetMissing(StatisticsKey),
    /// No live image has this id.
    #[error("image {0:?} is not in the catalogue")]
    ImageNotFound(String),
    /// The version of the catalogue that the cursor belongs to is no longer in memory.
    #[error(
        "cursor: table version {version} is no longer in memory here (search.cursor_seconds, search.cursor_mib), or never was; repeat the query without a cursor"
    )]
    CursorExpired {
        /// Version of the table.
        version: u64,
    },
    /// The queue of waiting queries is full; its capacity.
    #[error("{0} queries are waiting already (search.queue_capacity)")]
    QueueFull(usize),
    /// The caller disconnected, or the engine is stopping.
    #[error("the query was cancelled")]
    Cancelled,
    /// The text or image encoder failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

impl QueryError {
    pub(crate) fn invalid_field(field: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidField { field, reason: reason.into() }
    }
}
