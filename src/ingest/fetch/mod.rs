//! From an event's content to the bytes of the image.
//!
//! Images come from object storage (`s3://`, `gs://`, `az://`), local folders (`file://`, only below
//! configured roots), `http(s)://` (from private addresses only if configured) and `data:` URLs. The size
//! of each download is limited, and so is the memory of all of them together.

mod address;
mod encoding;
mod error;
mod fetcher;
mod http;
mod options;

pub use error::{FetchError, shorten_uri};
pub use fetcher::{FetchedBytes, Fetcher};
pub use options::FetchOptions;

#[cfg(test)]
mod failure_tests;
#[cfg(test)]
mod tests;
