//! Why a message is rejected.

use chrono::{DateTime, Utc};

use crate::record::InvalidField;

/// A message that cannot be decoded. Permanent: the message is dead-lettered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventDecodeError {
    /// The value is not in any known format.
    #[error("not a known event format: {0}")]
    UnknownFormat(String),
    /// The format is known, but not the type of the event.
    #[error("not a known event type: {0}")]
    UnknownType(String),
    /// A field is missing or invalid.
    #[error(transparent)]
    InvalidField(#[from] InvalidField),
    /// The event is so old that the image may have been deleted after it, and the tombstone erased.
    #[error(
        "is dated {0}; deletes are remembered for {1} days (maintenance.tombstone_retention_days), so an older event could restore a deleted image: publish the image again if it still exists"
    )]
    TooOld(DateTime<Utc>, i64),
    /// One of several records is invalid, and so the whole message is.
    #[error("record {index}: {fault}")]
    InvalidRecord {
        /// Position of the record in the message, counted from 0.
        index: usize,
        /// Why the record is rejected.
        fault: Box<EventDecodeError>,
    },
}

impl EventDecodeError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownFormat(_) => "unknown_format",
            Self::UnknownType(_) => "unknown_event_type",
            Self::InvalidField(_) => "invalid_field",
            Self::TooOld(..) => "too_old",
            Self::InvalidRecord { fault, .. } => fault.code(),
        }
    }

    /// Position of the invalid record, counted from 0; `None` if the message holds a single event.
    pub fn record_index(&self) -> Option<usize> {
        match self {
            Self::InvalidRecord { index, .. } => Some(*index),
            _ => None,
        }
    }
}
