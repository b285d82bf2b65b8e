//! Object storage by URL: S3 and compatible stores, GCS, Azure, a local folder, memory.
//!
//! Credentials come from the standard environment variables of each provider (`AWS_*`, `GOOGLE_*`,
//! `AZURE_*`). Options in the configuration override them.
//!
//! A [`Store`] is a folder of this program's own, such as that of a table. An [`ImageStore`] is a bucket or
//! folder of somebody else's images, whose keys may be anything.

mod folder;
mod folder_listing;
mod image_store;
mod key_translation;
mod listed_object;
mod object_keys;

pub use folder::{Store, StoreError, classify_error, is_known_option, parse_url, validate_options};
pub use image_store::ImageStore;
pub use listed_object::ListedObject;
pub use object_keys::{key_of_url, object_url, parse_object_url};
