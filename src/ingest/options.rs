//! Options of the section `ingest`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::validate;

/// Sizes of batches and queues, and time limits, of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IngestOptions {
    /// Maximum number of messages in the pipeline. Should be at least twice `batch_images`, so that the
    /// next batch is ready when the model is.
    pub max_in_flight_messages: usize,
    /// Maximum size of all messages in the pipeline, in MiB: messages may contain images.
    pub max_in_flight_mib: usize,
    /// Images embedded in one pass of the image encoder.
    pub batch_images: usize,
    /// How long an incomplete batch waits for more images, in milliseconds.
    pub batch_wait_ms: u64,
    /// Images decoded concurrently. 0: twice the number of cores.
    pub decode_threads: usize,
    /// A commit starts when this many rows are pending …
    pub commit_rows: usize,
    /// … or this many MiB of embeddings and attributes …
    pub commit_mib: usize,
    /// … or when the oldest pending row is this old, in milliseconds. Bounds how long a new image takes to
    /// become searchable, and how many files and requests a quiet topic costs.
    pub commit_ms: u64,
    /// Interval of the log event `heartbeat`, in seconds.
    pub heartbeat_seconds: u64,
    /// How long a worker may take at shutdown to finish the messages in the pipeline and to commit them, in
    /// seconds; a quarter of it is reserved for the last commit. The next owner of the partition repeats
    /// the work that was cut off.
    pub drain_seconds: u64,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self {
            max_in_flight_messages: 128,
            max_in_flight_mib: 64,
            batch_images: 32,
            batch_wait_ms: 20,
            decode_threads: 0,
            commit_rows: 10_000,
            commit_mib: 64,
            commit_ms: 1_000,
            heartbeat_seconds: 30,
            drain_seconds: 20,
        }
    }
}

impl IngestOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(
            p,
            "max_in_flight_messages",
            self.max_in_flight_messages as u64,
            1,
            100_000,
        );
        validate::check_range(p, "max_in_flight_mib", self.max_in_flight_mib as u64, 1, 65_536);
        validate::check_range(p, "batch_images", self.batch_images as u64, 1, 4096);
        validate::check_range(p, "batch_wait_ms", self.batch_wait_ms, 0, 10_000);
        validate::check_range(p, "decode_threads", self.decode_threads as u64, 0, 1024);
        validate::check_range(p, "commit_rows", self.commit_rows as u64, 1, 1_000_000);
        validate::check_range(p, "commit_mib", self.commit_mib as u64, 1, 4096);
        validate::check_range(p, "commit_ms", self.commit_ms, 1, 3_600_000);
        validate::check_range(p, "heartbeat_seconds", self.heartbeat_seconds, 1, 3_600);
        validate::check_range(p, "drain_seconds", self.drain_seconds, 0, 3_600);
        problems
    }
}
