//! Queries that wait together share one pass over memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use rayon::prelude::*;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::rank::{Exactly, Found};
use super::{Ask, scan, tasks};
use crate::search::Options;
use crate::search::query::{QueryError, Timings, milliseconds};
use crate::search::snapshot::Place;
use crate::telemetry::event;

/// What is wanted of a pass.
#[derive(Debug, Clone, Copy)]
pub enum Want {
    /// The best from this place on, 0 being the first.
    Best {
        /// How many to leave out.
        offset: usize,
    },
    /// The places of one image.
    Place(Place),
}

/// What a pass gave.
#[derive(Debug)]
pub struct Reply {
    pub found: Found,
    pub timings: Timings,
}

struct Job {
    ask: Ask,
    want: Want,
    left: CancellationToken,
    since: Instant,
    reply: SyncSender<Reply>,
}

/// A thread that takes waiting queries in batches, and the threads that scan for it. It ends when
/// this is dropped.
pub struct Batches {
    jobs: SyncSender<Job>,
    waiting: usize,
}

impl Batches {
    /// Starts the threads.
    pub fn start(options: &Options) -> Self {
        let (jobs, queue) = sync_channel(options.waiting);
        let most = options.batch;
        // Without threads of its own it scans on those that every other computation uses.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("scan-{i}"))
            .build()
            .ok();
        std::thread::spawn(move || {
            while let Some(batch) = take(&queue, most) {
                let pass = AssertUnwindSafe(|| match &pool {
                    Some(pool) => pool.install(|| answer(batch)),
                    None => answer(batch),
                });
                // The queries of this pass are given up; those that come later are answered.
                if catch_unwind(pass).is_err() {
                    error!(
                        event = event::HTTP_ERROR,
                        code = "panic",
                        error = "a pass over the catalogue panicked",
                        "a query panicked"
                    );
                }
            }
        });
        Self { jobs, waiting: options.waiting }
    }

    /// Waits for an answer.
    pub fn ask(&self, ask: Ask, want: Want, left: &CancellationToken) -> Result<Reply, QueryError> {
        let (reply, answer) = sync_channel(1);
        let job = Job { ask, want, left: left.clone(), since: Instant::now(), reply };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => QueryError::Busy(self.waiting),
            TrySendError::Disconnected(_) => QueryError::GivenUp,
        })?;
        answer.recv().map_err(|_| QueryError::GivenUp)
    }
}

/// The next queries, as soon as there is one; none when nobody can ask any more.
fn take(queue: &Receiver<Job>, most: usize) -> Option<Vec<Job>> {
    let mut batch = vec![queue.recv().ok()?];
    batch.extend(queue.try_iter().take(most - 1));
    // Who left gets no answer, and costs no pass.
    batch.retain(|job| !job.left.is_cancelled());
    Some(batch)
}

/// One pass a snapshot.
fn answer(mut batch: Vec<Job>) {
    while let Some(first) = batch.first() {
        let snapshot = first.ask.snapshot.clone();
        let of_this = |job: &mut Job| Arc::ptr_eq(&job.ask.snapshot, &snapshot);
        let jobs: Vec<Job> = batch.extract_if(.., of_this).collect();
        let started = Instant::now();
        let tasks = tasks(&snapshot);
        let asks: Vec<&Ask> = jobs.iter().map(|job| &job.ask).collect();
        let scanned = scan(&snapshot, &tasks, &asks);
        let scan_ms = milliseconds(started.elapsed());
        jobs.par_iter().zip(&scanned).for_each(|(job, scanned)| {
            let ranked = Instant::now();
            let exactly = Exactly::new(&job.ask, &tasks, scanned);
            let found = match job.want {
                Want::Best { offset } => exactly.best(offset),
                Want::Place(place) => Found {
                    hits: exactly.of(place).into_iter().collect(),
                    raw_hits: Vec::new(),
                    matched: scanned.matched,
                    background: scanned.background,
                },
            };
            let timings = Timings {
                text_ms: 0.0,
                wait_ms: milliseconds(started.duration_since(job.since)),
                scan_ms,
                rank_ms: milliseconds(ranked.elapsed()),
            };
            // Who left meanwhile does not hear it.
            let _ = job.reply.send(Reply { found, timings });
        });
    }
}
