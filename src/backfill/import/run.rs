//! Stores the rows of a plan.

use std::ops::Range;
use std::sync::Arc;

use chrono::{DateTime, SubsecRound, Utc};
use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::error::ImportError;
use super::plan::{ImportPlan, PlannedImage};
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet, compute_all_statistics};
use crate::record::arrays::EmbeddingArray;
use crate::record::{
    Embedding, ImageRow, LogAnchor, SequenceKey, StoredImage, StoredPosition, TopicPartition,
    VersionOrdering,
};
use crate::table::{PartitionBatch, TableError, TableWriter};

/// Digits of the fingerprint that name an import in the Delta log.
const NAME_DIGITS: usize = 32;

/// What an import did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportSummary {
    /// Rows that this process stored.
    pub stored: usize,
    /// Rows that the same import had stored before, or that another process stores.
    pub already_stored: usize,
    /// Whether every row is stored; false if it was interrupted.
    pub is_complete: bool,
}

/// Stores a plan in a table.
///
/// To the table an import is a partition whose messages are the rows: its name is the fingerprint of the plan, its
/// position is stored in the commits of the rows, and in the place of the message by which a log is recognised is
/// the time when the import began. The same import continues at its position, with the time of its first start.
pub struct Import<'a> {
    /// The checked rows.
    pub plan: &'a ImportPlan,
    /// What orders the versions of an image.
    pub ordering: VersionOrdering,
    /// Sets whose statistics the rows carry.
    pub prompt_sets: ActivePromptSets,
    /// Rows of a commit, at most.
    pub rows_per_commit: usize,
}

impl Import<'_> {
    /// Stores the rows that are not stored yet, until `cancel` is cancelled. `progress` is called with the
    /// number of rows that are done.
    pub async fn run(
        &self,
        writer: &mut TableWriter,
        progress: &(dyn Fn(usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<ImportSummary, ImportError> {
        let partition = self.partition();
        let total = self.plan.rows.len();
        let mut stored_rows = 0;
        let mut position = self.begin(writer, &partition, cancel).await?;
        let started = position.anchor.unwrap_or_else(start_now);
        let is_complete = loop {
            let first = usize::try_from(position.next_offset.unwrap_or_default()).unwrap_or(total);
            progress(first.min(total));
            if first >= total {
                break true;
            }
            if cancel.is_cancelled() {
                break false;
            }
            let range = first..total.min(first + self.rows_per_commit);
            let end = range.end as i64;
            let rows = tokio::task::block_in_place(|| self.build_rows(range, started))?;
            let batch = PartitionBatch {
                partition: partition.clone(),
                log_number: 0,
                anchor: Some(started),
                last_message: None,
                expected_position: position.next_offset,
                next_offset: end,
                rows,
            };
            let summary = match writer.append(vec![batch], cancel).await {
                Err(TableError::Cancelled { .. }) => break false,
                result => result?,
            };
            stored_rows += summary.written_row_count;
            position = if summary.fenced_partitions.is_empty() {
                StoredPosition { next_offset: Some(end), ..position }
            } else {
                writer.read_stored_position(&partition, cancel).await?
            };
        };
        let done = usize::try_from(position.next_offset.unwrap_or_default()).unwrap_or(total);
        let storable = self.plan.rows[..done.min(total)].iter().flatten().count();
        Ok(ImportSummary {
            stored: stored_rows,
            already_stored: storable.saturating_sub(stored_rows),
            is_complete,
        })
    }

    fn partition(&self) -> TopicPartition {
        let name = format!("import-{}", &self.plan.fingerprint()[..NAME_DIGITS]);
        TopicPartition { topic: name.into(), number: 0 }
    }

    /// Returns the position of this import; records its start if it has none. Of two processes that begin at the
    /// same time the first one decides about the time of the start.
    async fn begin(
        &self,
        writer: &mut TableWriter,
        partition: &TopicPartition,
        cancel: &CancellationToken,
    ) -> Result<StoredPosition, ImportError> {
        let stored = writer.read_stored_position(partition, cancel).await?;
        if stored.next_offset.is_some() {
            return Ok(stored);
        }
        let start = PartitionBatch {
            partition: partition.clone(),
            log_number: 0,
            anchor: Some(start_now()),
            last_message: None,
            expected_position: None,
            next_offset: 0,
            rows: Vec::new(),
        };
        writer.append(vec![start], cancel).await?;
        Ok(writer.read_stored_position(partition, cancel).await?)
    }

    /// Returns the rows in `range` with their statistics, each with its number.
    fn build_rows(
        &self,
        range: Range<usize>,
        started: LogAnchor,
    ) -> Result<Vec<(i64, ImageRow)>, ImportError> {
        let builder = RowBuilder {
            images: &self.plan.images,
            sets: self.prompt_sets.current(),
            embedded_at: Utc::now().trunc_subsecs(6),
            start_version: self.start_version(started),
        };
        range
            .into_par_iter()
            .filter_map(|row| Some((row, self.plan.rows[row].as_ref()?)))
            .map(|(row, planned)| Ok((row as i64, builder.build(row, planned)?)))
            .collect()
    }

    /// Returns the version of rows that have none. Only times can be compared with the start of the import; by
    /// every other ordering it is older than all events.
    fn start_version(&self, started: LogAnchor) -> SequenceKey {
        let oldest = SequenceKey::from_number(0);
        match self.ordering {
            VersionOrdering::EventTime => DateTime::from_timestamp_micros(started.fingerprint)
                .and_then(|time| SequenceKey::from_time(time).ok())
                .unwrap_or(oldest),
            VersionOrdering::Sequence | VersionOrdering::Offset => oldest,
            // The empty text sorts before all hexadecimal digits.
            VersionOrdering::Sequencer => SequenceKey::from_stored(""),
        }
    }
}

/// Builds the rows of one commit.
struct RowBuilder<'a> {
    images: &'a EmbeddingArray,
    sets: Arc<Vec<Arc<EmbeddedPromptSet>>>,
    embedded_at: DateTime<Utc>,
    /// Version of rows that have none.
    start_version: SequenceKey,
}

impl RowBuilder<'_> {
    fn build(&self, row: usize, planned: &PlannedImage) -> Result<ImageRow, ImportError> {
        let mut unit = vec![0f32; self.images.dimension()];
        self.images.write_unit_row(row, &mut unit);
        let embedding = Embedding::from_unit_vector(&unit);
        let statistics = compute_all_statistics(&self.sets, &embedding)
            .map_err(|key| ImportError::Statistics { row, prompt_set: key.to_string() })?;
        let version = planned.version.clone();
        let (sequence, event_time) = version.unwrap_or_else(|| (self.start_version.clone(), None));
        let (uri, attributes) = (planned.uri.clone(), planned.attributes.clone());
        Ok(ImageRow {
            image_id: planned.image_id.clone(),
            sequence,
            event_time: event_time.map(|time| time.trunc_subsecs(6)),
            embedded_at: self.embedded_at,
            image: Some(StoredImage::embedded_elsewhere(uri, attributes, embedding, statistics)),
        })
    }
}

/// Returns the time when an import begins, in the form of a message by which a log is recognised.
fn start_now() -> LogAnchor {
    LogAnchor { offset: 0, fingerprint: Utc::now().timestamp_micros() }
}
