//! The Kafka consumer: polling that never stalls, and an assignment that is handed over cleanly.
//!
//! librdkafka is polled on a thread of its own, whatever the pipeline does. When the hand-over
//! queue is full, the thread waits for room; where there is none for [`PATIENCE`], the assignment is
//! paused and polling goes on, so that the group never thinks this worker dead, until there is. Pausing
//! at once would cost more than it saves: it throws away what librdkafka has fetched. A revocation travels through the queue
//! behind the messages that came before it, and is acknowledged only when they are settled.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicI64, Ordering as AtomicOrdering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendError, TrySendError};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::SourceOptions;
use super::rebalance::{SourceContext, commit_offsets};
use crate::kafka;
use crate::record::{KafkaMessage, TopicPartition};
use crate::retry::{Classify, Disposition};
use crate::telemetry::event;

/// How long one poll waits: bounds the delay of pause, resume, commit and shutdown.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// How long the thread waits for room before it pauses the assignment. Bounds the delay of a rebalance
/// while the pipeline is busy.
const QUEUE_FULL_TIMEOUT: Duration = Duration::from_millis(500);
/// How often durable positions are told to Kafka. They only serve lag monitors: the table's own
/// positions decide where a worker resumes.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// Why consuming ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Kafka refused, or a client could not be made.
    #[error("Kafka at {brokers}: {source}")]
    Kafka {
        /// The configured brokers.
        brokers: String,
        /// Why.
        source: KafkaError,
    },
    /// The position to resume from could not be learnt.
    #[error("{partition}: the position to resume from cannot be read from the table: {reason}")]
    PositionUnreadable {
        /// Which partition.
        partition: TopicPartition,
        /// Why.
        reason: String,
    },
    /// The log has moved away while it was consumed.
    #[error(
        "{topics}: a position that was due is not in the log any more: messages were removed before they were processed, or the topic was re-created. A new start tells which (`source.data_loss`)"
    )]
    OffsetOutOfRange {
        /// The topics that are consumed.
        topics: String,
    },
    /// The table is ahead of the topic.
    #[error(
        "{partition}: the table has consumed up to offset {resume}, but the log ends at {end}; the topic was re-created. Use a topic of a new name, or a new catalogue"
    )]
    OffsetBeyondEnd {
        /// Which partition.
        partition: TopicPartition,
        /// The offset to resume from.
        resume: i64,
        /// The end of the log.
        end: i64,
    },
}

impl Classify for SourceError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Kafka { source, .. } => kafka::classify_error(source),
            Self::PositionUnreadable { .. }
            | Self::OffsetOutOfRange { .. }
            | Self::OffsetBeyondEnd { .. } => Disposition::Fatal,
        }
    }
}

/// Knows where a partition is to be resumed: the stored table, not Kafka.
#[async_trait]
pub trait OffsetProvider: Send + Sync {
    /// The offset after the last one that is durably stored; `None` where nothing is.
    async fn next_offset(&self, partition: &TopicPartition) -> Result<Option<i64>, String>;
}

/// What the source hands over, in order.
#[derive(Debug)]
pub enum ConsumerEvent {
    /// A message to process.
    Message(KafkaMessage),
    /// Partitions were given to this worker.
    Assigned(Vec<TopicPartition>),
    /// Partitions are about to be taken away. Settle what came before, then drop the [`Settled`].
    Revoked(Vec<TopicPartition>, RevokeAck),
    /// Consuming cannot go on.
    Failed(SourceError),
}

/// Held while revoked partitions drain; dropping it lets the rebalance go on.
#[derive(Debug)]
pub struct RevokeAck(
    #[expect(dead_code, reason = "its drop is the message")] pub(crate) sync_mpsc::SyncSender<()>,
);

/// A running consumer.
pub struct Source {
    events: mpsc::Receiver<ConsumerEvent>,
    shared: Arc<SharedState>,
    finished: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the thread and the pipeline both see.
#[derive(Default)]
pub(crate) struct SharedState {
    /// Offsets after the last durable message, not yet told to Kafka.
    pub uncommitted_offsets: Mutex<BTreeMap<TopicPartition, i64>>,
    /// When Kafka was last polled, in milliseconds since 1970; 0 before the first poll.
    last_poll_ms: AtomicI64,
    /// Partitions that are this worker's at the moment.
    pub assigned_partitions: Mutex<BTreeSet<TopicPartition>>,
    /// Offsets after the last stored message of each of them.
    pub stored_offsets: Mutex<BTreeMap<TopicPartition, i64>>,
    /// Offsets after the last message of each of them that Kafka gave out.
    pub polled_offsets: Mutex<BTreeMap<TopicPartition, i64>>,
    /// Ends of the logs, as last heard.
    pub end_offsets: Mutex<BTreeMap<TopicPartition, i64>>,
}

/// How a consumer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Milliseconds since Kafka was last polled; none before the first poll.
    pub poll_age_ms: Option<i64>,
    /// Partitions that are this worker's.
    pub partitions: usize,
    /// Messages of these partitions that are not stored yet; none while an end is not known.
    pub lag: Option<i64>,
}

