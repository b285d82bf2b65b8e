//! Errors of backfills.

use crate::clip::ClipError;
use crate::prompts::PromptError;
use crate::publish::PublishError;
use crate::reconcile::ReconcileError;
use crate::retry::{Classify, Disposition};
use crate::table::TableError;

/// Why statistics or a generation were not backfilled, or two generations not compared.
#[derive(Debug, thiserror::Error)]
pub enum BackfillError {
    /// A table or the state cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A prompt set cannot be used.
    #[error(transparent)]
    Prompts(#[from] PromptError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
    /// The current rows of a generation cannot be read.
    #[error(transparent)]
    Reconcile(#[from] ReconcileError),
    /// Events cannot be sent.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The temporary folder cannot be used.
    #[error("temporary folder: {0}; choose another by --temp-dir")]
    TempFolder(std::io::Error),
    /// The state of the catalogue does not allow it; the message says why, and what to do first.
    #[error("{0}")]
    Refused(String),
    /// A thread panicked: a fault of this program.
    #[error("a computation failed: {0}; please report it")]
    Panicked(String),
}

impl Classify for BackfillError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Table(error) => error.disposition(),
            Self::Reconcile(error) => error.disposition(),
            Self::Publish(error) => error.disposition(),
            Self::Prompts(_)
            | Self::Model(_)
            | Self::Refused(_)
            | Self::TempFolder(_)
            | Self::Panicked(_) => Disposition::Fatal,
        }
    }
}
