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
use crate::clip::{ClipError, Encoders, Pixels, run_self_test};
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet, compute_all_statistics};
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

/// Why an image has no embedding.
#[derive(Debug)]
pub enum EmbedError {
    /// The embedding of this image, and of this one only, has values that are no finite numbers.
    NotFinite(String),
    /// No image can be embedded.
    Fatal(Box<IngestError>),
}

impl EmbedError {
    fn fatal(error: IngestError) -> Self {
        Self::Fatal(Box::new(error))
    }
}

type ReplySender = oneshot::Sender<Result<EmbeddedImage, EmbedError>>;
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
    pub async fn embed(&self, pixels: Pixels) -> Result<EmbeddedImage, EmbedError> {
        let encoder_ended = || EmbedError::fatal(IngestError::Internal("embedding".into()));
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
            let embedded = trace_span!("model").in_scope(|| self.embed_batch(&pixels));
            Progress::add_to_counter(
                &self.progress.model_busy_us,
                started.elapsed().as_micros() as u64,
            );
            metrics::global()
                .model_batch_seconds
                .observe_seconds(&[], started.elapsed().as_secs_f64());
            idle_since = Some(Instant::now());
            let sets = self.prompt_sets.current();
            for (unit, reply) in embedded.into_iter().zip(replies) {
                // Fails if the caller was cancelled in the meantime.
                let _ = reply.send(unit.and_then(|unit| build_embedded_image(&unit, &sets)));
            }
        }
    }

    /// Embeds a batch. If one of its embeddings is not finite, embeds the images one by one, and tests
    /// the model: if the test passes, the images whose embeddings are not finite are to blame.
    fn embed_batch(&self, pixels: &[Pixels]) -> Vec<Result<Vec<f32>, EmbedError>> {
        let fatal = |error: &ClipError| EmbedError::fatal(IngestError::Model(error.to_string()));
        match self.encoders.embed_images(pixels) {
            Ok(units) => return units.into_iter().map(Ok).collect(),
            Err(ClipError::NotFinite { .. }) => {}
            Err(error) => return pixels.iter().map(|_| Err(fatal(&error))).collect(),
        }
        if let Err(error) = run_self_test(&*self.encoders) {
            return pixels.iter().map(|_| Err(fatal(&error))).collect();
        }
        let embed_alone =
            |pixels: &Pixels| match self.encoders.embed_images(std::slice::from_ref(pixels)) {
                Ok(units) => units
                    .into_iter()
                    .next()
                    .ok_or_else(|| EmbedError::fatal(IngestError::Internal("embedding".into()))),
                Err(error @ ClipError::NotFinite { .. }) => {
                    Err(EmbedError::NotFinite(error.to_string()))
                }
                Err(error) => Err(fatal(&error)),
            };
        pixels.iter().map(embed_alone).collect()
    }
}

/// Computes statistics from the embedding as it is stored, so that ingestion, reindexing and search
/// agree.
pub fn build_embedded_image(
    unit: &[f32],
    sets: &[Arc<EmbeddedPromptSet>],
) -> Result<EmbeddedImage, EmbedError> {
    let embedding = Embedding::from_unit_vector(unit);
    let statistics = compute_all_statistics(sets, &embedding).map_err(|key| {
        let reason = format!("statistics of an image by {key} are not finite");
        EmbedError::fatal(IngestError::Model(reason))
    })?;
    Ok(EmbeddedImage { embedding, statistics })
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::clip::ModelCard;

    /// Embeddings of pictures whose first byte is `overflows_at` are not finite; of all if it is `None`.
    struct OverflowingEncoders {
        card: ModelCard,
        overflows_at: Option<u8>,
    }

    impl Encoders for OverflowingEncoders {
        fn card(&self) -> &ModelCard {
            &self.card
        }

        fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
            Ok(Pixels(image.as_raw().clone()))
        }

        fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
            let embed = |pixels: &Pixels| {
                let first = pixels.0.first().copied().unwrap_or_default();
                if self.overflows_at.is_none_or(|byte| byte == first) {
                    return vec![f32::NAN; 2];
                }
                // Pictures of the self-test begin with different bytes.
                let angle = f32::from(first) / 100.0;
                vec![angle.cos(), angle.sin()]
            };
            ClipError::ensure_finite("picture", batch.iter().map(embed).collect())
        }

        fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
            let embed = |text: &&str| {
                let angle = text.len() as f32 / 100.0;
                vec![angle.cos(), angle.sin()]
            };
            Ok(texts.iter().map(embed).collect())
        }
    }

    fn embed(overflows_at: Option<u8>) -> Vec<Result<Vec<f32>, EmbedError>> {
        let card = ModelCard::without_checkpoint("overflowing", 2);
        let (_sender, batches) = mpsc::channel(1);
        let encoder = BatchEncoder {
            batches: Mutex::new(batches),
            encoders: Arc::new(OverflowingEncoders { card, overflows_at }),
            prompt_sets: ActivePromptSets::new(Vec::new()),
            progress: Arc::default(),
        };
        encoder.embed_batch(&[1, 2, 3].map(|byte| Pixels(vec![byte])))
    }

    #[test]
    fn an_embedding_that_is_not_finite_is_the_fault_of_its_image_or_of_the_model() {
        let of_one = embed(Some(2));
        assert!(matches!(of_one[1], Err(EmbedError::NotFinite(_))), "{of_one:?}");
        assert!(of_one[0].is_ok() && of_one[2].is_ok(), "{of_one:?}");
        let of_all = embed(None);
        let is_fatal = |result: &Result<_, _>| matches!(result, Err(EmbedError::Fatal(error)) if matches!(**error, IngestError::Model(_)));
        assert!(of_all.len() == 3 && of_all.iter().all(is_fatal), "{of_all:?}");
        assert!(embed(Some(9)).iter().all(Result::is_ok));
    }
}
