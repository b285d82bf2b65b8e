//! Counts of events, and time spent per stage.

use std::ops::AddAssign;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::telemetry::metrics;

/// Counts and times of one message, or their sums over the messages of a commit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Images embedded.
    pub embedded: u64,
    /// Deletes stored.
    pub deleted: u64,
    /// Messages dead-lettered.
    pub dead_lettered: u64,
    /// Images that were not found.
    pub not_found: u64,
    /// Bytes of the fetched images.
    pub image_bytes: u64,
    /// Time spent fetching, including waits.
    pub fetch_time: Duration,
    /// Time spent decoding, including the wait for permits.
    pub decode_time: Duration,
    /// Time spent embedding, including the wait for the batch.
    pub embed_time: Duration,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.embedded += other.embedded;
        self.deleted += other.deleted;
        self.dead_lettered += other.dead_lettered;
        self.not_found += other.not_found;
        self.image_bytes += other.image_bytes;
        self.fetch_time += other.fetch_time;
        self.decode_time += other.decode_time;
        self.embed_time += other.embed_time;
    }
}

/// Builds the tally of a message whose records are processed concurrently, and counts in the metrics.
#[derive(Default)]
pub struct TallyRecorder(Mutex<Tally>);

impl TallyRecorder {
    fn update(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Returns the sums so far.
    pub fn tally(&self) -> Tally {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn record_embedded(&self) {
        self.update(|t| t.embedded += 1);
        metrics::global().ingest_events.add(&["embedded"], 1);
    }

    pub fn record_deleted(&self) {
        self.update(|t| t.deleted += 1);
        metrics::global().ingest_events.add(&["deleted"], 1);
    }

    pub fn record_not_found(&self) {
        self.update(|t| t.not_found += 1);
        metrics::global().ingest_events.add(&["not_found"], 1);
    }

    pub fn record_dead_lettered(&self, stage: &str, code: &str) {
        self.update(|t| t.dead_lettered += 1);
        metrics::global().ingest_events.add(&["dead_lettered"], 1);
        metrics::global().dead_letters.add(&[stage, code], 1);
    }

    pub fn record_fetch(&self, since: Instant, bytes: u64) {
        let took = observe_stage_time("fetch", since);
        metrics::global().image_bytes.add(&[], bytes);
        self.update(|t| {
            t.fetch_time += took;
            t.image_bytes += bytes;
        });
    }

    pub fn record_decode(&self, since: Instant) {
        let took = observe_stage_time("decode", since);
        self.update(|t| t.decode_time += took);
    }

    pub fn record_embed(&self, since: Instant) {
        let took = observe_stage_time("embed", since);
        self.update(|t| t.embed_time += took);
    }
}

/// Observes the time since `since` in the metric of the stage, and returns it.
fn observe_stage_time(name: &str, since: Instant) -> Duration {
    let took = since.elapsed();
    metrics::global().ingest_stage_seconds.observe(&[name], took.as_secs_f64());
    took
}
