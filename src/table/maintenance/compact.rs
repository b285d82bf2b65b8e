//! Compaction: small files become large ones, and superseded rows go.
//!
//! What is rewritten is cut into jobs, each committed by itself: its inputs leave the log and its
//! output enters it in one atomic commit that changes no data (`dataChange = false`), which readers
//! that follow the table pass over. Each attempt to commit checks, on the very snapshot that it
//! commits against, that every input is still there; so two compactors never double a row, and an
//! append in between costs no more than another attempt.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use deltalake_core::arrow::array::{AsArray, BooleanArray, RecordBatch};
use deltalake_core::arrow::compute::filter_record_batch;
use deltalake_core::kernel::{Action, Add, Remove, Transaction};
use deltalake_core::protocol::DeltaOperation;
use object_store::path::Path;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::balance::statistics::StatisticsKey;
use crate::record::ImageRow;
use crate::retry::{Backoff, Classify, Disposition};
use crate::store::Store;
use crate::table::error::TableError;
use crate::table::file::{self, DataFileWriter, FileReadError};
use crate::table::generation::Generation;
use crate::table::key_index::{KeepMask, KeyIndex};
use crate::table::log::{COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, DeltaLog, VACUUM_APP_ID};
use crate::table::options::MaintenanceOptions;
use crate::table::schema;
use crate::table::statistics::{self, StatisticsFile, StatisticsTable};
use crate::telemetry::event;

/// How much compaction looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactionMode {
    /// Merges files of similar size, as the log shows them: cheap, reads nothing else. Superseded
    /// rows go where they meet what supersedes them.
    Merge,
    /// Reads the keys of all rows first, and rewrites every file with too many superseded rows, or
    /// with the embedding of an erased image.
    Deep,
}

/// What compaction did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CompactionSummary {
    /// Commits.
    pub committed_jobs: usize,
    /// Jobs given up because another compactor had taken a file.
    pub conflicting_jobs: usize,
    /// Files taken away.
    pub files_in: usize,
    /// Files put in their place.
    pub files_out: usize,
    /// Bytes of the files taken away.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Superseded rows that are gone.
    pub dropped_superseded_rows: usize,
    /// Tombstones that are gone, because nothing older was left and their time was over.
    pub dropped_tombstones: usize,
    /// Backfilled statistics that stand in the rows now.
    pub folded_statistics: usize,
}

/// Compacts the table of one generation.
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
    size: u64,
    /// Rows, where the log says so.
    rows: Option<usize>,
    remove_action: Remove,
}

/// Files to be rewritten as one, by index.
type CompactionJob = Vec<usize>;

/// Files as [`Keys::read`] wants them.
fn paths_and_sizes(inputs: &[InputFile]) -> Vec<(String, u64)> {
    inputs.iter().map(|input| (input.path.clone(), input.size)).collect()
}

impl Compactor {
    /// Opens the table of `generation`; `Missing` where there is none. A commit is tried `attempts`
    /// times.
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

    /// When every row was last looked at.
    pub async fn last_deep_compaction(&mut self) -> Result<Option<DateTime<Utc>>, TableError> {
        self.last_recorded_time(DEEP_COMPACTION_APP_ID).await
    }

    /// When files that nobody needs any more were last removed.
    pub async fn last_vacuum(&mut self) -> Result<Option<DateTime<Utc>>, TableError> {
        self.last_recorded_time(VACUUM_APP_ID).await
    }

    /// Takes note that they were removed.
    pub async fn record_vacuum(&mut self, now: DateTime<Utc>) -> Result<(), TableError> {
        self.record_time(VACUUM_APP_ID, now).await
    }

    async fn last_recorded_time(
        &mut self,
        application: &str,
    ) -> Result<Option<DateTime<Utc>>, TableError> {
        self.log.update().await?;
        let at = self.log.transaction_version(application).await?;
        Ok(at.and_then(DateTime::from_timestamp_millis))
    }

