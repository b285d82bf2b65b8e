//! Errors of candidates, promotions and roll backs.

use crate::backfill::BackfillError;
use crate::table::TableError;

/// Why a candidate was not set, promoted or rolled back.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// A table or the state cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Two generations cannot be compared.
    #[error(transparent)]
    Comparison(#[from] BackfillError),
    /// The state of the catalogue does not allow it; the message says why, and what to do first.
    #[error("{0}")]
    Refused(String),
}
