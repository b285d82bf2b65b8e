//! One message: decode, fetch, decode the image, embed; or put it aside.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, SubsecRound, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{info, trace_span, warn};

use super::dead_letter::{DeadLetterReason, DeadLetterWriter};
use super::embed::Embedder;
use super::fetch::{FetchError, Fetcher, shorten_uri};
use super::progress::Progress;
use super::source::decoder::format::Decoder;
use super::tally::{Tally, TallyRecorder};
use super::{IngestError, decode};
use crate::clip::Encoders;
use crate::record::{
    AcceptedEvent, Attributes, ImageChange, ImageContent, ImageRow, KafkaMessage, StoredImage,
    TopicPartition, to_hex,
};
use crate::retry::{Backoff, Classify, Disposition, retry};
use crate::telemetry::event;

/// Records of one message that are worked on at one time.
const MAX_CONCURRENT_RECORDS: usize = 16;

/// What became of one message.
#[derive(Debug)]
pub struct ProcessedMessage {
    /// Where it came from.
    pub partition: TopicPartition,
    /// Its offset.
    pub offset: i64,
    /// When its oldest event happened, where known.
    pub event_time: Option<DateTime<Utc>>,
    /// What became of its events, and how long that took.
    pub tally: Tally,
    /// The trace that it belongs to.
    pub trace_id: Option<String>,
    /// Its rows, none where it was put aside or its image was gone; or why there is no outcome.
    pub rows: Result<Vec<ImageRow>, Incomplete>,
}

/// A message that is neither stored nor put aside: its offset must not be passed.
#[derive(Debug)]
pub enum Incomplete {
    /// The worker is leaving.
    Abandoned,
    /// The worker cannot go on.
    Fatal(Box<IngestError>),
}

/// Why one event of a message yields no row.
enum EventFailure {
    DeadLetter(DeadLetterReason),
    NotFound,
    Incomplete(Incomplete),
}

/// Does the work of one message at a time; shared by all that are in flight.
pub struct Processor {
    pub decoder: Decoder,
    pub dead_letter_writer: DeadLetterWriter,
    pub fetcher: Fetcher,
    pub decode_options: decode::DecodeOptions,
    pub decode_permits: Arc<Semaphore>,
    /// Memory for decoding, a permit a MiB.
    pub decode_memory_budget: Arc<Semaphore>,
    pub encoders: Arc<dyn Encoders>,
    pub embedder: Embedder,
    pub progress: Arc<Progress>,
    pub cancel: CancellationToken,
}

/// The memory that decoding may take at one time.
pub fn new_decode_memory_budget(options: &decode::DecodeOptions) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(options.budget_mib as usize))
}

/// As many turns as images are decoded at one time. More than cores: the next image is ready to go on
/// when one is done (`benches/pipeline`: a fifth more images a second).
pub fn new_decode_permits(threads: usize) -> Arc<Semaphore> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new(if threads == 0 { 2 * cores } else { threads }))
}

impl Processor {
    /// Settles `message`: all of its events or none.
    pub async fn process(&self, message: KafkaMessage) -> ProcessedMessage {
        let events = self.decoder.decode(&message, Utc::now());
        let event_time = events.iter().flatten().filter_map(|e| e.event_time).min();
        let recorder = TallyRecorder::default();
        let rows = match events {
            Ok(events) => self.build_rows(&message, events, &recorder).await,
            Err(rejected) => {
                let reason = DeadLetterReason {
                    stage: "decode_event",
                    code: rejected.code(),
                    message: rejected.to_string(),
                    record: rejected.record_index(),
                };
                self.dead_letter(&message, reason, &recorder).await
            }
        };
        let tally = recorder.tally();
        let trace_id = message.trace_id().map(str::to_owned);
        let KafkaMessage { partition, offset, .. } = message;
        ProcessedMessage { partition, offset, event_time, tally, trace_id, rows }
    }

