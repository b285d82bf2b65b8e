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

use super::dead_letter::{DeadLetters, Reason};
use super::embed::Embedder;
use super::fetch::{FetchError, Fetcher, shorten};
use super::progress::Progress;
use super::source::decoder::format::Decoder;
use super::tally::{Counting, Tally};
use super::{IngestError, decode};
use crate::clip::Towers;
use crate::record::{Attributes, Change, Content, Event, Image, Message, Partition, Row, hex};
use crate::retry::{Backoff, Decide, Verdict, retry};
use crate::telemetry::event;

/// Records of one message that are worked on at one time.
const RECORDS_AT_ONCE: usize = 16;

/// What became of one message.
#[derive(Debug)]
pub struct Outcome {
    /// Where it came from.
    pub partition: Partition,
    /// Its offset.
    pub offset: i64,
    /// When its oldest event happened, where known.
    pub event_time: Option<DateTime<Utc>>,
    /// What became of its events, and how long that took.
    pub tally: Tally,
    /// The trace that it belongs to.
    pub trace_id: Option<String>,
    /// Its rows, none where it was put aside or its image was gone; or why there is no outcome.
    pub rows: Result<Vec<Row>, Unsettled>,
}

/// A message that is neither stored nor put aside: its offset must not be passed.
#[derive(Debug)]
pub enum Unsettled {
    /// The worker is leaving.
    Abandoned,
    /// The worker cannot go on.
    Fatal(Box<IngestError>),
}

/// Why one event of a message yields no row.
enum Failure {
    DeadLetter(Reason),
    Gone,
    Unsettled(Unsettled),
}

/// Does the work of one message at a time; shared by all that are in flight.
pub struct Processor {
    pub decoder: Decoder,
    pub dead_letters: DeadLetters,
    pub fetcher: Fetcher,
    pub decode: decode::Options,
    pub decode_turns: Arc<Semaphore>,
    /// Memory for decoding, a permit a MiB.
    pub decode_budget: Arc<Semaphore>,
    pub towers: Arc<dyn Towers>,
    pub embedder: Embedder,
    pub progress: Arc<Progress>,
    pub abandon: CancellationToken,
}

/// The memory that decoding may take at one time.
pub fn decode_budget(options: &decode::Options) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(options.budget_mib as usize))
}

/// As many turns as images are decoded at one time. More than cores: the next image is ready to go on
/// when one is done (`benches/pipeline`: a fifth more images a second).
pub fn decode_turns(threads: usize) -> Arc<Semaphore> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new(if threads == 0 { 2 * cores } else { threads }))
}

impl Processor {
    /// Settles `message`: all of its events or none.
    pub async fn process(&self, message: Message) -> Outcome {
        let events = self.decoder.decode(&message, Utc::now());
        let event_time = events.iter().flatten().filter_map(|e| e.event_time).min();
        let counting = Counting::default();
        let rows = match events {
            Ok(events) => self.rows(&message, events, &counting).await,
            Err(rejected) => {
                let reason = Reason {
                    stage: "decode_event",
                    code: rejected.code(),
                    message: rejected.to_string(),
                    record: rejected.record(),
                };
                self.put_aside(&message, reason, &counting).await
            }
        };
        let tally = counting.tally();
        let trace_id = message.trace_id().map(str::to_owned);
        let Message { partition, offset, .. } = message;
        Outcome { partition, offset, event_time, tally, trace_id, rows }
    }

    async fn rows(
        &self,
        message: &Message,
        events: Vec<Event>,
        counting: &Counting,
    ) -> Result<Vec<Row>, Unsettled> {
        let several = events.len() > 1;
        let rows = stream::iter(events.into_iter().enumerate()).map(|(index, event)| async move {
            let found = match &event.change {
                Change::Upsert { content, .. } | Change::Recheck { content } => named(content),
                Change::Delete => String::new(),
            };
            let image_id = event.image_id.clone();
            match self.row(event, counting).await {
                Err(Failure::Gone) => {
                    Progress::add(&self.progress.gone, 1);
                    counting.gone();
                    info!(
                        event = event::GONE, partition = %message.partition, offset = message.offset,
                        %image_id, uri = found, trace_id = message.trace_id(), "the image was gone before it could be fetched"
                    );
                    Ok(None)
                }
                Err(Failure::DeadLetter(reason)) if several => {
                    Err(Failure::DeadLetter(Reason { record: Some(index), ..reason }))
                }
                other => other.map(Some),
            }
        });
        let rows: Result<Vec<_>, _> = rows.buffered(RECORDS_AT_ONCE).try_collect().await;
        let rows: Vec<Row> = match rows {
            Ok(rows) => rows.into_iter().flatten().collect(),
            Err(Failure::DeadLetter(reason)) => {
                return self.put_aside(message, reason, counting).await;
            }
            Err(Failure::Unsettled(unsettled)) => return Err(unsettled),
            Err(Failure::Gone) => Vec::new(), // settled above
        };
        for row in &rows {
            let counter = if row.image.is_some() {
                counting.embedded();
                &self.progress.embedded
            } else {
                counting.deleted();
                &self.progress.deleted
            };
            Progress::add(counter, 1);
        }
        Ok(rows)
    }

