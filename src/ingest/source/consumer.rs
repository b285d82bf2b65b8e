//! The Kafka consumer: a thread that keeps polling, whatever the pipeline does.
//!
//! A consumer that does not poll is excluded from its group after `max.poll.interval.ms`. When the queue
//! to the pipeline is full, the thread therefore waits for capacity only for [`QUEUE_FULL_TIMEOUT`]; then
//! it pauses the assignment and goes on polling until there is capacity again. It does not pause at once,
//! because pausing discards what librdkafka has prefetched. [`super::rebalance`] explains how partitions
//! are assigned and revoked.

use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendError, TrySendError};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::error::SourceError;
use super::event::ConsumerEvent;
use super::health::SourceProblem;
use super::log_check::LogCheck;
use super::options::SourceOptions;
use super::rebalance::{SourceContext, commit_offsets};
use super::start_position::{OffsetProvider, StartPositions};
use super::state::{ConsumerState, ConsumerStatus, ConsumerStatusHandle, lock_ignoring_poison};
use crate::kafka::{self, FailureKind, KafkaFailure, KafkaProbe};
use crate::record::{KafkaMessage, LogAnchor, TopicPartition};
use crate::retry::Disposition;
use crate::telemetry::event;

/// How long one poll waits: bounds the delay of pause, resume, commit and shutdown.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// How long the thread waits for queue capacity before it pauses the assignment. Bounds the delay of a
/// rebalance while the pipeline is busy.
const QUEUE_FULL_TIMEOUT: Duration = Duration::from_millis(500);
/// How often durable offsets are committed to Kafka. Only lag monitors read them: a worker resumes from
/// the table's positions.
const OFFSET_COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// A running consumer. The pipeline receives its events by [`Source::next_event`].
pub struct Source {
    events: mpsc::Receiver<ConsumerEvent>,
    state: Arc<ConsumerState>,
    /// Cancelled to make the thread leave the group and end.
    leave_group_token: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Source {
    /// Joins the group and starts to poll `topics`; checks these and `dead_letter_topic` every
    /// `source.log_check_seconds`. Messages arrive until `token` is cancelled; the
    /// consumer leaves the group in [`Source::close`].
    pub fn start(
        kafka: &kafka::KafkaOptions,
        options: &SourceOptions,
        topics: &[&str],
        dead_letter_topic: &str,
        offset_provider: Arc<dyn OffsetProvider>,
        token: CancellationToken,
    ) -> Result<Self, SourceError> {
        let kafka_error = |source| SourceError::Kafka { brokers: kafka.brokers.clone(), source };
        let (sender, events) = mpsc::channel(options.queue_messages);
        let state = Arc::new(ConsumerState::default());
        let context = SourceContext {
            event_sender: Mutex::new(Some(sender.clone())),
            state: state.clone(),
            start_positions: StartPositions {
                probe: KafkaProbe::new(kafka, &options.group_id())?,
                state: state.clone(),
                offset_provider,
                runtime: Handle::current(),
                worker_cancel: token.clone(),
            },
            runtime: Handle::current(),
            brokers: kafka.brokers.clone(),
            drain_timeout: Duration::from_secs(options.drain_seconds),
            worker_cancel: token.clone(),
        };
        let consumer: BaseConsumer<SourceContext> =
            consumer_config(kafka, options).create_with_context(context).map_err(kafka_error)?;
        consumer.subscribe(topics).map_err(kafka_error)?;
        let (wake, woken) = sync_channel(1);
        let check = LogCheck {
            probe: KafkaProbe::new(kafka, &options.group_id())?,
            state: state.clone(),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            dead_letter_topic: dead_letter_topic.to_owned(),
            interval: Duration::from_secs(options.log_check_seconds),
            wake: woken,
        };
        let finished = CancellationToken::new();
        let polling = PollingThread {
            consumer,
            event_sender: Some(sender),
            state: state.clone(),
            worker_cancel: token,
            leave_group_token: finished.clone(),
            pending_messages: VecDeque::new(),
            paused: false,
            brokers: kafka.brokers.clone(),
            subject: format!("topic {} in group {}", topics.join(", "), options.group_id()),
            wake_log_check: wake,
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run);
            thread.map_err(|e| kafka_error(KafkaError::ClientCreation(e.to_string())))
        };
        let thread = spawn("kafka-source", Box::new(move || polling.run()))?;
        // Ends when the other thread does, after the request that it may be waiting for.
        spawn("kafka-log-check", Box::new(move || check.run()))?;
        Ok(Self { events, state, leave_group_token: finished, thread: Some(thread) })
    }

