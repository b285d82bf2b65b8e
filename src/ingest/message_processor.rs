//! Takes one message through the stages: decode its events, fetch, decode and embed their images. A
//! message that can never be processed is dead-lettered.

use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, SubsecRound, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::{info, trace_span, warn};

use super::dead_letter::{DeadLetterReason, DeadLetterWriteError, DeadLetterWriter};
use super::decode::{self, DecodeOptions, DecodePermits, DecodedImage, is_data_url};
use super::embed::{EmbedError, EmbeddedImage, Embedder, build_embedded_image};
use super::error::IngestError;
use super::fetch::{FetchError, Fetcher, shorten_uri};
use super::metadata::metadata_attributes;
use super::progress::Progress;
use super::rejection::Rejection;
use super::source::Decoder;
use super::tally::{Tally, TallyRecorder};
use crate::clip::Encoders;
use crate::prompts::ActivePromptSets;
use crate::record::arrays::JsonEmbedding;
use crate::record::{
    AcceptedEvent, Attributes, Decoding, ImageChange, ImageRow, ImageSource, KafkaMessage,
    StoredImage, TopicPartition, to_hex,
};
use crate::retry::{Backoff, Classify, Disposition, retry};
use crate::telemetry::event;

/// Maximum number of events of one message that are processed concurrently.
const MAX_CONCURRENT_EVENTS: usize = 16;

/// The result of processing one message.
#[derive(Debug)]
pub struct ProcessedMessage {
    /// Partition of the message.
    pub partition: TopicPartition,
    /// Offset of the message.
    pub offset: i64,
    /// [`KafkaMessage::fingerprint`] of the message.
    pub fingerprint: i64,
    /// Time of its oldest event; `None` if no event states one.
    pub oldest_event_time: Option<DateTime<Utc>>,
    /// Counts of its events, and the time spent in each stage.
    pub tally: Tally,
    /// The trace that the message belongs to.
    pub trace_id: Option<String>,
    /// The rows to store, none if the message was dead-lettered or its image was not found; or why
    /// processing is incomplete.
    pub rows: Result<Vec<ImageRow>, Incomplete>,
}

/// Why a message is neither processed nor dead-lettered. No commit may cover its offset.
#[derive(Debug)]
pub enum Incomplete {
    /// The worker is shutting down.
    Abandoned,
    /// The worker cannot continue.
    Fatal(Box<IngestError>),
}

/// Why one event of a message yields no row.
enum EventFailure {
    DeadLetter(DeadLetterReason),
    NotFound,
    Incomplete(Incomplete),
}

/// Processes messages; shared by all that are in flight.
pub struct MessageProcessor {
    pub decoder: Decoder,
    pub dead_letter_writer: DeadLetterWriter,
    pub fetcher: Fetcher,
    pub decode_options: DecodeOptions,
    pub decode_permits: DecodePermits,
    pub encoders: Arc<dyn Encoders>,
    pub embedder: Embedder,
    /// Sets whose statistics new rows carry.
    pub prompt_sets: ActivePromptSets,
    pub progress: Arc<Progress>,
    /// Cancelled when the worker gives up messages in flight.
    pub processing_cancel: CancellationToken,
}

/// Creates the permits for decoding; 0 `threads`: two per core. Decoding more images than there are cores keeps the
/// cores busy between images (`benches/pipeline`: a fifth more images per second).
pub fn new_decode_permits(options: &DecodeOptions, threads: usize) -> DecodePermits {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    DecodePermits::new(options, if threads == 0 { 2 * cores } else { threads })
}