    async fn row(&self, event: Event, counting: &Counting) -> Result<Row, Failure> {
        let image = match event.change {
            Change::Delete => None,
            Change::Upsert { content, attributes } => {
                Some(self.image(&content, attributes, counting).await?)
            }
            Change::Recheck { content } => {
                match self.image(&content, Attributes::new(), counting).await {
                    Ok(image) => Some(image),
                    Err(Failure::Gone) => None,
                    Err(failure) => return Err(failure),
                }
            }
        };
        Ok(Row {
            image_id: event.image_id,
            sequence: event.sequence,
            event_time: event.event_time.map(|t| t.trunc_subsecs(6)),
            embedded_at: Utc::now().trunc_subsecs(6),
            image,
        })
    }

    async fn image(
        &self,
        content: &Content,
        attributes: Attributes,
        counting: &Counting,
    ) -> Result<Image, Failure> {
        let started = Instant::now();
        let fetched = self.fetcher.fetch(content, &self.abandon).await;
        let fetched = fetched.map_err(|error| self.fetch_failure(&error))?;
        let size = fetched.bytes.len() as u64;
        counting.fetched(started, size);
        let started = Instant::now();
        let (bytes, options) = (&fetched.bytes, &self.decode);
        let cost = catch_unwind(AssertUnwindSafe(|| decode::cost(bytes, options)))
            .map_err(|_| undecodable("decoder_panicked", "its header cannot be read".into()))?
            .map_err(|e| undecodable(e.code(), e.to_string()))?;
        let mib = u32::try_from(cost.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let share = self.decode_budget.clone();
        let share = share.acquire_many_owned(mib.clamp(1, self.decode.budget_mib)).await;
        let turn = self.decode_turns.clone().acquire_owned().await;
        let (options, towers) = (self.decode.clone(), self.towers.clone());
        let decoded = tokio::task::spawn_blocking(move || {
            let _held = (share, turn);
            // Whole, with its share of the download budget: the bytes are needed here and no longer.
            let fetched = fetched;
            let _span = trace_span!("decode").entered();
            let image = decode::decode(&fetched.bytes, &options)
                .map_err(|e| undecodable(e.code(), e.to_string()))?;
            let pixels = towers
                .prepare(&image)
                .map_err(|e| undecodable("preprocess_failed", e.to_string()))?;
            let hash = hex(&Sha256::digest(&fetched.bytes));
            Ok((pixels, image.width(), image.height(), hash))
        });
        let (pixels, width, height, content_hash) = decoded.await.map_err(|error| {
            // Started again, the worker would meet the same picture.
            if error.is_panic() {
                undecodable("decoder_panicked", format!("the decoder failed: {error}"))
            } else {
                fatal(IngestError::Broken(error.to_string()))
            }
        })??;
        counting.decoded(started);
        let started = Instant::now();
        let embedded = self.embedder.embed(pixels).await.map_err(fatal)?;
        counting.towered(started);
        Ok(Image {
            uri: match content {
                // What holds the picture itself is no place to fetch it from.
                Content::Uri { uri, .. } => Some(uri.clone()).filter(|uri| !is_data(uri)),
                Content::Inline(_) => None,
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

    fn fetch_failure(&self, error: &FetchError) -> Failure {
        match error {
            FetchError::Gone { .. } => Failure::Gone,
            // The last attempt was cut short: whether it would have worked is not known.
            error if error.verdict() == Verdict::Retry && self.abandon.is_cancelled() => {
                Failure::Unsettled(Unsettled::Abandoned)
            }
            error => Failure::DeadLetter(Reason {
                stage: "fetch",
                code: error.code(),
                message: error.to_string(),
                record: None,
            }),
        }
    }

    /// Puts a message aside; only when that is durable is the message settled.
    async fn put_aside(
        &self,
        message: &Message,
        reason: Reason,
        counting: &Counting,
    ) -> Result<Vec<Row>, Unsettled> {
        let on_retry = |attempt: u32, error: &super::dead_letter::DeadLetterError| {
            info!(event = event::RETRY, stage = "dead_letter", attempt, %error, "trying again");
        };
        let put = retry(Backoff::times(10), &self.abandon, on_retry, || async {
            self.dead_letters.put(message, &reason).await
        });
        if let Err(error) = put.await {
            let cut_short = error.verdict() == Verdict::Retry && self.abandon.is_cancelled();
            return Err(if cut_short {
                Unsettled::Abandoned
            } else {
                Unsettled::Fatal(Box::new(error.into()))
            });
        }
        Progress::add(&self.progress.dead_lettered, 1);
        counting.dead_lettered(reason.stage, reason.code);
        warn!(
            event = event::DEAD_LETTER, partition = %message.partition, offset = message.offset,
            stage = reason.stage, code = reason.code, reason = %reason.message,
            trace_id = message.trace_id(), "a message can never be used and was put aside"
        );
        Ok(Vec::new())
    }
}

fn undecodable(code: &'static str, message: String) -> Failure {
    Failure::DeadLetter(Reason { stage: "decode_image", code, message, record: None })
}

fn is_data(uri: &str) -> bool {
    uri.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// What a log line says of where an image comes from.
fn named(content: &Content) -> String {
    match content {
        Content::Uri { uri, .. } => shorten(uri),
        Content::Inline(_) => String::new(),
    }
}

fn fatal(error: IngestError) -> Failure {
    Failure::Unsettled(Unsettled::Fatal(Box::new(error)))
}
