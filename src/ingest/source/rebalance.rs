//! The rebalance protocol: how partitions are assigned, and released only once they are stored.
//!
//! librdkafka calls [`SourceContext::rebalance`] on the consumer thread, inside of a poll. The group uses
//! the cooperative protocol: a call names only the partitions that are added or removed, and the others
//! keep flowing. No poll happens during the call, so each wait in it is limited to stay well below
//! `max.poll.interval.ms`, after which the group would exclude this worker.
//!
//! **Assignment.** For each new partition:
//!
//! 1. Read the position that the table has stored. Kafka's committed offset is not used: the table
//!    writes rows and positions in one commit, so only its position is certain to match its rows.
//! 2. Compare it with the beginning and end of the log. If there is no position, start at the beginning. If
//!    it lies before the beginning, messages were lost: log `source.data_loss` and start at the beginning.
//!    If it lies behind the end, the topic was re-created: stop.
//! 3. Add the partition to [`ConsumerState`] and queue [`ConsumerEvent::Assigned`], so that the pipeline
//!    reads the position that its first commit expects before it sees a message.
//! 4. Hand the offsets to librdkafka, which begins to fetch.
//!
//! **Revocation.** The call returns only when the partitions may be given to another worker:
//!
//! 1. Queue [`ConsumerEvent::Revoked`] behind all messages that were queued before, with a [`RevokeAck`].
//! 2. The pipeline receives events in order. When it comes to this one, all earlier messages are
//!    processed; it commits them to the table, forgets the partitions and drops the acknowledgement.
//! 3. Wait for that, at most `source.drain_seconds`. Then commit the offsets to Kafka for lag monitors,
//!    remove the partitions from [`ConsumerState`] and release them. Messages that did not fit into the
//!    queue yet are dropped by the consumer thread, because their partition is no longer assigned.
//! 4. The next owner starts at step 1 above and finds the position of the commit in step 2.
//!
//! If the wait times out, or the session expired and the partitions were lost without a warning, two
//! workers may process the same messages. That costs time but stores nothing twice: a commit to the table
//! states the position that it continues, and is fenced if another worker has moved that position.

use std::sync::{Arc, Mutex, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::error::SourceError;
use super::event::{ConsumerEvent, RevokeAck};
use super::state::{ConsumerState, lock_ignoring_poison};
use crate::kafka;
use crate::record::TopicPartition;
use crate::retry::{Backoff, Disposition};
use crate::telemetry::{event, metrics};

/// How long to wait for a broker that does not know the ends of a partition's log yet, for example
/// because it restarts. No poll happens in this time: well below `max.poll.interval.ms`.
const WATERMARK_TIMEOUT: Duration = Duration::from_secs(60);

/// Provides the offsets from which assigned partitions are read. The table does, not Kafka.
#[async_trait]
pub trait OffsetProvider: Send + Sync {
    /// Returns the offset after the last durably stored message; `None` if nothing is stored.
    async fn next_offset(&self, partition: &TopicPartition) -> Result<Option<i64>, String>;
}

/// Commits to Kafka the durable offsets that it does not know yet.
pub(super) fn commit_offsets(
    consumer: &BaseConsumer<SourceContext>,
    state: &ConsumerState,
    mode: CommitMode,
) {
    let offsets = state.take_uncommitted_offsets();
    if offsets.is_empty() {
        return;
    }
    let mut list = TopicPartitionList::new();
    for (partition, offset) in &offsets {
        // Only fails for a partition number below zero, which Kafka never assigns.
        let _ =
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*offset));
    }
    if let Err(error) = consumer.commit(&list, mode) {
        // Nothing is lost: the table has the positions, and the next commit covers this one.
        debug!(event = event::SOURCE_ERROR, %error, "offsets were not committed to Kafka");
    }
}

