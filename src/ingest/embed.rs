//! Batches for the image tower: while one is computed, the next is collected.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;
use tracing::trace_span;

use super::progress::Progress;
use super::{IngestError, IngestOptions};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::clip::{Encoders, Pixels};
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet};
use crate::record::Embedding;
use crate::telemetry::metrics;

/// What the towers and the prompts make of one picture.
#[derive(Debug)]
pub struct EmbeddedImage {
    /// The embedding as it is stored.
    pub embedding: Embedding,
    /// Its statistics by prompt set.
    pub statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
}

type ReplySender = oneshot::Sender<Result<EmbeddedImage, IngestError>>;
type EmbedBatch = Vec<(Pixels, ReplySender)>;

/// Hands pictures to the image tower in batches.
#[derive(Clone)]
pub struct Embedder {
    queue: mpsc::Sender<(Pixels, ReplySender)>,
}

impl Embedder {
    /// Starts the collecting task and the computing thread; both end when the last `Embedder` is
    /// dropped.
    pub fn start(
        encoders: Arc<dyn Encoders>,
        prompt_sets: ActivePromptSets,
        options: &IngestOptions,
        progress: Arc<Progress>,
    ) -> Self {
        // One batch's worth may wait: pictures are the largest thing in the pipeline.
        let (queue, incoming) = mpsc::channel(options.batch_images);
        // One batch is collected while one is computed.
        let (batches, batch_receiver) = mpsc::channel(1);
        let wait = Duration::from_millis(options.batch_wait_ms);
        tokio::spawn(collect_batches(incoming, batches, options.batch_images, wait));
        let encoder = Arc::new(BatchEncoder {
            batches: Mutex::new(batch_receiver),
            encoders,
            prompt_sets,
            progress,
        });
        for _ in 0..encoder.encoders.concurrent_batches() {
            let encoder = encoder.clone();
            tokio::task::spawn_blocking(move || encoder.run());
        }
        Self { queue }
    }

    /// Embeds one picture, together with whatever others wait.
    pub async fn embed(&self, pixels: Pixels) -> Result<EmbeddedImage, IngestError> {
        let gone = || IngestError::Internal("embedding".into());
        let (reply, answer) = oneshot::channel();
        self.queue.send((pixels, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Collects batches: full ones at once, others when `wait` is over since their first picture.
async fn collect_batches(
    mut incoming: mpsc::Receiver<(Pixels, ReplySender)>,
    batches: mpsc::Sender<EmbedBatch>,
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

struct BatchEncoder {
    batches: Mutex<mpsc::Receiver<EmbedBatch>>,
    encoders: Arc<dyn Encoders>,
    prompt_sets: ActivePromptSets,
    progress: Arc<Progress>,
}

impl BatchEncoder {
    /// Computes batches until no more come.
    fn run(&self) {
        let mut idle_since = None;
        loop {
            let Some(batch) = self.batches.blocking_lock().blocking_recv() else { return };
            let started = Instant::now();
            // Waiting for the very first batch says nothing of the pipeline.
            let waited = idle_since.map_or(Duration::ZERO, |since| started - since);
            Progress::add_to(&self.progress.model_wait_us, waited.as_micros() as u64);
            metrics::global().model_wait_seconds.observe(&[], waited.as_secs_f64());
            // Callers that have left need no answer.
            let (pixels, replies): (Vec<Pixels>, Vec<ReplySender>) =
                batch.into_iter().filter(|(_, reply)| !reply.is_closed()).unzip();
            if pixels.is_empty() {
                continue;
            }
            let embedded = trace_span!("model").in_scope(|| self.encoders.embed_images(&pixels));
            Progress::add_to(&self.progress.model_us, started.elapsed().as_micros() as u64);
            metrics::global().model_batch_seconds.observe(&[], started.elapsed().as_secs_f64());
            idle_since = Some(Instant::now());
            match embedded {
                Ok(units) => {
                    let sets = self.prompt_sets.current();
                    for (unit, reply) in units.iter().zip(replies) {
                        // Nobody to tell: the caller has left meanwhile.
                        let _ = reply.send(Ok(with_statistics(unit, &sets)));
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    for reply in replies {
                        let _ = reply.send(Err(IngestError::Model(text.clone())));
                    }
                }
            }
        }
    }
}

/// Statistics are taken from the embedding as it is stored, so that ingestion, reindexing and
/// search agree.
fn with_statistics(unit: &[f32], sets: &[Arc<EmbeddedPromptSet>]) -> EmbeddedImage {
    let embedding = Embedding::from_unit_vector(unit);
    let statistics = sets
        .iter()
        .filter_map(|set| Some((set.statistics_key.clone(), set.statistics(&embedding)?)))
        .collect();
    EmbeddedImage { embedding, statistics }
}
