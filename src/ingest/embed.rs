//! Batches for the image tower: while one is computed, the next is collected.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;
use tracing::trace_span;

use super::progress::Progress;
use super::{IngestError, Options};
use crate::balance::statistics::{Statistics, StatisticsKey};
use crate::clip::{Pixels, Towers};
use crate::prompts::{ActiveSets, EmbeddedSet};
use crate::record::Embedding;
use crate::telemetry::metrics;

/// What the towers and the prompts make of one picture.
#[derive(Debug)]
pub struct Embedded {
    /// The embedding as it is stored.
    pub embedding: Embedding,
    /// Its statistics by prompt set.
    pub statistics: BTreeMap<StatisticsKey, Statistics>,
}

type Reply = oneshot::Sender<Result<Embedded, IngestError>>;
type Batch = Vec<(Pixels, Reply)>;

/// Hands pictures to the image tower in batches.
#[derive(Clone)]
pub struct Embedder {
    queue: mpsc::Sender<(Pixels, Reply)>,
}

impl Embedder {
    /// Starts the collecting task and the computing thread; both end when the last `Embedder` is
    /// dropped.
    pub fn start(
        towers: Arc<dyn Towers>,
        sets: ActiveSets,
        options: &Options,
        progress: Arc<Progress>,
    ) -> Self {
        // One batch's worth may wait: pictures are the largest thing in the pipeline.
        let (queue, incoming) = mpsc::channel(options.batch_images);
        // One batch is collected while one is computed.
        let (batches, ready) = mpsc::channel(1);
        let wait = Duration::from_millis(options.batch_wait_ms);
        tokio::spawn(collect(incoming, batches, options.batch_images, wait));
        let computer = Arc::new(Computer { ready: Mutex::new(ready), towers, sets, progress });
        for _ in 0..computer.towers.batches_at_once() {
            let computer = computer.clone();
            tokio::task::spawn_blocking(move || computer.run());
        }
        Self { queue }
    }

    /// Embeds one picture, together with whatever others wait.
    pub async fn embed(&self, pixels: Pixels) -> Result<Embedded, IngestError> {
        let gone = || IngestError::Broken("embedding".into());
        let (reply, answer) = oneshot::channel();
        self.queue.send((pixels, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Collects batches: full ones at once, others when `wait` is over since their first picture.
async fn collect(
    mut incoming: mpsc::Receiver<(Pixels, Reply)>,
    batches: mpsc::Sender<Batch>,
    size: usize,
    wait: Duration,
) {
    while let Some(first) = incoming.recv().await {
        let deadline = Instant::now() + wait;
        let mut batch = vec![first];
        while batch.len() < size {
            match tokio::time::timeout_at(deadline, incoming.recv()).await {
                Ok(Some(next)) => batch.push(next),
                Ok(None) | Err(_) => break,
            }
        }
        if batches.send(batch).await.is_err() {
            return;
        }
    }
}

struct Computer {
    ready: Mutex<mpsc::Receiver<Batch>>,
    towers: Arc<dyn Towers>,
    sets: ActiveSets,
    progress: Arc<Progress>,
}

impl Computer {
    /// Computes batches until no more come.
    fn run(&self) {
        let mut free = None;
        loop {
            let Some(batch) = self.ready.blocking_lock().blocking_recv() else { return };
            let started = Instant::now();
            // Waiting for the very first batch says nothing of the pipeline.
            let waited = free.map_or(Duration::ZERO, |since| started - since);
            Progress::add(&self.progress.towers_wait_us, waited.as_micros() as u64);
            metrics::get().towers_wait_seconds.observe(&[], waited.as_secs_f64());
            // Callers that have left need no answer.
            let (pixels, replies): (Vec<Pixels>, Vec<Reply>) =
                batch.into_iter().filter(|(_, reply)| !reply.is_closed()).unzip();
            if pixels.is_empty() {
                continue;
            }
            let embedded = trace_span!("towers").in_scope(|| self.towers.embed_images(&pixels));
            Progress::add(&self.progress.towers_us, started.elapsed().as_micros() as u64);
            metrics::get().towers_seconds.observe(&[], started.elapsed().as_secs_f64());
            free = Some(Instant::now());
            match embedded {
                Ok(units) => {
                    let sets = self.sets.get();
                    for (unit, reply) in units.iter().zip(replies) {
                        // Nobody to tell: the caller has left meanwhile.
                        let _ = reply.send(Ok(measure(unit, &sets)));
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    for reply in replies {
                        let _ = reply.send(Err(IngestError::Towers(text.clone())));
                    }
                }
            }
        }
    }
}

/// Statistics are taken from the embedding as it is stored, so that ingestion, reindexing and
/// search agree.
fn measure(unit: &[f32], sets: &[Arc<EmbeddedSet>]) -> Embedded {
    let embedding = Embedding::round(unit);
    let statistics = sets
        .iter()
        .filter_map(|set| Some((set.key.clone(), set.statistics(&embedding)?)))
        .collect();
    Embedded { embedding, statistics }
}