    async fn build_rows(
        &self,
        message: &KafkaMessage,
        events: Vec<AcceptedEvent>,
        recorder: &TallyRecorder,
    ) -> Result<Vec<ImageRow>, Incomplete> {
        let several = events.len() > 1;
        let rows = stream::iter(events.into_iter().enumerate()).map(|(index, event)| async move {
            let uri = match &event.change {
                ImageChange::Upsert { content, .. } | ImageChange::Recheck { content } => loggable_uri(content),
                ImageChange::Delete => String::new(),
            };
            let image_id = event.image_id.clone();
            match self.build_row(event, recorder).await {
                Err(EventFailure::NotFound) => {
                    Progress::add_to(&self.progress.not_found, 1);
                    recorder.record_not_found();
                    info!(
                        event = event::IMAGE_NOT_FOUND, partition = %message.partition, offset = message.offset,
                        %image_id, uri = uri, trace_id = message.trace_id(), "the image was gone before it could be fetched"
                    );
                    Ok(None)
                }
                Err(EventFailure::DeadLetter(reason)) if several => {
                    Err(EventFailure::DeadLetter(DeadLetterReason { record: Some(index), ..reason }))
                }
                other => other.map(Some),
            }
        });
        let rows: Result<Vec<_>, _> = rows.buffered(MAX_CONCURRENT_RECORDS).try_collect().await;
        let rows: Vec<ImageRow> = match rows {
            Ok(rows) => rows.into_iter().flatten().collect(),
            Err(EventFailure::DeadLetter(reason)) => {
                return self.dead_letter(message, reason, recorder).await;
            }
            Err(EventFailure::Incomplete(unsettled)) => return Err(unsettled),
            Err(EventFailure::NotFound) => Vec::new(), // settled above
        };
        for row in &rows {
            let counter = if row.image.is_some() {
                recorder.record_embedded();
                &self.progress.embedded
            } else {
                recorder.record_deleted();
                &self.progress.deleted
            };
            Progress::add_to(counter, 1);
        }
        Ok(rows)
    }

