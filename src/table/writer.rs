//! Appends rows and positions in one atomic commit.
//!
//! The commit loop handles what several writers on one log do to each other. Each attempt checks, on the
//! very snapshot that it commits against, that every partition's stored position is the expected one.
//! After a lost race the snapshot is updated and checked again; the library's own retries would skip
//! that check. An unclear answer (the write was applied, its acknowledgement was lost) is resolved in
//! the same way: if the stored position is the one of this commit and a commit names its file, it has
//! landed.

use std::time::{Duration, Instant};

use deltalake_core::arrow::array::RecordBatch;
use deltalake_core::kernel::{Action, Add, Transaction};
use deltalake_core::parquet::errors::ParquetError;
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::error::TableError;
use super::file::DataFileWriter;
use super::generation::Generation;
use super::log::{DeltaLog, TABLE_WENT_BACK, TableKind, commit_backoff};
use super::positions::{NO_ANCHOR, PartitionIds, Positions};
use super::schema;
use crate::record::{ImageRow, LogAnchor, StoredPosition, TopicPartition};
use crate::retry::{Classify, Disposition};
use crate::store::Store;
use crate::telemetry::event;

/// An older snapshot is updated before a commit builds on it. Well below the shortest time for which
/// the log is kept.
const MAX_SNAPSHOT_AGE: Duration = Duration::from_secs(600);

/// Rows of one partition that are committed together with its position.
#[derive(Debug, Clone)]
pub struct PartitionBatch {
    /// The partition.
    pub partition: TopicPartition,
    /// Number of the partition's log that the rows come from ([`StoredPosition::log_number`]).
    pub log_number: u64,
    /// A message of this log, by which the log is recognised later; `None` stores none.
    pub anchor: Option<LogAnchor>,
    /// The last message that is processed, the one before `next_offset`; `None` stores none.
    pub last_message: Option<LogAnchor>,
    /// The stored position that this commit builds on: the offset after the last stored one, `None` if
    /// nothing is stored yet.
    pub expected_position: Option<i64>,
    /// The position after the commit: every lower offset is processed.
    pub next_offset: i64,
    /// Rows, each with the offset of its message, in order. May be empty.
    pub rows: Vec<(i64, ImageRow)>,
}

/// The result of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitSummary {
    /// Version of the table after the commit.
    pub table_version: u64,
    /// Partitions that another worker has consumed since, with their stored positions. Their rows were
    /// left out, because they are stored already.
    pub fenced_partitions: Vec<(TopicPartition, i64)>,
    /// Rows written.
    pub written_row_count: usize,
    /// Bytes of the files written.
    pub written_bytes: u64,
}

/// Appends to the `images` table of one generation.
pub struct TableWriter {
    log: DeltaLog,
    max_attempts: u32,
    /// Name of the replay whose positions are used; usually empty.
    replay_name: String,
    /// The stored positions, as of the last commit that was read for them; at most the loaded snapshot.
    positions: Positions,
    /// When the snapshot was last updated. `None` forces an update before the next commit.
    refreshed_at: Option<Instant>,
}

/// A batch with its uploaded data file.
struct StagedBatch {
    batch: PartitionBatch,
    /// `None` if the batch has no rows.
    add_action: Option<Add>,
}

impl TableWriter {
    /// Opens the table of `generation` and creates it if there is none. A read or commit that fails is
    /// tried `max_attempts` times.
    pub async fn open(
        catalogue: &Store,
        generation: &Generation,
        max_attempts: u32,
    ) -> Result<Self, TableError> {
        let log = DeltaLog::open_or_create(catalogue, generation, TableKind::Images).await?;
        Ok(Self {
            positions: Positions::as_of(log.version()),
            log,
            max_attempts,
            replay_name: String::new(),
            refreshed_at: None,
        })
    }

