//! Embeds images in batches: while one batch is computed, the next is collected.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;
use tracing::trace_span;

use super::error::IngestError;
use super::options::IngestOptions;
use super::progress::Progress;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::clip::{Encoders, Pixels};
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet};
use crate::record::Embedding;
use crate::telemetry::metrics;

/// The embedding of an image and its statistics.
#[derive(Debug)]
pub struct EmbeddedImage {
    /// The embedding with the precision in which it is stored.
    pub embedding: Embedding,
    /// Statistics of its scores, by prompt set.
    pub statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
}

type ReplySender = oneshot::Sender<Result<EmbeddedImage, IngestError>>;
type EmbedBatch = Vec<(Pixels, ReplySender)>;

/// Queues images for the image encoder. Clones share one queue.
#[derive(Clone)]
pub struct Embedder {
    queue: mpsc::Sender<(Pixels, ReplySender)>,
}

impl Embedder {
    /// Starts the task that collects batches and the threads that compute them; they end when the last
    /// clone is dropped.
    pub fn start(
        encoders: Arc<dyn Encoders>,
        prompt_sets: ActivePromptSets,
        options: &IngestOptions,
        progress: Arc<Progress>,
    ) -> Self {
        // Queue at most one batch: pixels are the largest data in the pipeline.
        let (queue, incoming) = mpsc::channel(options.batch_images);
        // Collect one batch while another one is computed.
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

    /// Embeds one image, in a batch with others that are queued.
    pub async fn embed(&self, pixels: Pixels) -> Result<EmbeddedImage, IngestError> {
        let encoder_ended = || IngestError::Internal("embedding".into());
        let (reply, embedded) = oneshot::channel();
        self.queue.send((pixels, reply)).await.map_err(|_| encoder_ended())?;
        embedded.await.map_err(|_| encoder_ended())?
    }
}

/// Forwards batches when they are full, or `wait` after their first image.
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

/// Computes batches; one instance is shared by all computing threads.
struct BatchEncoder {
    batches: Mutex<mpsc::Receiver<EmbedBatch>>,
    encoders: Arc<dyn Encoders>,
    prompt_sets: ActivePromptSets,
    progress: Arc<Progress>,
}

impl BatchEncoder {
    /// Computes batches until the queue is closed.
    fn run(&self) {
        let mut idle_since = None;
        loop {
            let Some(batch) = self.batches.blocking_lock().blocking_recv() else { return };
            let started = Instant::now();
            // Waiting for the first batch does not show how busy the pipeline is.
            let waited = idle_since.map_or(Duration::ZERO, |since| started - since);
            Progress::add_to_counter(&self.progress.model_wait_us, waited.as_micros() as u64);
            metrics::global().model_wait_seconds.observe_seconds(&[], waited.as_secs_f64());
            // Skip images whose callers were cancelled.
            let (pixels, replies): (Vec<Pixels>, Vec<ReplySender>) =
                batch.into_iter().filter(|(_, reply)| !reply.is_closed()).unzip();
            if pixels.is_empty() {
                continue;
            }
            let embedded = trace_span!("model").in_scope(|| self.encoders.embed_images(&pixels));
            Progress::add_to_counter(
                &self.progress.model_busy_us,
                started.elapsed().as_micros() as u64,
            );
            metrics::global()
                .model_batch_seconds
                .observe_seconds(&[], started.elapsed().as_secs_f64());
            idle_since = Some(Instant::now());
            match embedded {
                Ok(units) => {
                    let sets = self.prompt_sets.current();
                    for (unit, reply) in units.iter().zip(replies) {
                        // Fails if the caller was cancelled in the meantime.
                        let _ = reply.send(Ok(build_embedded_image(unit, &sets)));
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

/// Computes statistics from the embedding as it is stored, so that ingestion, reindexing and search
/// agree.
fn build_embedded_image(unit: &[f32], sets: &[Arc<EmbeddedPromptSet>]) -> EmbeddedImage {
    let embedding = Embedding::from_unit_vector(unit);
    let statistics = sets
        .iter()
        .filter_map(|set| Some((set.statistics_key.clone(), set.compute_statistics(&embedding)?)))
        .collect();
    EmbeddedImage { embedding, statistics }
}
