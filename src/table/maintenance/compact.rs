//! Compaction: merges small files into large ones and drops superseded rows.
//!
//! The files to rewrite are split into jobs, and each job is committed by itself: its inputs leave the
//! log and its output enters it in one atomic commit that changes no data (`dataChange = false`), so
//! that readers that follow the table skip it. Each attempt to commit checks, on the very snapshot that
//! it commits against, that every input is still part of the table. So two compactors never store a row
//! twice, and an append in between costs no more than another attempt.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use deltalake_core::DeltaTableError;
use deltalake_core::arrow::array::{AsArray, BooleanArray, RecordBatch};
use deltalake_core::arrow::compute::filter_record_batch;
use deltalake_core::kernel::{Action, Add, LogicalFileView, Remove, Transaction};
use deltalake_core::protocol::DeltaOperation;
use object_store::path::Path;
use tokio_util::sync::CancellationToken;

use super::compaction_plan::{CompactionJob, bin_pack, plan_size_tiers};
use crate::balance::statistics::StatisticsKey;
use crate::record::ImageRow;
use crate::retry::{Classify, Disposition};
use crate::store::Store;
use crate::table::error::TableError;
use crate::table::file::{self, DataFileWriter, FileReadError};
use crate::table::generation::Generation;
use crate::table::key_index::{KeepMask, KeyIndex};
use crate::table::log::{
    COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, DeltaLog, VACUUM_APP_ID, commit_backoff,
};
use crate::table::options::MaintenanceOptions;
use crate::table::schema;
use crate::table::statistics::{self, StatisticsFile, StatisticsTable};

/// How thorough a compaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactionMode {
    /// Merges files of similar size, chosen by the log alone, and reads only those. Superseded rows are
    /// dropped if they are merged with the row that supersedes them.
    Merge,
    /// Reads the keys of all rows first, and also rewrites every file that has too many superseded rows
    /// or the embedding of an erased image.
    Deep,
}

/// The result of a compaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CompactionSummary {
    /// Jobs that were committed.
    pub committed_job_count: usize,
    /// Jobs that were given up because another compactor had replaced one of their files.
    pub conflicting_job_count: usize,
    /// Files removed.
    pub removed_file_count: usize,
    /// Files written in their place.
    pub written_file_count: usize,
    /// Bytes of the files removed.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Superseded rows that were dropped.
    pub dropped_superseded_row_count: usize,
    /// Tombstones that were dropped: nothing older was left, and their retention was over.
    pub dropped_tombstone_count: usize,
    /// Backfilled statistics that were moved into the rows.
    pub folded_statistics_count: usize,
}

/// Compacts the `images` table of one generation.
pub struct Compactor {
    log: DeltaLog,
    catalogue: Store,
    generation: Generation,
    options: MaintenanceOptions,
    max_attempts: u32,
}

/// A data file of the loaded snapshot.
#[derive(Clone)]
struct InputFile {
    path: String,
    byte_size: u64,
    /// Number of rows, if the log says so.
    row_count: Option<usize>,
    remove_action: Remove,
}

fn paths_and_sizes(inputs: &[InputFile]) -> Vec<(String, u64)> {
    inputs.iter().map(|input| (input.path.clone(), input.byte_size)).collect()
}

fn file_sizes(inputs: &[InputFile]) -> Vec<u64> {
    inputs.iter().map(|input| input.byte_size).collect()
}

/// What all jobs of one compaction share.
struct JobContext<'a> {
    /// Files of the table, which jobs name by index.
    inputs: &'a [InputFile],
    /// Keys of all rows. `None` if only the files of a job are known: then tombstones stay.
    key_index: Option<&'a KeyIndex>,
    now: DateTime<Utc>,
    progress: &'a (dyn Fn(usize, usize) + Sync),
    cancel: &'a CancellationToken,
}