    /// Returns the next event; `None` once the token is cancelled and the queue is empty.
    pub async fn next_event(&mut self) -> Option<ConsumerEvent> {
        self.events.recv().await
    }

    /// Records that everything below `next_offset` of `partition` is durable.
    pub fn mark_durable(&self, partition: TopicPartition, next_offset: i64) {
        self.state.record_durable_position(partition, next_offset);
    }

    /// Returns a message by which log `log_number` of an assigned partition is recognised, if one is known.
    pub fn log_anchor(&self, partition: &TopicPartition, log_number: u64) -> Option<LogAnchor> {
        self.state.anchor(partition, log_number)
    }

    /// Returns how the consumer is doing.
    pub fn status(&self) -> ConsumerStatus {
        self.status_handle().status()
    }

    /// Returns a handle that reads the status even while the pipeline is blocked.
    pub fn status_handle(&self) -> ConsumerStatusHandle {
        ConsumerStatusHandle(self.state.clone())
    }

    /// Commits the last durable offsets to Kafka and leaves the group, if a broker answers.
    pub async fn close(mut self) {
        self.events.close();
        // A revocation in the queue would wait for an acknowledgement that nobody sends any more.
        while self.events.try_recv().is_ok() {}
        self.leave_group_token.cancel();
        if let Some(thread) = self.thread.take()
            && let Some(Err(_)) = kafka::leave_group(move || thread.join()).await
        {
            error!(event = event::SOURCE_FAILED, "the consumer thread panicked");
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.leave_group_token.cancel();
    }
}

fn consumer_config(kafka: &kafka::KafkaOptions, options: &SourceOptions) -> rdkafka::ClientConfig {
    let mut config = kafka.client_config();
    config
        .set("group.id", options.group_id())
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Each assignment sets the offset to start from, by the table. If an offset is removed later,
        // consuming must not silently continue from another one.
        .set("auto.offset.reset", "error")
        // How soon added partitions, and topics that were created again, are noticed.
        .set("topic.metadata.refresh.interval.ms", "30000")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", options.session_timeout_ms.to_string())
        .set("max.poll.interval.ms", "300000")
        .set("statistics.interval.ms", "5000")
        .set("queued.max.messages.kbytes", (options.prefetch_mib * 1024).to_string());
    if !options.instance_id.is_empty() {
        config.set("group.instance.id", &options.instance_id);
    }
    config
}

/// State of the consumer thread.
struct PollingThread {
    consumer: BaseConsumer<SourceContext>,
    /// The queue to the pipeline; `None` once no more messages are forwarded.
    event_sender: Option<mpsc::Sender<ConsumerEvent>>,
    state: Arc<ConsumerState>,
    /// Cancelled when no more messages are wanted.
    worker_cancel: CancellationToken,
    /// Cancelled when the pipeline has ended and the consumer may leave its group.
    leave_group_token: CancellationToken,
    /// Messages that were polled while the queue was full.
    pending_messages: VecDeque<KafkaMessage>,
    paused: bool,
    brokers: String,
    /// Names topics and group in messages.
    subject: String,
    /// Wakes the thread of the log check.
    wake_log_check: SyncSender<()>,
}

impl PollingThread {
    fn run(mut self) {
        let mut last_commit = Instant::now();
        while !self.leave_group_token.is_cancelled() {
            if self.worker_cancel.is_cancelled() && self.event_sender.is_some() {
                self.stop_forwarding();
            }
            match self.consumer.poll(POLL_TIMEOUT) {
                Some(Ok(message)) => {
                    let mut message = kafka::to_owned_message(&message);
                    message.log_number = self.state.record_polled_message(&message);
                    self.forward_messages(Some(message));
                }
                Some(Err(error)) => self.handle_error(error),
                None => self.forward_messages(None),
            }
            self.state.record_poll_time();
            self.restart_partitions();
            if last_commit.elapsed() >= OFFSET_COMMIT_INTERVAL {
                commit_offsets(&self.consumer, &self.state, CommitMode::Async);
                last_commit = Instant::now();
            }
        }
        self.stop_forwarding();
        commit_offsets(&self.consumer, &self.state, CommitMode::Sync);
    }