    async fn build_row(
        &self,
        event: AcceptedEvent,
        recorder: &TallyRecorder,
    ) -> Result<ImageRow, EventFailure> {
        let image = match event.change {
            ImageChange::Delete => None,
            ImageChange::Upsert { content, attributes } => {
                Some(self.build_image(&content, attributes, recorder).await?)
            }
            ImageChange::Recheck { content } => {
                match self.build_image(&content, Attributes::new(), recorder).await {
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

    async fn build_image(
        &self,
        content: &ImageContent,
        attributes: Attributes,
        recorder: &TallyRecorder,
    ) -> Result<StoredImage, EventFailure> {
        let started = Instant::now();
        let fetched = self.fetcher.fetch(content, &self.cancel).await;
        let fetched = fetched.map_err(|error| self.classify_fetch_error(&error))?;
        let size = fetched.bytes.len() as u64;
        recorder.record_fetch(started, size);
        let started = Instant::now();
        let (bytes, options) = (&fetched.bytes, &self.decode_options);
        let memory_bytes =
            catch_unwind(AssertUnwindSafe(|| decode::estimate_memory_bytes(bytes, options)))
                .map_err(|_| {
                    undecodable_image("decoder_panicked", "its header cannot be read".into())
                })?
                .map_err(|e| undecodable_image(e.code(), e.to_string()))?;
        let mib = u32::try_from(memory_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let memory_permit = self.decode_memory_budget.clone();
        let memory_permit =
            memory_permit.acquire_many_owned(mib.clamp(1, self.decode_options.budget_mib)).await;
        let decode_permit = self.decode_permits.clone().acquire_owned().await;
        let (options, towers) = (self.decode_options.clone(), self.encoders.clone());
        let decoded = tokio::task::spawn_blocking(move || {
            let _held = (memory_permit, decode_permit);
            // Whole, with its share of the download budget: the bytes are needed here and no longer.
            let fetched = fetched;
            let _span = trace_span!("decode").entered();
            let image = decode::decode(&fetched.bytes, &options)
                .map_err(|e| undecodable_image(e.code(), e.to_string()))?;
            let pixels = towers
                .preprocess_image(&image)
                .map_err(|e| undecodable_image("preprocess_failed", e.to_string()))?;
            let hash = to_hex(&Sha256::digest(&fetched.bytes));
            Ok((pixels, image.width(), image.height(), hash))
        });
        let (pixels, width, height, content_hash) = decoded.await.map_err(|error| {
            // Started again, the worker would meet the same picture.
            if error.is_panic() {
                undecodable_image("decoder_panicked", format!("the decoder failed: {error}"))
            } else {
                fatal_failure(IngestError::Internal(error.to_string()))
            }
        })??;
        recorder.record_decode(started);
        let started = Instant::now();
        let embedded = self.embedder.embed(pixels).await.map_err(fatal_failure)?;
        recorder.record_embed(started);
        Ok(StoredImage {
            uri: match content {
                // What holds the picture itself is no place to fetch it from.
                ImageContent::Uri { uri, .. } => Some(uri.clone()).filter(|uri| !is_data_url(uri)),
                ImageContent::Inline(_) => None,
            },
            content_hash,
            bytes: size,
            width,
            height,
            attributes,
            embedding: embedded.embedding,
            statistics: embedded.statistics,
        })
    }

    fn classify_fetch_error(&self, error: &FetchError) -> EventFailure {
        match error {
            FetchError::NotFound { .. } => EventFailure::NotFound,
            // The last attempt was cut short: whether it would have worked is not known.
            error if error.disposition() == Disposition::Retry && self.cancel.is_cancelled() => {
                EventFailure::Incomplete(Incomplete::Abandoned)
            }
            error => EventFailure::DeadLetter(DeadLetterReason {
                stage: "fetch",
                code: error.code(),
                message: error.to_string(),
                record: None,
            }),
        }
    }

    /// Puts a message aside; only when that is durable is the message settled.
    async fn dead_letter(
        &self,
        message: &KafkaMessage,
        reason: DeadLetterReason,
        recorder: &TallyRecorder,
    ) -> Result<Vec<ImageRow>, Incomplete> {
        let on_retry = |attempt: u32, error: &super::dead_letter::DeadLetterWriteError| {
            info!(event = event::RETRY, stage = "dead_letter", attempt, %error, "trying again");
        };
        let put = retry(Backoff::with_max_attempts(10), &self.cancel, on_retry, || async {
            self.dead_letter_writer.write(message, &reason).await
        });
        if let Err(error) = put.await {
            let cut_short = error.disposition() == Disposition::Retry && self.cancel.is_cancelled();
            return Err(if cut_short {
                Incomplete::Abandoned
            } else {
                Incomplete::Fatal(Box::new(error.into()))
            });
        }
        Progress::add_to(&self.progress.dead_lettered, 1);
        recorder.record_dead_lettered(reason.stage, reason.code);
        warn!(
            event = event::DEAD_LETTER, partition = %message.partition, offset = message.offset,
            stage = reason.stage, code = reason.code, reason = %reason.message,
            trace_id = message.trace_id(), "a message can never be used and was put aside"
        );
        Ok(Vec::new())
    }
}

fn undecodable_image(code: &'static str, message: String) -> EventFailure {
    EventFailure::DeadLetter(DeadLetterReason {
        stage: "decode_image",
        code,
        message,
        record: None,
    })
}

fn is_data_url(uri: &str) -> bool {
    uri.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// What a log line says of where an image comes from.
fn loggable_uri(content: &ImageContent) -> String {
    match content {
        ImageContent::Uri { uri, .. } => shorten_uri(uri),
        ImageContent::Inline(_) => String::new(),
    }
}

fn fatal_failure(error: IngestError) -> EventFailure {
    EventFailure::Incomplete(Incomplete::Fatal(Box::new(error)))
}