    /// Uses the positions of the replay `name` instead of the usual ones. An empty name changes nothing.
    #[must_use]
    pub fn with_replay_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.replay_name);
        self
    }

    /// Returns the application ids under which the Delta log keeps a partition's position and what belongs
    /// to it.
    fn partition_ids(&self, partition: &TopicPartition) -> PartitionIds {
        PartitionIds::new(partition, &self.replay_name)
    }

    /// Reads the offset after the last stored one of the current log of `partition`, as
    /// [`Self::read_stored_position`] does.
    pub async fn read_position(
        &mut self,
        partition: &TopicPartition,
        cancel: &CancellationToken,
    ) -> Result<Option<i64>, TableError> {
        Ok(self.read_stored_position(partition, cancel).await?.next_offset)
    }

    /// Reads what is stored of `partition` from the log. Retries transient errors until `cancel` is
    /// cancelled. Attempts that read further than the ones before do not count, so that a store that fails
    /// now and then is outlasted, however much there is to read.
    pub async fn read_stored_position(
        &mut self,
        partition: &TopicPartition,
        cancel: &CancellationToken,
    ) -> Result<StoredPosition, TableError> {
        let ids = self.partition_ids(partition);
        let backoff = commit_backoff(self.max_attempts);
        let (mut attempt, mut last_progress) = (0, None);
        loop {
            let error = match self.try_read_stored_position(&ids).await {
                Ok(position) => return Ok(position),
                Err(error) => error,
            };
            let progress = Some(self.read_progress());
            if std::mem::replace(&mut last_progress, progress) != progress {
                attempt = 0;
            }
            if error.disposition() != Disposition::Retry || attempt + 1 >= self.max_attempts {
                return Err(error);
            }
            info!(event = event::RETRY, stage = "table", attempt, %error, "a position was not read; trying again");
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
            attempt += 1;
        }
    }

    async fn try_read_stored_position(
        &mut self,
        ids: &PartitionIds,
    ) -> Result<StoredPosition, TableError> {
        self.refresh_positions().await?;
        self.positions.stored_position(&self.log, ids).await
    }

    /// Records that the log after number `replaced` of `partition` is consumed from now on, from its
    /// beginning. Does nothing if another worker has recorded that already. Returns what is stored then.
    /// Retries conflicts and transient errors until `cancel` is cancelled.
    pub async fn start_new_log(
        &mut self,
        partition: &TopicPartition,
        replaced: u64,
        cancel: &CancellationToken,
    ) -> Result<StoredPosition, TableError> {
        let ids = self.partition_ids(partition);
        let backoff = commit_backoff(self.max_attempts);
        let mut attempt = 0;
        loop {
            let error = match self.try_start_new_log(&ids, replaced).await {
                Ok(stored) => return Ok(stored),
                Err(error) => error,
            };
            if error.disposition() != Disposition::Retry {
                return Err(error);
            }
            attempt += 1;
            if attempt >= self.max_attempts {
                return Err(self.log.attempts_exhausted_error(self.max_attempts, &error));
            }
            error.log_commit_retry(attempt, "a new log was not recorded");
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
        }
    }

    async fn try_start_new_log(
        &mut self,
        ids: &PartitionIds,
        replaced: u64,
    ) -> Result<StoredPosition, TableError> {
        let stored = self.try_read_stored_position(ids).await?;
        if stored.log_number > replaced {
            return Ok(stored);
        }
        let number = i64::try_from(replaced + 1).unwrap_or(i64::MAX);
        let transactions = vec![
            Transaction::new(ids.log_number(), number),
            Transaction::new(ids.anchor_offset(), NO_ANCHOR),
        ];
        self.write_commit(Vec::new(), transactions).await?;
        self.positions.stored_position(&self.log, ids).await
    }

    /// Commits `batches`, which have each partition at most once. Rows before the expected position are
    /// stored already and are left out: another worker may have come further than the rows that were
    /// collected here.
    ///
    /// Retries conflicts and transient errors until `cancel` is cancelled. Attempts that read further
    /// than the ones before do not count, as in [`Self::read_position`]. After an error the rows are not
    /// lost: the stored positions say whether they were committed.
    pub async fn append(
        &mut self,
        batches: Vec<PartitionBatch>,
        cancel: &CancellationToken,
    ) -> Result<CommitSummary, TableError> {
        let mut staged = Vec::with_capacity(batches.len());
        for mut batch in batches {
            batch.rows.retain(|(offset, _)| Some(*offset) >= batch.expected_position);
            let add_action = self.stage_batch(&batch, cancel).await?;
            staged.push(StagedBatch { batch, add_action });
        }
        let base_version = self.log.version();
        let backoff = commit_backoff(self.max_attempts);
        let (mut fenced, mut landed) = (Vec::new(), Vec::new());
        let (mut attempt, mut attempts_without_progress, mut last_progress) = (0, 0, None);
        loop {
            let result =
                self.try_append(&mut staged, &mut fenced, &mut landed, base_version, cancel).await;
            let error = match result {
                Ok(version) => {
                    let committed = || landed.iter().chain(&staged);
                    return Ok(CommitSummary {
                        table_version: version,
                        fenced_partitions: fenced,
                        written_row_count: committed().map(|s| s.batch.rows.len()).sum(),
                        written_bytes: committed()
                            .filter_map(|s| s.add_action.as_ref())
                            .map(|add| add.size as u64)
                            .sum(),
                    });
                }
                Err(error) if error.disposition() != Disposition::Retry => return Err(error),
                Err(error @ TableError::Cancelled { .. }) => return Err(error),
                Err(error) => error,
            };
            let progress = Some((self.read_progress(), landed.len()));
            if std::mem::replace(&mut last_progress, progress) != progress {
                attempts_without_progress = 0;
                // Others go on committing: a writer that is behind must be faster than they are. One
                // that met a conflict waits longer.
                if !error.is_commit_conflict() {
                    attempt = 0;
                }
            }
            attempts_without_progress += 1;
            if attempts_without_progress >= self.max_attempts {
                return Err(self.log.attempts_exhausted_error(self.max_attempts, &error));
            }
            error.log_commit_retry(attempt, "a commit did not go through");
            self.refreshed_at = None;
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
            attempt += 1;
        }
    }

    /// Makes one attempt: compares the staged batches with the stored positions, then commits the rest.
    /// Moves batches that an earlier attempt has committed to `landed`.
    async fn try_append(
        &mut self,
        staged: &mut Vec<StagedBatch>,
        fenced: &mut Vec<(TopicPartition, i64)>,
        landed: &mut Vec<StagedBatch>,
        base_version: u64,
        cancel: &CancellationToken,
    ) -> Result<u64, TableError> {
        // If the log was cleaned up past the snapshot, a commit after it would be written where nobody
        // reads any more.
        if self.refreshed_at.is_none_or(|at| at.elapsed() > MAX_SNAPSHOT_AGE) {
            self.refresh_positions().await?;
        }
        let (mut i, mut is_refreshed) = (0, false);
        // A batch leaves `staged` only after the step that decides about it has succeeded: if one
        // fails, the next attempt starts with all that remains.
        while let Some(one) = staged.get(i) {
            let ids = self.partition_ids(&one.batch.partition);
            let position_id = ids.position(one.batch.log_number);
            self.positions.look_up(&self.log, &[position_id.clone(), ids.log_number()]).await?;
            let stored = self.positions.known(&position_id);
            if stored == one.batch.expected_position && stored < Some(one.batch.next_offset) {
                i += 1;
                continue;
            }
            let position = stored.unwrap_or_default();
            if position == one.batch.next_offset
                && self.is_already_committed(one, base_version).await?
            {
                landed.push(staged.remove(i));
                continue;
            }
            if stored < one.batch.expected_position {
                // Whoever set the expected position may have seen a newer version.
                if !std::mem::replace(&mut is_refreshed, true) {
                    self.refresh_positions().await?;
                    continue;
                }
                return Err(TableError::Mismatch {
                    property: "position",
                    stored: format!("{position} of {}", one.batch.partition),
                    configured: format!(
                        "{} by what this worker has read before",
                        one.batch.expected_position.unwrap_or_default()
                    ),
                    remedy: TABLE_WENT_BACK,
                });
            }
            warn!(
                event = event::COMMIT_FENCED, partition = %one.batch.partition, stored_offset = position,
                expected_offset = one.batch.expected_position, next_offset = one.batch.next_offset,
                "another worker has consumed this partition"
            );
            let partition = one.batch.partition.clone();
            if (one.batch.expected_position.unwrap_or_default()..one.batch.next_offset)
                .contains(&position)
            {
                // Only a prefix is stored: this worker still has to write the rest.
                let mut batch = one.batch.clone();
                batch.rows.retain(|(offset, _)| *offset >= position);
                batch.expected_position = stored;
                let add_action = self.stage_batch(&batch, cancel).await?;
                staged[i] = StagedBatch { batch, add_action };
                i += 1;
            } else {
                staged.remove(i);
            }
            fenced.push((partition, position));
        }
        if staged.is_empty() {
            return Ok(self.log.version());
        }
        let transactions = staged.iter().flat_map(|one| self.transactions(&one.batch)).collect();
        let actions =
            staged.iter().filter_map(|one| one.add_action.clone()).map(Action::Add).collect();
        self.write_commit(actions, transactions).await
    }

    /// Returns what a commit says of the position of a batch. The number of the log is said each time, so
    /// that a reader finds it where it finds the position.
    fn transactions(&self, batch: &PartitionBatch) -> Vec<Transaction> {
        let ids = self.partition_ids(&batch.partition);
        let number = i64::try_from(batch.log_number).unwrap_or(i64::MAX);
        let mut transactions =
            vec![Transaction::new(ids.position(batch.log_number), batch.next_offset)];
        // Rows of a log that was replaced in the meantime may still be stored, but it is not consumed again.
        if self.positions.known(&ids.log_number()).is_none_or(|newest| newest <= number) {
            transactions.push(Transaction::new(ids.log_number(), number));
            if let Some(anchor) = batch.anchor {
                transactions.push(Transaction::new(ids.anchor_offset(), anchor.offset));
                transactions.push(Transaction::new(ids.anchor_fingerprint(), anchor.fingerprint));
            }
            if let Some(last) = batch.last_message {
                transactions.push(Transaction::new(ids.last_offset(), last.offset));
                transactions.push(Transaction::new(ids.last_fingerprint(), last.fingerprint));
            }
        }
        transactions
    }

    /// Commits on top of the loaded snapshot, in one attempt. Returns the new version.
    async fn write_commit(
        &mut self,
        actions: Vec<Action>,
        transactions: Vec<Transaction>,
    ) -> Result<u64, TableError> {
        let operation =
            DeltaOperation::Write { mode: SaveMode::Append, partition_by: None, predicate: None };
        let version = self.log.write_commit(actions, transactions.clone(), operation).await?;
        self.positions.record_commit(version, transactions);
        Ok(version)
    }

    /// Uploads the rows of a batch as a file that no commit names yet. Retries transient errors until
    /// `cancel` is cancelled.
    async fn stage_batch(
        &self,
        batch: &PartitionBatch,
        cancel: &CancellationToken,
    ) -> Result<Option<Add>, TableError> {
        if batch.rows.is_empty() {
            return Ok(None);
        }
        let rows: Vec<_> = batch
            .rows
            .iter()
            .map(|(offset, row)| (format!("{}@{offset}", batch.partition), row))
            .collect();
        let columns: RecordBatch =
            schema::rows_to_batch(&rows, &self.log.arrow_schema()?).map_err(|error| {
                TableError::Corrupt { file: self.log.location.clone(), reason: error.to_string() }
            })?;
        let upload = || self.write_data_file(&columns);
        self.log.retry_upload(self.max_attempts, cancel, upload).await.map(Some)
    }

    async fn write_data_file(&self, columns: &RecordBatch) -> Result<Add, TableError> {
        let wrap = |e: ParquetError| self.log.wrap_error(e.into());
        let mut file = DataFileWriter::new(columns.schema()).map_err(wrap)?;
        file.write_batch(columns).map_err(wrap)?;
        file.upload(&self.log).await
    }

    /// Loads the newest snapshot and the positions of its commits. What was read before an error stays read, so
    /// that a store that fails now and then is outlasted.
    async fn refresh_positions(&mut self) -> Result<(), TableError> {
        self.refreshed_at = None;
        self.log.load_newest_snapshot().await?;
        self.positions.read_new_commits(&self.log).await?;
        self.refreshed_at = Some(Instant::now());
        Ok(())
    }

    /// Returns how far the log was read. It changes if an attempt read anything new.
    fn read_progress(&self) -> (u64, u64, u64, usize) {
        let (version, scanned_from_version, known) = self.positions.read_progress();
        (self.log.version(), version, scanned_from_version, known)
    }

    /// Whether a commit after `base_version` names the staged file: then an attempt of this writer has
    /// landed without an answer. A batch without a file stores nothing twice, whoever committed it.
    async fn is_already_committed(
        &self,
        staged: &StagedBatch,
        base_version: u64,
    ) -> Result<bool, TableError> {
        let Some(staged) = &staged.add_action else { return Ok(true) };
        for version in base_version + 1..=self.log.version() {
            let actions = self.log.read_commit(version).await?.unwrap_or_default();
            let names_file =
                |action: &Action| matches!(action, Action::Add(add) if add.path == staged.path);
            if actions.iter().any(names_file) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
