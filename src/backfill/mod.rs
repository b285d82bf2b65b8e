//! Changing what a served catalogue is measured with: prompt sets, and how it is served.

mod claim;
pub(crate) mod control;
pub(crate) mod coverage;
pub(crate) mod model;
mod sets;
pub(crate) mod statistics;

pub use control::{Control, Request};
pub use coverage::Gap;
pub use model::{Missing, set_up, withdraw};
pub use sets::follow_sets;
pub use statistics::{Done, Job, add_set, retire};

use crate::clip::ClipError;
use crate::prompts::PromptError;
use crate::publish::PublishError;
use crate::reconcile::ReconcileError;
use crate::retry::{Decide, Verdict};
use crate::table::TableError;

/// Why a reindex, a promotion or a roll back did not go through.
#[derive(Debug, thiserror::Error)]
pub enum ReindexError {
    /// The table or the state cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A prompt set cannot be used.
    #[error(transparent)]
    Prompts(#[from] PromptError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
    /// Two generations cannot be compared.
    #[error(transparent)]
    Reconcile(#[from] ReconcileError),
    /// Events cannot be sent.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The temporary folder cannot be used.
    #[error("temporary folder: {0}; choose another by --temp")]
    Folder(std::io::Error),
    /// It would break something that holds; the message says what, and what to do first.
    #[error("{0}")]
    Refused(String),
    /// A thread panicked: a fault of this program.
    #[error("a computation broke off: {0}; please report it")]
    Broken(String),
}

impl Decide for ReindexError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Table(error) => error.verdict(),
            Self::Reconcile(error) => error.verdict(),
            Self::Publish(error) => error.verdict(),
            Self::Prompts(_)
            | Self::Model(_)
            | Self::Refused(_)
            | Self::Folder(_)
            | Self::Broken(_) => Verdict::Fatal,
        }
    }
}
