//! AVIF: AV1 images in a HEIF container, by the crate `re_rav1d`; the container is read
//! here.

mod colour;
mod container;
mod decoder;
mod frame;

pub use decoder::{decode, estimate_memory_bytes};
