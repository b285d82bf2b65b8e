//! What happens to the assignment: where partitions are resumed, and how they are handed over.

use std::sync::{Arc, Mutex, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::{Partition as Fetched, Statistics};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::consumer::{
    ConsumerEvent, OffsetProvider, RevokeAck, SharedState, SourceError, lock_ignoring_poison,
};
use crate::kafka;
use crate::record::TopicPartition;
use crate::retry::{Backoff, Disposition};
use crate::telemetry::{event, metrics};

/// How long a broker is waited for that does not know the ends of a partition's log yet. No poll
/// happens meanwhile: well below `max.poll.interval.ms`.
const WATERMARK_TIMEOUT: Duration = Duration::from_secs(60);

/// Tells Kafka the durable positions that it does not know yet.
pub(crate) fn commit_offsets(
    consumer: &BaseConsumer<SourceContext>,
    shared: &SharedState,
    mode: CommitMode,
) {
    let durable = std::mem::take(&mut *lock_ignoring_poison(&shared.uncommitted_offsets));
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
pub(crate) struct SourceContext {
    pub sender: Mutex<Option<mpsc::Sender<ConsumerEvent>>>,
    pub shared: Arc<SharedState>,
    pub offset_provider: Arc<dyn OffsetProvider>,
    pub runtime: Handle,
    pub brokers: String,
    pub request_timeout: Duration,
    pub drain_timeout: Duration,
    /// Cancelled when the worker is to stop: then no new assignment is waited for.
    pub cancel: CancellationToken,
}

impl ClientContext for SourceContext {
    /// Where the logs end, as librdkafka heard with the last messages it fetched; nobody knows it
    /// while no broker is reached.
    fn stats(&self, statistics: Statistics) {
        // The group's coordinator is told as a further, logical broker.
        let real = statistics.brokers.values().filter(|broker| broker.source != "logical");
        let up = real.filter(|broker| broker.state == "UP").count();
        metrics::global().brokers_up.set(&[], up as f64);
        let mut ends = lock_ignoring_poison(&self.shared.end_offsets);
        if up == 0 {
            ends.clear();
            return;
        }
        let taken = lock_ignoring_poison(&self.shared.polled_offsets);
        for (name, topic) in &statistics.topics {
            for (number, partition) in &topic.partitions {
                // Below zero: not known yet.
                if partition.hi_offset >= 0 {
                    let topic_partition =
                        TopicPartition { topic: name.as_str().into(), number: *number };
                    let end = readable_end_offset(partition, taken.get(&topic_partition).copied());
                    ends.insert(topic_partition, end);
                }
            }
        }
    }
}

/// Where a log ends for whom it has something to read: where librdkafka has given out all there is, what
/// lies behind the last message, or behind where the assignment began, is marks of transactions.
fn readable_end_offset(partition: &Fetched, polled_offset: Option<i64>) -> i64 {
    let end = partition.hi_offset;
    let is_given_out =
        partition.fetchq_cnt == 0 && partition.next_offset >= end && partition.app_offset >= end;
    polled_offset.filter(|_| is_given_out).map_or(end, |taken| taken.min(end))
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
            self.assign(consumer, list, cooperative)
        } else {
            self.revoke(consumer, list, cooperative)
        };
        if let Err(failed) = result
            && !self.cancel.is_cancelled()
        {
            self.report_failure(failed);
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(event = event::SOURCE_ERROR, %error, "offsets were not committed to Kafka");
        }
    }
}

