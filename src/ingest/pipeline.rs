//! The worker's main loop: from the consumer's events to commits.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{BoxFuture, ready};
use futures::stream::FuturesOrdered;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use super::error::IngestError;
use super::message_processor::{MessageProcessor, ProcessedMessage};
use super::options::IngestOptions;
use super::progress::Progress;
use super::sink::{CommitTask, FinishedCommit, Sink};
use super::source::{ConsumerEvent, RevokeAck, Source};
use crate::record::{KafkaMessage, TopicPartition};
use crate::telemetry::event;

/// How often the pipeline records that it is alive while no message arrives; well below
/// `progress::STUCK_TIMEOUT`.
const IDLE_STEP_INTERVAL: Duration = Duration::from_secs(10);

/// Share of `ingest.drain_seconds` in which the messages in the pipeline are finished; the rest is for the
/// last commit.
const DRAIN_TIME_SHARE_FOR_MESSAGES: f64 = 0.75;

/// Processes messages concurrently and passes the results to the sink in the order of their arrival.
pub struct Pipeline {
    source: Source,
    processor: Arc<MessageProcessor>,
    /// Yields results in the order in which the work was started, whichever ends first.
    in_flight_events: FuturesOrdered<BoxFuture<'static, PipelineEvent>>,
    /// Size of the messages in flight.
    in_flight_bytes: usize,
    sink: Sink,
    /// The commit in progress.
    commit_task: Option<CommitTask>,
    /// Why the source ended, if it failed.
    source_failure: Option<IngestError>,
    progress: Arc<Progress>,
    options: IngestOptions,
}

/// What leaves the pipeline, in the order of the consumer's events.
enum PipelineEvent {
    /// A processed message, and the size of its payload in bytes.
    Processed(ProcessedMessage, usize),
    Assigned(Vec<(TopicPartition, u64)>),
    Revoked(Vec<TopicPartition>, RevokeAck),
    Failed(IngestError),
}

impl Pipeline {
    pub fn new(
        source: Source,
        processor: Arc<MessageProcessor>,
        sink: Sink,
        progress: Arc<Progress>,
        options: IngestOptions,
    ) -> Self {
        Self {
            source,
            processor,
            in_flight_events: FuturesOrdered::new(),
            in_flight_bytes: 0,
            sink,
            commit_task: None,
            source_failure: None,
            progress,
            options,
        }
    }

    /// Runs until `token` is cancelled or a permanent error occurs; then cancels `draining`, finishes the
    /// messages in the pipeline and commits what is pending. The caller limits the time that this takes.
    pub async fn run(
        &mut self,
        token: &CancellationToken,
        draining: &CancellationToken,
    ) -> Result<(), IngestError> {
        let heartbeat_interval = Duration::from_secs(self.options.heartbeat_seconds);
        let mut heartbeat_ticks =
            interval_at(Instant::now() + heartbeat_interval, heartbeat_interval);
        heartbeat_ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut step_ticks = interval(IDLE_STEP_INTERVAL);
        while !token.is_cancelled() && self.source_failure.is_none() {
            self.progress.record_step(self.in_flight_events.len());
            if self.sink.is_full() && self.commit_task.is_none() {
                self.commit_task = self.sink.start_commit(&self.source);
            }
            let has_capacity = self.in_flight_events.len() < self.options.max_in_flight_messages
                && self.in_flight_bytes < self.options.max_in_flight_mib << 20;
            tokio::select! {
                finished = await_commit(&mut self.commit_task) => self.record_finished_commit(finished)?,
                // Backpressure: while the sink is full, results wait, and then so do new messages.
                Some(event) = self.in_flight_events.next(), if !self.sink.is_full() => {
                    self.handle_pipeline_event(event).await?;
                }
                event = self.source.next_event(), if has_capacity => match event {
                    Some(event) => self.enqueue_consumer_event(event),
                    None => break,
                },
                () = self.sink.wait_until_commit_due(), if self.commit_task.is_none() => {
                    self.commit_task = self.sink.start_commit(&self.source);
                }
                _ = heartbeat_ticks.tick() => self.log_heartbeat(),
                _ = step_ticks.tick() => {}
                () = token.cancelled() => {}
            }
        }
        draining.cancel();
        let limit = Duration::from_secs(self.options.drain_seconds);
        let drained = tokio::time::timeout(limit.mul_f64(DRAIN_TIME_SHARE_FOR_MESSAGES), async {
            while let Some(event) = self.in_flight_events.next().await {
                self.handle_pipeline_event(event).await?;
            }
            Ok::<_, IngestError>(())
        });
        match drained.await {
            Ok(result) => result?,
            Err(_) => self.warn_drain_timed_out(),
        }
        self.commit_all().await
    }

