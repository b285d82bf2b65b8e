//! Is what is stored what it should be? Checks a table in itself, without the outside world.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use deltalake_core::kernel::Action;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::balance::statistics::StatisticsKey;
use crate::record::{ImageRow, RowVersion, StoredImage};
use crate::store::Store;
use crate::table::error::TableError;
use crate::table::file::{self, FileReadError};
use crate::table::generation::Generation;
use crate::table::log::{COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, DeltaLog, VACUUM_APP_ID};
use crate::table::options::MaintenanceOptions;
use crate::table::statistics::{self, StatisticsFile, StatisticsTable};

/// Files read at one time.
const MAX_CONCURRENT_FILES: usize = 4;
/// How far from 1 the length of an embedding may be: rounding to f16 moves it by less.
const UNIT_LENGTH_TOLERANCE: f32 = 2e-3;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something is lost or wrong.
    Error,
    /// Something needs attention, nothing is wrong yet.
    Warning,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IntegrityFinding {
    /// How bad.
    pub severity: Severity,
    /// A stable name.
    pub code: &'static str,
    /// How often it was found.
    pub count: usize,
    /// Where, first: a file or an image.
    pub example: String,
    /// What is wrong and what to do.
    pub description: String,
}

/// What was looked at and what was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerificationReport {
    /// The generation whose table it is.
    pub generation: String,
    /// Version of the table.
    pub version: u64,
    /// Data files.
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Rows in them.
    pub rows: usize,
    /// Images that are there.
    pub images: usize,
    /// Images that are deleted.
    pub deleted: usize,
    /// Rows that a newer one of the same image has superseded.
    pub superseded: usize,
    /// What was found, the worst first.
    pub findings: Vec<IntegrityFinding>,
}

impl VerificationReport {
    /// Whether nothing is lost or wrong.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }
}

