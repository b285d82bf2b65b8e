//! Text→image search that can be trusted: a streaming pipeline around CLIP and BSAP.
//!
//! The pipeline can be read from the listing of modules; ARCHITECTURE.md draws it.

#![forbid(unsafe_code)]

pub mod calibration;
pub mod cli;
pub mod clip;
pub mod command;
pub mod config;
pub mod dead_letter;
pub mod decode;
pub mod demo;
pub mod evaluate;
pub mod feedback;
pub mod fetch;
pub mod http;
pub mod ingest;
pub mod kafka;
pub mod limits;
pub mod metrics;
pub mod normalise;
pub mod prompts;
pub mod publish;
pub mod reconcile;
pub mod record;
pub mod reindex;
pub mod retry;
pub mod search;
pub mod source;
pub mod statistics;
pub mod store;
pub mod table;
pub mod telemetry;
pub mod upkeep;
pub mod watch;
