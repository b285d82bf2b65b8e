//! The error of all tables, and what its caller does about it.

use deltalake_core::DeltaTableError;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::parquet::errors::ParquetError;
use tracing::info;

use crate::diagnosis::describe;
use crate::retry::{Classify, Disposition};
use crate::store::{self, StoreError};
use crate::telemetry::event;

/// Why a table, or the catalogue's state, cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The Delta log or a data file cannot be read or written.
    #[error("{location}: {}", describe(.source.as_ref()))]
    Delta {
        /// URL of the table.
        location: String,
        /// Error of the Delta library.
        source: Box<DeltaTableError>,
    },
    /// A file does not hold what it should.
    #[error("{file}: {reason}; it is not read as data")]
    Corrupt {
        /// URL or path of the object.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The catalogue's state has another format than the one that this program reads and writes.
    #[error(
        "{file}: the catalogue has format {stored}, this program reads format {supported}; {remedy}"
    )]
    UnsupportedFormat {
        /// The revision of the state that was read.
        file: String,
        /// Its format.
        stored: u64,
        /// The only format that this program reads.
        supported: u32,
        /// What to do.
        remedy: &'static str,
    },
    /// There is no catalogue at this place.
    #[error(
        "{location}: there is no catalogue here; start a worker (`bsap ingest`), which creates it"
    )]
    NotFound {
        /// URL of the folder.
        location: String,
    },
    /// What is stored does not match the configuration of this process.
    #[error("{property}: stored is {stored}, configured is {configured}. {remedy}")]
    Mismatch {
        /// The property that differs.
        property: &'static str,
        /// Its stored value.
        stored: String,
        /// Its configured value.
        configured: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Every attempt met a conflict or a transient error.
    #[error(
        "{location}: no commit went through in {attempts} attempts; the last error was: {last_error}"
    )]
    AttemptsExhausted {
        /// URL of the table.
        location: String,
        /// Attempts in a row that failed without any progress.
        attempts: u32,
        /// The last error.
        last_error: String,
    },
    /// The caller's token was cancelled before another attempt. Nothing is lost: whoever tries again
    /// starts from what the table says.
    #[error("{location}: cancelled before another attempt; the last error was: {last_error}")]
    Cancelled {
        /// URL of the table.
        location: String,
        /// The error of the last attempt.
        last_error: String,
    },
}

impl Classify for TableError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Delta { source, .. } => classify_delta_error(source),
            Self::AttemptsExhausted { .. } | Self::Cancelled { .. } => Disposition::Retry,
            Self::Corrupt { .. }
            | Self::UnsupportedFormat { .. }
            | Self::NotFound { .. }
            | Self::Mismatch { .. } => Disposition::Fatal,
        }
    }
}

impl TableError {
    /// Whether another commit was written first.
    pub(super) fn is_commit_conflict(&self) -> bool {
        let Self::Delta { source, .. } = self else { return false };
        match &**source {
            DeltaTableError::Transaction { source } => {
                !matches!(source, TransactionError::ObjectStore { .. })
            }
            DeltaTableError::VersionAlreadyExists(_) => true,
            _ => false,
        }
    }

    /// Logs that a commit is tried again: as a conflict, or as a transient error of the store.
    pub(super) fn log_commit_retry(&self, attempt: u32, failed: &'static str) {
        if self.is_commit_conflict() {
            info!(event = event::COMMIT_CONFLICT, attempt, reason = %self, "{failed}; trying again");
        } else {
            info!(event = event::RETRY, stage = "table", attempt, error = %self, "{failed}; trying again");
        }
    }
}

/// Returns what to do about an error of the Delta library.
pub(super) fn classify_delta_error(error: &DeltaTableError) -> Disposition {
    match error {
        DeltaTableError::ObjectStore { source }
        | DeltaTableError::Transaction { source: TransactionError::ObjectStore { source } } => {
            store::classify_error(source)
        }
        // What the Parquet writer calls external is its sink, the store.
        DeltaTableError::Parquet { source: ParquetError::External(_) } => Disposition::Retry,
        DeltaTableError::Transaction { .. }
        | DeltaTableError::VersionAlreadyExists(_)
        // The log was cleaned up past the loaded snapshot; the next attempt loads it again.
        | DeltaTableError::InvalidVersion(_)
        | DeltaTableError::Kernel { .. }
        | DeltaTableError::KernelError(_)
        | DeltaTableError::Generic(_)
        | DeltaTableError::GenericError { .. }
        | DeltaTableError::Io { .. } => Disposition::Retry,
        _ => Disposition::Fatal,
    }
}
