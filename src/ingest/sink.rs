//! Collects processed messages in order and commits their rows. One commit runs at a time, in parallel
//! with the processing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::error::IngestError;
use super::message_processor::{Incomplete, ProcessedMessage};
use super::options::IngestOptions;
use super::progress::Progress;
use super::source::Source;
use super::tally::Tally;
use crate::prompts::ActivePromptSets;
use crate::record::{ImageRow, LogAnchor, TopicPartition};
use crate::table::{CommitSummary, PartitionBatch, TableError, TableWriter};
use crate::telemetry::{event, metrics};

/// Maximum number of trace ids that are logged per commit.
const MAX_TRACE_IDS: usize = 32;

/// Collects processed messages of the assigned partitions until they are committed.
pub struct Sink {
    table_writer: Arc<Mutex<TableWriter>>,
    /// Cancelled when the time to drain is over: ends the attempts of reads and commits.
    processing_cancel: CancellationToken,
    pending_partitions: BTreeMap<TopicPartition, PendingPartition>,
    options: IngestOptions,
    progress: Arc<Progress>,
    pending_rows: usize,
    pending_bytes: usize,
    /// When the oldest pending message was added.
    pending_since: Option<Instant>,
    /// Time of the oldest pending event.
    oldest_pending_event_time: Option<DateTime<Utc>>,
    /// Sums over the pending messages.
    pending_tally: Tally,
    /// Trace ids of pending messages, at most [`MAX_TRACE_IDS`].
    pending_trace_ids: Vec<String>,
    /// Logged with each commit, like the first prompt set.
    model_fingerprint: String,
    prompt_sets: ActivePromptSets,
    /// Age of the oldest event of the last commit when it was stored, in milliseconds.
    last_commit_event_age_ms: Option<i64>,
    /// [`Progress::model_busy_us`] and [`Progress::model_wait_us`] at the last commit.
    model_busy_and_wait_us_at_last_commit: [u64; 2],
}

/// A commit in progress.
pub type CommitTask = AbortOnDropHandle<Result<FinishedCommit, TableError>>;

/// A commit that the table has stored.
pub struct FinishedCommit {
    commit_summary: CommitSummary,
    /// The offset after the last message of each partition in the commit.
    next_offsets: Vec<(TopicPartition, i64)>,
    oldest_event_time: Option<DateTime<Utc>>,
    tally: Tally,
    trace_ids: Vec<String>,
    duration: Duration,
}

/// What is pending for one partition.
struct PendingPartition {
    /// Number of the partition's log that is consumed.
    log_number: u64,
    /// The position in the table, which the next commit expects; `None` if there is none yet.
    table_position: Option<i64>,
    /// The last pending message, after which the next commit continues; `None` if no message is pending.
    last_message: Option<LogAnchor>,
    /// Pending rows with the offsets of their messages.
    rows: Vec<(i64, ImageRow)>,
    /// The offset after the last added message.
    next_expected_offset: i64,
    /// `embedded_at` of the partition's last added row. Each row gets a later one, because it
    /// decides between two rows of equal version, and there the later message must win.
    last_embedded_at: DateTime<Utc>,
    /// Whether a message was abandoned. Nothing after it may be committed, or it would be lost.
    has_abandoned_message: bool,
}

/// Estimates the memory of a row: its embedding, and the texts whose size the event determines.
fn estimate_row_bytes(row: &ImageRow) -> usize {
    let Some(image) = &row.image else { return 0 };
    let texts =
        image.attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    let uri = image.uri.as_ref().map_or(0, String::len);
    size_of_val(image.embedding.values()) + texts + uri
}

