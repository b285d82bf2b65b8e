//! Appending rows and positions in one atomic commit.
//!
//! The commit loop answers what goes wrong between several writers on one log. Each attempt checks,
//! on the very snapshot that it commits against, that every partition's stored position is the
//! expected one; a lost race refreshes and looks again instead of trusting the library's retries.
//! An unclear answer (the write was applied, its acknowledgement was lost) is resolved the same way:
//! if the stored position is ours and so is the file in that commit, the commit has landed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use deltalake_core::arrow::array::RecordBatch;
use deltalake_core::kernel::{Action, Add, Transaction};
use deltalake_core::parquet::errors::ParquetError;
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use tracing::{info, warn};

use super::error::TableError;
use super::file::DataFileWriter;
use super::generation::Generation;
use super::log::{DeltaLog, TableKind};
use super::schema;
use crate::record::{ImageRow, TopicPartition};
use crate::retry::{Backoff, Classify, Disposition};
use crate::store::Store;
use crate::telemetry::event;

/// A snapshot older than this is not built upon: well below the least time that the log stays.
const MAX_SNAPSHOT_AGE: Duration = Duration::from_secs(600);
/// Commits that are looked at one by one for a position, newest first, before the log is asked: a
/// partition that has work is in one of them.
const MAX_LOOK_BACK_COMMITS: u64 = 40;

/// Rows of one partition that are to be committed together with its position.
#[derive(Debug, Clone)]
pub struct PartitionBatch {
    /// Which partition.
    pub partition: TopicPartition,
    /// The position that the table must have for this commit to be right: the offset after the
    /// last one that is stored, `None` where nothing is stored yet.
    pub expected_position: Option<i64>,
    /// The position after the commit: every offset below it is done with.
    pub next_offset: i64,
    /// Rows with the offset of the message that each came from, in order. May be empty.
    pub rows: Vec<(i64, ImageRow)>,
}

/// What a commit came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitSummary {
    /// Version of the table after it.
    pub version: u64,
    /// Partitions that somebody else has consumed meanwhile, with the table's position: their rows
    /// were dropped, because they are stored already.
    pub fenced_partitions: Vec<(TopicPartition, i64)>,
    /// Rows written.
    pub rows: usize,
    /// Bytes of the files written.
    pub bytes: u64,
}

/// Appends to the table of one generation.
pub struct TableWriter {
    log: DeltaLog,
    max_attempts: u32,
    /// Name of the replay whose positions are kept; usually empty.
    replay_name: String,
    /// Positions as of `known`. Single commits tell them, a worker's own most of the time: asking
    /// the log for one reads all of its tail at once, each time anew.
    positions: HashMap<String, Option<i64>>,
    /// Version that `positions` are as of; at most that of the loaded snapshot.
    positions_version: u64,
    /// Commits below this version have not been read for positions.
    scanned_from_version: u64,
    /// When the snapshot was last compared with the log; none where that is due.
    refreshed_at: Option<Instant>,
}

/// A batch with its staged file.
struct StagedBatch {
    batch: PartitionBatch,
    /// None where there are no rows.
    add_action: Option<Add>,
}

impl TableWriter {
    /// Opens the table of `generation`, making it where it is missing.
    pub async fn open(
        catalogue: &Store,
        generation: &Generation,
        max_attempts: u32,
    ) -> Result<Self, TableError> {
        let log = DeltaLog::open_or_create(catalogue, generation, TableKind::Images).await?;
        Ok(Self {
            positions_version: log.version(),
            scanned_from_version: log.version() + 1,
            log,
            max_attempts,
            replay_name: String::new(),
            positions: HashMap::new(),
            refreshed_at: None,
        })
    }

