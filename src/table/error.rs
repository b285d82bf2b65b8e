//! The error of all tables, and what its caller does about it.

use deltalake_core::DeltaTableError;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::parquet::errors::ParquetError;

use crate::retry::{Classify, Disposition};
use crate::store::StoreError;

/// Why the table cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The Delta log or a data file cannot be read or written.
    #[error("{location}: {source}")]
    Delta {
        /// Which table.
        location: String,
        /// Why.
        source: Box<DeltaTableError>,
    },
    /// A file does not hold what it should.
    #[error("{file}: {reason}; it is not read as data")]
    Corrupt {
        /// The object.
        file: String,
        /// What is wrong.
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
        "{location}: there is no catalogue here; start a worker (`bsap ingest`), which makes it"
    )]
    NotFound {
        /// Where.
        location: String,
    },
    /// What is stored does not fit what this process was told to use.
    #[error("{property}: stored is {stored}, configured is {configured}. {remedy}")]
    Mismatch {
        /// Which property.
        property: &'static str,
        /// As stored.
        stored: String,
        /// As configured.
        configured: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Too many conflicts or passing faults in a row.
    #[error(
        "{location}: no commit went through in {attempts} attempts; the last fault was: {last_error}"
    )]
    AttemptsExhausted {
        /// Which table.
        location: String,
        /// How often it was tried.
        attempts: u32,
        /// The last fault.
        last_error: String,
    },
}

impl Classify for TableError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Delta { source, .. } => classify_delta_error(source),
            Self::AttemptsExhausted { .. } => Disposition::Retry,
            Self::Corrupt { .. }
            | Self::UnsupportedFormat { .. }
            | Self::NotFound { .. }
            | Self::Mismatch { .. } => Disposition::Fatal,
        }
    }
}

impl TableError {
    /// Whether a commit did not go through, as when another one was first.
    pub(super) fn is_commit_conflict(&self) -> bool {
        let Self::Delta { source, .. } = self else { return false };
        let source = &**source;
        matches!(
            source,
            DeltaTableError::Transaction { .. } | DeltaTableError::VersionAlreadyExists(_)
        )
    }
}

pub(super) fn classify_delta_error(error: &DeltaTableError) -> Disposition {
    match error {
        DeltaTableError::ObjectStore { source } => crate::store::classify_error(source),
        DeltaTableError::Transaction { source: TransactionError::ObjectStore { source } } => {
            crate::store::classify_error(source)
        }
        // What the Parquet writer calls external is its sink, the store.
        DeltaTableError::Parquet { source: ParquetError::External(_) } => Disposition::Retry,
        DeltaTableError::Transaction { .. }
        | DeltaTableError::VersionAlreadyExists(_)
        // The log was cleaned up past the loaded snapshot; the next attempt loads it anew.
        | DeltaTableError::InvalidVersion(_)
        | DeltaTableError::Kernel { .. }
        | DeltaTableError::KernelError(_)
        | DeltaTableError::Generic(_)
        | DeltaTableError::GenericError { .. }
        | DeltaTableError::Io { .. } => Disposition::Retry,
        _ => Disposition::Fatal,
    }
}
