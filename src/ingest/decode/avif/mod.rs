//! AVIF: AV1 images in a HEIF container, by the crates `zenavif-parse` and `re_rav1d`.

mod colour;
mod container;
mod decoder;
mod frame;

pub use decoder::{decode, estimate_memory_bytes};
