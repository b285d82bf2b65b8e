//! Text→image search that can be trusted: a streaming pipeline around CLIP and BSAP.
//!
//! This list is the map: layers from the leaves to the commands, and inside a layer the order of the
//! pipeline. A module imports only from its own layer or from earlier ones. ARCHITECTURE.md draws the
//! pipeline and follows one message and one query through it; docs/glossary.md explains the terms.

#![forbid(unsafe_code)]

// # Leaves: know nothing of the pipeline.

// BSAP itself: statistics of an image, balanced scores, calibrated thresholds.
pub mod balance;
// Events, rows and identifiers that pass between the stages, and embeddings that others have computed.
pub mod record;
// Checks that options share.
pub mod validate;
// Errors of libraries with all of their causes and remedies, and without secrets.
pub mod diagnosis;
// What a caller does about an error, and how long it waits before it tries again.
pub mod retry;
// Log events, metrics, traces, and the address for probes and metrics.
pub mod telemetry;
// Connections to Kafka.
pub mod kafka;
// Object storage by URL.
pub mod store;

// # Stages: from a message to a stored row, and from a query to a ranking.

// From a checkpoint to embeddings of images and texts.
pub mod clip;
// Sets of auxiliary prompts, which images are measured against.
pub mod prompts;
// The worker: source, fetch, decode, embed, sink, dead letters.
pub mod ingest;
// The stored rows: two Delta Lake tables per model, their writers, readers and maintenance.
pub mod table;
// A catalogue's state: which model and prompt set are served, and which replicas are ready.
pub mod catalogue;
// Exact ranking over a snapshot in memory.
pub mod search;

// # Flows: join stages to what a command runs.

// Announces images as events.
pub mod publish;
// Finds differences between a listing of images and the table.
pub mod reconcile;
// Watches folders, buckets and lists, and announces what is new, changed or removed.
pub mod watch;
// Computes statistics and embeddings for images that are already stored, and imports embeddings from files.
pub mod backfill;
// The query worker: follows the catalogue, answers HTTP, shows the page.
pub mod serve;
// Compares configurations on judged queries, and calibrates thresholds.
pub mod evaluate;
// Candidate, promotion and roll back of configurations and models.
pub mod rollout;
// A drawn catalogue, and a broker in this process.
pub mod demo;

// # Wiring: options, and the program's commands.

// One TOML file and environment variables become the options of each module.
pub mod config;
// One file per command: its arguments and what it does.
pub mod commands;
