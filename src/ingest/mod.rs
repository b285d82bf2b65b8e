//! The worker: from messages to stored rows.
//!
//! Messages are processed concurrently and settled in order: the outcomes of each partition leave
//! the pipeline in the order of its offsets, so that a commit always covers a prefix without holes.

pub mod dead_letter;
pub mod decode;
mod embed;
pub mod fetch;
mod process;
pub(crate) mod progress;
mod sink;
pub mod source;
mod tally;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::future::{BoxFuture, ready};
use futures::stream::FuturesOrdered;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::clip::Towers;
use crate::prompts::ActiveSets;
use crate::record::{Message, Partition};
use crate::table::{TableError, Writer};
use crate::telemetry::event;
use crate::{kafka, validate};
use dead_letter::{DeadLetterError, DeadLetters};
use fetch::Fetcher;
use source::consumer::{Item, Resume, Source, SourceError};
use source::decoder::format::Decoder;

use process::{Outcome, Processor};
pub use progress::Progress;
use sink::{Commit, Sink, Written};

/// How the worker batches and bounds its work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Messages in the pipeline at one time. At least twice `batch_images`, so that the next batch
    /// is ready when the towers are.
    pub in_flight: usize,
    /// Bytes of the messages in the pipeline at one time, in MiB: pictures may come in them.
    pub in_flight_mib: usize,
    /// Images embedded in one pass of the image tower.
    pub batch_images: usize,
    /// How long a batch that is not full waits for more images, in milliseconds.
    pub batch_wait_ms: u64,
    /// Images decoded at one time. 0: twice as many as there are cores.
    pub decode_threads: usize,
    /// A commit is cut when it has this many rows …
    pub commit_rows: usize,
    /// … or this many bytes of embeddings, in MiB …
    pub commit_mib: usize,
    /// … or when its oldest outcome is this old, in milliseconds. Bounds how long a new image
    /// takes to become searchable, and how many files and requests a quiet topic costs.
    pub commit_ms: u64,
    /// How often the worker says that it is alive, in seconds: log event `heartbeat`.
    pub heartbeat_seconds: u64,
    /// How long messages in the pipeline may take at shutdown, in seconds. What is cut off is
    /// done again by the next owner.
    pub drain_seconds: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            in_flight: 128,
            in_flight_mib: 64,
            batch_images: 32,
            batch_wait_ms: 20,
            decode_threads: 0,
            commit_rows: 10_000,
            commit_mib: 64,
            commit_ms: 1_000,
            heartbeat_seconds: 30,
            drain_seconds: 20,
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::range(p, "in_flight", self.in_flight as u64, 1, 100_000);
        validate::range(p, "in_flight_mib", self.in_flight_mib as u64, 1, 65_536);
        validate::range(p, "batch_images", self.batch_images as u64, 1, 4096);
        validate::range(p, "batch_wait_ms", self.batch_wait_ms, 0, 10_000);
        validate::range(p, "decode_threads", self.decode_threads as u64, 0, 1024);
        validate::range(p, "commit_rows", self.commit_rows as u64, 1, 1_000_000);
        validate::range(p, "commit_mib", self.commit_mib as u64, 1, 4096);
        validate::range(p, "commit_ms", self.commit_ms, 1, 3_600_000);
        validate::range(p, "heartbeat_seconds", self.heartbeat_seconds, 1, 3_600);
        validate::range(p, "drain_seconds", self.drain_seconds, 0, 3_600);
        problems
    }
}

/// Why the worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// Consuming cannot go on.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The table cannot be written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A message could not be put aside.
    #[error(transparent)]
    DeadLetter(#[from] DeadLetterError),
    /// The device of the model does not compute. Opened anew it may; until then every image would fail.
    #[error("{0}. Nothing is lost: started again, the worker goes on from its last commit")]
    Towers(String),
    /// A task of the pipeline panicked: a fault of this program.
    #[error("the pipeline failed at {0}; please report it")]
    Broken(String),
}

