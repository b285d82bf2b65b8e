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
    pub gone: u64,
    /// Bytes of the images that were fetched.
    pub image_bytes: u64,
    /// Fetching, waiting included.
    pub fetch: Duration,
    /// Decoding, the wait for a turn included.
    pub decode: Duration,
    /// Embedding, the wait for the batch included.
    pub embed: Duration,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.embedded += other.embedded;
        self.deleted += other.deleted;
        self.dead_lettered += other.dead_lettered;
        self.gone += other.gone;
        self.image_bytes += other.image_bytes;
        self.fetch += other.fetch;
        self.decode += other.decode;
        self.embed += other.embed;
    }
}

/// The tally of a message whose records are worked on at one time; counts the metrics too.
#[derive(Default)]
pub struct Counting(Mutex<Tally>);

impl Counting {
    fn with(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// The sum so far.
    pub fn tally(&self) -> Tally {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn embedded(&self) {
        self.with(|t| t.embedded += 1);
        metrics::get().events.add(&["embedded"], 1);
    }

    pub fn deleted(&self) {
        self.with(|t| t.deleted += 1);
        metrics::get().events.add(&["deleted"], 1);
    }

    pub fn gone(&self) {
        self.with(|t| t.gone += 1);
        metrics::get().events.add(&["gone"], 1);
    }

    pub fn dead_lettered(&self, stage: &str, code: &str) {
        self.with(|t| t.dead_lettered += 1);
        metrics::get().events.add(&["dead_lettered"], 1);
        metrics::get().dead_letters.add(&[stage, code], 1);
    }

    pub fn fetched(&self, since: Instant, bytes: u64) {
        let took = stage("fetch", since);
        metrics::get().image_bytes.add(&[], bytes);
        self.with(|t| {
            t.fetch += took;
            t.image_bytes += bytes;
        });
    }

    pub fn decoded(&self, since: Instant) {
        let took = stage("decode", since);
        self.with(|t| t.decode += took);
    }

    pub fn towered(&self, since: Instant) {
        let took = stage("embed", since);
        self.with(|t| t.embed += took);
    }
}

fn stage(name: &str, since: Instant) -> Duration {
    let took = since.elapsed();
    metrics::get().stage_seconds.observe(&[name], took.as_secs_f64());
    took
}
