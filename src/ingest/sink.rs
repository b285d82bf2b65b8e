//! Outcomes in order, cut into commits. One commit runs at a time, beside the processing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::process::{Outcome, Unsettled};
use super::progress::Progress;
use super::source::consumer::Source;
use super::tally::Tally;
use super::{IngestError, Options};
use crate::prompts::ActiveSets;
use crate::record::{Partition, Row};
use crate::table::{Committed, PartitionBatch, TableError, Writer};
use crate::telemetry::{event, metrics};

/// Traces of one commit that the log names.
const TRACES: usize = 32;

/// Collects outcomes and commits them.
pub struct Sink {
    writer: Arc<Mutex<Writer>>,
    partitions: BTreeMap<Partition, Pending>,
    options: Options,
    progress: Arc<Progress>,
    rows: usize,
    bytes: usize,
    /// When the oldest outcome that is not committed came in.
    since: Option<Instant>,
    /// When the oldest event among them happened.
    oldest: Option<DateTime<Utc>>,
    /// What became of them.
    tally: Tally,
    /// Traces of what waits, at most [`TRACES`].
    trace_ids: Vec<String>,
    /// Fingerprint of the model, and the prompt sets, as the log names them.
    model: String,
    sets: ActiveSets,
    /// How old the oldest event of the last commit was, in milliseconds.
    age_ms: Option<i64>,
    /// What the image tower had computed and waited at the last commit, in microseconds.
    towers: [u64; 2],
}

/// A commit under way.
pub type Commit = AbortOnDropHandle<Result<Written, TableError>>;

/// A commit that has landed.
pub struct Written {
    done: Committed,
    /// Where each of its partitions ended.
    ends: Vec<(Partition, i64)>,
    oldest: Option<DateTime<Utc>>,
    tally: Tally,
    trace_ids: Vec<String>,
    took: Duration,
}

/// What one partition has outstanding.
struct Pending {
    /// The table's position of this partition.
    expected: Option<i64>,
    /// The position after the next commit.
    next_offset: Option<i64>,
    rows: Vec<(i64, Row)>,
    /// Behind the last outcome that was taken.
    taken: i64,
    /// When the last row was embedded: of two versions that are equal otherwise the later message wins.
    embedded_at: DateTime<Utc>,
    /// A message was abandoned: committing anything behind it would leave a hole.
    closed: bool,
}

/// What a row takes in memory, about: its embedding, and the texts that the event chose.
fn bytes_of(row: &Row) -> usize {
    let Some(image) = &row.image else { return 0 };
    let texts =
        image.attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    let uri = image.uri.as_ref().map_or(0, String::len);
    size_of_val(image.embedding.values()) + texts + uri
}

impl Sink {
    /// `model`: its fingerprint.
    pub fn new(
        writer: Arc<Mutex<Writer>>,
        options: &Options,
        progress: Arc<Progress>,
        model: String,
        sets: ActiveSets,
    ) -> Self {
        Self {
            writer,
            partitions: BTreeMap::new(),
            options: options.clone(),
            progress,
            rows: 0,
            bytes: 0,
            since: None,
            oldest: None,
            tally: Tally::default(),
            trace_ids: Vec::new(),
            model,
            sets,
            age_ms: None,
            towers: [0; 2],
        }
    }

    /// Partitions that are this worker's from now on.
    pub async fn assign(&mut self, partitions: Vec<Partition>) -> Result<(), IngestError> {
        let mut writer = self.writer.lock().await;
        for partition in partitions {
            let expected = writer.position(&partition).await?;
            let pending = Pending {
                expected,
                next_offset: None,
                rows: Vec::new(),
                taken: 0,
                embedded_at: DateTime::UNIX_EPOCH,
                closed: false,
            };
            self.partitions.insert(partition, pending);
        }
        Ok(())
    }

