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

use crate::clip::Encoders;
use crate::prompts::ActivePromptSets;
use crate::record::{KafkaMessage, TopicPartition};
use crate::table::{TableError, TableWriter};
use crate::telemetry::event;
use crate::{kafka, validate};
use dead_letter::{DeadLetterWriteError, DeadLetterWriter};
use fetch::Fetcher;
use source::consumer::{ConsumerEvent, OffsetProvider, Source, SourceError};
use source::decoder::format::Decoder;

use process::{ProcessedMessage, Processor};
pub use progress::Progress;
use sink::{CommitTask, FinishedCommit, Sink};

/// How the worker batches and bounds its work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IngestOptions {
    /// Messages in the pipeline at one time. At least twice `batch_images`, so that the next batch
    /// is ready when the towers are.
    pub max_in_flight_messages: usize,
    /// Bytes of the messages in the pipeline at one time, in MiB: pictures may come in them.
    pub max_in_flight_mib: usize,
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
    /// How long a worker may take at shutdown to finish the messages in the pipeline and to commit them,
    /// in seconds; a quarter of it is reserved for the last commit. What is cut off is done again by the
    /// next owner.
    pub drain_seconds: u64,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self {
            max_in_flight_messages: 128,
            max_in_flight_mib: 64,
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

impl IngestOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(
            p,
            "max_in_flight_messages",
            self.max_in_flight_messages as u64,
            1,
            100_000,
        );
        validate::check_range(p, "max_in_flight_mib", self.max_in_flight_mib as u64, 1, 65_536);
        validate::check_range(p, "batch_images", self.batch_images as u64, 1, 4096);
        validate::check_range(p, "batch_wait_ms", self.batch_wait_ms, 0, 10_000);
        validate::check_range(p, "decode_threads", self.decode_threads as u64, 0, 1024);
        validate::check_range(p, "commit_rows", self.commit_rows as u64, 1, 1_000_000);
        validate::check_range(p, "commit_mib", self.commit_mib as u64, 1, 4096);
        validate::check_range(p, "commit_ms", self.commit_ms, 1, 3_600_000);
        validate::check_range(p, "heartbeat_seconds", self.heartbeat_seconds, 1, 3_600);
        validate::check_range(p, "drain_seconds", self.drain_seconds, 0, 3_600);
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
    DeadLetter(#[from] DeadLetterWriteError),
    /// The device of the model does not compute. Opened anew it may; until then every image would fail.
    #[error("{0}. Nothing is lost: started again, the worker goes on from its last commit")]
    Model(String),
    /// A task of the pipeline panicked: a fault of this program.
    #[error("the pipeline failed at {0}; please report it")]
    Internal(String),
}

/// Everything that a worker is made of.
pub struct Worker {
    /// How to reach Kafka.
    pub kafka: kafka::KafkaOptions,
    /// Where events come from.
    pub source_options: source::SourceOptions,
    /// How events are read.
    pub decoder: Decoder,
    /// Where unusable messages go.
    pub dead_letter_writer: DeadLetterWriter,
    /// Gets the bytes of images.
    pub fetcher: Fetcher,
    /// Limits of image decoding.
    pub decode_options: decode::DecodeOptions,
    /// The model.
    pub encoders: Arc<dyn Encoders>,
    /// Prompt sets whose statistics every image gets; they may change meanwhile.
    pub prompt_sets: ActivePromptSets,
    /// The table.
    pub writer: TableWriter,
    /// Batches and bounds.
    pub options: IngestOptions,
    /// What has been done.
    pub progress: Arc<Progress>,
}

/// Lets the consumer ask the table where a partition is to be resumed.
struct TableOffsetProvider {
    writer: Arc<Mutex<TableWriter>>,
    /// Cancelled when the worker stops: then no position is needed any more.
    cancel: CancellationToken,
}

#[async_trait]
impl OffsetProvider for TableOffsetProvider {
    async fn next_offset(&self, partition: &TopicPartition) -> Result<Option<i64>, String> {
        let read = async { self.writer.lock().await.read_position(partition, &self.cancel).await };
        match self.cancel.run_until_cancelled(read).await {
            Some(position) => position.map_err(|e| e.to_string()),
            None => Err("the worker is stopping".into()),
        }
    }
}

impl Worker {
    /// Works until `token` is cancelled or something fails for good. Returns whether everything
    /// that had been taken up was settled.
    pub async fn run(self, token: CancellationToken) -> Result<bool, IngestError> {
        let writer = Arc::new(Mutex::new(self.writer));
        // Cancelled when nothing new is started: the worker is to stop, or its source has failed.
        let draining = token.child_token();
        let offset_provider =
            Arc::new(TableOffsetProvider { writer: writer.clone(), cancel: draining.clone() });
        let reembed_topic = self.decoder.reembed.as_ref().map(|again| again.topic.clone());
        let topics: Vec<&str> = std::iter::once(self.source_options.topic.as_str())
            .chain(reembed_topic.as_deref())
            .collect();
        let source = Source::start(
            &self.kafka,
            &self.source_options,
            &topics,
            offset_provider,
            draining.clone(),
        )?;
        self.progress.add_consumer(source.handle());
        let model = self.encoders.card().fingerprint.clone();
        let prompt_sets = self.prompt_sets.clone();
        // Cancelled when the time to drain is over: no attempt and no pause outlives it.
        let cancel_processing = CancellationToken::new();
        let _drain_timer = start_drain_timer(
            draining.clone(),
            Duration::from_secs(self.options.drain_seconds),
            cancel_processing.clone(),
        );
        let embedder = embed::Embedder::start(
            self.encoders.clone(),
            self.prompt_sets,
            &self.options,
            self.progress.clone(),
        );
        let processor = Arc::new(Processor {
            decoder: self.decoder,
            dead_letter_writer: self.dead_letter_writer,
            fetcher: self.fetcher,
            decode_permits: process::new_decode_permits(self.options.decode_threads),
            decode_memory_budget: process::new_decode_memory_budget(&self.decode_options),
            decode_options: self.decode_options,
            encoders: self.encoders,
            embedder,
            progress: self.progress.clone(),
            cancel: cancel_processing.clone(),
        });
        let mut pipeline = Pipeline {
            source,
            processor,
            in_flight: FuturesOrdered::new(),
            in_flight_bytes: 0,
            commit_task: None,
            source_failure: None,
            sink: Sink::new(
                writer,
                &self.options,
                self.progress.clone(),
                model,
                prompt_sets,
                cancel_processing.clone(),
            ),
            progress: self.progress,
            options: self.options,
        };
        let result = cancel_processing.run_until_cancelled(pipeline.run(&token, &draining)).await;
        cancel_processing.cancel();
        let Pipeline { source, in_flight, commit_task, source_failure, .. } = pipeline;
        let drained = match result {
            Some(Err(IngestError::Table(TableError::Cancelled { .. }))) | None => {
                warn_drain_timed_out(in_flight.len());
                Ok(false)
            }
            Some(result) => result.map(|()| in_flight.is_empty()),
        };
        // Both end the tasks behind them.
        drop((in_flight, commit_task));
        source.close().await;
        let drained = drained?;
        match source_failure {
            Some(error) => Err(error),
            None if token.is_cancelled() => Ok(drained),
            None => Err(IngestError::Internal("the consumer".into())),
        }
    }
}

/// Cancels `deadline` when `limit` has passed since `draining` was cancelled.
fn start_drain_timer(
    draining: CancellationToken,
    limit: Duration,
    deadline: CancellationToken,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        draining.cancelled().await;
        tokio::time::sleep(limit).await;
        deadline.cancel();
    }))
}