/// Everything that a worker is made of.
pub struct Worker {
    /// How to reach Kafka.
    pub kafka: kafka::Options,
    /// Where events come from.
    pub source: source::Options,
    /// How events are read.
    pub decoder: Decoder,
    /// Where unusable messages go.
    pub dead_letters: DeadLetters,
    /// Gets the bytes of images.
    pub fetcher: Fetcher,
    /// Limits of image decoding.
    pub decode: decode::Options,
    /// The model.
    pub towers: Arc<dyn Towers>,
    /// Prompt sets whose statistics every image gets; they may change meanwhile.
    pub sets: ActiveSets,
    /// The table.
    pub writer: Writer,
    /// Batches and bounds.
    pub options: Options,
    /// What has been done.
    pub progress: Arc<Progress>,
}

/// Lets the consumer ask the table where a partition is to be resumed.
struct TablePositions(Arc<Mutex<Writer>>);

#[async_trait]
impl Resume for TablePositions {
    async fn next_offset(&self, partition: &Partition) -> Result<Option<i64>, String> {
        let mut writer = self.0.lock().await;
        writer.position(partition).await.map_err(|e| e.to_string())
    }
}

impl Worker {
    /// Works until `token` is cancelled or something fails for good. Returns whether everything
    /// that had been taken up was settled.
    pub async fn run(self, token: CancellationToken) -> Result<bool, IngestError> {
        let writer = Arc::new(Mutex::new(self.writer));
        let resume = Arc::new(TablePositions(writer.clone()));
        let again = self.decoder.again.as_ref().map(|again| again.topic.clone());
        let topics: Vec<&str> =
            std::iter::once(self.source.topic.as_str()).chain(again.as_deref()).collect();
        let source = Source::start(&self.kafka, &self.source, &topics, resume, token.clone())?;
        self.progress.watching(source.watch());
        let model = self.towers.card().fingerprint.clone();
        let sets = self.sets.clone();
        let abandon = CancellationToken::new();
        let embedder = embed::Embedder::start(
            self.towers.clone(),
            self.sets,
            &self.options,
            self.progress.clone(),
        );
        let processor = Arc::new(Processor {
            decoder: self.decoder,
            dead_letters: self.dead_letters,
            fetcher: self.fetcher,
            decode_turns: process::decode_turns(self.options.decode_threads),
            decode_budget: process::decode_budget(&self.decode),
            decode: self.decode,
            towers: self.towers,
            embedder,
            progress: self.progress.clone(),
            abandon: abandon.clone(),
        });
        let mut pipeline = Pipeline {
            source,
            processor,
            in_flight: FuturesOrdered::new(),
            held: 0,
            committing: None,
            failed: None,
            sink: Sink::new(writer, &self.options, self.progress.clone(), model, sets),
            progress: self.progress,
            options: self.options,
        };
        let result = pipeline.run(&token).await;
        abandon.cancel();
        let Pipeline { source, in_flight, .. } = pipeline;
        let drained = in_flight.is_empty();
        drop(in_flight);
        source.close().await;
        result.map(|()| drained)
    }
}

/// How often the pipeline shows that it is alive where nothing comes; well below what counts as stuck.
const STEP: Duration = Duration::from_secs(10);

struct Pipeline {
    source: Source,
    processor: Arc<Processor>,
    in_flight: FuturesOrdered<BoxFuture<'static, Settling>>,
    /// Bytes of the messages in flight.
    held: usize,
    sink: Sink,
    /// The commit under way.
    committing: Option<Commit>,
    /// Why the source has ended.
    failed: Option<IngestError>,
    progress: Arc<Progress>,
    options: Options,
}

/// What leaves the pipeline, in order.
enum Settling {
    /// Of a message of so many bytes.
    Outcome(Outcome, usize),
    Assigned(Vec<Partition>),
    Revoked(Vec<Partition>, source::consumer::Settled),
    Failed(IngestError),
}

