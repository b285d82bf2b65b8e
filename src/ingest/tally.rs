//! Counts of events, and time spent per stage.

use std::ops::AddAssign;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::telemetry::metrics;

/// Counts and times of one message, or their sums over the messages of a commit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Images embedded.
    pub embedded_images: u64,
    /// Deletes stored.
    pub stored_deletes: u64,
    /// Messages dead-lettered.
    pub dead_lettered_messages: u64,
    /// Images that were not found.
    pub not_found_images: u64,
    /// Bytes of the fetched images.
    pub fetched_bytes: u64,
    /// Time spent fetching, including waits.
    pub fetch_duration: Duration,
    /// Time spent decoding, including the wait for permits.
    pub decode_duration: Duration,
    /// Time spent embedding, including the wait for the batch.
    pub embed_duration: Duration,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.embedded_images += other.embedded_images;
        self.stored_deletes += other.stored_deletes;
        self.dead_lettered_messages += other.dead_lettered_messages;
        self.not_found_images += other.not_found_images;
        self.fetched_bytes += other.fetched_bytes;
        self.fetch_duration += other.fetch_duration;
        self.decode_duration += other.decode_duration;
        self.embed_duration += other.embed_duration;
    }
}

/// Builds the tally of a message whose events are processed concurrently, and counts in the metrics.
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

    pub fn count_embedded_image(&self) {
        self.update(|t| t.embedded_images += 1);
        metrics::global().ingest_events.add(&["embedded"], 1);
    }

    pub fn count_stored_delete(&self) {
        self.update(|t| t.stored_deletes += 1);
        metrics::global().ingest_events.add(&["deleted"], 1);
    }

    pub fn count_not_found_image(&self) {
        self.update(|t| t.not_found_images += 1);
        metrics::global().ingest_events.add(&["not_found"], 1);
    }

    pub fn count_dead_lettered_message(&self, stage: &str, code: &str) {
        self.update(|t| t.dead_lettered_messages += 1);
        metrics::global().ingest_events.add(&["dead_lettered"], 1);
        metrics::global().dead_letters.add(&[stage, code], 1);
    }

    pub fn record_fetch(&self, since: Instant, bytes: u64) {
        let took = observe_stage_time("fetch", since);
        metrics::global().image_bytes.add(&[], bytes);
        self.update(|t| {
            t.fetch_duration += took;
            t.fetched_bytes += bytes;
        });
    }

    pub fn record_decode_duration(&self, since: Instant) {
        let took = observe_stage_time("decode", since);
        self.update(|t| t.decode_duration += took);
    }

    pub fn record_embed_duration(&self, since: Instant) {
        let took = observe_stage_time("embed", since);
        self.update(|t| t.embed_duration += took);
    }
}

/// Observes the time since `since` in the metric of the stage, and returns it.
fn observe_stage_time(name: &str, since: Instant) -> Duration {
    let took = since.elapsed();
    metrics::global().ingest_stage_seconds.observe_seconds(&[name], took.as_secs_f64());
    took
}
