//! What a source contains: pictures, and files that are skipped.

use std::collections::BTreeMap;

use chrono::{DateTime, SubsecRound, Utc};
use serde_json::Value;

use crate::record::{ImageId, MAX_IMAGE_ID_BYTES};

/// Something that was found in a source.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundItem {
    /// Path or address, as it is shown to people.
    pub path: String,
    /// The picture; or why it is none, or cannot be read.
    pub content: Result<FoundPicture, SkipReason>,
}

/// A picture that was found in a source.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundPicture {
    /// Id under which it is stored.
    pub image_id: String,
    /// Address from which it is fetched.
    pub uri: String,
    /// What changes when the picture changes.
    pub version: ItemVersion,
    /// Attributes by name.
    pub attributes: BTreeMap<String, Value>,
}

/// What changes when a picture changes, as far as its source tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ItemVersion {
    /// Time of the last change, in microseconds; `None` if unknown.
    pub modified_at: Option<DateTime<Utc>>,
    /// Size in bytes; `None` if unknown.
    pub size_bytes: Option<u64>,
}

impl ItemVersion {
    /// Creates a version. A time that RFC 3339 cannot write counts as unknown.
    pub fn new(modified_at: Option<DateTime<Utc>>, size_bytes: u64) -> Self {
        use chrono::Datelike as _;
        let modified_at = modified_at.filter(|time| (0..=9999).contains(&time.year()));
        Self {
            modified_at: modified_at.map(|time| time.trunc_subsecs(6)),
            size_bytes: Some(size_bytes),
        }
    }
}

/// Why something is not stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkipReason {
    /// The reason without details, by which skipped files are counted.
    pub group: String,
    /// The reason, in one sentence.
    pub reason: String,
    /// Whether it should have been stored: it is a picture, or is said to be one.
    pub is_failure: bool,
}

impl SkipReason {
    /// A file that is no picture.
    pub fn not_a_picture(group: impl Into<String>) -> Self {
        let group = group.into();
        Self { reason: group.clone(), group, is_failure: false }
    }

    /// A picture that could not be read, although it should have been stored.
    pub fn failure(group: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { group: group.into(), reason: reason.into(), is_failure: true }
    }

    /// Returns the reason why workers rejected the event of a picture, by the code of the dead letter.
    pub fn from_rejection(code: &str, explanation: &str) -> Self {
        let (group, is_failure) = match code {
            "unknown_image_format" => {
                ("named like a picture, but not one of a known format", false)
            }
            "image_damaged" | "decoder_panicked" => ("damaged", false),
            "unsupported_format" => ("a format or variant that is not read", false),
            "image_too_large" | "file_too_large" => {
                ("larger than decode.max_side, decode.max_pixels or fetch.max_bytes allow", true)
            }
            "decode_timed_out" => ("not decoded within decode.timeout_ms", true),
            "image_not_found" => ("not there when it was to be read", true),
            "uri_not_allowed" => ("an address that may not be read", true),
            "fetch_refused" | "fetch_failed" | "fetch_forbidden" => ("cannot be read", true),
            "invalid_field" => ("not accepted", true),
            other => (other, true),
        };
        Self { group: group.to_owned(), reason: explanation.to_owned(), is_failure }
    }
}

/// Returns the id of a picture with this key below `prefix`. What an id may not contain is written as in
/// an address: `%1B` for a control character.
pub(super) fn image_id_from_key(prefix: &str, key: &str) -> Result<String, SkipReason> {
    use percent_encoding::{CONTROLS, utf8_percent_encode};
    let id = format!("{prefix}{key}");
    let id = if id.chars().any(char::is_control) {
        utf8_percent_encode(&id, CONTROLS).to_string()
    } else {
        id
    };
    match ImageId::new(&id) {
        Ok(_) => Ok(id),
        Err(_) => Err(SkipReason::failure(
            "a path that is too long",
            format!(
                "its path has more than {MAX_IMAGE_ID_BYTES} bytes; name a folder nearer to it"
            ),
        )),
    }
}