impl MessageProcessor {
    /// Processes `message`: either all of its events yield their rows, or none does.
    pub async fn process(&self, message: KafkaMessage) -> ProcessedMessage {
        let events = self.decoder.decode(&message, Utc::now());
        let event_time = events.iter().flatten().filter_map(|e| e.event_time).min();
        let recorder = TallyRecorder::default();
        let rows = match events {
            Ok(events) => self.process_events(&message, events, &recorder).await,
            Err(rejected) => {
                let reason = DeadLetterReason {
                    stage: "decode_event",
                    code: rejected.code(),
                    explanation: rejected.to_string(),
                    record_index: rejected.record_index(),
                };
                self.write_dead_letter(&message, reason, &recorder).await
            }
        };
        let tally = recorder.tally();
        let trace_id = message.trace_id().map(str::to_owned);
        ProcessedMessage {
            fingerprint: message.fingerprint(),
            offset: message.offset,
            oldest_event_time: event_time,
            tally,
            trace_id,
            rows,
            partition: message.partition,
        }
    }

    /// Processes the events of a message; dead-letters the whole message if one of them fails for good.
    async fn process_events(
        &self,
        message: &KafkaMessage,
        events: Vec<AcceptedEvent>,
        recorder: &TallyRecorder,
    ) -> Result<Vec<ImageRow>, Incomplete> {
        let has_several_events = events.len() > 1;
        let rows = stream::iter(events.into_iter().enumerate()).map(|(index, event)| async move {
            let uri = match &event.change {
                ImageChange::Upsert { content, .. } | ImageChange::Recheck { content } => loggable_uri(content),
                ImageChange::Embedded { uri, .. } => uri.as_deref().map(shorten_uri).unwrap_or_default(),
                ImageChange::Delete => String::new(),
            };
            let image_id = event.image_id.clone();
            match self.process_event(event, recorder).await {
                Err(EventFailure::NotFound) => {
                    Progress::add_to_counter(&self.progress.not_found_images, 1);
                    recorder.count_not_found_image();
                    info!(
                        event = event::IMAGE_NOT_FOUND, partition = %message.partition, offset = message.offset,
                        %image_id, uri = uri, trace_id = message.trace_id(), "the image was not found; no row is stored"
                    );
                    let explanation = "there is nothing at this address, or no longer";
                    let rejection = Rejection { message, code: "image_not_found", explanation };
                    self.progress.notify_rejection(rejection);
                    Ok(None)
                }
                Err(EventFailure::DeadLetter(reason)) if has_several_events => {
                    Err(EventFailure::DeadLetter(DeadLetterReason { record_index: Some(index), ..reason }))
                }
                other => other.map(Some),
            }
        });
        let rows: Result<Vec<_>, _> = rows.buffered(MAX_CONCURRENT_EVENTS).try_collect().await;
        let rows: Vec<ImageRow> = match rows {
            Ok(rows) => rows.into_iter().flatten().collect(),
            Err(EventFailure::DeadLetter(reason)) => {
                return self.write_dead_letter(message, reason, recorder).await;
            }
            Err(EventFailure::Incomplete(incomplete)) => return Err(incomplete),
            Err(EventFailure::NotFound) => Vec::new(), // handled above
        };
        for row in &rows {
            let counter = if row.image.is_some() {
                recorder.count_embedded_image();
                &self.progress.embedded_images
            } else {
                recorder.count_stored_delete();
                &self.progress.stored_deletes
            };
            Progress::add_to_counter(counter, 1);
        }
        Ok(rows)
    }

    async fn process_event(
        &self,
        event: AcceptedEvent,
        recorder: &TallyRecorder,
    ) -> Result<ImageRow, EventFailure> {
        let image = match event.change {
            ImageChange::Delete => None,
            ImageChange::Upsert { content, attributes } => {
                Some(self.fetch_and_embed_image(&content, attributes, recorder).await?)
            }
            ImageChange::Embedded { embedding, model, uri, attributes } => {
                Some(self.measure_foreign_embedding(embedding, &model, uri, attributes).await?)
            }
            ImageChange::Recheck { content } => {
                match self.fetch_and_embed_image(&content, Attributes::new(), recorder).await {
                    Ok(image) => Some(image),
                    Err(EventFailure::NotFound) => None,
                    Err(failure) => return Err(failure),
                }
            }
        };
        Ok(ImageRow {
            image_id: event.image_id,
            sequence: event.sequence,
            event_time: event.event_time.map(|t| t.trunc_subsecs(6)),
            embedded_at: Utc::now().trunc_subsecs(6),
            image,
        })
    }

