//! Why a source cannot be watched.

use crate::retry::{Classify, Disposition};
use crate::store::StoreError;

/// Why a source cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The source does not exist, may not be read, or is of no known kind.
    #[error("{target}: {reason}")]
    InvalidTarget {
        /// The source as given by the user.
        target: String,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// A bucket cannot be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A folder or a list that could be read at first cannot be read any more.
    #[error("{target}: {source}; what is stored of it is kept until it can be read again")]
    Unreadable {
        /// The source as given by the user.
        target: String,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// There are more files than one process follows.
    #[error(
        "more than {limit} files were found, the most that one process follows; name a smaller folder, or use bsap ingest, serve and reconcile (docs/real-catalogue.md)"
    )]
    TooManyFiles {
        /// The limit.
        limit: usize,
    },
    /// A task panicked: a bug in this program.
    #[error("listing failed: {0}; please report it")]
    Internal(String),
}

impl Classify for WatchError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Unreadable { .. } => Disposition::Retry,
            Self::InvalidTarget { .. } | Self::TooManyFiles { .. } | Self::Internal(_) => {
                Disposition::Fatal
            }
        }
    }
}
