//! Why an image could not be fetched.

use crate::diagnosis::redact::redact;
use crate::retry::{Classify, Disposition};

/// Why the bytes of an image could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The URI is malformed, of an unknown scheme, or not allowed.
    #[error("{uri}: {reason}")]
    UriRejected {
        /// The URI, shortened.
        uri: String,
        /// Why it is rejected.
        reason: String,
    },
    /// The image has more bytes than allowed.
    #[error("{uri}: larger than fetch.max_bytes = {limit} bytes")]
    TooLarge {
        /// The URI, shortened.
        uri: String,
        /// `fetch.max_bytes`.
        limit: u64,
    },
    /// There is no image at the URI, or no longer.
    #[error("{uri}: not there")]
    NotFound {
        /// The URI, shortened.
        uri: String,
    },
    /// The server rejected the request, and would reject it again.
    #[error("{uri}: {reason}")]
    Permanent {
        /// The URI, shortened.
        uri: String,
        /// The server's answer.
        reason: String,
    },
    /// The server or store forbids to read the image: 403, or the operating system says so.
    #[error("{uri}: {reason}")]
    Forbidden {
        /// The URI, shortened.
        uri: String,
        /// The answer.
        reason: String,
    },
    /// What is at the URI is no picture, by its first bytes.
    #[error("{uri}: is no picture, by its first bytes; the rest was not downloaded")]
    NotAnImage {
        /// The URI, shortened.
        uri: String,
    },
    /// A later attempt may succeed.
    #[error("{uri}: {reason}")]
    Transient {
        /// The URI, shortened.
        uri: String,
        /// Why this attempt failed.
        reason: String,
        /// Whether the host or bucket answered, so that only this image or this attempt failed.
        host_responded: bool,
    },
}

impl FetchError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UriRejected { .. } => "uri_not_allowed",
            Self::TooLarge { .. } => "file_too_large",
            Self::NotFound { .. } => "image_not_found",
            Self::Permanent { .. } => "fetch_refused",
            Self::Forbidden { .. } => "fetch_forbidden",
            Self::NotAnImage { .. } => "unknown_image_format",
            Self::Transient { .. } => "fetch_failed",
        }
    }
}

impl Classify for FetchError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Transient { .. } => Disposition::Retry,
            _ => Disposition::DeadLetter,
        }
    }
}

pub(super) fn uri_rejected_error(uri: &str, reason: String) -> FetchError {
    FetchError::UriRejected { uri: shorten_uri(uri), reason }
}

pub(super) fn permanent_error(uri: &str, reason: String) -> FetchError {
    FetchError::Permanent { uri: shorten_uri(uri), reason }
}

pub(super) fn transient_error(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten_uri(uri), reason: reason.into(), host_responded: false }
}

/// Like [`transient_error`], if the host or bucket answered.
pub(super) fn transient_error_after_response(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten_uri(uri), reason: reason.into(), host_responded: true }
}

/// Shortens a URI for messages: drops the query, which may contain a signature, and long tails; hides user
/// and password.
pub fn shorten_uri(uri: &str) -> String {
    const MAX_CHARS: usize = 200;
    let plain = redact(uri.split(['?', '#']).next().unwrap_or_default());
    if plain.chars().count() <= MAX_CHARS {
        return plain.into_owned();
    }
    plain.chars().take(MAX_CHARS).chain("…".chars()).collect()
}
