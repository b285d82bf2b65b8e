//! Why the worker stopped.

use super::dead_letter::DeadLetterWriteError;
use super::source::SourceError;
use crate::table::TableError;

/// Why the worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// Consuming cannot go on.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The table cannot be written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A message could not be dead-lettered.
    #[error(transparent)]
    DeadLetter(#[from] DeadLetterWriteError),
    /// The model's device failed. A new process may be able to open it; until then every image would fail.
    #[error("{0}. Nothing is lost: after a restart, the worker continues from its last commit")]
    Model(String),
    /// A task of the pipeline panicked: a bug in this program.
    #[error("the pipeline failed at {0}; please report it")]
    Internal(String),
}