/// Collects findings, the same ones together.
#[derive(Default)]
struct FindingCollector(BTreeMap<(Severity, &'static str, String), (usize, String)>);

impl FindingCollector {
    fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        example: impl Into<String>,
        about: impl Into<String>,
    ) {
        let found = self.0.entry((severity, code, about.into()));
        found.or_insert_with(|| (0, example.into())).0 += 1;
    }

    fn into_findings(self) -> Vec<IntegrityFinding> {
        let finding = |((severity, code, about), (count, example))| IntegrityFinding {
            severity,
            code,
            count,
            example,
            description: about,
        };
        self.0.into_iter().map(finding).collect()
    }
}

/// Reads the whole table of `generation`, the live one or the one beside it, and says what is wrong. `None` where `token` was
/// cancelled meanwhile; `progress` hears of files read and files in all.
pub async fn verify_table(
    catalogue: &Store,
    generation: &Generation,
    prompt_sets: &[StatisticsKey],
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    progress: &(dyn Fn(usize, usize) + Sync),
    token: &CancellationToken,
) -> Result<Option<VerificationReport>, TableError> {
    let mut log = DeltaLog::open_images(catalogue, generation).await?;
    log.update().await?;
    let mut findings = FindingCollector::default();
    check_table_properties(&log, generation, &mut findings)?;
    let files: Vec<(Path, u64, Option<usize>)> = {
        let files = log.snapshot()?.log_data();
        let known = files.iter();
        known.map(|f| (f.object_store_path(), f.size().unsigned_abs(), f.num_records())).collect()
    };
    let mut done = VerificationReport {
        generation: generation.id.clone(),
        version: log.version(),
        files: files.len(),
        bytes: files.iter().map(|(_, size, _)| size).sum(),
        ..VerificationReport::default()
    };
    let known: BTreeSet<&str> = prompt_sets.iter().map(StatisticsKey::as_str).collect();
    let mut images = ImageTally::default();
    let mut backfill = StatisticsTable::open(catalogue, generation, 1).await?;
    let units = match &mut backfill {
        Some(table) => table.files_by_unit().await?,
        None => HashMap::new(),
    };
    let keys: BTreeSet<&StatisticsKey> = units.values().map(|unit| &unit.key).collect();
    let (this, keys, units, backfill) = (&log, &keys, &units, backfill.as_ref());
    let total = files.len();
    let mut reads = stream::iter(files)
        .map(|(path, size, rows)| async move {
            let mut read = file::read_and_check_rows(this, &path, size, rows).await;
            let mut faults = Vec::new();
            if let (Ok(rows), Some(table)) = (&mut read, backfill) {
                let of = |key: &&StatisticsKey| {
                    units.get(&statistics::backfill_unit_id(key, path.as_ref()))
                };
                for unit in keys.iter().filter_map(of) {
                    faults.extend(attach_backfilled_file(table, unit, rows).await?);
                }
            }
            Ok::<_, TableError>((path, read, faults))
        })
        .buffer_unordered(MAX_CONCURRENT_FILES);
    let mut files_done = 0;
    while let Some(read) = reads.next().await {
        if token.is_cancelled() {
            return Ok(None);
        }
        let (path, read, faults) = read?;
        files_done += 1;
        progress(files_done, total);
        for (file, about) in faults {
            findings.add(Severity::Error, "statistics_corrupt", &file, about);
        }
        let Some(rows) = rows_or_finding(this, &path, read, &mut findings)? else { continue };
        for row in &rows {
            if let Some(image) = &row.image {
                check_image(row.image_id.as_str(), image, generation, &known, &mut findings);
            }
            images.add_row(row);
        }
        done.rows += rows.len();
    }
    drop(reads);
    images.add_to_report(options, now, &mut done, &mut findings);
    if !check_positions(&log, &mut findings, token).await? {
        return Ok(None);
    }
    done.findings = findings.into_findings();
    Ok(Some(done))
}

/// The newest version of each image, and which have an embedding.
#[derive(Default)]
struct ImageTally {
    newest_versions: HashMap<String, RowVersion>,
    superseded_rows: usize,
    // When rows with an embedding were superseded is known only after all files were read.
    images_with_embedding: HashSet<String>,
}

impl ImageTally {
    fn add_row(&mut self, row: &ImageRow) {
        let id = row.image_id.as_str();
        if row.image.is_some() {
            self.images_with_embedding.insert(id.to_owned());
        }
        let version = RowVersion::from_row(row);
        match self.newest_versions.get_mut(id) {
            None => {
                self.newest_versions.insert(id.to_owned(), version);
            }
            Some(known) => {
                self.superseded_rows += 1;
                if version > *known {
                    *known = version;
                }
            }
        }
    }

    fn add_to_report(
        &self,
        options: &MaintenanceOptions,
        now: DateTime<Utc>,
        report: &mut VerificationReport,
        findings: &mut FindingCollector,
    ) {
        report.superseded = self.superseded_rows;
        for (id, version) in &self.newest_versions {
            if !version.deleted {
                report.images += 1;
                continue;
            }
            report.deleted += 1;
            let overdue = TimeDelta::hours(2 * i64::from(options.erase_deleted_after_hours));
            if self.images_with_embedding.contains(id) && now - version.embedded_at >= overdue {
                let about =
                    "was deleted, and its embedding is still in the table; run `bsap compact`";
                findings.add(Severity::Warning, "erasure_overdue", id, about);
            }
        }
    }
}

/// The rows of a file; none where it cannot be used, which is found then.
fn rows_or_finding(
    log: &DeltaLog,
    path: &Path,
    read: Result<Vec<ImageRow>, FileReadError>,
    findings: &mut FindingCollector,
) -> Result<Option<Vec<ImageRow>>, TableError> {
    let (code, about) = match read {
        Ok(rows) => {
            if file::checksum_in_name(path).is_none() {
                let about =
                    "was written by another tool: damage in it cannot be told from its name";
                findings.add(Severity::Warning, "checksum_missing", path.as_ref(), about);
            }
            return Ok(Some(rows));
        }
        Err(FileReadError::Store(error)) => {
            return Err(FileReadError::Store(error).into_table_error(log, path.as_ref()));
        }
        Err(FileReadError::NotFound) => {
            ("file_missing", "is named by the log and is not there".to_owned())
        }
        Err(FileReadError::Corrupt(reason)) => ("file_corrupt", reason),
    };
    let about = format!(
        "{about}; restore it from a backup, or take it out by `bsap compact --drop-damaged` and let `bsap reconcile` announce its images again"
    );
    findings.add(Severity::Error, code, path.as_ref(), about);
    Ok(None)
}

/// Gives rows their backfilled statistics; the file and what is wrong with it where it is damaged.
async fn attach_backfilled_file(
    table: &StatisticsTable,
    unit: &StatisticsFile,
    rows: &mut [ImageRow],
) -> Result<Option<(String, String)>, TableError> {
    let damaged = |file: String, reason: &str| {
        Ok(Some((file, format!("{reason}; retire its prompt set and reindex it again"))))
    };
    match table.read_file_if_exists(&unit.path).await {
        Ok(Some(found)) => {
            statistics::attach_statistics(rows, &unit.key, &statistics::index_by_version(found));
            Ok(None)
        }
        Ok(None) => damaged(unit.path.clone(), "is named by the log and is not there"),
        Err(TableError::Corrupt { file, reason }) => damaged(file, &reason),
        Err(error) => Err(error),
    }
}

/// Does the table say of itself that it is this generation's?
fn check_table_properties(
    log: &DeltaLog,
    generation: &Generation,
    findings: &mut FindingCollector,
) -> Result<(), TableError> {
    let configuration = log.snapshot()?.metadata().configuration().clone();
    for (key, wanted) in [
        ("bsap.model_fingerprint", generation.model_fingerprint.as_str()),
        ("bsap.ordering", generation.ordering.as_str()),
    ] {
        let found = configuration.get(key).map_or("nothing", String::as_str);
        if found != wanted {
            let about = format!(
                "the table was made for {found}, the catalogue's state says {wanted}; its rows do not belong together"
            );
            findings.add(Severity::Error, "fingerprint_mismatch", key, about);
        }
    }
    Ok(())
}

fn check_image(
    id: &str,
    image: &StoredImage,
    generation: &Generation,
    known: &BTreeSet<&str>,
    findings: &mut FindingCollector,
) {
    let values = image.embedding.values();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    if values.len() != generation.dimension {
        let about = format!(
            "has an embedding of {} values, the model gives {}; publish it again",
            values.len(),
            generation.dimension
        );
        findings.add(Severity::Error, "embedding_dimension_mismatch", id, about);
    } else if length.is_nan() || (length - 1.0).abs() > UNIT_LENGTH_TOLERANCE {
        let about = "has an embedding that is not of length 1; publish it again";
        findings.add(Severity::Error, "embedding_not_normalised", id, about);
    }
    for key in known {
        if !image.statistics.keys().any(|k| k.as_str() == *key) {
            let about = format!(
                "has no statistics of {key}: it came before the set, and no reindexing has reached it; the query worker computes them as it loads"
            );
            findings.add(Severity::Warning, "statistics_missing", id, about);
        }
    }
    for (key, statistics) in &image.statistics {
        if !known.contains(key.as_str()) {
            let about =
                format!("has statistics of {key}, which the catalogue's state does not know");
            findings.add(Severity::Warning, "statistics_unknown", id, about);
        }
        let ordered = statistics.min <= statistics.mean && statistics.mean <= statistics.max;
        if !ordered
            || statistics.std.is_nan()
            || statistics.std < 0.0
            || !statistics.lse.is_finite()
        {
            let about =
                format!("has statistics of {key} that contradict each other; publish it again");
            findings.add(Severity::Error, "statistics_inconsistent", id, about);
        }
    }
}

/// Positions may only grow, as far back as the log reaches. False where `token` was cancelled.
async fn check_positions(
    log: &DeltaLog,
    findings: &mut FindingCollector,
    token: &CancellationToken,
) -> Result<bool, TableError> {
    let mut known: HashMap<String, i64> = HashMap::new();
    let mut commits = stream::iter(log.oldest_version().await?..=log.version())
        .map(|version| async move { log.read_commit(version).await.map(|found| (version, found)) })
        .buffered(MAX_CONCURRENT_FILES);
    while let Some((version, actions)) = commits.try_next().await? {
        if token.is_cancelled() {
            return Ok(false);
        }
        for action in actions.unwrap_or_default() {
            let Action::Txn(transaction) = action else { continue };
            // Times of compactions: two that run at one time may end in either order.
            if [COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, VACUUM_APP_ID]
                .contains(&transaction.app_id.as_str())
            {
                continue;
            }
            let before = known.insert(transaction.app_id.clone(), transaction.version);
            if before.is_some_and(|before| before > transaction.version) {
                let about = format!(
                    "went back from {} to {} in version {version}: messages may stand twice",
                    before.unwrap_or_default(),
                    transaction.version
                );
                findings.add(Severity::Error, "position_regressed", transaction.app_id, about);
            }
        }
    }
    Ok(true)
}