impl Pipeline {
    async fn run(&mut self, token: &CancellationToken) -> Result<(), IngestError> {
        let beat = Duration::from_secs(self.options.heartbeat_seconds);
        let mut heart = interval_at(Instant::now() + beat, beat);
        heart.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut steps = interval(STEP);
        while !token.is_cancelled() && self.failed.is_none() {
            self.progress.step(self.in_flight.len());
            if self.sink.is_full() && self.committing.is_none() {
                self.committing = self.sink.cut();
            }
            let room = self.in_flight.len() < self.options.in_flight
                && self.held < self.options.in_flight_mib << 20;
            tokio::select! {
                written = finished(&mut self.committing) => self.written(written)?,
                Some(settling) = self.in_flight.next(), if !self.sink.is_full() => {
                    self.settle(settling).await?;
                }
                item = self.source.next(), if room => match item {
                    Some(item) => self.take_up(item),
                    None => break,
                },
                () = self.sink.due(), if self.committing.is_none() => {
                    self.committing = self.sink.cut();
                }
                _ = heart.tick() => self.heartbeat(),
                _ = steps.tick() => {}
                () = token.cancelled() => {}
            }
        }
        let limit = Duration::from_secs(self.options.drain_seconds);
        let drained = tokio::time::timeout(limit, async {
            while let Some(settling) = self.in_flight.next().await {
                self.settle(settling).await?;
            }
            Ok::<_, IngestError>(())
        });
        match drained.await {
            Ok(result) => result?,
            Err(_) => warn!(
                event = event::DRAIN_OVERDUE,
                left = self.in_flight.len(),
                "work was cut off; it is done again by the next owner"
            ),
        }
        self.commit().await?;
        match self.failed.take() {
            Some(error) => Err(error),
            None if token.is_cancelled() => Ok(()),
            None => Err(IngestError::Broken("the consumer".into())),
        }
    }

    fn heartbeat(&self) {
        let pulse = self.source.pulse();
        info!(
            event = event::HEARTBEAT,
            role = "worker",
            poll_age_ms = pulse.poll_age_ms,
            partitions = pulse.partitions,
            in_flight = self.in_flight.len(),
            waiting_rows = self.sink.rows(),
            committing = self.committing.is_some(),
            "alive"
        );
        let in_flight = self.in_flight.len() as i64;
        info!(
            event = event::LAG,
            known = pulse.lag.is_some(),
            durable = pulse.lag,
            buffered = pulse.lag.map(|lag| (lag - in_flight).max(0)),
            event_age_ms = self.sink.age_ms(),
            "how far behind"
        );
    }

    fn take_up(&mut self, item: Item) {
        let settling: BoxFuture<'static, Settling> = match item {
            Item::Message(message) => {
                let size = message.payload.as_ref().map_or(0, |payload| payload.len());
                self.held += size;
                let task = self.process(message);
                Box::pin(async move {
                    match task.await {
                        Ok(outcome) => Settling::Outcome(outcome, size),
                        Err(panic) => Settling::Failed(IngestError::Broken(panic.to_string())),
                    }
                })
            }
            Item::Assigned(partitions) => Box::pin(ready(Settling::Assigned(partitions))),
            Item::Revoked(partitions, settled) => {
                Box::pin(ready(Settling::Revoked(partitions, settled)))
            }
            Item::Failed(error) => {
                self.failed = Some(error.into());
                return;
            }
        };
        self.in_flight.push_back(settling);
    }

    fn process(&self, message: Message) -> AbortOnDropHandle<Outcome> {
        let processor = self.processor.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { processor.process(message).await }))
    }

    async fn settle(&mut self, settling: Settling) -> Result<(), IngestError> {
        match settling {
            Settling::Outcome(outcome, size) => {
                self.held -= size;
                let taken = self.sink.take(outcome);
                if taken.is_err() {
                    // What came before it is done and must not be done again.
                    self.commit().await?;
                }
                taken
            }
            Settling::Assigned(partitions) => self.sink.assign(partitions).await,
            Settling::Revoked(partitions, settled) => {
                self.commit().await?;
                self.sink.revoke(&partitions);
                drop(settled);
                Ok(())
            }
            Settling::Failed(error) => {
                // What came before it is done and must not be done again.
                self.commit().await?;
                Err(error)
            }
        }
    }

    /// Commits everything that is outstanding, and waits for it.
    async fn commit(&mut self) -> Result<(), IngestError> {
        loop {
            if self.committing.is_none() {
                self.committing = self.sink.cut();
            }
            if self.committing.is_none() {
                return Ok(());
            }
            let written = finished(&mut self.committing).await;
            self.written(written)?;
        }
    }

    fn written(&mut self, written: Result<Written, IngestError>) -> Result<(), IngestError> {
        self.committing = None;
        self.sink.written(written?, &self.source);
        Ok(())
    }
}

/// The result of the commit under way; waits for ever where there is none.
async fn finished(committing: &mut Option<Commit>) -> Result<Written, IngestError> {
    match committing {
        Some(commit) => {
            Ok(commit.await.map_err(|panic| IngestError::Broken(panic.to_string()))??)
        }
        None => std::future::pending().await,
    }
}