    /// Compacts once, as things are `now`. Ends early, between two jobs, when `token` is cancelled.
    /// `progress` hears of jobs done and jobs in all.
    pub async fn run(
        &mut self,
        mode: CompactionMode,
        now: DateTime<Utc>,
        progress: &(dyn Fn(usize, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<CompactionSummary, TableError> {
        let mut done = CompactionSummary::default();
        if mode == CompactionMode::Deep {
            let inputs = self.list_input_files().await?;
            let keys = KeyIndex::read_files(&self.log, paths_and_sizes(&inputs)).await?;
            let chosen = keys.files_to_rewrite(&self.options, now);
            let jobs = bin_pack(&self.options, &file_sizes(&inputs), chosen);
            self.run_jobs(&inputs, jobs, Some(&keys), now, &mut done, progress, token).await?;
            if !token.is_cancelled() {
                self.record_time(DEEP_COMPACTION_APP_ID, now).await?;
            }
        }
        let inputs = self.list_input_files().await?;
        let jobs = plan_size_tiers(&self.options, &file_sizes(&inputs));
        self.run_jobs(&inputs, jobs, None, now, &mut done, progress, token).await?;
        Ok(done)
    }

    /// Takes files that are not there, or are not what was written, out of the table, and gives
    /// their names. What they held is no longer known: which images, and which were deleted. None where
    /// `token` was cancelled, or a file was taken by another compactor meanwhile: nothing was done.
    /// `progress` hears of files read and files in all.
    pub async fn drop_damaged_files(
        &mut self,
        progress: &(dyn Fn(usize, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<Option<Vec<String>>, TableError> {
        let inputs = self.list_input_files().await?;
        let mut damaged = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            if token.is_cancelled() {
                return Ok(None);
            }
            let path = Path::from(input.path.as_str());
            match file::read_and_check_rows(&self.log, &path, input.size, input.rows).await {
                Ok(_) => {}
                Err(FileReadError::Store(error)) => {
                    return Err(
                        FileReadError::Store(error).into_table_error(&self.log, &input.path)
                    );
                }
                Err(FileReadError::NotFound | FileReadError::Corrupt(_)) => {
                    damaged.push(input.clone())
                }
            }
            progress(i + 1, inputs.len());
        }
        if !damaged.is_empty() && !self.commit_rewrite(&damaged, None, Utc::now()).await? {
            return Ok(None);
        }
        Ok(Some(damaged.into_iter().map(|input| input.path).collect()))
    }

    /// Files that another merge would take.
    pub async fn count_pending_files(&mut self) -> Result<usize, TableError> {
        let inputs = self.list_input_files().await?;
        Ok(plan_size_tiers(&self.options, &file_sizes(&inputs)).iter().map(Vec::len).sum())
    }

    /// Data files of the table.
    pub async fn count_files(&mut self) -> Result<usize, TableError> {
        Ok(self.list_input_files().await?.len())
    }

    async fn list_input_files(&mut self) -> Result<Vec<InputFile>, TableError> {
        self.log.update().await?;
        let files = self.log.snapshot()?.log_data();
        let input = |file: deltalake_core::kernel::LogicalFileView| InputFile {
            path: file.path().into_owned(),
            size: file.size().unsigned_abs(),
            rows: file.num_records(),
            remove_action: file.remove_action(false),
        };
        let mut inputs: Vec<InputFile> = files.iter().map(input).collect();
        inputs.sort_by(|a, b| (a.size, &a.path).cmp(&(b.size, &b.path)));
        Ok(inputs)
    }

    #[allow(clippy::too_many_arguments)]
    async fn run_jobs(
        &mut self,
        inputs: &[InputFile],
        jobs: Vec<CompactionJob>,
        keys: Option<&KeyIndex>,
        now: DateTime<Utc>,
        summary: &mut CompactionSummary,
        progress: &(dyn Fn(usize, usize) + Sync),
        token: &CancellationToken,
    ) -> Result<(), TableError> {
        let total = jobs.len();
        let mut backfill =
            StatisticsTable::open(&self.catalogue, &self.generation, self.max_attempts).await?;
        for (i, job) in jobs.into_iter().enumerate() {
            if token.is_cancelled() {
                break;
            }
            let files: Vec<InputFile> = job.iter().map(|i| inputs[*i].clone()).collect();
            let kept = match keys {
                Some(keys) => keys.keep_mask(&job, &self.options, now),
                // Nothing is known of other files: tombstones stay.
                None => KeyIndex::read_files(&self.log, paths_and_sizes(&files))
                    .await?
                    .keep_newest_mask(),
            };
            let units = match &mut backfill {
                None => Vec::new(),
                Some(table) => statistics_files_of(table, &files).await?,
            };
            let (output, folded) = self
                .rewrite_files(&files, &kept, backfill.as_ref().map(|table| (table, &units)))
                .await?;
            let bytes_out = output.as_ref().map_or(0, |add| add.size.unsigned_abs());
            let files_out = usize::from(output.is_some());
            if self.commit_rewrite(&files, output, now).await? {
                summary.committed_jobs += 1;
                summary.files_in += files.len();
                summary.files_out += files_out;
                summary.bytes_in += files.iter().map(|f| f.size).sum::<u64>();
                summary.bytes_out += bytes_out;
                summary.dropped_superseded_rows += kept.superseded_rows;
                summary.dropped_tombstones += kept.dropped_tombstones;
                summary.folded_statistics += folded;
                // They belong to files that are gone. Left behind by a crash here they do no harm,
                // and a reader that has not seen the new file yet computes what it misses.
                if let Some(table) = backfill.as_mut().filter(|_| !units.is_empty()) {
                    table.remove_files(units.into_iter().map(|(_, unit)| unit).collect()).await?;
                }
            } else {
                summary.conflicting_jobs += 1;
            }
            progress(i + 1, total);
        }
        Ok(())
    }

    /// Writes what is kept of `files` into one file that no commit names yet; none where nothing is.
    /// Their backfilled statistics go into the rows; the second value counts them.
    async fn rewrite_files(
        &self,
        files: &[InputFile],
        kept: &KeepMask,
        backfill: Option<(&StatisticsTable, &Vec<(usize, StatisticsFile)>)>,
    ) -> Result<(Option<Add>, usize), TableError> {
        let failed = |e: deltalake_core::DeltaTableError| self.log.wrap_error(e);
        let mut output =
            DataFileWriter::new(self.log.arrow_schema()?).map_err(|e| failed(e.into()))?;
        let mut folded = 0;
        for (i, (input, mask)) in files.iter().zip(&kept.masks).enumerate() {
            if !mask.contains(&true) {
                continue;
            }
            let mut found = Vec::new();
            if let Some((table, units)) = backfill {
                for (_, unit) in units.iter().filter(|(file, _)| *file == i) {
                    found.push((
                        unit.key.clone(),
                        statistics::index_by_version(table.read_file_or_empty(&unit.path).await?),
                    ));
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
                if !found.is_empty() {
                    let (with, count) = fold_statistics(&kept_rows, &found).map_err(corrupt)?;
                    (kept_rows, folded) = (with, folded + count);
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

    /// Puts `output` in the place of `files`. False where one of them is gone already.
    async fn commit_rewrite(
        &mut self,
        files: &[InputFile],
        output: Option<Add>,
        now: DateTime<Utc>,
    ) -> Result<bool, TableError> {
        let mut tried = false;
        // Removed from now on: retention is counted from there, however long the work took.
        let removed = |file: &InputFile| {
            let deletion_timestamp = Some(Utc::now().timestamp_millis());
            Action::Remove(Remove { deletion_timestamp, ..file.remove_action.clone() })
        };
        let backoff = Backoff {
            cap: Duration::from_secs(2),
            ..Backoff::with_max_attempts(self.max_attempts)
        };
        let mut last = String::new();
        for attempt in 0..self.max_attempts {
            let result = async {
                self.log.update().await?;
                let live: HashSet<String> = {
                    let files = self.log.snapshot()?.log_data();
                    files.iter().map(|file| file.path().into_owned()).collect()
                };
                let gone = files.iter().any(|file| !live.contains(&file.path));
                if gone {
                    // Either somebody else was first, or this is what an attempt came to of which
                    // no answer arrived.
                    let ours = output.as_ref().map_or(tried, |add| live.contains(&add.path));
                    return Ok(ours);
                }
                tried = true;
                let actions = files.iter().map(removed).chain(output.clone().map(Action::Add));
                self.try_commit(actions.collect(), COMPACTION_APP_ID, now).await.map(|()| true)
            };
            match result.await {
                Err(error) if error.disposition() == Disposition::Retry => {
                    last = error.to_string();
                    info!(event = event::COMMIT_CONFLICT, attempt, reason = %last, "a compaction did not go through; looking again");
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                }
                other => return other,
            }
        }
        Err(TableError::AttemptsExhausted {
            location: self.log.location.clone(),
            attempts: self.max_attempts,
            last_error: last,
        })
    }

    /// Takes note of the time in a commit of its own.
    async fn record_time(
        &mut self,
        application: &str,
        now: DateTime<Utc>,
    ) -> Result<(), TableError> {
        let backoff = Backoff {
            cap: Duration::from_secs(2),
            ..Backoff::with_max_attempts(self.max_attempts)
        };
        let mut attempt = 0;
        loop {
            let noted = async {
                self.log.update().await?;
                self.try_commit(Vec::new(), application, now).await
            };
            match noted.await {
                Err(error)
                    if error.disposition() == Disposition::Retry
                        && attempt + 1 < self.max_attempts =>
                {
                    tokio::time::sleep(backoff.random_delay(attempt)).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    async fn try_commit(
        &mut self,
        actions: Vec<Action>,
        application: &str,
        now: DateTime<Utc>,
    ) -> Result<(), TableError> {
        let operation = DeltaOperation::Optimize {
            predicate: None,
            target_size: (self.options.target_file_mib << 20) as i64,
        };
        let noted = vec![Transaction::new(application, now.timestamp_millis())];
        self.log.write_commit(actions, noted, operation).await.map(|_| ())
    }
}

fn file_sizes(inputs: &[InputFile]) -> Vec<u64> {
    inputs.iter().map(|input| input.size).collect()
}

/// Jobs for files of similar size, of which `sizes` says how large they are, the smallest first. A
/// file belongs to a tier, each `merge_files` times as large as the one before; only where a tier has
/// that many files, or enough for one of the largest size, are they merged, so that a row is rewritten
/// at most once a tier.
fn plan_size_tiers(options: &MaintenanceOptions, sizes: &[u64]) -> Vec<CompactionJob> {
    let mut tiers: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, size) in sizes.iter().enumerate() {
        if let Some(tier) = options.size_tier(*size) {
            tiers.entry(tier).or_default().push(i);
        }
    }
    let full = |files: Vec<usize>| {
        let mut jobs = bin_pack(options, sizes, files);
        // The others were cut because the next file did not fit: they are as large as they get.
        let last = jobs.pop().filter(|job| job.len() >= options.files_per_merge);
        jobs.retain(|job| job.len() > 1);
        jobs.into_iter().chain(last)
    };
    tiers.into_values().flat_map(full).collect()
}

/// Cuts files, in their order, into jobs of at most the size of one output.
fn bin_pack(options: &MaintenanceOptions, sizes: &[u64], files: Vec<usize>) -> Vec<CompactionJob> {
    let limit = options.target_file_mib << 20;
    let (mut jobs, mut bytes) = (Vec::<CompactionJob>::new(), 0);
    for i in files {
        bytes += sizes[i];
        match jobs.last_mut() {
            Some(job) if bytes <= limit => job.push(i),
            _ => {
                bytes = sizes[i];
                jobs.push(vec![i]);
            }
        }
    }
    jobs
}

/// The units of backfilled statistics that belong to `files`, each with the place of its file.
async fn statistics_files_of(
    table: &mut StatisticsTable,
    files: &[InputFile],
) -> Result<Vec<(usize, StatisticsFile)>, TableError> {
    let all = table.files_by_unit().await?;
    let keys: HashSet<&StatisticsKey> = all.values().map(|unit| &unit.key).collect();
    let mut units = Vec::new();
    for (i, file) in files.iter().enumerate() {
        let of =
            keys.iter().filter_map(|key| all.get(&statistics::backfill_unit_id(key, &file.path)));
        units.extend(of.map(|unit| (i, unit.clone())));
    }
    Ok(units)
}

/// The batch with the backfilled statistics of its rows in them, and how many that are.
fn fold_statistics(
    batch: &RecordBatch,
    found: &[(StatisticsKey, statistics::BackfilledByVersion)],
) -> Result<(RecordBatch, usize), String> {
    let mut rows = schema::rows_from_batch(batch)?;
    let mut count = 0;
    for (key, found) in found {
        count += statistics::attach_statistics(&mut rows, key, found);
    }
    let sources =
        batch.column_by_name(schema::SOURCE_COLUMN).and_then(|c| c.as_string_opt::<i32>());
    let sources = sources.ok_or("column source is not text")?;
    let rows: Vec<(String, &ImageRow)> =
        rows.iter().enumerate().map(|(i, row)| (sources.value(i).to_owned(), row)).collect();
    let with = schema::rows_to_batch(&rows, &batch.schema()).map_err(|e| e.to_string())?;
    Ok((with, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However large commits are, files end up as large as they get.
    #[test]
    fn files_of_every_size_are_merged_until_they_are_large() {
        let options = MaintenanceOptions::default();
        let largest = options.target_file_mib << 20;
        for size in [1 << 10, 3 << 20, 17 << 20, 20 << 20, 40 << 20, 64 << 20] {
            let mut sizes = vec![size; 300];
            for _ in 0..20 {
                let jobs = plan_size_tiers(&options, &sizes);
                let merged: Vec<u64> =
                    jobs.iter().map(|job| job.iter().map(|i| sizes[*i]).sum()).collect();
                assert!(merged.iter().all(|size| *size <= largest), "{size}");
                let taken: HashSet<usize> = jobs.into_iter().flatten().collect();
                let left = (0..sizes.len()).filter(|i| !taken.contains(i)).map(|i| sizes[i]);
                sizes = left.collect();
                sizes.extend(merged);
                sizes.sort_unstable();
            }
            let small = sizes.iter().filter(|size| **size <= largest / 2).count();
            assert!(
                small < options.files_per_merge * 5,
                "{size}: {small} of {} are small",
                sizes.len()
            );
            if size > 16 << 20 {
                assert!(small <= 7, "{size}: {small} of {} are small", sizes.len());
            }
        }
    }
}
