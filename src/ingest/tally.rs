//! What became of messages, and where their time went.

use std::ops::AddAssign;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::telemetry::metrics;

/// Counts and times of one message, or summed over those of a commit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Images embedded.
    pub embedded: u64,
    /// Deletes.
    pub deleted: u64,
    /// Messages put aside.
    pub dead_lettered: u64,
    /// Images that were gone.
    pub not_found: u64,
    /// Bytes of the images that were fetched.
    pub image_bytes: u64,
    /// Fetching, waiting included.
    pub fetch_time: Duration,
    /// Decoding, the wait for a turn included.
    pub decode_time: Duration,
    /// Embedding, the wait for the batch included.
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

/// The tally of a message whose records are worked on at one time; counts the metrics too.
#[derive(Default)]
pub struct TallyRecorder(Mutex<Tally>);

impl TallyRecorder {
    fn update(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// The sum so far.
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

fn observe_stage_time(name: &str, since: Instant) -> Duration {
    let took = since.elapsed();
    metrics::global().ingest_stage_seconds.observe(&[name], took.as_secs_f64());
    took
}
