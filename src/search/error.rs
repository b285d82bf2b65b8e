//! Why a query is not answered.

use crate::balance::statistics::StatisticsKey;
use crate::clip::ClipError;

/// A question that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    InvalidField {
        /// Which field.
        field: &'static str,
        /// Why, and what would be right.
        reason: String,
    },
    /// The snapshot is not whole yet.
    #[error("the catalogue is still being loaded; try again in a moment")]
    NotReady,
    /// How queries are answered names a prompt set that is not there: no other one stands in for it.
    #[error(
        "prompt set {0} is served, but not among the catalogue's as this model computes them; store it anew (bsap reindex statistics), then serve that (bsap candidate set, bsap promote)"
    )]
    PromptSetMissing(StatisticsKey),
    /// No live image has this id.
    #[error("image {0:?} is not in the catalogue")]
    ImageNotFound(String),
    /// The version of the catalogue that a cursor belongs to is not held any more.
    #[error(
        "cursor: table version {version} is not held here any more (search.cursor_seconds, search.cursor_mib), or never was; ask again without a cursor"
    )]
    CursorExpired {
        /// Of the table.
        version: u64,
    },
    /// As many queries wait as may.
    #[error("{0} queries wait already (search.queue_capacity)")]
    QueueFull(usize),
    /// The caller left, or the engine stops.
    #[error("the query was given up")]
    Cancelled,
    /// A tower failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

impl QueryError {
    pub(crate) fn invalid_field(field: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidField { field, reason: reason.into() }
    }
}
