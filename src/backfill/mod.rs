//! Changing what a served catalogue is measured with: prompt sets, and how it is served.

mod claims;
pub(crate) mod control_topic;
pub(crate) mod generation_gap;
mod prompt_set_follower;
pub(crate) mod standby_generation;
pub(crate) mod statistics;

pub use control_topic::{ControlConsumer, ControlRequest};
pub use generation_gap::GenerationGap;
pub use prompt_set_follower::follow_prompt_sets;
pub use standby_generation::{ReembedPlan, set_up_standby, withdraw_standby};
pub use statistics::{BackfillResult, StatisticsBackfill, add_prompt_set, retire_prompt_set};

use crate::clip::ClipError;
use crate::prompts::PromptError;
use crate::publish::PublishError;
use crate::reconcile::ReconcileError;
use crate::retry::{Classify, Disposition};
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
    TempFolder(std::io::Error),
    /// It would break something that holds; the message says what, and what to do first.
    #[error("{0}")]
    Refused(String),
    /// A thread panicked: a fault of this program.
    #[error("a computation broke off: {0}; please report it")]
    Panicked(String),
}

impl Classify for ReindexError {
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
