//! The Kafka consumer: polling that never stalls, and an assignment that is handed over cleanly.
//!
//! librdkafka is polled on a thread of its own, whatever the pipeline does. When the hand-over
//! queue is full, the assignment is paused and polling goes on, so that the group never thinks
//! this worker dead; when there is room it is resumed. A revocation travels through the queue
//! behind the messages that came before it, and is acknowledged only when they are settled.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicI64, Ordering as AtomicOrdering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers, Message as _};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::Options;
use crate::kafka;
use crate::record::{Message, Partition};
use crate::retry::{Decide, Verdict};
use crate::telemetry::event;

/// How long one poll waits: bounds the delay of pause, resume, commit and shutdown.
const POLL: Duration = Duration::from_millis(100);
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
            Self::Position { .. } | Self::BeyondEnd { .. } => Verdict::Fatal,
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
    #[expect(dead_code, reason = "its drop is the message")] sync_mpsc::SyncSender<()>,
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
struct Shared {
    /// Offsets after the last durable message, not yet told to Kafka.
    durable: Mutex<BTreeMap<Partition, i64>>,
    /// Milliseconds since `started` at the last poll.
    last_poll_ms: AtomicI64,
    /// Partitions that are this worker's at the moment.
    assigned: Mutex<BTreeSet<Partition>>,
}

impl Source {
    /// Joins the group and starts to poll. Messages come until `token` is cancelled; the group is
    /// left when [`Source::close`] is called.
    pub fn start(
        kafka: &kafka::Options,
        options: &Options,
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
        consumer.subscribe(&[&options.topic]).map_err(wrap)?;
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
        lock(&self.shared.durable).insert(partition, next_offset);
    }

    /// When Kafka was last polled, in milliseconds since 1970; 0 before the first poll.
    pub fn last_poll_ms(&self) -> i64 {
        self.shared.last_poll_ms.load(AtomicOrdering::Relaxed)
    }

    /// Tells Kafka the last durable positions and leaves the group.
    pub async fn close(mut self) {
        self.items.close();
        // A revocation still in the queue would wait for an answer that nobody gives.
        while self.items.try_recv().is_ok() {}
        self.finished.cancel();
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                error!(event = event::SOURCE_FAILED, "the consumer thread panicked");
            }
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
        .set("group.id", &options.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", options.session_timeout_ms.to_string())
        .set("max.poll.interval.ms", "300000")
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
                    let message = owned(&message);
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
        self.waiting.extend(message);
        let Some(sender) = &self.sender else {
            return;
        };
        while let Some(message) = self.waiting.pop_front() {
            if !lock(&self.shared.assigned).contains(&message.partition) {
                continue; // taken away while it waited: its new owner processes it
            }
            match sender.try_send(Item::Message(message)) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(Item::Message(message))) => {
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
        let fatal = matches!(source, KafkaError::MessageConsumptionFatal(_))
            || kafka::verdict(&source) == Verdict::Fatal;
        if fatal {
            let failed = SourceError::Kafka { brokers: self.brokers.clone(), source };
            self.consumer.context().fail(failed);
            self.stop_handing_over();
        } else {
            warn!(event = event::SOURCE_ERROR, error = %source, "Kafka reported an error; consuming goes on");
        }
    }
}

/// Tells Kafka the durable positions that it does not know yet.
fn commit(consumer: &BaseConsumer<Context>, shared: &Shared, mode: CommitMode) {
    let durable = std::mem::take(&mut *lock(&shared.durable));
    if durable.is_empty() {
        return;
    }
    let mut list = TopicPartitionList::new();
    for (partition, offset) in &durable {
        // Only fails for a partition number below zero, which Kafka never assigns.
        let _ =
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*offset));
    }
    if let Err(error) = consumer.commit(&list, mode) {
        // Not lost: the table has the positions, and the next commit covers this one.
        debug!(event = event::SOURCE_ERROR, %error, "offsets were not committed to Kafka");
    }
}

/// Callbacks from librdkafka; they run inside `poll`, on the polling thread.
struct Context {
    sender: Mutex<Option<mpsc::Sender<Item>>>,
    shared: Arc<Shared>,
    resume: Arc<dyn Resume>,
    runtime: Handle,
    brokers: String,
    request_timeout: Duration,
    drain: Duration,
}

impl ClientContext for Context {}

impl ConsumerContext for Context {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let result = if error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            self.assign(consumer, list, cooperative)
        } else {
            self.revoke(consumer, list, cooperative)
        };
        if let Err(failed) = result {
            self.fail(failed);
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(event = event::SOURCE_ERROR, %error, "offsets were not committed to Kafka");
        }
    }
}

