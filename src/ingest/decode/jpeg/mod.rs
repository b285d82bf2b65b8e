//! JPEG: by libjpeg-turbo; samples of 12 bits and damaged files by its port to Rust.

mod decoder;
mod header;
mod lenient;

pub use decoder::{Samples, decode, decode_samples, estimate_memory_bytes, frame_size};
