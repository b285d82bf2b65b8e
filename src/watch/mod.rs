//! Watches folders, buckets and lists of addresses, and announces what is new, changed or removed. In the
//! order of the work:
//!
//! 1. `source` says what a path or an address given by a user is;
//! 2. `folder`, `bucket` and `list` read one source from beginning to end and yield what they find: pictures,
//!    and files that are skipped, each with the reason (`file_kind` tells them apart);
//! 3. `tracker` compares what was found with what is stored, decides which events are sent, and knows of each
//!    file whether it is stored, on its way or skipped. It limits how many events are on their way, so that
//!    the topic never has to keep more than that.

mod bucket;
mod error;
mod file_kind;
mod folder;
mod item;
mod list;
mod source;
mod tracker;

pub use error::WatchError;
pub use item::{FoundItem, FoundPicture, ItemVersion, SkipReason};
pub use source::{SourceKind, WatchedSource, open_sources};
pub use tracker::{
    ImageAction, MAX_EVENTS_IN_TRANSIT, SettledImage, StoredImageVersion, Tracker, TrackerCounts,
};

#[cfg(test)]
mod tests;