/// Callbacks from librdkafka; they run inside of `poll`, on the consumer thread.
pub(super) struct SourceContext {
    /// The queue to the pipeline; `None` once the worker is shutting down.
    pub event_sender: Mutex<Option<mpsc::Sender<ConsumerEvent>>>,
    pub state: Arc<ConsumerState>,
    pub offset_provider: Arc<dyn OffsetProvider>,
    pub runtime: Handle,
    pub brokers: String,
    pub request_timeout: Duration,
    pub drain_timeout: Duration,
    /// Cancelled when the worker is to stop: then no new assignment is waited for.
    pub worker_cancel: CancellationToken,
}

impl ClientContext for SourceContext {
    /// Records the ends of the logs, as of the last fetch of each partition.
    fn stats(&self, statistics: Statistics) {
        // librdkafka lists the group's coordinator as a further, logical broker.
        let brokers = statistics.brokers.values().filter(|broker| broker.source != "logical");
        let brokers_up = brokers.filter(|broker| broker.state == "UP").count();
        metrics::global().brokers_up.set(&[], brokers_up as f64);
        if brokers_up == 0 {
            self.state.clear_end_offsets();
        } else {
            self.state.update_end_offsets(&statistics.topics);
        }
    }
}

impl ConsumerContext for SourceContext {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        error: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let result = if error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            self.assign_partitions(consumer, list, cooperative)
        } else {
            self.revoke_partitions(consumer, list, cooperative)
        };
        // While the worker stops, no position is needed, and none is waited for.
        if let Err(error) = result
            && !self.worker_cancel.is_cancelled()
        {
            self.report_failure(error);
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(event = event::SOURCE_ERROR, %error, "offsets were not committed to Kafka");
        }
    }
}

impl SourceContext {
    fn assign_partitions(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let mut start_offsets = Vec::new();
        for partition in to_partitions(list) {
            let offset = self.start_offset(consumer, &partition)?;
            list.set_partition_offset(&partition.topic, partition.number, Offset::Offset(offset))
                .map_err(|source| self.kafka_error(source))?;
            start_offsets.push((partition, offset));
        }
        self.state.add_partitions(&start_offsets);
        let names: Vec<String> = start_offsets.iter().map(|(p, o)| format!("{p}@{o}")).collect();
        let assigned: Vec<TopicPartition> = start_offsets.into_iter().map(|(p, _)| p).collect();
        info!(
            event = event::REBALANCE,
            change = "assigned",
            partitions = names.join(" "),
            "partitions assigned"
        );
        if !assigned.is_empty() {
            self.send_event(ConsumerEvent::Assigned(assigned));
        }
        let done =
            if cooperative { consumer.incremental_assign(list) } else { consumer.assign(list) };
        // librdkafka remembers that a partition was paused even while another worker owns it: if it
        // was lost while paused and comes back, it would never yield a message.
        done.and_then(|()| consumer.resume(list)).map_err(|source| self.kafka_error(source))
    }

    /// Returns the offset to start from: the table's position, or the beginning of the log.
    fn start_offset(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: &TopicPartition,
    ) -> Result<i64, SourceError> {
        let resume = self.runtime.block_on(self.offset_provider.next_offset(partition)).map_err(
            |reason| SourceError::PositionUnreadable { partition: partition.clone(), reason },
        )?;
        let (low, high) = self.fetch_watermarks(consumer, partition)?;
        match resume {
            Some(resume) if resume > high => Err(SourceError::OffsetBeyondEnd {
                partition: partition.clone(),
                resume,
                end: high,
            }),
            Some(resume) if resume < low => {
                error!(
                    event = event::SOURCE_DATA_LOSS, partition = %partition, requested_offset = resume, earliest_offset = low, lost_messages = low - resume,
                    "Kafka's retention removed messages that were never processed; run a reconcile of the catalogue"
                );
                Ok(low)
            }
            Some(resume) => Ok(resume),
            None => Ok(low),
        }
    }

