//! What a listing says of an object.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use url::Url;

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Key of the object below the URL that is listed. Names of local files need not be UTF-8.
    pub key: Vec<u8>,
    /// URL of the object, or why it cannot have one.
    pub uri: Result<Url, String>,
    /// Time of the last change.
    pub last_modified: DateTime<Utc>,
    /// Size of the object.
    pub size_bytes: u64,
}

impl ListedObject {
    /// Returns the key as text; what is not UTF-8 is replaced.
    pub fn key_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.key)
    }
}
