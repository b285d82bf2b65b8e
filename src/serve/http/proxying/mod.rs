//! What proxies in front need: a path of their own (`base_path`), and compressed responses
//! (`compression`).

mod base_path;
mod compression;

pub use base_path::{accept_base_path, validate_base_path};
pub use compression::{compress_response, reject_compressed_body};

#[cfg(test)]
mod tests;
