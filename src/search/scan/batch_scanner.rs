//! Collects waiting queries into batches that share one pass over memory.

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

/// What the pass should find.
#[derive(Debug, Clone, Copy)]
pub enum ScanGoal {
    /// The best hits.
    TopHits {
        /// Number of best hits to leave out, because they are on earlier pages.
        offset: usize,
    },
    /// The scores and ranks of one image.
    RankOf(RowLocation),
}

/// Result of a pass for one query.
#[derive(Debug)]
pub struct ScanReply {
    pub top_k: TopK,
    pub timings: Timings,
}

/// A waiting query.
struct ScanJob {
    request: ScanRequest,
    goal: ScanGoal,
    cancel: CancellationToken,
    queued_at: Instant,
    reply_sender: SyncSender<ScanReply>,
}

/// Hands queries to a thread that takes them in batches and scans for them on a thread pool of its
/// own. The threads end when this is dropped.
pub struct BatchScanner {
    queue: SyncSender<ScanJob>,
    queue_capacity: usize,
}

impl BatchScanner {
    /// Starts the threads.
    pub fn start(options: &SearchOptions) -> Self {
        let (queue, jobs) = sync_channel(options.queue_capacity);
        let max_batch = options.max_queries_per_scan;
        // If the pool cannot be created, the pass runs on the threads that all other computations use.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("scan-{i}"))
            .build()
            .ok();
        std::thread::spawn(move || {
            while let Some(batch) = next_batch(&jobs, max_batch) {
                let pass = AssertUnwindSafe(|| match &pool {
                    Some(pool) => pool.install(|| answer_batch(batch)),
                    None => answer_batch(batch),
                });
                // The queries of this batch fail; later ones are answered.
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
        Self { queue, queue_capacity: options.queue_capacity }
    }

    /// Queues a request and blocks until it is answered. Fails at once if the queue is full.
    pub fn scan_and_wait(
        &self,
        request: ScanRequest,
        goal: ScanGoal,
        cancel: &CancellationToken,
    ) -> Result<ScanReply, QueryError> {
        let (reply_sender, reply_receiver) = sync_channel(1);
        let job = ScanJob {
            request,
            goal,
            cancel: cancel.clone(),
            queued_at: Instant::now(),
            reply_sender,
        };
        self.queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => QueryError::QueueFull(self.queue_capacity),
            TrySendError::Disconnected(_) => QueryError::Cancelled,
        })?;
        reply_receiver.recv().map_err(|_| QueryError::Cancelled)
    }
}

/// Waits for a query, and returns it with the others that are waiting. Returns `None` after the scanner
/// was dropped.
fn next_batch(jobs: &Receiver<ScanJob>, max_batch: usize) -> Option<Vec<ScanJob>> {
    let mut batch = vec![jobs.recv().ok()?];
    batch.extend(jobs.try_iter().take(max_batch - 1));
    // A cancelled query needs no answer.
    batch.retain(|job| !job.cancel.is_cancelled());
    Some(batch)
}

/// Answers a batch with one pass per snapshot.
fn answer_batch(mut batch: Vec<ScanJob>) {
    while let Some(first) = batch.first() {
        let snapshot = first.request.snapshot.clone();
        let is_of_snapshot = |job: &mut ScanJob| Arc::ptr_eq(&job.request.snapshot, &snapshot);
        let jobs: Vec<ScanJob> = batch.extract_if(.., is_of_snapshot).collect();
        let scan_started_at = Instant::now();
        let tasks = split_into_tasks(&snapshot);
        let requests: Vec<&ScanRequest> = jobs.iter().map(|job| &job.request).collect();
        let results = scan_snapshot(&snapshot, &tasks, &requests);
        let scan_ms = to_milliseconds(scan_started_at.elapsed());
        jobs.par_iter().zip(&results).for_each(|(job, result)| {
            let rank_started_at = Instant::now();
            let ranker = ExactRanker::new(&job.request, &tasks, result);
            let top_k = match job.goal {
                ScanGoal::TopHits { offset } => ranker.top_k(offset),
                ScanGoal::RankOf(location) => TopK {
                    hits: ranker.ranked_hit(location).into_iter().collect(),
                    raw_hits: Vec::new(),
                    matched_image_count: result.matched_row_count,
                    score_distribution: result.score_distribution,
                },
            };
            let timings = Timings {
                embed_ms: 0.0,
                wait_ms: to_milliseconds(scan_started_at.duration_since(job.queued_at)),
                scan_ms,
                rank_ms: to_milliseconds(rank_started_at.elapsed()),
            };
            // An error means that the caller no longer waits.
            let _ = job.reply_sender.send(ScanReply { top_k, timings });
        });
    }
}
