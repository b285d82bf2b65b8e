//! Checks whether a table is sound in itself, without comparing it to anything outside.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use deltalake_core::kernel::{Action, LogicalFileView};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::balance::statistics::StatisticsKey;
use crate::record::{Attributes, Decoding, ImageRow, RowVersion, SequenceKey, StoredImage};
use crate::store::Store;
use crate::table::error::TableError;
use crate::table::file::{self, FileReadError};
use crate::table::generation::Generation;
use crate::table::log::{COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, DeltaLog, VACUUM_APP_ID};
use crate::table::options::MaintenanceOptions;
use crate::table::positions::ANCHOR_PREFIX;
use crate::table::statistics::{self, StatisticsFile, StatisticsTable};

/// Files that are read at the same time.
const MAX_CONCURRENT_FILES: usize = 4;
/// Largest distance of an embedding's length from 1. Rounding to f16 changes it by less.
const UNIT_LENGTH_TOLERANCE: f32 = 2e-3;

/// How serious a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Data is lost or wrong.
    Error,
    /// Something needs attention; no data is wrong yet.
    Warning,
}

/// A kind of problem in a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IntegrityFinding {
    /// How serious it is.
    pub severity: Severity,
    /// Stable name of the kind, such as `file_missing`.
    pub code: &'static str,
    /// How often it occurs.
    pub count: usize,
    /// First file or image that has it.
    pub example: String,
    /// What is wrong, and what to do.
    pub description: String,
}

/// The result of a verification.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VerificationReport {
    /// Id of the generation.
    pub generation: String,
    /// Version of the table that was checked.
    pub version: u64,
    /// Number of data files.
    pub files: usize,
    /// Bytes of the data files.
    pub bytes: u64,
    /// Number of rows in readable files.
    pub rows: usize,
    /// Number of images that are not deleted.
    pub images: usize,
    /// Number of images that are deleted.
    pub deleted: usize,
    /// Number of rows that a newer row of the same image supersedes.
    pub superseded: usize,
    /// Findings, the most serious first.
    pub findings: Vec<IntegrityFinding>,
    /// Images that were decoded under another rule, by id; not part of the printed report.
    #[serde(skip)]
    pub decoded_otherwise: Vec<OtherwiseDecodedImage>,
}

impl VerificationReport {
    /// Whether no data is lost or wrong.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }
}

/// Collects findings and counts equal ones. Maps severity, code and description to a count and the first
/// example.
#[derive(Default)]
struct FindingCollector(BTreeMap<(Severity, &'static str, String), (usize, String)>);

impl FindingCollector {
    fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        example: impl Into<String>,
        description: impl Into<String>,
    ) {
        let finding = self.0.entry((severity, code, description.into()));
        finding.or_insert_with(|| (0, example.into())).0 += 1;
    }

    fn into_findings(self) -> Vec<IntegrityFinding> {
        let finding = |((severity, code, description), (count, example))| IntegrityFinding {
            severity,
            code,
            count,
            example,
            description,
        };
        self.0.into_iter().map(finding).collect()
    }
}

/// What a table is compared with.
#[derive(Debug, Clone, Copy)]
pub struct VerificationRules<'a> {
    /// Keys of the prompt sets that the catalogue's state has for the generation.
    pub prompt_sets: &'a [StatisticsKey],
    /// The rule by which workers decode images now.
    pub decode_rule: &'a str,
    /// When embeddings of deleted images must be gone.
    pub options: &'a MaintenanceOptions,
    /// The time.
    pub now: DateTime<Utc>,
}

/// An image that was decoded under another rule than the present one.
#[derive(Debug, Clone, PartialEq)]
pub struct OtherwiseDecodedImage {
    /// Its id.
    pub image_id: String,
    /// Its address; `None` if the message contained the image.
    pub uri: Option<String>,
    /// The rule; `None` if the row was stored before it was recorded.
    pub decode_rule: Option<String>,
    /// The share of its pixels that could be decoded.
    pub decoded_share: Option<f32>,
    /// Its version.
    pub sequence: SequenceKey,
    /// When the change happened, if the event said it.
    pub event_time: Option<DateTime<Utc>>,
    /// Its attributes.
    pub attributes: Attributes,
    /// When its row was stored.
    pub embedded_at: DateTime<Utc>,
}

