//! Text→image search that can be trusted: a streaming pipeline around CLIP and BSAP.
//!
//! This list is the map: layers from leaves to commands, inside a layer in the order of the pipeline.
//! A module imports only from its own layer or from earlier ones; ARCHITECTURE.md draws the pipeline.

#![forbid(unsafe_code)]

// Leaves: know nothing of the pipeline.
pub mod balance;
pub mod kafka;
pub mod record;
pub mod retry;
pub mod store;
pub mod telemetry;
pub mod validate;

// Stages: from a message to a stored row, from a query to a ranking.
pub mod catalogue;
pub mod clip;
pub mod ingest;
pub mod prompts;
pub mod search;
pub mod table;

// Flows: programs made of stages.
pub mod backfill;
pub mod demo;
pub mod evaluate;
pub mod publish;
pub mod reconcile;
pub mod rollout;
pub mod serve;

// Wiring: options and commands.
pub mod commands;
pub mod config;