impl Source {
    /// Joins the group and starts to poll `topics`. Messages come until `token` is cancelled; the group is
    /// left when [`Source::close`] is called.
    pub fn start(
        kafka: &kafka::KafkaOptions,
        options: &SourceOptions,
        topics: &[&str],
        offset_provider: Arc<dyn OffsetProvider>,
        token: CancellationToken,
    ) -> Result<Self, SourceError> {
        let wrap = |source| SourceError::Kafka { brokers: kafka.brokers.clone(), source };
        let (sender, items) = mpsc::channel(options.queue_messages);
        let shared = Arc::new(SharedState::default());
        let context = SourceContext {
            sender: Mutex::new(Some(sender.clone())),
            shared: shared.clone(),
            offset_provider,
            runtime: Handle::current(),
            brokers: kafka.brokers.clone(),
            request_timeout: Duration::from_millis(kafka.request_timeout_ms),
            drain_timeout: Duration::from_secs(options.drain_seconds),
            cancel: token.clone(),
        };
        let consumer: BaseConsumer<SourceContext> =
            consumer_config(kafka, options).create_with_context(context).map_err(wrap)?;
        consumer.subscribe(topics).map_err(wrap)?;
        let finished = CancellationToken::new();
        let polling = PollingThread {
            consumer,
            sender: Some(sender),
            shared: shared.clone(),
            token,
            finished: finished.clone(),
            pending_messages: VecDeque::new(),
            paused: false,
            brokers: kafka.brokers.clone(),
            topics: topics.join(", "),
        };
        let thread = std::thread::Builder::new()
            .name("kafka-source".into())
            .spawn(move || polling.run())
            .map_err(|e| wrap(KafkaError::ClientCreation(e.to_string())))?;
        Ok(Self { events: items, shared, finished, thread: Some(thread) })
    }

    /// The next item; `None` after the token was cancelled and the queue is empty.
    pub async fn next(&mut self) -> Option<ConsumerEvent> {
        self.events.recv().await
    }

    /// Notes that everything below `next_offset` of `partition` is durable.
    pub fn mark_durable(&self, partition: TopicPartition, next_offset: i64) {
        if let Some(stored) = lock_ignoring_poison(&self.shared.stored_offsets).get_mut(&partition)
        {
            *stored = next_offset;
        }
        lock_ignoring_poison(&self.shared.uncommitted_offsets).insert(partition, next_offset);
    }

    /// How the consumer is doing.
    pub fn status(&self) -> ConsumerStatus {
        self.handle().status()
    }

    /// What others may look at while the pipeline is busy, or stuck.
    pub fn handle(&self) -> ConsumerHandle {
        ConsumerHandle(self.shared.clone())
    }

    /// Tells Kafka the last durable positions and leaves the group, where it is in reach.
    pub async fn close(mut self) {
        self.events.close();
        // A revocation still in the queue would wait for an answer that nobody gives.
        while self.events.try_recv().is_ok() {}
        self.finished.cancel();
        if let Some(thread) = self.thread.take()
            && let Some(Err(_)) = kafka::leave_group(move || thread.join()).await
        {
            error!(event = event::SOURCE_FAILED, "the consumer thread panicked");
        }
    }
}

/// Looks at a consumer from elsewhere.
#[derive(Clone)]
pub struct ConsumerHandle(Arc<SharedState>);

impl std::fmt::Debug for ConsumerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.status().fmt(f)
    }
}