impl Sink {
    pub fn new(
        writer: Arc<Mutex<TableWriter>>,
        options: &IngestOptions,
        progress: Arc<Progress>,
        model_fingerprint: String,
        prompt_sets: ActivePromptSets,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            table_writer: writer,
            processing_cancel: cancel,
            pending_partitions: BTreeMap::new(),
            options: options.clone(),
            progress,
            pending_rows: 0,
            pending_bytes: 0,
            pending_since: None,
            oldest_pending_event_time: None,
            pending_tally: Tally::default(),
            pending_trace_ids: Vec::new(),
            model_fingerprint,
            prompt_sets,
            last_commit_event_age_ms: None,
            model_busy_and_wait_us_at_last_commit: [0; 2],
        }
    }

    /// Adds partitions, each with the number of its log, and their positions in the table.
    pub async fn add_partitions(
        &mut self,
        partitions: Vec<(TopicPartition, u64)>,
    ) -> Result<(), IngestError> {
        let mut writer = self.table_writer.lock().await;
        for (partition, log_number) in partitions {
            let stored = writer.read_stored_position(&partition, &self.processing_cancel).await?;
            // If another worker has found a newer log since, this one is about to lose the partition.
            let is_current = stored.log_number == log_number;
            let pending = PendingPartition {
                log_number,
                table_position: stored.next_offset.filter(|_| is_current),
                last_message: None,
                rows: Vec::new(),
                next_expected_offset: 0,
                last_embedded_at: DateTime::UNIX_EPOCH,
                has_abandoned_message: false,
            };
            self.pending_partitions.insert(partition, pending);
        }
        Ok(())
    }

    /// Removes partitions and what is pending for them: call it after the last commit.
    pub fn remove_partitions(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.pending_partitions.remove(partition);
        }
    }

    /// Adds the next message of a partition.
    pub fn add_message(&mut self, message: ProcessedMessage) -> Result<(), IngestError> {
        let Some(pending) = self.pending_partitions.get_mut(&message.partition) else {
            return Ok(()); // revoked: the next owner processes the message
        };
        let is_stored = pending.table_position.is_some_and(|position| message.offset < position);
        if pending.has_abandoned_message || is_stored {
            return Ok(());
        }
        if message.offset < pending.next_expected_offset {
            return Err(IngestError::Internal(format!(
                "the order of {}: offset {} came after {}",
                message.partition,
                message.offset,
                pending.next_expected_offset - 1
            )));
        }
        let mut rows = match message.rows {
            Ok(rows) => rows,
            Err(Incomplete::Fatal(error)) => return Err(*error),
            Err(Incomplete::Abandoned) => {
                pending.has_abandoned_message = true;
                return Ok(());
            }
        };
        pending.last_message =
            Some(LogAnchor { offset: message.offset, fingerprint: message.fingerprint });
        pending.next_expected_offset = message.offset + 1;
        for row in &mut rows {
            // Not monotonic by itself: downloads overtake each other, and clocks are set back.
            row.embedded_at =
                row.embedded_at.max(pending.last_embedded_at + TimeDelta::microseconds(1));
            pending.last_embedded_at = row.embedded_at;
        }
        self.pending_tally += message.tally;
        if self.pending_trace_ids.len() < MAX_TRACE_IDS {
            self.pending_trace_ids.extend(message.trace_id);
        }
        self.pending_rows += rows.len();
        self.pending_bytes += rows.iter().map(estimate_row_bytes).sum::<usize>();
        pending.rows.extend(rows.into_iter().map(|row| (message.offset, row)));
        self.pending_since.get_or_insert_with(Instant::now);
        self.oldest_pending_event_time =
            match (self.oldest_pending_event_time, message.oldest_event_time) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        Ok(())
    }

    /// Returns the age of the oldest event of the last commit, in milliseconds; `None` if it is unknown.
    pub fn last_commit_event_age_ms(&self) -> Option<i64> {
        self.last_commit_event_age_ms
    }

    /// Returns how many rows wait for the next commit.
    pub fn pending_rows(&self) -> usize {
        self.pending_rows
    }

    /// Whether the pending rows fill a commit.
    pub fn is_full(&self) -> bool {
        self.pending_rows >= self.options.commit_rows
            || self.pending_bytes >= self.options.commit_mib << 20
    }

    /// Returns when the oldest pending message has waited for `ingest.commit_ms`; never if none is pending.
    pub async fn wait_until_commit_due(&self) {
        match self.pending_since {
            Some(since) => {
                let wait = Duration::from_millis(self.options.commit_ms);
                tokio::time::sleep_until(since + wait).await;
            }
            None => std::future::pending().await,
        }
    }

    /// Starts to commit everything that is pending; `None` if there is nothing. The commit runs in a task;
    /// its result must be passed to [`Sink::record_finished_commit`] before the next commit starts. `source`
    /// knows by which messages the logs are recognised later.
    pub fn start_commit(&mut self, source: &Source) -> Option<CommitTask> {
        let batches: Vec<PartitionBatch> = self
            .pending_partitions
            .iter_mut()
            .filter_map(|(partition, pending)| {
                let last_message = pending.last_message.take()?;
                Some(PartitionBatch {
                    partition: partition.clone(),
                    log_number: pending.log_number,
                    anchor: source.log_anchor(partition, pending.log_number),
                    expected_position: pending.table_position,
                    last_message: Some(last_message),
                    next_offset: last_message.offset + 1,
                    rows: std::mem::take(&mut pending.rows),
                })
            })
            .collect();
        self.pending_since = None;
        (self.pending_rows, self.pending_bytes) = (0, 0);
        let oldest_event_time = self.oldest_pending_event_time.take();
        let tally = std::mem::take(&mut self.pending_tally);
        let trace_ids = std::mem::take(&mut self.pending_trace_ids);
        if batches.is_empty() {
            return None;
        }
        let (writer, cancel) = (self.table_writer.clone(), self.processing_cancel.clone());
        Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let end_offsets =
                batches.iter().map(|b| (b.partition.clone(), b.next_offset)).collect();
            let started = Instant::now();
            let committed = writer.lock().await.append(batches, &cancel).await?;
            Ok(FinishedCommit {
                commit_summary: committed,
                next_offsets: end_offsets,
                oldest_event_time,
                tally,
                trace_ids,
                duration: started.elapsed(),
            })
        })))
    }

    /// Records the new positions, reports them to `source`, and logs the commit.
    pub fn record_finished_commit(&mut self, finished: FinishedCommit, source: &Source) {
        let FinishedCommit {
            commit_summary: committed,
            next_offsets: end_offsets,
            oldest_event_time,
            tally,
            trace_ids,
            duration,
        } = finished;
        let mut positions = Vec::with_capacity(end_offsets.len());
        for (partition, next_offset) in end_offsets {
            // A fenced partition continues from the position that another worker has stored.
            let fenced = committed.fenced_partitions.iter().find(|(p, _)| *p == partition);
            let position = fenced.map_or(next_offset, |(_, position)| *position.max(&next_offset));
            if let Some(pending) = self.pending_partitions.get_mut(&partition) {
                pending.table_position = Some(position);
            }
            positions.push(format!("{partition}@{position}"));
            source.mark_durable(partition, position);
        }
        Progress::add_to_counter(&self.progress.stored_rows, committed.written_row_count as u64);
        self.progress.table_version.store(committed.table_version, Ordering::Relaxed);
        self.last_commit_event_age_ms =
            oldest_event_time.map(|t| (Utc::now() - t).num_milliseconds());
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let model_us = [count(&self.progress.model_busy_us), count(&self.progress.model_wait_us)];
        let model_ms =
            |i: usize| (model_us[i] - self.model_busy_and_wait_us_at_last_commit[i]) / 1_000;
        let ms = |time: Duration| time.as_millis() as u64;
        info!(
            event = event::COMMIT_SUCCEEDED,
            table_version = committed.table_version,
            positions = positions.join(" "),
            model_fingerprint = self.model_fingerprint,
            prompt_set =
                self.prompt_sets.current().first().map(|set| set.statistics_key.to_string()),
            rows = committed.written_row_count,
            bytes = committed.written_bytes,
            succeeded = tally.embedded_images + tally.stored_deletes,
            deleted = tally.stored_deletes,
            dead_lettered = tally.dead_lettered_messages,
            not_found = tally.not_found_images,
            image_bytes = tally.fetched_bytes,
            fetch_ms = ms(tally.fetch_duration),
            decode_ms = ms(tally.decode_duration),
            embed_ms = ms(tally.embed_duration),
            model_ms = model_ms(0),
            model_wait_ms = model_ms(1),
            fenced_partitions = committed.fenced_partitions.len(),
            commit_ms = ms(duration),
            event_age_ms = self.last_commit_event_age_ms,
            trace_ids = (!trace_ids.is_empty()).then(|| trace_ids.join(" ")),
            "rows and positions stored"
        );
        self.model_busy_and_wait_us_at_last_commit = model_us;
        let metrics = metrics::global();
        metrics.rows_stored.add(&[], committed.written_row_count as u64);
        metrics.commit_bytes.add(&[], committed.written_bytes);
        metrics.commit_seconds.observe_seconds(&[], duration.as_secs_f64());
        metrics.last_commit.set(&[], metrics::unix_seconds_now());
        metrics.table_version.set(&[], committed.table_version as f64);
        if let Some(age) = self.last_commit_event_age_ms {
            metrics.event_age_seconds.observe_seconds(&[], age as f64 / 1e3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{
        Embedding, ImageId, RowVersion, SequenceKey, StoredImage, VersionOrdering as By,
    };
    use crate::store::Store;
    use crate::table::Generation;

    const EVENT_TIME: DateTime<Utc> = DateTime::from_timestamp(1_700_000_000, 0).unwrap();

    async fn new_sink(options: IngestOptions) -> (Sink, TopicPartition) {
        let generation = Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, By::EventTime);
        let writer = TableWriter::open(&Store::in_memory(), &generation, 3).await.unwrap();
        let sets = ActivePromptSets::new(Vec::new());
        let mut sink = Sink::new(
            Arc::new(Mutex::new(writer)),
            &options,
            Arc::default(),
            "m".into(),
            sets,
            CancellationToken::new(),
        );
        let partition = TopicPartition { topic: "images".into(), number: 0 };
        sink.add_partitions(vec![(partition.clone(), 0)]).await.unwrap();
        (sink, partition)
    }

    fn processed_message(
        partition: &TopicPartition,
        offset: i64,
        rows: Vec<ImageRow>,
    ) -> ProcessedMessage {
        ProcessedMessage {
            partition: partition.clone(),
            offset,
            fingerprint: 0,
            oldest_event_time: None,
            tally: Tally::default(),
            trace_id: None,
            rows: Ok(rows),
        }
    }

    fn row_with_uri(embedded_at: DateTime<Utc>, uri: &str) -> ImageRow {
        ImageRow {
            image_id: ImageId::new("one").unwrap(),
            sequence: SequenceKey::from_number(1),
            event_time: Some(EVENT_TIME),
            embedded_at,
            image: Some(StoredImage {
                uri: Some(uri.into()),
                content_hash: String::new(),
                byte_size: 1,
                width: 1,
                height: 1,
                attributes: [("title".into(), "t".repeat(1 << 20))].into(),
                embedding: Embedding::from_unit_vector(&[0.5; 4]),
                statistics: [].into(),
                decoding: None,
            }),
        }
    }

    #[tokio::test]
    async fn of_two_equal_versions_the_later_message_wins_even_if_it_was_embedded_first() {
        let (mut sink, partition) = new_sink(IngestOptions::default()).await;
        let late = EVENT_TIME + TimeDelta::seconds(9);
        sink.add_message(processed_message(&partition, 0, vec![row_with_uri(late, "slow")]))
            .unwrap();
        sink.add_message(processed_message(
            &partition,
            1,
            vec![row_with_uri(EVENT_TIME, "quick"), row_with_uri(EVENT_TIME, "last")],
        ))
        .unwrap();
        let rows = &sink.pending_partitions[&partition].rows;
        let newest = rows.iter().max_by_key(|(_, row)| RowVersion::from_row(row)).unwrap();
        assert_eq!(newest.1.image.as_ref().unwrap().uri.as_deref(), Some("last"));
    }

    #[tokio::test]
    async fn attributes_count_towards_commit_size_and_repeated_offsets_are_rejected() {
        let (mut sink, partition) =
            new_sink(IngestOptions { commit_mib: 2, ..IngestOptions::default() }).await;
        sink.add_message(processed_message(&partition, 4, vec![row_with_uri(EVENT_TIME, "a")]))
            .unwrap();
        assert!(!sink.is_full());
        sink.add_message(processed_message(&partition, 6, vec![row_with_uri(EVENT_TIME, "b")]))
            .unwrap();
        assert!(sink.is_full(), "two titles of 1 MiB fill 2 MiB");
        let error =
            sink.add_message(processed_message(&partition, 6, Vec::new())).unwrap_err().to_string();
        assert!(error.contains("offset 6 came after 6"), "{error}");
    }
}