    /// Partitions that are not this worker's any more. Commit first.
    pub fn revoke(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.partitions.remove(partition);
        }
    }

    /// Takes the next outcome.
    pub fn take(&mut self, outcome: Outcome) -> Result<(), IngestError> {
        let Some(pending) = self.partitions.get_mut(&outcome.partition) else {
            return Ok(()); // revoked meanwhile: its new owner does it
        };
        let stored = pending.expected.is_some_and(|position| outcome.offset < position);
        if pending.closed || stored {
            return Ok(());
        }
        if outcome.offset < pending.taken {
            return Err(IngestError::Broken(format!(
                "the order of {}: offset {} came after {}",
                outcome.partition,
                outcome.offset,
                pending.taken - 1
            )));
        }
        let mut rows = match outcome.rows {
            Ok(rows) => rows,
            Err(Unsettled::Fatal(error)) => return Err(*error),
            Err(Unsettled::Abandoned) => {
                pending.closed = true;
                return Ok(());
            }
        };
        pending.next_offset = Some(outcome.offset + 1);
        pending.taken = outcome.offset + 1;
        for row in &mut rows {
            // Downloads overtake one another, and clocks are set back.
            row.embedded_at = row.embedded_at.max(pending.embedded_at + TimeDelta::microseconds(1));
            pending.embedded_at = row.embedded_at;
        }
        self.tally += outcome.tally;
        if self.trace_ids.len() < TRACES {
            self.trace_ids.extend(outcome.trace_id);
        }
        self.rows += rows.len();
        self.bytes += rows.iter().map(bytes_of).sum::<usize>();
        pending.rows.extend(rows.into_iter().map(|row| (outcome.offset, row)));
        self.since.get_or_insert_with(Instant::now);
        self.oldest = match (self.oldest, outcome.event_time) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Ok(())
    }

    /// How old the oldest event of the last commit was, in milliseconds, where known.
    pub fn age_ms(&self) -> Option<i64> {
        self.age_ms
    }

    /// Rows that wait for the next commit.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether what is outstanding fills a commit.
    pub fn is_full(&self) -> bool {
        self.rows >= self.options.commit_rows || self.bytes >= self.options.commit_mib << 20
    }

    /// Resolves when the oldest outcome has waited long enough; never while there is none.
    pub async fn due(&self) {
        match self.since {
            Some(since) => {
                let wait = Duration::from_millis(self.options.commit_ms);
                tokio::time::sleep_until(since + wait).await;
            }
            None => std::future::pending().await,
        }
    }

    /// Cuts what is outstanding into a commit, if there is anything. It runs on its own; its result
    /// goes to [`Sink::written`] before the next is cut.
    pub fn cut(&mut self) -> Option<Commit> {
        let batches: Vec<PartitionBatch> = self
            .partitions
            .iter_mut()
            .filter_map(|(partition, pending)| {
                Some(PartitionBatch {
                    partition: partition.clone(),
                    expected: pending.expected,
                    next_offset: pending.next_offset.take()?,
                    rows: std::mem::take(&mut pending.rows),
                })
            })
            .collect();
        self.since = None;
        (self.rows, self.bytes) = (0, 0);
        let oldest = self.oldest.take();
        let tally = std::mem::take(&mut self.tally);
        let trace_ids = std::mem::take(&mut self.trace_ids);
        if batches.is_empty() {
            return None;
        }
        let writer = self.writer.clone();
        Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let ends = batches.iter().map(|b| (b.partition.clone(), b.next_offset)).collect();
            let started = Instant::now();
            let done = writer.lock().await.append(batches).await?;
            Ok(Written { done, ends, oldest, tally, trace_ids, took: started.elapsed() })
        })))
    }

    /// Takes note of a commit that has landed, and tells the source.
    pub fn written(&mut self, written: Written, source: &Source) {
        let Written { done, ends, oldest, tally, trace_ids, took } = written;
        let mut positions = Vec::with_capacity(ends.len());
        for (partition, next_offset) in ends {
            let stored = done.fenced.iter().find(|(p, _)| *p == partition);
            let position = stored.map_or(next_offset, |(_, position)| *position.max(&next_offset));
            if let Some(pending) = self.partitions.get_mut(&partition) {
                pending.expected = Some(position);
            }
            positions.push(format!("{partition}@{position}"));
            source.mark_durable(partition, position);
        }
        Progress::add(&self.progress.stored, done.rows as u64);
        self.progress.version.store(done.version, Ordering::Relaxed);
        self.age_ms = oldest.map(|t| (Utc::now() - t).num_milliseconds());
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let towers = [count(&self.progress.towers_us), count(&self.progress.towers_wait_us)];
        let since = |i: usize| (towers[i] - self.towers[i]) / 1_000;
        let ms = |duration: Duration| duration.as_millis() as u64;
        info!(
            event = event::BATCH_DONE,
            version = done.version,
            positions = positions.join(" "),
            model = self.model,
            prompt_set = self.sets.get().first().map(|set| set.key.to_string()),
            rows = done.rows,
            bytes = done.bytes,
            ok = tally.embedded + tally.deleted,
            deleted = tally.deleted,
            dead_lettered = tally.dead_lettered,
            skipped = tally.gone,
            image_bytes = tally.image_bytes,
            fetch_ms = ms(tally.fetch),
            decode_ms = ms(tally.decode),
            embed_ms = ms(tally.embed),
            towers_ms = since(0),
            towers_wait_ms = since(1),
            fenced = done.fenced.len(),
            commit_ms = ms(took),
            age_ms = self.age_ms,
            trace_ids = (!trace_ids.is_empty()).then(|| trace_ids.join(" ")),
            "rows and positions stored"
        );
        self.towers = towers;
        let metrics = metrics::get();
        metrics.rows_stored.add(&[], done.rows as u64);
        metrics.commit_bytes.add(&[], done.bytes);
        metrics.commit_seconds.observe(&[], took.as_secs_f64());
        metrics.last_commit.set(&[], metrics::now());
        metrics.table_version.set(&[], done.version as f64);
        if let Some(age) = self.age_ms {
            metrics.event_age.observe(&[], age as f64 / 1e3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Generation;
    use crate::record::{Embedding, Image, ImageId, Ordering as By, Sequence, Version};
    use crate::store::Store;

    const AT: DateTime<Utc> = DateTime::from_timestamp(1_700_000_000, 0).unwrap();

    async fn sink(options: Options) -> (Sink, Partition) {
        let generation = Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, By::EventTime);
        let writer = Writer::open(&Store::memory(), &generation, 3).await.unwrap();
        let sets = ActiveSets::new(Vec::new());
        let mut sink =
            Sink::new(Arc::new(Mutex::new(writer)), &options, Arc::default(), "m".into(), sets);
        let partition = Partition { topic: "images".into(), number: 0 };
        sink.assign(vec![partition.clone()]).await.unwrap();
        (sink, partition)
    }

    fn outcome(partition: &Partition, offset: i64, rows: Vec<Row>) -> Outcome {
        Outcome {
            partition: partition.clone(),
            offset,
            event_time: None,
            tally: Tally::default(),
            trace_id: None,
            rows: Ok(rows),
        }
    }

    fn row(embedded_at: DateTime<Utc>, uri: &str) -> Row {
        Row {
            image_id: ImageId::new("one").unwrap(),
            sequence: Sequence::from_number(1),
            event_time: Some(AT),
            embedded_at,
            image: Some(Image {
                uri: Some(uri.into()),
                content_hash: String::new(),
                bytes: 1,
                width: 1,
                height: 1,
                attributes: [("title".into(), "t".repeat(1 << 20))].into(),
                embedding: Embedding::round(&[0.5; 4]),
                statistics: [].into(),
            }),
        }
    }

    #[tokio::test]
    async fn of_two_equal_versions_the_later_message_wins_whichever_was_embedded_first() {
        let (mut sink, partition) = sink(Options::default()).await;
        let late = AT + TimeDelta::seconds(9);
        sink.take(outcome(&partition, 0, vec![row(late, "slow")])).unwrap();
        sink.take(outcome(&partition, 1, vec![row(AT, "quick"), row(AT, "last")])).unwrap();
        let rows = &sink.partitions[&partition].rows;
        let newest = rows.iter().max_by_key(|(_, row)| Version::of(row)).unwrap();
        assert_eq!(newest.1.image.as_ref().unwrap().uri.as_deref(), Some("last"));
    }

    #[tokio::test]
    async fn texts_count_and_what_comes_twice_is_refused() {
        let (mut sink, partition) = sink(Options { commit_mib: 2, ..Options::default() }).await;
        sink.take(outcome(&partition, 4, vec![row(AT, "a")])).unwrap();
        assert!(!sink.is_full());
        sink.take(outcome(&partition, 6, vec![row(AT, "b")])).unwrap();
        assert!(sink.is_full(), "two titles of 1 MiB fill 2 MiB");
        let error = sink.take(outcome(&partition, 6, Vec::new())).unwrap_err().to_string();
        assert!(error.contains("offset 6 came after 6"), "{error}");
    }
}