/// Reads the whole table of `generation` and reports what is wrong with it. Returns `None` if `cancel` was
/// cancelled. Calls `progress` with the files read and the files in all.
pub async fn verify_table(
    catalogue: &Store,
    generation: &Generation,
    rules: &VerificationRules<'_>,
    progress: &(dyn Fn(usize, usize) + Sync),
    cancel: &CancellationToken,
) -> Result<Option<VerificationReport>, TableError> {
    let mut log = DeltaLog::open_images(catalogue, generation).await?;
    log.load_newest_snapshot().await?;
    let mut findings = FindingCollector::default();
    check_table_properties(&log, generation, &mut findings)?;
    let files: Vec<(Path, u64, Option<usize>)> = {
        let files = log.snapshot()?.log_data();
        let entry =
            |f: LogicalFileView| (f.object_store_path(), f.size().unsigned_abs(), f.num_records());
        files.iter().map(entry).collect()
    };
    let mut report = VerificationReport {
        generation: generation.id.clone(),
        version: log.version(),
        files: files.len(),
        bytes: files.iter().map(|(_, size, _)| size).sum(),
        ..VerificationReport::default()
    };
    let known_sets: BTreeSet<&str> = rules.prompt_sets.iter().map(StatisticsKey::as_str).collect();
    let mut images = ImageTally::default();
    let mut statistics_table = StatisticsTable::open_if_exists(catalogue, generation, 1).await?;
    let units = match &mut statistics_table {
        Some(table) => table.files_by_unit().await?,
        None => HashMap::new(),
    };
    let keys: BTreeSet<&StatisticsKey> = units.values().map(|unit| &unit.prompt_set_key).collect();
    let (log, keys, units) = (&log, &keys, &units);
    let statistics_table = statistics_table.as_ref();
    let total = files.len();
    let mut reads = stream::iter(files)
        .map(|(path, size, rows)| async move {
            let mut read = file::read_and_check_rows(log, &path, size, rows).await;
            let mut damaged_files = Vec::new();
            if let (Ok(rows), Some(table)) = (&mut read, statistics_table) {
                let statistics_file = |key: &&StatisticsKey| {
                    units.get(&statistics::backfill_unit_id(key, path.as_ref()))
                };
                for unit in keys.iter().filter_map(statistics_file) {
                    damaged_files.extend(attach_backfilled_file(table, unit, rows).await?);
                }
            }
            Ok::<_, TableError>((path, read, damaged_files))
        })
        .buffer_unordered(MAX_CONCURRENT_FILES);
    let mut files_read = 0;
    while let Some(read) = reads.next().await {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let (path, read, damaged_files) = read?;
        files_read += 1;
        progress(files_read, total);
        for (file, description) in damaged_files {
            findings.add(Severity::Error, "statistics_corrupt", &file, description);
        }
        let Some(rows) = rows_or_finding(log, &path, read, &mut findings)? else { continue };
        for row in &rows {
            if let Some(image) = &row.image {
                check_image(row.image_id.as_str(), image, generation, &known_sets, &mut findings);
            }
            images.add_row(row, rules.decode_rule);
        }
        report.rows += rows.len();
    }
    drop(reads);
    images.add_to_report(rules, &mut report, &mut findings);
    if !check_positions_grow(log, &mut findings, cancel).await? {
        return Ok(None);
    }
    report.findings = findings.into_findings();
    Ok(Some(report))
}

/// The newest version of each image, and which have an embedding.
#[derive(Default)]
struct ImageTally {
    newest_versions: HashMap<String, RowVersion>,
    superseded_rows: usize,
    /// Ids of images of which some row has an embedding, even if a newer row deletes the image.
    images_with_embedding: HashSet<String>,
    /// The newest row of each image that was decoded under another rule, or only in part.
    decoded_otherwise: HashMap<String, (RowVersion, OtherwiseDecodedImage)>,
}