impl Compactor {
    /// Opens the table of `generation`. Fails with [`TableError::NotFound`] if there is none. A commit
    /// that fails is tried `max_attempts` times.
    pub async fn open(
        catalogue: &Store,
        generation: &Generation,
        options: &MaintenanceOptions,
        max_attempts: u32,
    ) -> Result<Self, TableError> {
        let log = DeltaLog::open_images(catalogue, generation).await?;
        let (catalogue, generation) = (catalogue.clone(), generation.clone());
        Ok(Self { log, catalogue, generation, options: options.clone(), max_attempts })
    }

    /// Returns when the keys of all rows were last checked.
    pub async fn last_deep_compaction_time(&mut self) -> Result<Option<DateTime<Utc>>, TableError> {
        self.last_recorded_time(DEEP_COMPACTION_APP_ID).await
    }

    /// Returns when files that no reader needs any more were last removed.
    pub async fn last_vacuum_time(&mut self) -> Result<Option<DateTime<Utc>>, TableError> {
        self.last_recorded_time(VACUUM_APP_ID).await
    }

    /// Records in the Delta log that a vacuum was done at `now`.
    pub async fn record_vacuum_time(
        &mut self,
        now: DateTime<Utc>,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        self.record_time(VACUUM_APP_ID, now, cancel).await
    }

    async fn last_recorded_time(
        &mut self,
        application_id: &str,
    ) -> Result<Option<DateTime<Utc>>, TableError> {
        self.log.load_newest_snapshot().await?;
        let at = self.log.transaction_version(application_id).await?;
        Ok(at.and_then(DateTime::from_timestamp_millis))
    }

