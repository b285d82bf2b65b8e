//! Decides where an assigned partition is read from, and reports what was lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::error::SourceError;
use super::health::SourceProblem;
use super::state::{ConsumerState, PartitionStart};
use crate::kafka::{self, FailureKind, KafkaProbe, LogIdentity, PartitionLog, PartitionLogs};
use crate::record::{StoredPosition, TopicPartition};
use crate::retry::Backoff;
use crate::telemetry::{event, metrics};

/// How long to wait for a broker that does not know the ends of a partition's log yet, for example
/// because it restarts. No poll happens in this time: well below `max.poll.interval.ms`.
const WATERMARK_TIMEOUT: Duration = Duration::from_secs(60);

/// Provides the positions from which assigned partitions are read. The table does, not Kafka.
#[async_trait]
pub trait OffsetProvider: Send + Sync {
    /// Returns what is durably stored of a partition.
    async fn stored_position(&self, partition: &TopicPartition) -> Result<StoredPosition, String>;

    /// Records that the log after number `replaced` is consumed from now on. Returns what is stored of it, which
    /// is something if another worker has begun with it.
    async fn start_new_log(
        &self,
        partition: &TopicPartition,
        replaced: u64,
    ) -> Result<StoredPosition, String>;
}

/// Compares the stored positions of partitions with their logs. All of its methods block.
pub(super) struct StartPositions {
    /// For requests about logs. They are not made by the consumer, which would return what it reads as messages.
    pub probe: KafkaProbe,
    pub state: Arc<ConsumerState>,
    pub offset_provider: Arc<dyn OffsetProvider>,
    pub runtime: Handle,
    /// Cancelled when the worker is to stop: then no broker is waited for.
    pub worker_cancel: CancellationToken,
}

impl StartPositions {
    /// Returns where each partition is read from.
    pub(super) fn find(
        &self,
        partitions: &[TopicPartition],
    ) -> Result<Vec<PartitionStart>, SourceError> {
        let mut stored = Vec::with_capacity(partitions.len());
        for partition in partitions {
            let position = self.runtime.block_on(self.offset_provider.stored_position(partition));
            stored.push((partition.clone(), unreadable(partition, position)?));
        }
        let PartitionLogs { logs, read_failure } = self.identify_logs(&stored)?;
        if let Some(problem) = read_failure.as_ref().and_then(SourceProblem::from_failure) {
            self.state.report_problem(problem);
        }
        let starts = stored.into_iter().zip(logs);
        starts
            .map(|((partition, stored), log)| self.start_position(partition, stored, &log))
            .collect()
    }

    /// Compares the logs with what is stored. Waits for a broker that restarts.
    fn identify_logs(
        &self,
        stored: &[(TopicPartition, StoredPosition)],
    ) -> Result<PartitionLogs, SourceError> {
        let started = Instant::now();
        let backoff = Backoff::with_max_attempts(u32::MAX);
        let mut attempt = 0;
        loop {
            let failure = match kafka::identify_logs(&self.probe, stored) {
                Ok(logs) => return Ok(logs),
                Err(failure) => failure,
            };
            // A topic that was just created is not known to every broker.
            let may_pass = !matches!(
                failure.kind,
                FailureKind::NotAuthorised | FailureKind::AuthenticationFailed
            );
            if !may_pass || started.elapsed() >= WATERMARK_TIMEOUT {
                return Err(failure.into());
            }
            info!(event = event::RETRY, stage = "source", attempt, error = %failure, "the end of a partition's log is not known yet");
            if !self.runtime.block_on(backoff.wait(attempt, &self.worker_cancel)) {
                return Err(failure.into());
            }
            attempt += 1;
        }
    }

    /// Returns where a partition is read from: the table's position, or the beginning of its log.
    fn start_position(
        &self,
        partition: TopicPartition,
        stored: StoredPosition,
        log: &PartitionLog,
    ) -> Result<PartitionStart, SourceError> {
        let stored = match &log.identity {
            LogIdentity::Other(reason) => self.start_new_log(&partition, stored, log, reason)?,
            LogIdentity::Same | LogIdentity::Unknown => stored,
        };
        let first_wanted = stored.next_wanted_offset();
        let lost = first_wanted.map_or(0, |offset| log.earliest_offset - offset);
        if lost > 0 {
            metrics::global().lost_messages.add(&["retention"], lost.unsigned_abs());
            error!(
                event = event::SOURCE_DATA_LOSS, %partition, requested_offset = first_wanted,
                earliest_offset = log.earliest_offset, lost_messages = lost,
                "Kafka removed messages that were never processed; run a reconcile of the catalogue"
            );
        }
        Ok(PartitionStart {
            offset: first_wanted.unwrap_or(log.earliest_offset).max(log.earliest_offset),
            log_number: stored.log_number,
            anchor: stored.anchor,
            partition,
        })
    }

    /// Reports that the log of a partition is another one, and records it in the table.
    fn start_new_log(
        &self,
        partition: &TopicPartition,
        stored: StoredPosition,
        log: &PartitionLog,
        reason: &str,
    ) -> Result<StoredPosition, SourceError> {
        let recorded = self.offset_provider.start_new_log(partition, stored.log_number);
        let new = unreadable(partition, self.runtime.block_on(recorded))?;
        let lost = self.state.count_unstored_messages(partition, &stored);
        metrics::global().lost_messages.add(&["log_replaced"], lost.unwrap_or(0).unsigned_abs());
        error!(
            event = event::SOURCE_LOG_REPLACED, %partition, log_number = new.log_number,
            stored_offset = stored.next_offset, earliest_offset = log.earliest_offset, end_offset = log.end_offset,
            replayed_messages = log.end_offset - log.earliest_offset, lost_messages = lost, reason,
            "the log of the partition is not the one that was consumed; the new log is consumed from its beginning"
        );
        Ok(new)
    }
}

fn unreadable(
    partition: &TopicPartition,
    position: Result<StoredPosition, String>,
) -> Result<StoredPosition, SourceError> {
    position
        .map_err(|reason| SourceError::PositionUnreadable { partition: partition.clone(), reason })
}
