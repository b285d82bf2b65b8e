//! Counters and health of a worker, for metrics and probes.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;

use super::rejection::{Rejection, RejectionListener};
use super::source::{ConsumerStatus, ConsumerStatusHandle, SourceProblem, SourceState};
use crate::telemetry::metrics::{self, HealthProbe};

/// A consumer that has not polled for this long was excluded from its group (`max.poll.interval.ms`); a
/// pipeline that has taken no step for this long is stuck.
const STUCK_TIMEOUT: Duration = Duration::from_secs(300);

/// Counters and health of the workers of one process, shared with metrics and probes.
#[derive(Debug, Default)]
pub struct Progress {
    /// Images embedded.
    pub embedded_images: AtomicU64,
    /// Deletes stored.
    pub stored_deletes: AtomicU64,
    /// Messages dead-lettered.
    pub dead_lettered_messages: AtomicU64,
    /// Images that were not found when they were fetched.
    pub not_found_images: AtomicU64,
    /// Rows stored.
    pub stored_rows: AtomicU64,
    /// Time that the image encoder computed, in microseconds.
    pub model_busy_us: AtomicU64,
    /// Time that the image encoder waited for images between batches, in microseconds.
    pub model_wait_us: AtomicU64,
    /// Version of the table after the last commit.
    pub table_version: AtomicU64,
    /// Messages in the pipeline.
    in_flight_messages: AtomicU64,
    /// When the pipeline last took a step, in milliseconds since 1970; 0 before the first step.
    last_step_unix_ms: AtomicI64,
    /// The consumers of the workers that were started.
    consumer_handles: Mutex<Vec<ConsumerStatusHandle>>,
    rejection_listener: Option<RejectionListener>,
}

impl Progress {
    /// Creates counters whose process is notified of each message that yields no row.
    pub fn with_rejection_listener(listener: RejectionListener) -> Self {
        Self { rejection_listener: Some(listener), ..Self::default() }
    }

    pub(super) fn notify_rejection(&self, rejection: Rejection<'_>) {
        if let Some(listener) = &self.rejection_listener {
            listener.notify(rejection);
        }
    }

    pub(super) fn add_to_counter(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn add_consumer(&self, consumer: ConsumerStatusHandle) {
        self.consumer_handles.lock().unwrap_or_else(PoisonError::into_inner).push(consumer);
    }

    /// Records that the pipeline has taken a step and holds `in_flight` messages.
    pub(super) fn record_step(&self, in_flight: usize) {
        self.in_flight_messages.store(in_flight as u64, Ordering::Relaxed);
        self.last_step_unix_ms.store(Utc::now().timestamp_millis(), Ordering::Relaxed);
    }

    /// Combines the status of all consumers; `None` before one was started.
    fn consumer_status(&self) -> Option<ConsumerStatus> {
        let consumers = self.consumer_handles.lock().unwrap_or_else(PoisonError::into_inner);
        consumers.iter().map(ConsumerStatusHandle::status).reduce(|a, b| ConsumerStatus {
            state: a.state.max(b.state),
            // The oldest poll; `None` while one consumer has not polled.
            poll_age_ms: a.poll_age_ms.zip(b.poll_age_ms).map(|(a, b)| a.max(b)),
            assigned_partition_count: a.assigned_partition_count + b.assigned_partition_count,
            lag_messages: a.lag_messages.zip(b.lag_messages).map(|(a, b)| a + b),
        })
    }

    /// Returns the gravest state of all consumers; `None` before one was started.
    fn source_state(&self) -> Option<SourceProblem> {
        let consumers = self.consumer_handles.lock().unwrap_or_else(PoisonError::into_inner);
        consumers.iter().map(ConsumerStatusHandle::source_state).max_by_key(|one| one.state)
    }

    fn step_age_ms(&self) -> Option<i64> {
        let last = self.last_step_unix_ms.load(Ordering::Relaxed);
        (last > 0).then(|| Utc::now().timestamp_millis() - last)
    }
}

impl HealthProbe for Progress {
    fn update_gauges(&self) {
        let metrics = metrics::global();
        let seconds = |ms: Option<i64>| ms.map(|ms| ms as f64 / 1e3);
        let status = self.consumer_status();
        let state = status.map_or(SourceState::Starting, |status| status.state);
        for one in SourceState::ALL {
            metrics.source_state.set(&[one.as_str()], f64::from(u8::from(one == state)));
        }
        metrics.lag_messages.set_or_nan(status.and_then(|p| p.lag_messages).map(|lag| lag as f64));
        metrics.assigned_partitions.set_or_nan(status.map(|p| p.assigned_partition_count as f64));
        metrics.poll_age.set_or_nan(seconds(status.and_then(|p| p.poll_age_ms)));
        metrics.pipeline_age.set_or_nan(seconds(self.step_age_ms()));
        metrics.in_flight_messages.set(&[], self.in_flight_messages.load(Ordering::Relaxed) as f64);
    }

    fn check_liveness(&self) -> Result<(), String> {
        let age = self.consumer_status().and_then(|p| p.poll_age_ms).max(self.step_age_ms());
        match age {
            Some(age) if age > STUCK_TIMEOUT.as_millis() as i64 => {
                Err(format!("the consumer or the pipeline took no step for {} s", age / 1_000))
            }
            _ => Ok(()),
        }
    }

    /// A worker without partitions is ready: it takes them over when another one ends.
    fn check_readiness(&self) -> Result<&'static str, String> {
        let Some(SourceProblem { state, detail }) = self.source_state() else {
            return Err("starting: the worker opens its catalogue and model".into());
        };
        self.check_liveness()?;
        match state {
            SourceState::Consuming => Ok("ready"),
            SourceState::NoPartitionsAssigned => Ok("ready: no_partitions_assigned"),
            _ => Err(format!("{}: {detail}", state.as_str())),
        }
    }
}
