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

use super::Options;
use super::rebalance::{Context, commit};
use crate::kafka;
use crate::record::{Message, Partition};
use crate::retry::{Decide, Verdict};
use crate::telemetry::event;

/// How long one poll waits: bounds the delay of pause, resume, commit and shutdown.
const POLL: Duration = Duration::from_millis(100);
/// How long the thread waits for room before it pauses the assignment. Bounds the delay of a rebalance
/// while the pipeline is busy.
const PATIENCE: Duration = Duration::from_millis(500);
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
    Position {
        /// Which partition.
        partition: Partition,
        /// Why.
        reason: String,
    },
    /// The log has moved away while it was consumed.
    #[error(
        "{topics}: a position that was due is not in the log any more: messages were removed before they were processed, or the topic was re-created. A new start tells which (`source.gap`)"
    )]
    Moved {
        /// The topics that are consumed.
        topics: String,
    },
    /// The table is ahead of the topic.
    #[error(
        "{partition}: the table has consumed up to offset {resume}, but the log ends at {end}; the topic was re-created. Use a topic of a new name, or a new catalogue"
    )]
    BeyondEnd {
        /// Which partition.
        partition: Partition,
        /// The offset to resume from.
        resume: i64,
        /// The end of the log.
        end: i64,
    },
}

impl Decide for SourceError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Kafka { source, .. } => kafka::verdict(source),
            Self::Position { .. } | Self::Moved { .. } | Self::BeyondEnd { .. } => Verdict::Fatal,
        }
    }
}

/// Knows where a partition is to be resumed: the stored table, not Kafka.
#[async_trait]
pub trait Resume: Send + Sync {
    /// The offset after the last one that is durably stored; `None` where nothing is.
    async fn next_offset(&self, partition: &Partition) -> Result<Option<i64>, String>;
}

/// What the source hands over, in order.
#[derive(Debug)]
pub enum Item {
    /// A message to process.
    Message(Message),
    /// Partitions were given to this worker.
    Assigned(Vec<Partition>),
    /// Partitions are about to be taken away. Settle what came before, then drop the [`Settled`].
    Revoked(Vec<Partition>, Settled),
    /// Consuming cannot go on.
    Failed(SourceError),
}

/// Held while revoked partitions drain; dropping it lets the rebalance go on.
#[derive(Debug)]
pub struct Settled(
    #[expect(dead_code, reason = "its drop is the message")] pub(crate) sync_mpsc::SyncSender<()>,
);

/// A running consumer.
pub struct Source {
    items: mpsc::Receiver<Item>,
    shared: Arc<Shared>,
    finished: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the thread and the pipeline both see.
#[derive(Default)]
pub(crate) struct Shared {
    /// Offsets after the last durable message, not yet told to Kafka.
    pub durable: Mutex<BTreeMap<Partition, i64>>,
    /// When Kafka was last polled, in milliseconds since 1970; 0 before the first poll.
    last_poll_ms: AtomicI64,
    /// Partitions that are this worker's at the moment.
    pub assigned: Mutex<BTreeSet<Partition>>,
    /// Offsets after the last stored message of each of them.
    pub stored: Mutex<BTreeMap<Partition, i64>>,
    /// Offsets after the last message of each of them that Kafka gave out.
    pub taken: Mutex<BTreeMap<Partition, i64>>,
    /// Ends of the logs, as last heard.
    pub ends: Mutex<BTreeMap<Partition, i64>>,
}

/// How a consumer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pulse {
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
        kafka: &kafka::Options,
        options: &Options,
        topics: &[&str],
        resume: Arc<dyn Resume>,
        token: CancellationToken,
    ) -> Result<Self, SourceError> {
        let wrap = |source| SourceError::Kafka { brokers: kafka.brokers.clone(), source };
        let (sender, items) = mpsc::channel(options.queue_messages);
        let shared = Arc::new(Shared::default());
        let context = Context {
            sender: Mutex::new(Some(sender.clone())),
            shared: shared.clone(),
            resume,
            runtime: Handle::current(),
            brokers: kafka.brokers.clone(),
            request_timeout: Duration::from_millis(kafka.request_timeout_ms),
            drain: Duration::from_secs(options.drain_seconds),
        };
        let consumer: BaseConsumer<Context> =
            configuration(kafka, options).create_with_context(context).map_err(wrap)?;
        consumer.subscribe(topics).map_err(wrap)?;
        let finished = CancellationToken::new();
        let polling = Polling {
            consumer,
            sender: Some(sender),
            shared: shared.clone(),
            token,
            finished: finished.clone(),
            waiting: VecDeque::new(),
            paused: false,
            brokers: kafka.brokers.clone(),
            topics: topics.join(", "),
        };
        let thread = std::thread::Builder::new()
            .name("kafka-source".into())
            .spawn(move || polling.run())
            .map_err(|e| wrap(KafkaError::ClientCreation(e.to_string())))?;
        Ok(Self { items, shared, finished, thread: Some(thread) })
    }

    /// The next item; `None` after the token was cancelled and the queue is empty.
    pub async fn next(&mut self) -> Option<Item> {
        self.items.recv().await
    }

    /// Notes that everything below `next_offset` of `partition` is durable.
    pub fn mark_durable(&self, partition: Partition, next_offset: i64) {
        if let Some(stored) = lock(&self.shared.stored).get_mut(&partition) {
            *stored = next_offset;
        }
        lock(&self.shared.durable).insert(partition, next_offset);
    }

    /// How the consumer is doing.
    pub fn pulse(&self) -> Pulse {
        self.watch().pulse()
    }

    /// What others may look at while the pipeline is busy, or stuck.
    pub fn watch(&self) -> Watch {
        Watch(self.shared.clone())
    }

    /// Tells Kafka the last durable positions and leaves the group, where it is in reach.
    pub async fn close(mut self) {
        self.items.close();
        // A revocation still in the queue would wait for an answer that nobody gives.
        while self.items.try_recv().is_ok() {}
        self.finished.cancel();
        if let Some(thread) = self.thread.take()
            && let Some(Err(_)) = kafka::leave(move || thread.join()).await
        {
            error!(event = event::SOURCE_FAILED, "the consumer thread panicked");
        }
    }
}