impl ImageTally {
    fn add_row(&mut self, row: &ImageRow, decode_rule: &str) {
        let id = row.image_id.as_str();
        if row.image.is_some() {
            self.images_with_embedding.insert(id.to_owned());
        }
        let version = RowVersion::from_row(row);
        self.add_decoding(row, &version, decode_rule);
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

    fn add_decoding(&mut self, row: &ImageRow, version: &RowVersion, decode_rule: &str) {
        let Some(image) = &row.image else { return };
        let decoding = image.decoding.as_ref();
        let is_as_now = |decoding: &Decoding| {
            (&*decoding.rule == decode_rule && decoding.share >= 1.0)
                || decoding.is_embedded_elsewhere()
        };
        if decoding.is_some_and(is_as_now) {
            return;
        }
        let id = row.image_id.as_str();
        if self.decoded_otherwise.get(id).is_some_and(|(known, _)| known > version) {
            return;
        }
        let image = OtherwiseDecodedImage {
            image_id: id.to_owned(),
            uri: image.uri.clone(),
            decode_rule: decoding.map(|decoding| decoding.rule.as_ref().to_owned()),
            decoded_share: decoding.map(|decoding| decoding.share),
            sequence: row.sequence.clone(),
            event_time: row.event_time,
            attributes: image.attributes.clone(),
            embedded_at: row.embedded_at,
        };
        self.decoded_otherwise.insert(id.to_owned(), (version.clone(), image));
    }

    /// Adds the images whose newest row was decoded under another rule, or only in part.
    fn add_decodings_to_report(
        self,
        decode_rule: &str,
        report: &mut VerificationReport,
        findings: &mut FindingCollector,
    ) {
        for (id, (version, image)) in self.decoded_otherwise {
            if self.newest_versions.get(&id) != Some(&version) {
                continue;
            }
            if image.decoded_share.is_some_and(|share| share < 1.0) {
                let description = "is damaged and was stored with the part that could be decoded, as decode.damaged = \"accept\" allows";
                findings.add(Severity::Warning, "image_incomplete", &id, description);
            }
            if image.decode_rule.as_deref() != Some(decode_rule) {
                let stored = image.decode_rule.as_deref().unwrap_or("unknown");
                let description = format!(
                    "was decoded under the rule `{stored}`, workers now decode under `{decode_rule}`: its pixels may have been others; `bsap verify --decoded-otherwise` lists these images as events for `bsap publish --jsonl`"
                );
                findings.add(Severity::Warning, "decode_rule_differs", &id, description);
                report.decoded_otherwise.push(image);
            }
        }
        report.decoded_otherwise.sort_by(|a, b| a.image_id.cmp(&b.image_id));
    }

    fn add_to_report(
        self,
        rules: &VerificationRules<'_>,
        report: &mut VerificationReport,
        findings: &mut FindingCollector,
    ) {
        let VerificationRules { options, now, decode_rule, .. } = *rules;
        report.superseded = self.superseded_rows;
        for (id, version) in &self.newest_versions {
            if !version.deleted {
                report.images += 1;
                continue;
            }
            report.deleted += 1;
            let overdue = TimeDelta::hours(2 * i64::from(options.erase_deleted_after_hours));
            if self.images_with_embedding.contains(id) && now - version.embedded_at >= overdue {
                let description =
                    "was deleted, and its embedding is still in the table; run `bsap compact`";
                findings.add(Severity::Warning, "erasure_overdue", id, description);
            }
        }
        self.add_decodings_to_report(decode_rule, report, findings);
    }
}

/// Returns the rows of a file. Adds a finding and returns `None` if it is missing or damaged.
fn rows_or_finding(
    log: &DeltaLog,
    path: &Path,
    read: Result<Vec<ImageRow>, FileReadError>,
    findings: &mut FindingCollector,
) -> Result<Option<Vec<ImageRow>>, TableError> {
    let (code, damage) = match read {
        Ok(rows) => {
            if file::checksum_in_name(path).is_none() {
                let description =
                    "was written by another tool: its name has no checksum that would show damage";
                findings.add(Severity::Warning, "checksum_missing", path.as_ref(), description);
            }
            return Ok(Some(rows));
        }
        Err(FileReadError::Store(error)) => {
            return Err(FileReadError::Store(error).into_table_error(log, path.as_ref()));
        }
        Err(FileReadError::NotFound) => {
            ("file_missing", "is named by the log and does not exist".to_owned())
        }
        Err(FileReadError::Corrupt(reason)) => ("file_corrupt", reason),
    };
    let description = format!(
        "{damage}; restore it from a backup, or remove it by `bsap compact --drop-damaged` and let `bsap reconcile` announce its images again"
    );
    findings.add(Severity::Error, code, path.as_ref(), description);
    Ok(None)
}

/// Adds the backfilled statistics of a file to its rows. Returns the file and a description of the
/// damage if it is damaged.
async fn attach_backfilled_file(
    table: &StatisticsTable,
    unit: &StatisticsFile,
    rows: &mut [ImageRow],
) -> Result<Option<(String, String)>, TableError> {
    let damaged = |file: String, reason: &str| {
        Ok(Some((file, format!("{reason}; retire its prompt set and reindex it again"))))
    };
    match table.read_file_if_exists(&unit.path).await {
        Ok(Some(backfilled)) => {
            let by_version = statistics::index_by_version(backfilled);
            statistics::attach_statistics(rows, &unit.prompt_set_key, &by_version);
            Ok(None)
        }
        Ok(None) => damaged(unit.path.clone(), "is named by the log and does not exist"),
        Err(TableError::Corrupt { file, reason }) => damaged(file, &reason),
        Err(error) => Err(error),
    }
}

/// Checks that the properties of the table are those of `generation`.
fn check_table_properties(
    log: &DeltaLog,
    generation: &Generation,
    findings: &mut FindingCollector,
) -> Result<(), TableError> {
    let configuration = log.snapshot()?.metadata().configuration().clone();
    for (key, expected) in [
        ("bsap.model_fingerprint", generation.model_fingerprint.as_str()),
        ("bsap.ordering", generation.ordering.as_str()),
    ] {
        let stored = configuration.get(key).map_or("nothing", String::as_str);
        if stored != expected {
            let description = format!(
                "the table was created for {stored}, the catalogue's state says {expected}; its rows do not belong together"
            );
            findings.add(Severity::Error, "fingerprint_mismatch", key, description);
        }
    }
    Ok(())
}

fn check_image(
    id: &str,
    image: &StoredImage,
    generation: &Generation,
    known_sets: &BTreeSet<&str>,
    findings: &mut FindingCollector,
) {
    let values = image.embedding.values();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    if values.len() != generation.dimension {
        let description = format!(
            "has an embedding of {} values, the model gives {}; publish it again",
            values.len(),
            generation.dimension
        );
        findings.add(Severity::Error, "embedding_dimension_mismatch", id, description);
    } else if length.is_nan() || (length - 1.0).abs() > UNIT_LENGTH_TOLERANCE {
        let description = "has an embedding that is not of length 1; publish it again";
        findings.add(Severity::Error, "embedding_not_normalised", id, description);
    }
    for key in known_sets {
        if !image.statistics.keys().any(|k| k.as_str() == *key) {
            let description = format!(
                "has no statistics of {key}: it is older than the set, and no reindex has processed it yet; query workers compute them when they load the table"
            );
            findings.add(Severity::Warning, "statistics_missing", id, description);
        }
    }
    for (key, statistics) in &image.statistics {
        if !known_sets.contains(key.as_str()) {
            let description =
                format!("has statistics of {key}, which the catalogue's state does not know");
            findings.add(Severity::Warning, "statistics_unknown", id, description);
        }
        let ordered = statistics.min <= statistics.mean && statistics.mean <= statistics.max;
        if !ordered
            || statistics.std.is_nan()
            || statistics.std < 0.0
            || !statistics.lse.is_finite()
        {
            let description =
                format!("has statistics of {key} that contradict each other; publish it again");
            findings.add(Severity::Error, "statistics_inconsistent", id, description);
        }
    }
}

/// Checks that positions only grow in the commits that are still in the log. Returns false if `cancel` was
/// cancelled.
async fn check_positions_grow(
    log: &DeltaLog,
    findings: &mut FindingCollector,
    cancel: &CancellationToken,
) -> Result<bool, TableError> {
    let mut positions: HashMap<String, i64> = HashMap::new();
    let mut commits =
        stream::iter(log.oldest_version().await?..=log.version())
            .map(|version| async move {
                log.read_commit(version).await.map(|actions| (version, actions))
            })
            .buffered(MAX_CONCURRENT_FILES);
    while let Some((version, actions)) = commits.try_next().await? {
        if cancel.is_cancelled() {
            return Ok(false);
        }
        for action in actions.unwrap_or_default() {
            let Action::Txn(transaction) = action else { continue };
            // Their versions are times, and two compactions at the same time may end in either order.
            if [COMPACTION_APP_ID, DEEP_COMPACTION_APP_ID, VACUUM_APP_ID]
                .contains(&transaction.app_id.as_str())
                || transaction.app_id.starts_with(ANCHOR_PREFIX)
            {
                continue;
            }
            let before = positions.insert(transaction.app_id.clone(), transaction.version);
            if before.is_some_and(|before| before > transaction.version) {
                let description = format!(
                    "went back from {} to {} in version {version}: messages may be stored twice",
                    before.unwrap_or_default(),
                    transaction.version
                );
                let code = "position_regressed";
                findings.add(Severity::Error, code, transaction.app_id, description);
            }
        }
    }
    Ok(true)
}