    async fn fetch_and_embed_image(
        &self,
        content: &ImageSource,
        attributes: Attributes,
        recorder: &TallyRecorder,
    ) -> Result<StoredImage, EventFailure> {
        let started = Instant::now();
        let fetched = self.fetcher.fetch(content, &self.processing_cancel).await;
        let fetched = fetched.map_err(|error| self.classify_fetch_error(&error))?;
        let size = fetched.bytes.len() as u64;
        recorder.record_fetch(started, size);
        let started = Instant::now();
        let (bytes, options) = (&fetched.bytes, &self.decode_options);
        let permit = self.decode_permits.acquire(bytes, options).await;
        let permit = permit.map_err(|e| undecodable_image_failure(e.code(), e.to_string()))?;
        let (options, encoders) = (self.decode_options.clone(), self.encoders.clone());
        let declared = self.decoder.attribute_types().clone();
        let decoded = permit.run(move || {
            // Move the whole value in: dropping it here releases its share of the download budget.
            let fetched = fetched;
            let _span = trace_span!("decode").entered();
            let DecodedImage { image, decoded_share } =
                decode::decode_with_report(&fetched.bytes, &options)
                    .map_err(|e| undecodable_image_failure(e.code(), e.to_string()))?;
            let pixels = encoders
                .preprocess_image(&image)
                .map_err(|e| undecodable_image_failure("preprocess_failed", e.to_string()))?;
            let hash = to_hex(&Sha256::digest(&fetched.bytes));
            let (fields, charset) = (&options.metadata, options.metadata_charset);
            let max_bytes = options.metadata_max_bytes;
            let of_file =
                metadata_attributes(&fetched.bytes, fields, &declared, charset, max_bytes);
            let decoding = Decoding { rule: options.rule().into(), share: decoded_share as f32 };
            Ok((pixels, image.width(), image.height(), hash, of_file, decoding))
        });
        let decoded = decoded.await;
        let decoded = decoded.map_err(|e| undecodable_image_failure(e.code(), e.to_string()))?;
        let (pixels, width, height, content_hash, mut attributes_of_file, decoding) = decoded
            .map_err(|error| {
                // Not fatal: after a restart, the worker would fail at the same image again.
                if error.is_panic() {
                    undecodable_image_failure(
                        "decoder_panicked",
                        format!("the decoder failed: {error}"),
                    )
                } else {
                    fatal_failure(IngestError::Internal(error.to_string()))
                }
            })??;
        recorder.record_decode_duration(started);
        let started = Instant::now();
        let embedded = self.embedder.embed(pixels).await.map_err(embed_failure)?;
        recorder.record_embed_duration(started);
        // The event's own attributes replace those of the file.
        attributes_of_file.extend(attributes);
        Ok(StoredImage {
            uri: match content {
                // A data URL is the image itself, not an address to store.
                ImageSource::Uri { uri, .. } => Some(uri.clone()).filter(|uri| !is_data_url(uri)),
                ImageSource::Inline(_) => None,
            },
            content_hash,
            byte_size: size,
            width,
            height,
            attributes: attributes_of_file,
            embedding: embedded.embedding,
            statistics: embedded.statistics,
            decoding: Some(decoding),
        })
    }

    /// Checks an embedding that came in an event, and computes its statistics.
    async fn measure_foreign_embedding(
        &self,
        embedding: JsonEmbedding,
        model: &str,
        uri: Option<String>,
        attributes: Attributes,
    ) -> Result<StoredImage, EventFailure> {
        let card = self.encoders.card();
        if model != card.fingerprint {
            return Err(unusable_embedding_failure(
                "embedding_of_other_model",
                format!(
                    "model: the embedding is by {model:.100?}, but this worker's model is {} ({})",
                    card.fingerprint, card.name
                ),
            ));
        }
        let (dimension, sets) = (card.dimension, self.prompt_sets.current());
        let measured = tokio::task::spawn_blocking(move || {
            let unit = embedding.to_unit_vector(dimension).map_err(|reason| {
                unusable_embedding_failure("embedding_invalid", format!("embedding: {reason}"))
            })?;
            build_embedded_image(&unit, &sets).map_err(embed_failure)
        });
        let measured =
            measured.await.map_err(|e| fatal_failure(IngestError::Internal(e.to_string())))??;
        let EmbeddedImage { embedding, statistics } = measured;
        // A data URL is the image itself, not an address to store.
        let uri = uri.filter(|uri| !is_data_url(uri));
        Ok(StoredImage::embedded_elsewhere(uri, attributes, embedding, statistics))
    }

