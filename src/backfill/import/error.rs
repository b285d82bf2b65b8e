//! Why an import ends.

use crate::clip::ClipError;
use crate::retry::{Classify, Disposition};
use crate::table::TableError;

/// Why rows are not stored. What was committed before remains, and the same import continues after it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The table cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
    /// The statistics of a row are not finite.
    #[error(
        "row {row}: its statistics by {prompt_set} are not finite; the model or the set is damaged"
    )]
    Statistics {
        /// The row, from 0.
        row: usize,
        /// Key of the prompt set.
        prompt_set: String,
    },
    /// A thread panicked: a fault of this program.
    #[error("a computation failed: {0}; please report it")]
    Panicked(String),
}

impl Classify for ImportError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Table(error) => error.disposition(),
            Self::Model(_) | Self::Statistics { .. } | Self::Panicked(_) => Disposition::Fatal,
        }
    }
}