/// Looks at a consumer from elsewhere.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pulse().fmt(f)
    }
}

impl Watch {
    /// How the consumer is doing.
    pub fn pulse(&self) -> Pulse {
        let last = self.0.last_poll_ms.load(AtomicOrdering::Relaxed);
        let now = chrono::Utc::now().timestamp_millis();
        let (stored, ends) = (lock(&self.0.stored), lock(&self.0.ends));
        let lag = |(partition, stored): (&Partition, &i64)| {
            ends.get(partition).map(|end| (end - stored).max(0))
        };
        Pulse {
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

fn configuration(kafka: &kafka::Options, options: &Options) -> rdkafka::ClientConfig {
    let mut config = kafka.client();
    config
        .set("group.id", options.group())
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
struct Polling {
    consumer: BaseConsumer<Context>,
    sender: Option<mpsc::Sender<Item>>,
    shared: Arc<Shared>,
    token: CancellationToken,
    finished: CancellationToken,
    /// Messages that found the queue full; at most those that were on their way when it filled.
    waiting: VecDeque<Message>,
    paused: bool,
    brokers: String,
    topics: String,
}

impl Polling {
    fn run(mut self) {
        let mut last_commit = Instant::now();
        while !self.finished.is_cancelled() {
            if self.token.is_cancelled() && self.sender.is_some() {
                self.stop_handing_over();
            }
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    let message = kafka::owned(&message);
                    let taken = (message.partition.clone(), message.offset + 1);
                    lock(&self.shared.taken).extend([taken]);
                    self.hand_over(Some(message));
                }
                Some(Err(error)) => self.report(error),
                None => self.hand_over(None),
            }
            let now = chrono::Utc::now().timestamp_millis();
            self.shared.last_poll_ms.store(now, AtomicOrdering::Relaxed);
            if last_commit.elapsed() >= COMMIT_INTERVAL {
                commit(&self.consumer, &self.shared, CommitMode::Async);
                last_commit = Instant::now();
            }
        }
        self.stop_handing_over();
        commit(&self.consumer, &self.shared, CommitMode::Sync);
    }

    fn stop_handing_over(&mut self) {
        self.sender = None;
        *lock(&self.consumer.context().sender) = None;
        self.waiting.clear();
        self.pause(true);
    }

    /// Hands over what waits, then `message`; pauses the assignment while there is no room.
    fn hand_over(&mut self, message: Option<Message>) {
        let Some(sender) = &self.sender else {
            return; // stopping: the next owner processes it
        };
        self.waiting.extend(message);
        // A paused assignment has waited long enough: polling goes on meanwhile.
        let patience = if self.paused { Duration::ZERO } else { PATIENCE };
        let until = Instant::now() + patience;
        while let Some(message) = self.waiting.pop_front() {
            if !lock(&self.shared.assigned).contains(&message.partition) {
                continue; // taken away while it waited: its new owner processes it
            }
            match self.room(sender, until) {
                Ok(Some(room)) => room.send(Item::Message(message)),
                Ok(None) => {
                    self.waiting.push_front(message);
                    break;
                }
                Err(_) => {
                    self.waiting.clear();
                    break;
                }
            }
        }
        self.pause(!self.waiting.is_empty());
    }

    /// A place in the queue, once there is one; none where there is none until then, or where nothing
    /// is to be handed over any more.
    fn room<'a>(
        &self,
        sender: &'a mpsc::Sender<Item>,
        until: Instant,
    ) -> Result<Option<mpsc::Permit<'a, Item>>, SendError<()>> {
        match sender.try_reserve() {
            Ok(room) => return Ok(Some(room)),
            Err(TrySendError::Closed(())) => return Err(SendError(())),
            Err(TrySendError::Full(())) => {}
        }
        self.consumer.context().runtime.block_on(async {
            tokio::select! {
                room = sender.reserve() => room.map(Some),
                () = tokio::time::sleep_until(until.into()) => Ok(None),
                () = self.token.cancelled() => Ok(None),
            }
        })
    }

    /// Pauses or resumes the whole assignment. Pausing is repeated: partitions that were assigned
    /// meanwhile are not paused.
    fn pause(&mut self, pause: bool) {
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

    fn report(&mut self, source: KafkaError) {
        let moved = source.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset);
        let fatal = moved
            || matches!(source, KafkaError::MessageConsumptionFatal(_))
            || kafka::verdict(&source) == Verdict::Fatal;
        if fatal {
            let failed = if moved {
                SourceError::Moved { topics: self.topics.clone() }
            } else {
                SourceError::Kafka { brokers: self.brokers.clone(), source }
            };
            self.consumer.context().fail(failed);
            self.stop_handing_over();
        } else {
            warn!(event = event::SOURCE_ERROR, error = %source, "Kafka reported an error; consuming goes on");
        }
    }
}

/// A poisoned lock only means that another thread panicked between two plain assignments.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