impl Context {
    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let mut assigned = Vec::new();
        for partition in partitions(list) {
            let offset = self.start_offset(consumer, &partition)?;
            list.set_partition_offset(&partition.topic, partition.number, Offset::Offset(offset))
                .map_err(|source| self.kafka(source))?;
            assigned.push((partition, offset));
        }
        let names: Vec<String> = assigned.iter().map(|(p, o)| format!("{p}@{o}")).collect();
        let assigned: Vec<Partition> = assigned.into_iter().map(|(p, _)| p).collect();
        lock(&self.shared.assigned).extend(assigned.iter().cloned());
        info!(
            event = event::REBALANCE,
            change = "assigned",
            partitions = names.join(" "),
            "partitions assigned"
        );
        if !assigned.is_empty() {
            self.send(Item::Assigned(assigned));
        }
        let done =
            if cooperative { consumer.incremental_assign(list) } else { consumer.assign(list) };
        done.map_err(|source| self.kafka(source))
    }

    /// Where to start: behind the table's position, or at the beginning of the log.
    fn start_offset(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: &Partition,
    ) -> Result<i64, SourceError> {
        let resume = self
            .runtime
            .block_on(self.resume.next_offset(partition))
            .map_err(|reason| SourceError::Position { partition: partition.clone(), reason })?;
        let (low, high) = consumer
            .fetch_watermarks(&partition.topic, partition.number, self.request_timeout)
            .map_err(|source| self.kafka(source))?;
        match resume {
            Some(resume) if resume > high => {
                Err(SourceError::BeyondEnd { partition: partition.clone(), resume, end: high })
            }
            Some(resume) if resume < low => {
                error!(
                    event = event::SOURCE_GAP, partition = %partition, resume, low, lost = low - resume,
                    "Kafka's retention removed messages that were never processed; run a reconcile of the catalogue"
                );
                Ok(low)
            }
            Some(resume) => Ok(resume),
            None => Ok(low),
        }
    }

    fn revoke(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let revoked = partitions(list);
        let names: Vec<String> = revoked.iter().map(ToString::to_string).collect();
        let (settled, wait) = sync_mpsc::sync_channel(0);
        let handed_over = self.send(Item::Revoked(revoked.clone(), Settled(settled)));
        // The other end is dropped, never used: either answer but a time-out means settled.
        let drained = !handed_over
            || wait.recv_timeout(self.drain) != Err(sync_mpsc::RecvTimeoutError::Timeout);
        info!(
            event = event::REBALANCE,
            change = "revoked",
            partitions = names.join(" "),
            drained,
            "partitions revoked"
        );
        if !consumer.assignment_lost() {
            commit(consumer, &self.shared, CommitMode::Sync);
        }
        {
            let mut assigned = lock(&self.shared.assigned);
            let mut durable = lock(&self.shared.durable);
            for partition in &revoked {
                assigned.remove(partition);
                durable.remove(partition);
            }
        }
        let done =
            if cooperative { consumer.incremental_unassign(list) } else { consumer.unassign() };
        done.map_err(|source| self.kafka(source))
    }

    fn kafka(&self, source: KafkaError) -> SourceError {
        SourceError::Kafka { brokers: self.brokers.clone(), source }
    }

    fn fail(&self, failed: SourceError) {
        error!(event = event::SOURCE_FAILED, error = %failed, "consuming cannot go on");
        self.send(Item::Failed(failed));
    }

    /// Sends in order, waiting for room; false where the pipeline is gone.
    fn send(&self, item: Item) -> bool {
        let sender = lock(&self.sender).clone();
        sender.is_some_and(|sender| sender.blocking_send(item).is_ok())
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    list.elements()
        .iter()
        .map(|element| Partition { topic: element.topic().into(), number: element.partition() })
        .collect()
}

fn owned(message: &BorrowedMessage<'_>) -> Message {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        headers.iter().map(|h| (h.key.to_owned(), h.value.map(Bytes::copy_from_slice))).collect()
    });
    Message {
        partition: Partition { topic: message.topic().into(), number: message.partition() },
        offset: message.offset(),
        key: message.key().map(Bytes::copy_from_slice),
        payload: message.payload().map(Bytes::copy_from_slice),
        headers,
        timestamp_ms: message.timestamp().to_millis(),
    }
}

/// A poisoned lock only means that another thread panicked between two plain assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