impl ConsumerHandle {
    /// How the consumer is doing.
    pub fn status(&self) -> ConsumerStatus {
        let last = self.0.last_poll_ms.load(AtomicOrdering::Relaxed);
        let now = chrono::Utc::now().timestamp_millis();
        let (stored, ends) = (
            lock_ignoring_poison(&self.0.stored_offsets),
            lock_ignoring_poison(&self.0.end_offsets),
        );
        let lag = |(partition, stored): (&TopicPartition, &i64)| {
            ends.get(partition).map(|end| (end - stored).max(0))
        };
        ConsumerStatus {
            poll_age_ms: (last > 0).then_some(now - last),
            partitions: stored.len(),
            lag: stored.iter().map(lag).sum(),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.finished.cancel();
    }
}

fn consumer_config(kafka: &kafka::KafkaOptions, options: &SourceOptions) -> rdkafka::ClientConfig {
    let mut config = kafka.client_config();
    config
        .set("group.id", options.group_id())
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Where to begin is said at each assignment, by the table. A position that is gone later is no
        // reason to go on elsewhere in silence.
        .set("auto.offset.reset", "error")
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

/// The polling thread's state.
struct PollingThread {
    consumer: BaseConsumer<SourceContext>,
    sender: Option<mpsc::Sender<ConsumerEvent>>,
    shared: Arc<SharedState>,
    token: CancellationToken,
    finished: CancellationToken,
    /// Messages that found the queue full; at most those that were on their way when it filled.
    pending_messages: VecDeque<KafkaMessage>,
    paused: bool,
    brokers: String,
    topics: String,
}

impl PollingThread {
    fn run(mut self) {
        let mut last_commit = Instant::now();
        while !self.finished.is_cancelled() {
            if self.token.is_cancelled() && self.sender.is_some() {
                self.stop_forwarding();
            }
            match self.consumer.poll(POLL_TIMEOUT) {
                Some(Ok(message)) => {
                    let message = kafka::to_owned_message(&message);
                    let polled = (message.partition.clone(), message.offset + 1);
                    lock_ignoring_poison(&self.shared.polled_offsets).extend([polled]);
                    self.forward(Some(message));
                }
                Some(Err(error)) => self.handle_error(error),
                None => self.forward(None),
            }
            let now = chrono::Utc::now().timestamp_millis();
            self.shared.last_poll_ms.store(now, AtomicOrdering::Relaxed);
            if last_commit.elapsed() >= COMMIT_INTERVAL {
                commit_offsets(&self.consumer, &self.shared, CommitMode::Async);
                last_commit = Instant::now();
            }
        }
        self.stop_forwarding();
        commit_offsets(&self.consumer, &self.shared, CommitMode::Sync);
    }

    fn stop_forwarding(&mut self) {
        self.sender = None;
        *lock_ignoring_poison(&self.consumer.context().sender) = None;
        self.pending_messages.clear();
        self.set_paused(true);
    }

    /// Hands over what waits, then `message`; pauses the assignment while there is no room.
    fn forward(&mut self, message: Option<KafkaMessage>) {
        let Some(sender) = &self.sender else {
            return; // stopping: the next owner processes it
        };
        self.pending_messages.extend(message);
        // A paused assignment has waited long enough: polling goes on meanwhile.
        let queue_timeout = if self.paused { Duration::ZERO } else { QUEUE_FULL_TIMEOUT };
        let until = Instant::now() + queue_timeout;
        while let Some(message) = self.pending_messages.pop_front() {
            if !lock_ignoring_poison(&self.shared.assigned_partitions).contains(&message.partition)
            {
                continue; // taken away while it waited: its new owner processes it
            }
            match self.reserve_capacity(sender, until) {
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

    /// A place in the queue, once there is one; none where there is none until then, or where nothing
    /// is to be handed over any more.
    fn reserve_capacity<'a>(
        &self,
        sender: &'a mpsc::Sender<ConsumerEvent>,
        until: Instant,
    ) -> Result<Option<mpsc::Permit<'a, ConsumerEvent>>, SendError<()>> {
        match sender.try_reserve() {
            Ok(permit) => return Ok(Some(permit)),
            Err(TrySendError::Closed(())) => return Err(SendError(())),
            Err(TrySendError::Full(())) => {}
        }
        self.consumer.context().runtime.block_on(async {
            tokio::select! {
                permit = sender.reserve() => permit.map(Some),
                () = tokio::time::sleep_until(until.into()) => Ok(None),
                () = self.token.cancelled() => Ok(None),
            }
        })
    }

    /// Pauses or resumes the whole assignment. Pausing is repeated: partitions that were assigned
    /// meanwhile are not paused.
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

    fn handle_error(&mut self, source: KafkaError) {
        let moved = source.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset);
        let fatal = moved
            || matches!(source, KafkaError::MessageConsumptionFatal(_))
            || kafka::classify_error(&source) == Disposition::Fatal;
        if fatal {
            let failed = if moved {
                SourceError::OffsetOutOfRange { topics: self.topics.clone() }
            } else {
                SourceError::Kafka { brokers: self.brokers.clone(), source }
            };
            self.consumer.context().report_failure(failed);
            self.stop_forwarding();
        } else {
            warn!(event = event::SOURCE_ERROR, error = %source, "Kafka reported an error; consuming goes on");
        }
    }
}

/// A poisoned lock only means that another thread panicked between two plain assignments.
pub(crate) fn lock_ignoring_poison<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