    /// Returns the beginning and end of a partition's log. Waits for a broker that restarts.
    fn fetch_watermarks(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: &TopicPartition,
    ) -> Result<(i64, i64), SourceError> {
        let started = Instant::now();
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        loop {
            let watermarks =
                consumer.fetch_watermarks(&partition.topic, partition.number, self.request_timeout);
            match watermarks {
                Ok(watermarks) => return Ok(watermarks),
                Err(error)
                    if kafka::classify_error(&error) == Disposition::Retry
                        && started.elapsed() < WATERMARK_TIMEOUT =>
                {
                    info!(event = event::RETRY, stage = "source", attempt, %error, "the end of a partition's log is not known yet");
                    if !self.runtime.block_on(backoff.wait(attempt, &self.worker_cancel)) {
                        return Err(self.kafka_error(error));
                    }
                    attempt += 1;
                }
                Err(error) => return Err(self.kafka_error(error)),
            }
        }
    }

    fn revoke_partitions(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let revoked = to_partitions(list);
        let names: Vec<String> = revoked.iter().map(ToString::to_string).collect();
        let (ack, acknowledged) = sync_mpsc::sync_channel(0);
        let started = Instant::now();
        let send_result = self.send_event_with_timeout(
            ConsumerEvent::Revoked(revoked.clone(), RevokeAck(ack)),
            self.drain_timeout,
        );
        let remaining = self.drain_timeout.saturating_sub(started.elapsed());
        let drained = match send_result {
            // The pipeline only drops its end: any result but a timeout is the acknowledgement.
            SendResult::Delivered => {
                acknowledged.recv_timeout(remaining) != Err(sync_mpsc::RecvTimeoutError::Timeout)
            }
            SendResult::TimedOut => false,
            SendResult::ReceiverGone => true,
        };
        info!(
            event = event::REBALANCE,
            change = "revoked",
            partitions = names.join(" "),
            drained,
            "partitions revoked"
        );
        if !consumer.assignment_lost() {
            commit_offsets(consumer, &self.state, CommitMode::Sync);
        }
        self.state.remove_partitions(&revoked);
        let done =
            if cooperative { consumer.incremental_unassign(list) } else { consumer.unassign() };
        done.map_err(|source| self.kafka_error(source))
    }

    fn kafka_error(&self, source: KafkaError) -> SourceError {
        SourceError::Kafka { brokers: self.brokers.clone(), source }
    }

    /// Logs that consuming cannot go on and queues the reason for the pipeline.
    pub(super) fn report_failure(&self, error: SourceError) {
        error!(event = event::SOURCE_FAILED, %error, "consuming cannot go on");
        self.send_event(ConsumerEvent::Failed(error));
    }

    /// Queues `item` behind what was queued before; waits at most `limit` while the queue is full.
    fn send_event_with_timeout(&self, item: ConsumerEvent, limit: Duration) -> SendResult {
        let Some(sender) = lock_ignoring_poison(&self.event_sender).clone() else {
            return SendResult::ReceiverGone;
        };
        let sending = async { tokio::time::timeout(limit, sender.send(item)).await };
        match self.runtime.block_on(sending) {
            Ok(Ok(())) => SendResult::Delivered,
            Ok(Err(_)) => SendResult::ReceiverGone,
            Err(_) => SendResult::TimedOut,
        }
    }

    /// Queues `item` behind what was queued before; waits while the queue is full. Returns false if the
    /// pipeline has ended.
    fn send_event(&self, item: ConsumerEvent) -> bool {
        let sender = lock_ignoring_poison(&self.event_sender).clone();
        sender.is_some_and(|sender| sender.blocking_send(item).is_ok())
    }
}

/// Result of sending an event to the pipeline.
enum SendResult {
    Delivered,
    TimedOut,
    ReceiverGone,
}

fn to_partitions(list: &TopicPartitionList) -> Vec<TopicPartition> {
    list.elements()
        .iter()
        .map(|element| TopicPartition {
            topic: element.topic().into(),
            number: element.partition(),
        })
        .collect()
}
