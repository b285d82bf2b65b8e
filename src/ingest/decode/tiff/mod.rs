//! TIFF: strips and tiles are found, joined and coloured here; what they are compressed by is read by libraries.
//! The crates that read TIFF as a whole either refuse common files (palettes, fax, JPEG in YCbCr) or decode some
//! of them wrongly (fill order, opacity, planes in tiles).

mod chunks;
mod colour;
mod compression;
mod decoder;
mod fax;
mod layout;

pub use decoder::{decode, estimate_memory_bytes};
