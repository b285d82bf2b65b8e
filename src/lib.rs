//! Text→image search that can be trusted: a streaming pipeline around CLIP and BSAP.
//!
//! The pipeline can be read from the listing of modules; ARCHITECTURE.md draws it.

#![forbid(unsafe_code)]

pub mod dead_letter;
pub mod fetch;
pub mod kafka;
pub mod normalise;
pub mod record;
pub mod retry;
pub mod source;
pub mod statistics;
pub mod store;
pub mod table;
pub mod telemetry;
