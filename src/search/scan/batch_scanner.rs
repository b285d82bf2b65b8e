//! Queries that wait together share one pass over memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use rayon::prelude::*;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::hit::TopK;
use super::pass::scan_snapshot;
use super::rank::ExactRanker;
use super::request::ScanRequest;
use super::task::split_into_tasks;
use crate::search::error::QueryError;
use crate::search::options::SearchOptions;
use crate::search::snapshot::RowLocation;
use crate::search::timings::{Timings, to_milliseconds};
use crate::telemetry::event;

/// What is wanted of a pass.
#[derive(Debug, Clone, Copy)]
pub enum ScanGoal {
    /// The best from this place on, 0 being the first.
    TopHits {
        /// How many to leave out.
        offset: usize,
    },
    /// The places of one image.
    RankOf(RowLocation),
}

/// What a pass gave.
#[derive(Debug)]
pub struct ScanReply {
    pub top_k: TopK,
    pub timings: Timings,
}

struct ScanJob {
    request: ScanRequest,
    goal: ScanGoal,
    cancel: CancellationToken,
    queued_at: Instant,
    reply_sender: SyncSender<ScanReply>,
}

/// A thread that takes waiting queries in batches, and the threads that scan for it. It ends when
/// this is dropped.
pub struct BatchScanner {
    jobs: SyncSender<ScanJob>,
    queue_capacity: usize,
}

impl BatchScanner {
    /// Starts the threads.
    pub fn start(options: &SearchOptions) -> Self {
        let (jobs, queue) = sync_channel(options.queue_capacity);
        let max_batch = options.max_queries_per_scan;
        // Without threads of its own it scans on those that every other computation uses.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("scan-{i}"))
            .build()
            .ok();
        std::thread::spawn(move || {
            while let Some(batch) = next_batch(&queue, max_batch) {
                let pass = AssertUnwindSafe(|| match &pool {
                    Some(pool) => pool.install(|| answer_batch(batch)),
                    None => answer_batch(batch),
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
        Self { jobs, queue_capacity: options.queue_capacity }
    }

    /// Waits for an answer.
    pub fn scan_and_wait(
        &self,
        ask: ScanRequest,
        goal: ScanGoal,
        cancel: &CancellationToken,
    ) -> Result<ScanReply, QueryError> {
        let (reply, reply_receiver) = sync_channel(1);
        let job = ScanJob {
            request: ask,
            goal,
            cancel: cancel.clone(),
            queued_at: Instant::now(),
            reply_sender: reply,
        };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => QueryError::QueueFull(self.queue_capacity),
            TrySendError::Disconnected(_) => QueryError::Cancelled,
        })?;
        reply_receiver.recv().map_err(|_| QueryError::Cancelled)
    }
}

/// The next queries, as soon as there is one; none when nobody can ask any more.
fn next_batch(queue: &Receiver<ScanJob>, max_batch: usize) -> Option<Vec<ScanJob>> {
    let mut batch = vec![queue.recv().ok()?];
    batch.extend(queue.try_iter().take(max_batch - 1));
    // Who left gets no answer, and costs no pass.
    batch.retain(|job| !job.cancel.is_cancelled());
    Some(batch)
}

/// One pass a snapshot.
fn answer_batch(mut batch: Vec<ScanJob>) {
    while let Some(first) = batch.first() {
        let snapshot = first.request.snapshot.clone();
        let of_this = |job: &mut ScanJob| Arc::ptr_eq(&job.request.snapshot, &snapshot);
        let jobs: Vec<ScanJob> = batch.extract_if(.., of_this).collect();
        let started = Instant::now();
        let tasks = split_into_tasks(&snapshot);
        let asks: Vec<&ScanRequest> = jobs.iter().map(|job| &job.request).collect();
        let scanned = scan_snapshot(&snapshot, &tasks, &asks);
        let scan_ms = to_milliseconds(started.elapsed());
        jobs.par_iter().zip(&scanned).for_each(|(job, scanned)| {
            let ranked = Instant::now();
            let ranker = ExactRanker::new(&job.request, &tasks, scanned);
            let found = match job.goal {
                ScanGoal::TopHits { offset } => ranker.top_k(offset),
                ScanGoal::RankOf(place) => TopK {
                    hits: ranker.rank_of(place).into_iter().collect(),
                    raw_hits: Vec::new(),
                    matched: scanned.matched,
                    score_distribution: scanned.score_distribution,
                },
            };
            let timings = Timings {
                embed_ms: 0.0,
                wait_ms: to_milliseconds(started.duration_since(job.queued_at)),
                scan_ms,
                rank_ms: to_milliseconds(ranked.elapsed()),
            };
            // Who left meanwhile does not hear it.
            let _ = job.reply_sender.send(ScanReply { top_k: found, timings });
        });
    }
}
