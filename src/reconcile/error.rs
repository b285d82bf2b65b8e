//! Why reconciling failed.

use std::io;

use crate::diagnosis::describe;
use crate::publish::PublishError;
use crate::retry::{Classify, Disposition};
use crate::store::StoreError;
use crate::table::TableError;

/// Why a comparison or its repair failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A bucket or folder cannot be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Events cannot be sent.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The temporary folder cannot be used.
    #[error("temporary folder {folder}: {}; choose another one with --temp-dir", describe(.source))]
    TempFolder {
        /// The folder for sorting.
        folder: String,
        /// The error of the file system.
        source: io::Error,
    },
    /// A list cannot be read, or a line of it is invalid. Fatal: the image of that line would otherwise be
    /// taken for removed.
    #[error("{name}:{line}: {reason}; nothing was compared")]
    InvalidList {
        /// Name of the file.
        name: String,
        /// The line, counted from 1.
        line: u64,
        /// Why it is invalid.
        reason: String,
    },
    /// The repair would delete too many images.
    #[error(
        "{delete_events} of {stored} images would be deleted, more than the share {limit} that --max-deletes allows; nothing was sent. Check that the listing is complete; if it is, allow more"
    )]
    TooManyDeletes {
        /// Deletes that the repair would send.
        delete_events: u64,
        /// Images of the target that are stored.
        stored: u64,
        /// Maximum share of the stored images that may be deleted, 0 to 1.
        limit: f64,
    },
    /// The sequences of the catalogue are not times, although `--sequence-is-time` claims it.
    #[error(
        "image {example}: its sequence is not the time of its event in microseconds; events with such times would supersede all later events of its own producer. Nothing was sent; use --ids with events that carry sequences"
    )]
    SequenceNotTime {
        /// Id of such an image.
        example: String,
    },
    /// A task panicked: a bug in this program.
    #[error("the comparison failed: {0}; please report it")]
    Internal(String),
    /// The comparison was cancelled.
    #[error("interrupted; nothing was sent")]
    Interrupted,
}

impl Classify for ReconcileError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Table(error) => error.disposition(),
            Self::Publish(error) => error.disposition(),
            _ => Disposition::Fatal,
        }
    }
}