    /// Compacts once, with ages as of `now`. Calls `progress` with the jobs done and the jobs in all.
    /// When `cancel` is cancelled, it finishes the job in progress, unless its commit has to be tried
    /// again, and returns what was done so far.
    pub async fn run(
        &mut self,
        mode: CompactionMode,
        now: DateTime<Utc>,
        progress: &(dyn Fn(usize, usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<CompactionSummary, TableError> {
        let mut summary = CompactionSummary::default();
        match self.run_passes(mode, now, &mut summary, progress, cancel).await {
            // An output that was not committed is removed by vacuum later.
            Ok(()) | Err(TableError::Cancelled { .. }) => Ok(summary),
            Err(error) => Err(error),
        }
    }

    async fn run_passes(
        &mut self,
        mode: CompactionMode,
        now: DateTime<Utc>,
        summary: &mut CompactionSummary,
        progress: &(dyn Fn(usize, usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        if mode == CompactionMode::Deep {
            let inputs = self.list_input_files().await?;
            let keys = KeyIndex::read_files(&self.log, paths_and_sizes(&inputs)).await?;
            let files = keys.file_indices_to_rewrite(&self.options, now);
            let jobs = bin_pack(&self.options, &file_sizes(&inputs), files);
            let context =
                JobContext { inputs: &inputs, key_index: Some(&keys), now, progress, cancel };
            self.run_jobs(jobs, &context, summary).await?;
            if !cancel.is_cancelled() {
                self.record_time(DEEP_COMPACTION_APP_ID, now, cancel).await?;
            }
        }
        let inputs = self.list_input_files().await?;
        let jobs = plan_size_tiers(&self.options, &file_sizes(&inputs));
        let context = JobContext { inputs: &inputs, key_index: None, now, progress, cancel };
        self.run_jobs(jobs, &context, summary).await
    }

    /// Removes from the table files that are missing or damaged, and returns their names. What they held
    /// is no longer known: neither which images, nor which of them were deleted. Does nothing and
    /// returns `None` if `cancel` was cancelled, or if another compactor has replaced one of the files.
    /// Calls `progress` with the files read and the files in all.
    pub async fn drop_damaged_files(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<String>>, TableError> {
        let inputs = self.list_input_files().await?;
        let mut damaged = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            if cancel.is_cancelled() {
                return Ok(None);
            }
            let path = Path::from(input.path.as_str());
            match file::read_and_check_rows(&self.log, &path, input.byte_size, input.row_count)
                .await
            {
                Ok(_) => {}
                Err(FileReadError::Store(error)) => {
                    return Err(
                        FileReadError::Store(error).into_table_error(&self.log, &input.path)
                    );
                }
                Err(FileReadError::NotFound | FileReadError::Corrupt(_)) => {
                    damaged.push(input.clone());
                }
            }
            progress(i + 1, inputs.len());
        }
        if !damaged.is_empty() {
            match self.commit_rewrite(&damaged, None, Utc::now(), cancel).await {
                Ok(true) => {}
                Ok(false) | Err(TableError::Cancelled { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(damaged.into_iter().map(|input| input.path).collect()))
    }

    /// Returns the number of files that the next merge would rewrite.
    pub async fn count_files_to_merge(&mut self) -> Result<usize, TableError> {
        let inputs = self.list_input_files().await?;
        Ok(plan_size_tiers(&self.options, &file_sizes(&inputs)).iter().map(Vec::len).sum())
    }

    /// Returns the number of data files of the table.
    pub async fn count_files(&mut self) -> Result<usize, TableError> {
        Ok(self.list_input_files().await?.len())
    }

    /// Lists the data files of the newest snapshot, the smallest first.
    async fn list_input_files(&mut self) -> Result<Vec<InputFile>, TableError> {
        self.log.load_newest_snapshot().await?;
        let files = self.log.snapshot()?.log_data();
        let input = |file: LogicalFileView| InputFile {
            path: file.path().into_owned(),
            byte_size: file.size().unsigned_abs(),
            row_count: file.num_records(),
            remove_action: file.remove_action(false),
        };
        let mut inputs: Vec<InputFile> = files.iter().map(input).collect();
        inputs.sort_by(|a, b| (a.byte_size, &a.path).cmp(&(b.byte_size, &b.path)));
        Ok(inputs)
    }

    async fn run_jobs(
        &mut self,
        jobs: Vec<CompactionJob>,
        context: &JobContext<'_>,
        summary: &mut CompactionSummary,
    ) -> Result<(), TableError> {
        let total = jobs.len();
        let mut statistics =
            StatisticsTable::open_if_exists(&self.catalogue, &self.generation, self.max_attempts)
                .await?;
        for (i, job) in jobs.iter().enumerate() {
            if context.cancel.is_cancelled() {
                break;
            }
            self.run_job(job, context, &mut statistics, summary).await?;
            (context.progress)(i + 1, total);
        }
        Ok(())
    }

    async fn run_job(
        &mut self,
        job: &CompactionJob,
        context: &JobContext<'_>,
        statistics: &mut Option<StatisticsTable>,
        summary: &mut CompactionSummary,
    ) -> Result<(), TableError> {
        let files: Vec<InputFile> = job.iter().map(|i| context.inputs[*i].clone()).collect();
        let kept = match context.key_index {
            Some(keys) => keys.keep_mask(job, &self.options, context.now),
            None => {
                KeyIndex::read_files(&self.log, paths_and_sizes(&files)).await?.keep_newest_mask()
            }
        };
        let units = match statistics {
            None => Vec::new(),
            Some(table) => statistics_files_of(table, &files).await?,
        };
        let backfilled = statistics.as_ref().map(|table| (table, units.as_slice()));
        let (output, folded) = self.rewrite_files(&files, &kept, backfilled).await?;
        let bytes_out = output.as_ref().map_or(0, |add| add.size.unsigned_abs());
        let files_out = usize::from(output.is_some());
        if !self.commit_rewrite(&files, output, context.now, context.cancel).await? {
            summary.conflicting_job_count += 1;
            return Ok(());
        }
        summary.committed_job_count += 1;
        summary.removed_file_count += files.len();
        summary.written_file_count += files_out;
        summary.bytes_in += files.iter().map(|f| f.byte_size).sum::<u64>();
        summary.bytes_out += bytes_out;
        summary.dropped_superseded_row_count += kept.superseded_row_count;
        summary.dropped_tombstone_count += kept.dropped_tombstone_count;
        summary.folded_statistics_count += folded;
        // They belong to files that are gone. If a crash leaves them behind, they do no harm, and a
        // reader that has not seen the new file yet computes what it lacks.
        if let Some(table) = statistics.as_mut().filter(|_| !units.is_empty()) {
            let unit_files = units.into_iter().map(|(_, file)| file).collect();
            table.remove_files(unit_files, context.cancel).await?;
        }
        Ok(())
    }

    /// Writes the kept rows of `files` to one file that no commit names yet, with their backfilled
    /// statistics. Returns `None` if no row is kept, and the number of statistics that were added.
    async fn rewrite_files(
        &self,
        files: &[InputFile],
        kept: &KeepMask,
        backfilled: Option<(&StatisticsTable, &[(usize, StatisticsFile)])>,
    ) -> Result<(Option<Add>, usize), TableError> {
        let failed = |e: DeltaTableError| self.log.wrap_error(e);
        let mut output =
            DataFileWriter::new(self.log.arrow_schema()?).map_err(|e| failed(e.into()))?;
        let mut folded = 0;
        for (i, (input, mask)) in files.iter().zip(&kept.masks).enumerate() {
            if !mask.contains(&true) {
                continue;
            }
            let mut by_version = Vec::new();
            if let Some((table, units)) = backfilled {
                for (_, unit) in units.iter().filter(|(file, _)| *file == i) {
                    let rows = table.read_file_or_empty(&unit.path).await?;
                    by_version
                        .push((unit.prompt_set_key.clone(), statistics::index_by_version(rows)));
                }
            }
            let corrupt = |reason: String| TableError::Corrupt {
                file: format!("{}/{}", self.log.location, input.path),
                reason,
            };
            let bytes =
                file::read_and_verify_checksum(&self.log, &Path::from(input.path.as_str())).await;
            let bytes = bytes.map_err(|e| e.into_table_error(&self.log, &input.path))?;
            let mut row = 0;
            for batch in file::read_batches(bytes).map_err(|e| corrupt(e.to_string()))? {
                let batch: RecordBatch = batch.map_err(|e| corrupt(e.to_string()))?;
                let end = row + batch.num_rows();
                let mask = mask.get(row..end).ok_or_else(|| corrupt("has more rows now".into()))?;
                row = end;
                let kept_rows = filter_record_batch(&batch, &BooleanArray::from(mask.to_vec()));
                let mut kept_rows = kept_rows.map_err(|e| corrupt(e.to_string()))?;
                if !by_version.is_empty() {
                    let (with_statistics, count) =
                        fold_statistics(&kept_rows, &by_version).map_err(corrupt)?;
                    (kept_rows, folded) = (with_statistics, folded + count);
                }
                output.write_batch(&kept_rows).map_err(|e| failed(e.into()))?;
            }
        }
        if output.row_count() == 0 {
            return Ok((None, folded));
        }
        let mut add = output.upload(&self.log).await?;
        add.data_change = false;
        Ok((Some(add), folded))
    }

    /// Replaces `files` by `output`. Returns false if another compactor has replaced one of them first.
    /// Retries conflicts and transient errors until `cancel` is cancelled.
    async fn commit_rewrite(
        &mut self,
        files: &[InputFile],
        output: Option<Add>,
        now: DateTime<Utc>,
        cancel: &CancellationToken,
    ) -> Result<bool, TableError> {
        let backoff = commit_backoff(self.max_attempts);
        let (mut attempt, mut is_attempted) = (0, false);
        loop {
            let result =
                self.try_commit_rewrite(files, output.as_ref(), now, &mut is_attempted).await;
            let error = match result {
                Err(error) if error.disposition() == Disposition::Retry => error,
                result => return result,
            };
            if attempt + 1 >= self.max_attempts {
                return Err(self.log.attempts_exhausted_error(self.max_attempts, &error));
            }
            error.log_commit_retry(attempt, "a compaction did not go through");
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
            attempt += 1;
        }
    }

    /// Makes one attempt. `is_attempted` says whether an earlier one has sent its commit.
    async fn try_commit_rewrite(
        &mut self,
        files: &[InputFile],
        output: Option<&Add>,
        now: DateTime<Utc>,
        is_attempted: &mut bool,
    ) -> Result<bool, TableError> {
        self.log.load_newest_snapshot().await?;
        let current: HashSet<String> = {
            let files = self.log.snapshot()?.log_data();
            files.iter().map(|file| file.path().into_owned()).collect()
        };
        if files.iter().any(|file| !current.contains(&file.path)) {
            // Either another compactor was first, or an earlier attempt landed without an answer.
            return Ok(output.map_or(*is_attempted, |add| current.contains(&add.path)));
        }
        *is_attempted = true;
        // Retention is counted from the commit, however long the rewriting took.
        let remove = |file: &InputFile| {
            let deletion_timestamp = Some(Utc::now().timestamp_millis());
            Action::Remove(Remove { deletion_timestamp, ..file.remove_action.clone() })
        };
        let actions = files.iter().map(remove).chain(output.cloned().map(Action::Add));
        self.commit_once(actions.collect(), COMPACTION_APP_ID, now).await?;
        Ok(true)
    }

    /// Records a time in a commit of its own. Retries conflicts and transient errors until `cancel` is
    /// cancelled.
    async fn record_time(
        &mut self,
        application_id: &str,
        time: DateTime<Utc>,
        cancel: &CancellationToken,
    ) -> Result<(), TableError> {
        let backoff = commit_backoff(self.max_attempts);
        let mut attempt = 0;
        loop {
            let error = match self.try_record_time(application_id, time).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if error.disposition() != Disposition::Retry || attempt + 1 >= self.max_attempts {
                return Err(error);
            }
            if !backoff.wait(attempt, cancel).await {
                return Err(self.log.cancelled_error(&error));
            }
            attempt += 1;
        }
    }

    async fn try_record_time(
        &mut self,
        application_id: &str,
        time: DateTime<Utc>,
    ) -> Result<(), TableError> {
        self.log.load_newest_snapshot().await?;
        self.commit_once(Vec::new(), application_id, time).await
    }

    /// Commits on top of the loaded snapshot, with `time` as the version of `application_id`.
    async fn commit_once(
        &mut self,
        actions: Vec<Action>,
        application_id: &str,
        time: DateTime<Utc>,
    ) -> Result<(), TableError> {
        let operation = DeltaOperation::Optimize {
            predicate: None,
            target_size: (self.options.target_file_mib << 20) as i64,
        };
        let transactions = vec![Transaction::new(application_id, time.timestamp_millis())];
        self.log.write_commit(actions, transactions, operation).await.map(|_| ())
    }
}

/// Returns the files of backfilled statistics that belong to `files`, each with the index of its file.
async fn statistics_files_of(
    table: &mut StatisticsTable,
    files: &[InputFile],
) -> Result<Vec<(usize, StatisticsFile)>, TableError> {
    let all = table.files_by_unit().await?;
    let keys: HashSet<&StatisticsKey> = all.values().map(|unit| &unit.prompt_set_key).collect();
    let mut units = Vec::new();
    for (i, file) in files.iter().enumerate() {
        let units_of_file =
            keys.iter().filter_map(|key| all.get(&statistics::backfill_unit_id(key, &file.path)));
        units.extend(units_of_file.map(|unit| (i, unit.clone())));
    }
    Ok(units)
}

/// Returns the batch with the backfilled statistics of its rows, and how many were added.
fn fold_statistics(
    batch: &RecordBatch,
    backfilled: &[(StatisticsKey, statistics::BackfilledByVersion)],
) -> Result<(RecordBatch, usize), String> {
    let mut rows = schema::rows_from_batch(batch)?;
    let mut count = 0;
    for (key, by_version) in backfilled {
        count += statistics::attach_statistics(&mut rows, key, by_version);
    }
    let sources =
        batch.column_by_name(schema::SOURCE_COLUMN).and_then(|c| c.as_string_opt::<i32>());
    let sources = sources.ok_or("column source is not text")?;
    let rows: Vec<(String, &ImageRow)> =
        rows.iter().enumerate().map(|(i, row)| (sources.value(i).to_owned(), row)).collect();
    let batch = schema::rows_to_batch(&rows, &batch.schema()).map_err(|e| e.to_string())?;
    Ok((batch, count))
}
