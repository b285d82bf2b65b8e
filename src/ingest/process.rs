//! One message: decode, fetch, decode the image, embed; or put it aside.

use std::sync::Arc;

use chrono::{DateTime, SubsecRound, Utc};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::embed::Embedder;
use super::{IngestError, Progress};
use crate::clip::Towers;
use crate::dead_letter::{DeadLetters, Reason};
use crate::decode;
use crate::fetch::{FetchError, Fetcher, shorten};
use crate::record::{Attributes, Change, Content, Event, Image, Message, Partition, Row, hex};
use crate::retry::{Backoff, Decide, Verdict, retry};
use crate::source::Decoder;
use crate::telemetry::event;

/// What became of one message.
#[derive(Debug)]
pub struct Outcome {
    /// Where it came from.
    pub partition: Partition,
    /// Its offset.
    pub offset: i64,
    /// When its oldest event happened, where known.
    pub event_time: Option<DateTime<Utc>>,
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
    pub towers: Arc<dyn Towers>,
    pub embedder: Embedder,
    pub progress: Arc<Progress>,
    pub abandon: CancellationToken,
}

/// As many turns as images are decoded at one time.
pub fn decode_turns(threads: usize) -> Arc<Semaphore> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new(if threads == 0 { cores } else { threads }))
}

impl Processor {
    /// Settles `message`: all of its events or none.
    pub async fn process(&self, message: Message) -> Outcome {
        let events = self.decoder.decode(&message, Utc::now());
        let event_time = events.iter().flatten().filter_map(|e| e.event_time).min();
        let rows = match events {
            Ok(events) => self.rows(&message, events).await,
            Err(rejected) => {
                let reason = Reason {
                    stage: "decode_event",
                    code: rejected.code(),
                    message: rejected.to_string(),
                };
                self.put_aside(&message, reason).await
            }
        };
        Outcome { partition: message.partition, offset: message.offset, event_time, rows }
    }

    async fn rows(&self, message: &Message, events: Vec<Event>) -> Result<Vec<Row>, Unsettled> {
        let mut rows = Vec::with_capacity(events.len());
        for event in events {
            let image_id = event.image_id.clone();
            let uri = match &event.change {
                Change::Upsert { content: Content::Uri(uri), .. } => shorten(uri),
                _ => String::new(),
            };
            match self.row(event).await {
                Ok(row) => rows.push(row),
                Err(Failure::Gone) => {
                    Progress::add(&self.progress.gone, 1);
                    info!(
                        event = event::GONE, partition = %message.partition, offset = message.offset,
                        image_id = %image_id, uri, "the image was gone before it could be fetched"
                    );
                }
                Err(Failure::DeadLetter(reason)) => return self.put_aside(message, reason).await,
                Err(Failure::Unsettled(unsettled)) => return Err(unsettled),
            }
        }
        for row in &rows {
            let counter = match row.image {
                Some(_) => &self.progress.embedded,
                None => &self.progress.deleted,
            };
            Progress::add(counter, 1);
        }
        Ok(rows)
    }

    async fn row(&self, event: Event) -> Result<Row, Failure> {
        let image = match event.change {
            Change::Delete => None,
            Change::Upsert { content, attributes } => Some(self.image(&content, attributes).await?),
        };
        Ok(Row {
            image_id: event.image_id,
            sequence: event.sequence,
            event_time: event.event_time.map(|t| t.trunc_subsecs(6)),
            embedded_at: Utc::now().trunc_subsecs(6),
            image,
        })
    }

    async fn image(&self, content: &Content, attributes: Attributes) -> Result<Image, Failure> {
        let fetched = self.fetcher.fetch(content, &self.abandon).await;
        let fetched = fetched.map_err(|error| self.fetch_failure(&error))?;
        let size = fetched.bytes.len() as u64;
        let turn = self.decode_turns.clone().acquire_owned().await;
        let (options, towers) = (self.decode.clone(), self.towers.clone());
        let decoded = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let image = decode::decode(&fetched.bytes, &options)
                .map_err(|e| ("decode_image", e.code(), e.to_string()))?;
            let pixels = towers
                .prepare(&image)
                .map_err(|e| ("decode_image", "preprocess_failed", e.to_string()))?;
            let hash = hex(&Sha256::digest(&fetched.bytes));
            Ok((pixels, image.width(), image.height(), hash))
        });
        let (pixels, width, height, content_hash) =
            decoded.await.map_err(|panic| fatal(IngestError::Broken(panic.to_string())))?.map_err(
                |(stage, code, message)| Failure::DeadLetter(Reason { stage, code, message }),
            )?;
        let embedded = self.embedder.embed(pixels).await.map_err(fatal)?;
        Ok(Image {
            uri: match content {
                Content::Uri(uri) => Some(uri.clone()),
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
            }),
        }
    }

    /// Puts a message aside; only when that is durable is the message settled.
    async fn put_aside(&self, message: &Message, reason: Reason) -> Result<Vec<Row>, Unsettled> {
        let on_retry = |attempt: u32, error: &crate::dead_letter::DeadLetterError| {
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
        warn!(
            event = event::DEAD_LETTER, partition = %message.partition, offset = message.offset,
            stage = reason.stage, code = reason.code, reason = %reason.message,
            "a message can never be used and was put aside"
        );
        Ok(Vec::new())
    }
}

fn fatal(error: IngestError) -> Failure {
    Failure::Unsettled(Unsettled::Fatal(Box::new(error)))
}
