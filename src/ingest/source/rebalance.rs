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
//! 2. Compare it with the log (`start_position`). If there is no position, start at the beginning. If
//!    it lies before the beginning, messages were lost: log `source.data_loss` and start at the beginning.
//!    If the log is another one, because the topic was created again: log `source.log_replaced`, record the new
//!    log in the table, and start at its beginning.
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
//! **Restart.** If `log_check` finds that the log of an assigned partition is another one, or that its next message
//! was removed, the partition is revoked and assigned again, without the group: step 2 of the assignment decides.
//!
//! If the wait times out, or the session expired and the partitions were lost without a warning, two
//! workers may process the same messages. That costs time but stores nothing twice: a commit to the table
//! states the position that it continues, and is fenced if another worker has moved that position.

use std::sync::{Arc, Mutex, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

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
use super::start_position::StartPositions;
use super::state::{ConsumerState, lock_ignoring_poison};
use crate::record::TopicPartition;
use crate::telemetry::{event, metrics};

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
    pub start_positions: StartPositions,
    pub runtime: Handle,
    pub brokers: String,
    pub drain_timeout: Duration,
    /// Cancelled when the worker is to stop: then no new assignment is waited for.
    pub worker_cancel: CancellationToken,
}

impl ClientContext for SourceContext {
    /// Records the ends of the logs, as of the last fetch of each partition.
    fn stats(&self, statistics: Statistics) {
        let join_state = statistics.cgrp.as_ref().map(|group| group.join_state.as_str());
        self.state.record_joined(join_state == Some("steady"));
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
        self.report_unless_stopping(result);
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
        let starts = self.start_positions.find(&to_partitions(list))?;
        for start in &starts {
            let (topic, number) = (&start.partition.topic, start.partition.number);
            list.set_partition_offset(topic, number, Offset::Offset(start.offset))
                .map_err(|source| self.kafka_error(source))?;
        }
        self.state.add_partitions(&starts);
        let names: Vec<String> =
            starts.iter().map(|start| format!("{}@{}", start.partition, start.offset)).collect();
        let assigned: Vec<(TopicPartition, u64)> =
            starts.into_iter().map(|start| (start.partition, start.log_number)).collect();
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

    /// Reads `partitions` again from the positions that are right for their logs now.
    pub(super) fn restart_partitions(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &[TopicPartition],
    ) {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.number);
        }
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let result = self
            .revoke_partitions(consumer, &list, cooperative)
            .and_then(|()| self.assign_partitions(consumer, &mut list, cooperative));
        self.report_unless_stopping(result);
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

    /// Reports an error, except while the worker stops: then no position is needed, and none is waited for.
    fn report_unless_stopping(&self, result: Result<(), SourceError>) {
        if let Err(error) = result
            && !self.worker_cancel.is_cancelled()
        {
            self.report_failure(error);
        }
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