    /// Whether all messages were processed.
    pub fn is_empty(&self) -> bool {
        self.in_flight_events.is_empty()
    }

    /// Ends unfinished work and the consumer. Returns why the source ended, if it failed.
    pub async fn close(self) -> Option<IngestError> {
        let Self { source, in_flight_events: in_flight, commit_task, source_failure, .. } = self;
        // Both end the tasks behind them.
        drop((in_flight, commit_task));
        source.close().await;
        source_failure
    }

    /// Logs that the time to drain is over.
    pub fn warn_drain_timed_out(&self) {
        warn!(
            event = event::DRAIN_TIMED_OUT,
            remaining = self.in_flight_events.len(),
            "the pipeline did not drain in time; the next owner repeats the remaining work"
        );
    }

    fn log_heartbeat(&self) {
        let status = self.source.status();
        info!(
            event = event::HEARTBEAT,
            role = "worker",
            poll_age_ms = status.poll_age_ms,
            state = status.state.as_str(),
            assigned_partitions = status.assigned_partition_count,
            in_flight_messages = self.in_flight_events.len(),
            pending_rows = self.sink.pending_rows(),
            committing = self.commit_task.is_some(),
            "alive"
        );
        let in_flight = self.in_flight_events.len() as i64;
        info!(
            event = event::LAG,
            state = status.state.as_str(),
            end_offsets_known = status.lag_messages.is_some(),
            lag_messages = status.lag_messages,
            unread_messages = status.lag_messages.map(|lag| (lag - in_flight).max(0)),
            event_age_ms = self.sink.last_commit_event_age_ms(),
            "how far behind"
        );
    }

    /// Starts the work for one event of the consumer.
    fn enqueue_consumer_event(&mut self, event: ConsumerEvent) {
        let pending_event: BoxFuture<'static, PipelineEvent> = match event {
            ConsumerEvent::Message(message) => {
                let size = message.payload.as_ref().map_or(0, |payload| payload.len());
                self.in_flight_bytes += size;
                let task = self.spawn_processing(message);
                Box::pin(async move {
                    match task.await {
                        Ok(processed) => PipelineEvent::Processed(processed, size),
                        Err(panic) => {
                            PipelineEvent::Failed(IngestError::Internal(panic.to_string()))
                        }
                    }
                })
            }
            ConsumerEvent::Assigned(partitions) => {
                Box::pin(ready(PipelineEvent::Assigned(partitions)))
            }
            ConsumerEvent::Revoked(partitions, ack) => {
                Box::pin(ready(PipelineEvent::Revoked(partitions, ack)))
            }
            ConsumerEvent::Failed(error) => {
                self.source_failure = Some(error.into());
                return;
            }
        };
        self.in_flight_events.push_back(pending_event);
    }

    fn spawn_processing(&self, message: KafkaMessage) -> AbortOnDropHandle<ProcessedMessage> {
        let processor = self.processor.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { processor.process(message).await }))
    }

    async fn handle_pipeline_event(&mut self, event: PipelineEvent) -> Result<(), IngestError> {
        match event {
            PipelineEvent::Processed(message, size) => {
                self.in_flight_bytes -= size;
                let added = self.sink.add_message(message);
                if added.is_err() {
                    // Commit the messages before the failed one, so that they are not repeated.
                    self.commit_all().await?;
                }
                added
            }
            PipelineEvent::Assigned(partitions) => self.sink.add_partitions(partitions).await,
            PipelineEvent::Revoked(partitions, ack) => {
                self.commit_all().await?;
                self.sink.remove_partitions(&partitions);
                drop(ack);
                Ok(())
            }
            PipelineEvent::Failed(error) => {
                // Commit the messages before the failed one, so that they are not repeated.
                self.commit_all().await?;
                Err(error)
            }
        }
    }

    /// Commits everything that is pending, and waits for it.
    async fn commit_all(&mut self) -> Result<(), IngestError> {
        loop {
            if self.commit_task.is_none() {
                self.commit_task = self.sink.start_commit(&self.source);
            }
            if self.commit_task.is_none() {
                return Ok(());
            }
            let finished = await_commit(&mut self.commit_task).await;
            self.record_finished_commit(finished)?;
        }
    }

    fn record_finished_commit(
        &mut self,
        finished: Result<FinishedCommit, IngestError>,
    ) -> Result<(), IngestError> {
        self.commit_task = None;
        self.sink.record_finished_commit(finished?, &self.source);
        Ok(())
    }
}

/// Waits for the commit in progress; never returns if there is none.
async fn await_commit(commit_task: &mut Option<CommitTask>) -> Result<FinishedCommit, IngestError> {
    match commit_task {
        Some(task) => {
            Ok(task.await.map_err(|panic| IngestError::Internal(panic.to_string()))??)
        }
        None => std::future::pending().await,
    }
}
