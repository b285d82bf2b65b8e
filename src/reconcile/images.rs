//! What is compared: an image as the listing describes it, and as the table knows it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::ingest::source::ImageEvent;
use crate::record::{Attributes, SequenceKey};

/// One image as the listing describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ListedImage {
    /// An object of a bucket or a folder.
    Object {
        /// URL of the object, or why it cannot have one.
        uri: Result<String, String>,
        /// Time of the last change.
        modified_at: DateTime<Utc>,
        /// Size of the object.
        size_bytes: u64,
        /// Whether its extension is that of an image.
        is_image: bool,
    },
    /// An id in a list, without further information.
    Id,
    /// An event in a list, and its version by the catalogue's ordering.
    Event(Box<ImageEvent>, SequenceKey),
}

/// One image as the table knows it, under the key by which it is compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableImage {
    /// Id of the image.
    pub image_id: String,
    /// Whether the image exists, seen from the key.
    pub status: TableImageStatus,
    /// Version of the image.
    pub sequence: SequenceKey,
    /// Time of the event; if the event states none, when the row was embedded.
    pub event_time: DateTime<Utc>,
    /// Whether the event states its time.
    pub has_event_time: bool,
    /// When the row was embedded, shortly before it was stored.
    pub embedded_at: DateTime<Utc>,
    /// Address of the image; `None` if it is deleted, or its event contained it.
    pub uri: Option<String>,
    /// Size of the image as fetched; `None` if it is deleted.
    pub size_bytes: Option<u64>,
    /// Stored attributes.
    pub attributes: Attributes,
}

/// Whether an image exists, seen from the key by which it is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableImageStatus {
    /// It exists, and was fetched from the address of this key.
    Present,
    /// It was deleted.
    Deleted,
    /// It has the id that an object with this key would get, but was fetched from another address.
    FetchedElsewhere,
}

impl TableImage {
    /// Whether the version of the image is the time of its event in microseconds.
    pub fn has_time_sequence(&self) -> bool {
        self.has_event_time
            && SequenceKey::from_time(self.event_time).is_ok_and(|time| time == self.sequence)
    }
}

/// How the ids of a target's images are formed.
#[derive(Debug, Clone, Default)]
pub struct IdScheme {
    /// Id and key of an image whose id is not prefix and key; `None` unless most images have such ids.
    pub custom_id_example: Option<(String, String)>,
}