fn warn_drain_timed_out(remaining: usize) {
    warn!(
        event = event::DRAIN_TIMED_OUT,
        remaining, "work was cut off; it is done again by the next owner"
    );
}

/// How often the pipeline shows that it is alive where nothing comes; well below what counts as stuck.
const STEP_INTERVAL: Duration = Duration::from_secs(10);

struct Pipeline {
    source: Source,
    processor: Arc<Processor>,
    in_flight: FuturesOrdered<BoxFuture<'static, PipelineEvent>>,
    /// Bytes of the messages in flight.
    in_flight_bytes: usize,
    sink: Sink,
    /// The commit under way.
    commit_task: Option<CommitTask>,
    /// Why the source has ended.
    source_failure: Option<IngestError>,
    progress: Arc<Progress>,
    options: IngestOptions,
}

/// What leaves the pipeline, in order.
enum PipelineEvent {
    /// Of a message of so many bytes.
    Processed(ProcessedMessage, usize),
    Assigned(Vec<TopicPartition>),
    Revoked(Vec<TopicPartition>, source::consumer::RevokeAck),
    Failed(IngestError),
}

/// Share of the time to drain that is for messages in the pipeline; the rest is for the last commit.
const MESSAGES_SHARE_OF_DRAIN: f64 = 0.75;