impl SourceContext {
    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let mut assigned = Vec::new();
        for partition in to_partitions(list) {
            let offset = self.start_offset(consumer, &partition)?;
            list.set_partition_offset(&partition.topic, partition.number, Offset::Offset(offset))
                .map_err(|source| self.kafka_error(source))?;
            assigned.push((partition, offset));
        }
        let names: Vec<String> = assigned.iter().map(|(p, o)| format!("{p}@{o}")).collect();
        lock_ignoring_poison(&self.shared.stored_offsets).extend(assigned.iter().cloned());
        lock_ignoring_poison(&self.shared.polled_offsets).extend(assigned.iter().cloned());
        let assigned: Vec<TopicPartition> = assigned.into_iter().map(|(p, _)| p).collect();
        lock_ignoring_poison(&self.shared.assigned_partitions).extend(assigned.iter().cloned());
        info!(
            event = event::REBALANCE,
            change = "assigned",
            partitions = names.join(" "),
            "partitions assigned"
        );
        if !assigned.is_empty() {
            self.send(ConsumerEvent::Assigned(assigned));
        }
        let done =
            if cooperative { consumer.incremental_assign(list) } else { consumer.assign(list) };
        // librdkafka remembers for each partition that it was paused, even while it is somebody
        // else's: one that was lost while paused and comes back would be silent for ever.
        done.and_then(|()| consumer.resume(list)).map_err(|source| self.kafka_error(source))
    }

    /// Where to start: behind the table's position, or at the beginning of the log.
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

    /// Begin and end of a partition's log. A broker that restarts is waited for, until the worker is to
    /// stop.
    fn fetch_watermarks(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: &TopicPartition,
    ) -> Result<(i64, i64), SourceError> {
        let started = Instant::now();
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        loop {
            let found =
                consumer.fetch_watermarks(&partition.topic, partition.number, self.request_timeout);
            match found {
                Ok(watermarks) => return Ok(watermarks),
                Err(error)
                    if kafka::classify_error(&error) == Disposition::Retry
                        && started.elapsed() < WATERMARK_TIMEOUT =>
                {
                    info!(event = event::RETRY, stage = "source", attempt, %error, "the end of a partition's log is not known yet");
                    if !self.runtime.block_on(backoff.wait(attempt, &self.cancel)) {
                        return Err(self.kafka_error(error));
                    }
                    attempt += 1;
                }
                Err(error) => return Err(self.kafka_error(error)),
            }
        }
    }

    fn revoke(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
        cooperative: bool,
    ) -> Result<(), SourceError> {
        let revoked = to_partitions(list);
        let names: Vec<String> = revoked.iter().map(ToString::to_string).collect();
        let (settled, wait) = sync_mpsc::sync_channel(0);
        let started = Instant::now();
        let send_result = self.send_with_timeout(
            ConsumerEvent::Revoked(revoked.clone(), RevokeAck(settled)),
            self.drain_timeout,
        );
        let remaining = self.drain_timeout.saturating_sub(started.elapsed());
        let drained = match send_result {
            // The other end is dropped, never used: either answer but a time-out means settled.
            SendResult::Delivered => {
                wait.recv_timeout(remaining) != Err(sync_mpsc::RecvTimeoutError::Timeout)
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
            commit_offsets(consumer, &self.shared, CommitMode::Sync);
        }
        {
            let mut assigned = lock_ignoring_poison(&self.shared.assigned_partitions);
            let mut durable = lock_ignoring_poison(&self.shared.uncommitted_offsets);
            let mut stored = lock_ignoring_poison(&self.shared.stored_offsets);
            let mut taken = lock_ignoring_poison(&self.shared.polled_offsets);
            for partition in &revoked {
                assigned.remove(partition);
                durable.remove(partition);
                stored.remove(partition);
                taken.remove(partition);
            }
        }
        let done =
            if cooperative { consumer.incremental_unassign(list) } else { consumer.unassign() };
        done.map_err(|source| self.kafka_error(source))
    }

    fn kafka_error(&self, source: KafkaError) -> SourceError {
        SourceError::Kafka { brokers: self.brokers.clone(), source }
    }

    /// Tells the pipeline that consuming cannot go on.
    pub fn report_failure(&self, failed: SourceError) {
        error!(event = event::SOURCE_FAILED, error = %failed, "consuming cannot go on");
        self.send(ConsumerEvent::Failed(failed));
    }

    /// Sends in order, waiting for room for at most `limit`.
    fn send_with_timeout(&self, item: ConsumerEvent, limit: Duration) -> SendResult {
        let Some(sender) = lock_ignoring_poison(&self.sender).clone() else {
            return SendResult::ReceiverGone;
        };
        let sending = async { tokio::time::timeout(limit, sender.send(item)).await };
        match self.runtime.block_on(sending) {
            Ok(Ok(())) => SendResult::Delivered,
            Ok(Err(_)) => SendResult::ReceiverGone,
            Err(_) => SendResult::TimedOut,
        }
    }

    /// Sends in order, waiting for room; false where the pipeline is gone.
    fn send(&self, item: ConsumerEvent) -> bool {
        let sender = lock_ignoring_poison(&self.sender).clone();
        sender.is_some_and(|sender| sender.blocking_send(item).is_ok())
    }
}

/// What became of something that was to be sent to the pipeline.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transaction_markers_are_not_counted_as_messages() {
        let known = |next_offset, app_offset, fetchq_cnt| Fetched {
            next_offset,
            app_offset,
            fetchq_cnt,
            hi_offset: 101,
            ..Fetched::default()
        };
        for (of, taken, wanted) in [
            (known(101, 101, 0), Some(100), 100),
            (known(101, 101, 0), Some(101), 101),
            // Not all is fetched, or some of it was not given out yet.
            (known(95, 95, 0), Some(95), 101),
            (known(101, 95, 5), Some(95), 101),
            (known(101, 95, 0), Some(95), 101),
            (known(101, -1001, 0), Some(100), 101),
            (known(101, 101, 0), None, 101),
        ] {
            assert_eq!(readable_end_offset(&of, taken), wanted, "{of:?}");
        }
    }
}
