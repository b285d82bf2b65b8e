//! Errors of following the catalogue.

use crate::prompts::PromptError;
use crate::table::TableError;

/// Why a query worker does not serve what the newest revision of the catalogue's state says. The
/// follower logs the error, reports it to promotions that wait, and tries again.
#[derive(Debug, thiserror::Error)]
pub enum ApplyStateError {
    /// The state or a table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A prompt set cannot be embedded.
    #[error(transparent)]
    Prompts(#[from] PromptError),
    /// The query worker cannot serve the revision, or cannot serve it yet; the message says why.
    #[error("{0}")]
    CannotServe(String),
    /// A thread panicked: a fault of this program.
    #[error("a computation failed: {0}; please report it")]
    Panicked(String),
}
