//! Why a file of the hub could not be had.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use crate::retry::{Classify, Disposition};

/// Why a file of the hub could not be had. No message has the token or the query of an address, which
/// may have a signature.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A later attempt may succeed: no connection, a broken one, silence, or an overloaded server.
    #[error("{reason}")]
    Transient {
        /// What happened, at which address.
        reason: String,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// The hub refuses, and would refuse again.
    #[error("{0}")]
    Refused(String),
    /// The model has no weights that can be read.
    #[error("{file}: {reason}")]
    NoWeights {
        /// The file that is missing or cannot be read, below the name of the model.
        file: String,
        /// Why it cannot be read, and the remedy.
        reason: String,
    },
    /// The hub sends other bytes than it announces.
    #[error("{0}")]
    WrongBytes(String),
    /// The cache cannot be written.
    #[error("{0}")]
    Cache(String),
}

impl HubError {
    pub fn transient(reason: String) -> Self {
        Self::Transient { reason, retry_after: None }
    }

    /// Returns an error about a file or folder of the cache, with the remedy.
    pub fn cache_file(path: &Path, error: &io::Error) -> Self {
        let full = matches!(
            error.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
        );
        let remedy = if full {
            "free space there, or set HF_HUB_CACHE to a folder that has more; the download continues where it ended"
        } else {
            "set HF_HUB_CACHE to a folder that this user can write"
        };
        Self::Cache(format!("{}: {error}; {remedy}", path.display()))
    }
}

impl Classify for HubError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Transient { .. } => Disposition::Retry,
            _ => Disposition::Fatal,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Transient { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