    /// Keeps positions under the name of a deliberate replay, apart from the usual ones; an empty
    /// name changes nothing.
    #[must_use]
    pub fn with_replay_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.replay_name);
        self
    }

    /// The application id under which the Delta log keeps a partition's position.
    fn application_id(&self, partition: &TopicPartition) -> String {
        let usual = format!("bsap:{}:{}", partition.topic, partition.number);
        if self.replay_name.is_empty() {
            usual
        } else {
            format!("{usual}:replay:{}", self.replay_name)
        }
    }

    /// The offset after the last stored one of `partition`, read anew from the log. Tries again
    /// what may pass, as often as a commit; attempts that came further do not count, however long the
    /// way is.
    pub async fn read_position(
        &mut self,
        partition: &TopicPartition,
    ) -> Result<Option<i64>, TableError> {
        let backoff = self.backoff();
        let (mut attempt, mut reached) = (0, None);
        loop {
            let result = self.try_read_position(partition).await;
            let now = Some((self.log.version(), self.positions_version, self.scanned_from_version));
            if std::mem::replace(&mut reached, now) != now {
                attempt = 0;
            }
            match result {
                Err(error)
                    if error.disposition() == Disposition::Retry
                        && attempt + 1 < self.max_attempts =>
                {
                    info!(event = event::RETRY, stage = "table", attempt, %error, "a position was not read; trying again");
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    async fn try_read_position(
        &mut self,
        partition: &TopicPartition,
    ) -> Result<Option<i64>, TableError> {
        self.refresh_positions().await?;
        self.stored_position(&self.application_id(partition)).await
    }

    fn backoff(&self) -> Backoff {
        Backoff { cap: Duration::from_secs(2), ..Backoff::with_max_attempts(self.max_attempts) }
    }

    /// Commits `batches`, each partition at most once. Rows before the expected position are stored
    /// already, and are left out: another worker may have come further than what had gathered here.
    /// Attempts that came further do not count, as in [`Writer::position`].
    pub async fn append(
        &mut self,
        batches: Vec<PartitionBatch>,
    ) -> Result<CommitSummary, TableError> {
        let mut staged = Vec::with_capacity(batches.len());
        for mut batch in batches {
            batch.rows.retain(|(offset, _)| Some(*offset) >= batch.expected_position);
            let add = self.stage_batch(&batch).await?;
            staged.push(StagedBatch { batch, add_action: add });
        }
        let mut fenced = Vec::new();
        let base = self.log.version();
        let backoff = self.backoff();
        let mut landed = Vec::new();
        let (mut attempt, mut idle, mut reached) = (0, 0, None);
        loop {
            match self.try_append(&mut staged, &mut fenced, &mut landed, base).await {
                Ok(version) => {
                    let all = || landed.iter().chain(&staged);
                    return Ok(CommitSummary {
                        version,
                        fenced_partitions: fenced,
                        rows: all().map(|s| s.batch.rows.len()).sum(),
                        bytes: all()
                            .filter_map(|s| s.add_action.as_ref())
                            .map(|a| a.size as u64)
                            .sum(),
                    });
                }
                Err(error) if error.disposition() == Disposition::Retry => {
                    let now = Some((
                        self.log.version(),
                        self.positions_version,
                        self.scanned_from_version,
                        landed.len(),
                    ));
                    if std::mem::replace(&mut reached, now) != now {
                        idle = 0;
                        // Others commit meanwhile: who is behind must be faster. Who met them waits longer.
                        if !error.is_commit_conflict() {
                            attempt = 0;
                        }
                    }
                    idle += 1;
                    let last = error.to_string();
                    if idle >= self.max_attempts {
                        let (place, attempts) = (self.log.location.clone(), self.max_attempts);
                        return Err(TableError::AttemptsExhausted {
                            location: place,
                            attempts,
                            last_error: last,
                        });
                    }
                    info!(event = event::COMMIT_CONFLICT, attempt, reason = %last, "commit did not go through; looking again");
                    self.refreshed_at = None;
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One attempt: reconcile what is staged with what is stored, then commit what is left.
    async fn try_append(
        &mut self,
        staged: &mut Vec<StagedBatch>,
        fenced: &mut Vec<(TopicPartition, i64)>,
        landed: &mut Vec<StagedBatch>,
        base: u64,
    ) -> Result<u64, TableError> {
        // A commit after a snapshot whose successors were cleaned up would be written where nobody
        // reads any more.
        if self.refreshed_at.is_none_or(|at| at.elapsed() > MAX_SNAPSHOT_AGE) {
            self.refresh_positions().await?;
        }
        let (mut i, mut looked_again) = (0, false);
        // Nothing leaves `staged` before the step that settles it has succeeded: a fault in between
        // starts the next attempt with all that is left.
        while let Some(one) = staged.get(i) {
            let stored = self.stored_position(&self.application_id(&one.batch.partition)).await?;
            if stored == one.batch.expected_position && stored < Some(one.batch.next_offset) {
                i += 1;
                continue;
            }
            let position = stored.unwrap_or_default();
            if position == one.batch.next_offset && self.is_already_committed(one, base).await? {
                landed.push(staged.remove(i));
                continue;
            }
            if stored < one.batch.expected_position {
                // Whoever said what is expected may have seen a newer version.
                if !std::mem::replace(&mut looked_again, true) {
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
                    remedy: "The table went back, as if it had been restored; start the workers again, and they read again what it lacks",
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
                // Only a prefix is stored: the rest is still this worker's to write.
                let mut batch = one.batch.clone();
                batch.rows.retain(|(offset, _)| *offset >= position);
                batch.expected_position = stored;
                let add = self.stage_batch(&batch).await?;
                staged[i] = StagedBatch { batch, add_action: add };
                i += 1;
            } else {
                staged.remove(i);
            }
            fenced.push((partition, position));
        }
        if staged.is_empty() {
            return Ok(self.log.version());
        }
        let version = self.commit_staged(staged).await?;
        self.positions_version = version;
        for one in staged {
            let application = self.application_id(&one.batch.partition);
            self.positions.insert(application, Some(one.batch.next_offset));
        }
        Ok(version)
    }

    async fn commit_staged(&mut self, staged: &[StagedBatch]) -> Result<u64, TableError> {
        let transactions = staged
            .iter()
            .map(|one| {
                Transaction::new(self.application_id(&one.batch.partition), one.batch.next_offset)
            })
            .collect();
        let actions =
            staged.iter().filter_map(|one| one.add_action.clone()).map(Action::Add).collect();
        let operation =
            DeltaOperation::Write { mode: SaveMode::Append, partition_by: None, predicate: None };
        self.log.write_commit(actions, transactions, operation).await
    }

    /// Writes the rows of a batch to a file that no commit names yet.
    async fn stage_batch(&self, batch: &PartitionBatch) -> Result<Option<Add>, TableError> {
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
        let backoff = Backoff::with_max_attempts(self.max_attempts);
        let mut attempt = 0;
        loop {
            match self.write_data_file(&columns).await {
                Ok(add) => return Ok(Some(add)),
                Err(error)
                    if error.disposition() == Disposition::Retry
                        && attempt + 1 < self.max_attempts =>
                {
                    info!(event = event::RETRY, stage = "table", attempt, %error, "a file was not written; trying again");
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn write_data_file(&self, columns: &RecordBatch) -> Result<Add, TableError> {
        let wrap = |e: ParquetError| self.log.wrap_error(e.into());
        let mut file = DataFileWriter::new(columns.schema()).map_err(wrap)?;
        file.write_batch(columns).map_err(wrap)?;
        file.upload(&self.log).await
    }

    /// Loads the newest snapshot, and what its commits say of positions. Each step counts where the
    /// next one fails, so that a store that fails now and then is outlasted.
    async fn refresh_positions(&mut self) -> Result<(), TableError> {
        self.refreshed_at = None;
        self.log.update().await?;
        while self.positions_version < self.log.version() {
            let Some(actions) = self.log.read_commit(self.positions_version + 1).await? else {
                // Cleaned up meanwhile: the log is asked for each position anew.
                self.positions.clear();
                self.positions_version = self.log.version();
                self.scanned_from_version = self.positions_version + 1;
                break;
            };
            for (application, position) in positions_in_commit(actions) {
                self.positions.insert(application, Some(position));
            }
            self.positions_version += 1;
        }
        self.refreshed_at = Some(Instant::now());
        Ok(())
    }

    async fn stored_position(&mut self, application_id: &str) -> Result<Option<i64>, TableError> {
        let lowest = self.positions_version.saturating_sub(MAX_LOOK_BACK_COMMITS);
        while !self.positions.contains_key(application_id) && self.scanned_from_version > lowest {
            let Some(actions) = self.log.read_commit(self.scanned_from_version - 1).await? else {
                break;
            };
            for (application, position) in positions_in_commit(actions) {
                self.positions.entry(application).or_insert(Some(position));
            }
            self.scanned_from_version -= 1;
        }
        if let Some(known) = self.positions.get(application_id) {
            return Ok(*known);
        }
        let position = match self.scanned_from_version {
            0 => None,
            _ => self.log.transaction_version(application_id).await?,
        };
        self.positions.insert(application_id.to_owned(), position);
        Ok(position)
    }

    /// Whether a commit after version `base` holds the staged files: then it is this writer's own,
    /// of which it never heard. Without files there is nothing that could be doubled.
    async fn is_already_committed(
        &self,
        staged: &StagedBatch,
        base: u64,
    ) -> Result<bool, TableError> {
        let Some(staged) = &staged.add_action else { return Ok(true) };
        for version in base + 1..=self.log.version() {
            let actions = self.log.read_commit(version).await?.unwrap_or_default();
            let ours = |a: &Action| matches!(a, Action::Add(add) if add.path == staged.path);
            if actions.iter().any(ours) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The positions that a commit sets.
fn positions_in_commit(actions: Vec<Action>) -> impl Iterator<Item = (String, i64)> {
    actions.into_iter().filter_map(|action| match action {
        Action::Txn(transaction) => Some((transaction.app_id, transaction.version)),
        _ => None,
    })
}