    fn classify_fetch_error(&self, error: &FetchError) -> EventFailure {
        match error {
            FetchError::NotFound { .. } => EventFailure::NotFound,
            // Cancelled between attempts: a later one might have succeeded.
            error
                if error.disposition() == Disposition::Retry
                    && self.processing_cancel.is_cancelled() =>
            {
                EventFailure::Incomplete(Incomplete::Abandoned)
            }
            error => EventFailure::DeadLetter(DeadLetterReason {
                stage: "fetch",
                code: error.code(),
                explanation: error.to_string(),
                record_index: None,
            }),
        }
    }

    /// Dead-letters a message. The message counts as processed only when the dead letter is durable.
    async fn write_dead_letter(
        &self,
        message: &KafkaMessage,
        reason: DeadLetterReason,
        recorder: &TallyRecorder,
    ) -> Result<Vec<ImageRow>, Incomplete> {
        let on_retry = |attempt: u32, error: &DeadLetterWriteError| {
            info!(event = event::RETRY, stage = "dead_letter", attempt, %error, "the dead letter was not written; retrying");
        };
        let written =
            retry(Backoff::with_max_attempts(10), &self.processing_cancel, on_retry, || async {
                self.dead_letter_writer.write(message, &reason).await
            });
        let omitted = match written.await {
            Ok(omitted) => omitted,
            Err(error) => {
                let cancelled = error.disposition() == Disposition::Retry
                    && self.processing_cancel.is_cancelled();
                return Err(if cancelled {
                    Incomplete::Abandoned
                } else {
                    Incomplete::Fatal(Box::new(error.into()))
                });
            }
        };
        Progress::add_to_counter(&self.progress.dead_lettered_messages, 1);
        let (code, explanation) = (reason.code, reason.explanation.as_str());
        self.progress.notify_rejection(Rejection { message, code, explanation });
        recorder.count_dead_lettered_message(reason.stage, reason.code);
        warn!(
            event = event::DEAD_LETTER, partition = %message.partition, offset = message.offset,
            stage = reason.stage, code = reason.code, reason = %reason.explanation,
            omitted_bytes = omitted.map(|value| value.bytes),
            trace_id = message.trace_id(), "a message can never be processed and was dead-lettered"
        );
        Ok(Vec::new())
    }
}

fn undecodable_image_failure(code: &'static str, message: String) -> EventFailure {
    EventFailure::DeadLetter(DeadLetterReason {
        stage: "decode_image",
        code,
        explanation: message,
        record_index: None,
    })
}

fn embed_failure(error: EmbedError) -> EventFailure {
    match error {
        EmbedError::Fatal(error) => fatal_failure(*error),
        EmbedError::NotFinite(explanation) => {
            unusable_embedding_failure("embedding_not_finite", explanation)
        }
    }
}

fn unusable_embedding_failure(code: &'static str, explanation: String) -> EventFailure {
    EventFailure::DeadLetter(DeadLetterReason {
        stage: "embed_image",
        code,
        explanation,
        record_index: None,
    })
}

/// Returns the address of an image for log lines; empty if the message contains the image.
fn loggable_uri(content: &ImageSource) -> String {
    match content {
        ImageSource::Uri { uri, .. } => shorten_uri(uri),
        ImageSource::Inline(_) => String::new(),
    }
}

fn fatal_failure(error: IngestError) -> EventFailure {
    EventFailure::Incomplete(Incomplete::Fatal(Box::new(error)))
}