impl Pipeline {
    /// Works until `token` is cancelled or something fails, cancels `draining`, finishes what is in the
    /// pipeline, and commits it. The caller limits the time that this takes.
    async fn run(
        &mut self,
        token: &CancellationToken,
        draining: &CancellationToken,
    ) -> Result<(), IngestError> {
        let heartbeat_interval = Duration::from_secs(self.options.heartbeat_seconds);
        let mut heartbeat_ticks =
            interval_at(Instant::now() + heartbeat_interval, heartbeat_interval);
        heartbeat_ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut step_ticks = interval(STEP_INTERVAL);
        while !token.is_cancelled() && self.source_failure.is_none() {
            self.progress.record_step(self.in_flight.len());
            if self.sink.is_full() && self.commit_task.is_none() {
                self.commit_task = self.sink.start_commit();
            }
            let has_capacity = self.in_flight.len() < self.options.max_in_flight_messages
                && self.in_flight_bytes < self.options.max_in_flight_mib << 20;
            tokio::select! {
                written = await_commit(&mut self.commit_task) => self.finish_commit(written)?,
                Some(settling) = self.in_flight.next(), if !self.sink.is_full() => {
                    self.handle_event(settling).await?;
                }
                item = self.source.next(), if has_capacity => match item {
                    Some(item) => self.start_item(item),
                    None => break,
                },
                () = self.sink.wait_until_due(), if self.commit_task.is_none() => {
                    self.commit_task = self.sink.start_commit();
                }
                _ = heartbeat_ticks.tick() => self.log_heartbeat(),
                _ = step_ticks.tick() => {}
                () = token.cancelled() => {}
            }
        }
        draining.cancel();
        let limit = Duration::from_secs(self.options.drain_seconds);
        let drained = tokio::time::timeout(limit.mul_f64(MESSAGES_SHARE_OF_DRAIN), async {
            while let Some(settling) = self.in_flight.next().await {
                self.handle_event(settling).await?;
            }
            Ok::<_, IngestError>(())
        });
        match drained.await {
            Ok(result) => result?,
            Err(_) => warn_drain_timed_out(self.in_flight.len()),
        }
        self.commit_all().await
    }

    fn log_heartbeat(&self) {
        let pulse = self.source.status();
        info!(
            event = event::HEARTBEAT,
            role = "worker",
            poll_age_ms = pulse.poll_age_ms,
            assigned_partitions = pulse.partitions,
            in_flight_messages = self.in_flight.len(),
            pending_rows = self.sink.pending_rows(),
            committing = self.commit_task.is_some(),
            "alive"
        );
        let in_flight = self.in_flight.len() as i64;
        info!(
            event = event::LAG,
            end_offsets_known = pulse.lag.is_some(),
            lag_messages = pulse.lag,
            unread_messages = pulse.lag.map(|lag| (lag - in_flight).max(0)),
            event_age_ms = self.sink.event_age_ms(),
            "how far behind"
        );
    }

    fn start_item(&mut self, item: ConsumerEvent) {
        let pending_event: BoxFuture<'static, PipelineEvent> = match item {
            ConsumerEvent::Message(message) => {
                let size = message.payload.as_ref().map_or(0, |payload| payload.len());
                self.in_flight_bytes += size;
                let task = self.spawn_processing(message);
                Box::pin(async move {
                    match task.await {
                        Ok(outcome) => PipelineEvent::Processed(outcome, size),
                        Err(panic) => {
                            PipelineEvent::Failed(IngestError::Internal(panic.to_string()))
                        }
                    }
                })
            }
            ConsumerEvent::Assigned(partitions) => {
                Box::pin(ready(PipelineEvent::Assigned(partitions)))
            }
            ConsumerEvent::Revoked(partitions, settled) => {
                Box::pin(ready(PipelineEvent::Revoked(partitions, settled)))
            }
            ConsumerEvent::Failed(error) => {
                self.source_failure = Some(error.into());
                return;
            }
        };
        self.in_flight.push_back(pending_event);
    }

    fn spawn_processing(&self, message: KafkaMessage) -> AbortOnDropHandle<ProcessedMessage> {
        let processor = self.processor.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { processor.process(message).await }))
    }

    async fn handle_event(&mut self, pipeline_event: PipelineEvent) -> Result<(), IngestError> {
        match pipeline_event {
            PipelineEvent::Processed(outcome, size) => {
                self.in_flight_bytes -= size;
                let added = self.sink.add(outcome);
                if added.is_err() {
                    // What came before it is done and must not be done again.
                    self.commit_all().await?;
                }
                added
            }
            PipelineEvent::Assigned(partitions) => self.sink.assign(partitions).await,
            PipelineEvent::Revoked(partitions, settled) => {
                self.commit_all().await?;
                self.sink.revoke(&partitions);
                drop(settled);
                Ok(())
            }
            PipelineEvent::Failed(error) => {
                // What came before it is done and must not be done again.
                self.commit_all().await?;
                Err(error)
            }
        }
    }

    /// Commits everything that is outstanding, and waits for it.
    async fn commit_all(&mut self) -> Result<(), IngestError> {
        loop {
            if self.commit_task.is_none() {
                self.commit_task = self.sink.start_commit();
            }
            if self.commit_task.is_none() {
                return Ok(());
            }
            let written = await_commit(&mut self.commit_task).await;
            self.finish_commit(written)?;
        }
    }

    fn finish_commit(
        &mut self,
        written: Result<FinishedCommit, IngestError>,
    ) -> Result<(), IngestError> {
        self.commit_task = None;
        self.sink.finish_commit(written?, &self.source);
        Ok(())
    }
}

/// The result of the commit under way; waits for ever where there is none.
async fn await_commit(committing: &mut Option<CommitTask>) -> Result<FinishedCommit, IngestError> {
    match committing {
        Some(commit) => {
            Ok(commit.await.map_err(|panic| IngestError::Internal(panic.to_string()))??)
        }
        None => std::future::pending().await,
    }
}