    /// Forwards no more messages; polling goes on, so that the worker stays in its group while it drains.
    fn stop_forwarding(&mut self) {
        self.event_sender = None;
        *lock_ignoring_poison(&self.consumer.context().event_sender) = None;
        self.pending_messages.clear();
        self.set_paused(true);
    }

    /// Queues the pending messages, then `message`; pauses the assignment while the queue is full.
    fn forward_messages(&mut self, message: Option<KafkaMessage>) {
        let Some(sender) = &self.event_sender else {
            return; // shutting down: the next owner processes the message
        };
        self.pending_messages.extend(message);
        // While the assignment is paused, polling must go on: do not wait again.
        let queue_timeout = if self.paused { Duration::ZERO } else { QUEUE_FULL_TIMEOUT };
        let deadline = Instant::now() + queue_timeout;
        while let Some(message) = self.pending_messages.pop_front() {
            if !self.state.is_assigned(&message.partition) {
                continue; // revoked while the message was pending: the next owner processes it
            }
            match self.reserve_capacity(sender, deadline) {
                Ok(Some(permit)) => permit.send(ConsumerEvent::Message(message)),
                Ok(None) => {
                    self.pending_messages.push_front(message);
                    break;
                }
                Err(_) => {
                    self.pending_messages.clear();
                    break;
                }
            }
        }
        self.set_paused(!self.pending_messages.is_empty());
    }

    /// Waits for capacity in the queue; `None` if there is none by `deadline`, or the token is cancelled.
    fn reserve_capacity<'a>(
        &self,
        sender: &'a mpsc::Sender<ConsumerEvent>,
        deadline: Instant,
    ) -> Result<Option<mpsc::Permit<'a, ConsumerEvent>>, SendError<()>> {
        match sender.try_reserve() {
            Ok(permit) => return Ok(Some(permit)),
            Err(TrySendError::Closed(())) => return Err(SendError(())),
            Err(TrySendError::Full(())) => {}
        }
        self.consumer.context().runtime.block_on(async {
            tokio::select! {
                permit = sender.reserve() => permit.map(Some),
                () = tokio::time::sleep_until(deadline.into()) => Ok(None),
                () = self.worker_cancel.cancelled() => Ok(None),
            }
        })
    }

    /// Pauses or resumes the whole assignment. Pauses even if it is paused already: partitions that were
    /// assigned since then are not paused.
    fn set_paused(&mut self, pause: bool) {
        if !pause && !self.paused {
            return;
        }
        let result = self.consumer.assignment().and_then(|assignment| {
            if pause { self.consumer.pause(&assignment) } else { self.consumer.resume(&assignment) }
        });
        if let Err(error) = result {
            warn!(event = event::SOURCE_ERROR, %error, pause, "the assignment could not be paused or resumed");
        }
        self.paused = pause;
    }

    /// Reads partitions from another position for which the log check has asked for that.
    fn restart_partitions(&mut self) {
        let partitions = self.state.take_partitions_to_restart();
        if partitions.is_empty() || self.event_sender.is_none() {
            return;
        }
        self.pending_messages.retain(|message| !partitions.contains(&message.partition));
        self.consumer.context().restart_partitions(&self.consumer, &partitions);
    }

    /// Ends consuming if the error is permanent; otherwise logs it. Missing rights and wrong credentials are a
    /// state that lasts until somebody changes them: the client tries again by itself.
    fn handle_error(&mut self, source: KafkaError) {
        let kind = kafka::failure_kind(&source);
        if source.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) {
            self.state.request_range_check();
            // If it is full, the check is woken already.
            let _ = self.wake_log_check.try_send(());
        } else if matches!(kind, FailureKind::NotAuthorised | FailureKind::AuthenticationFailed) {
            let failure = KafkaFailure::new(kind, &self.brokers, &self.subject, source.to_string());
            if let Some(problem) = SourceProblem::from_failure(&failure) {
                self.state.report_problem(problem);
            }
            let _ = self.wake_log_check.try_send(());
        } else if matches!(source, KafkaError::MessageConsumptionFatal(_))
            || kafka::classify_error(&source) == Disposition::Fatal
        {
            let error = SourceError::Kafka { brokers: self.brokers.clone(), source };
            self.consumer.context().report_failure(error);
            self.stop_forwarding();
            return;
        }
        warn!(event = event::SOURCE_ERROR, error = %source, "Kafka reported an error; consuming goes on");
    }
}
