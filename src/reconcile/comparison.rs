//! A whole comparison, from reading both sides to sending the events that repair the differences.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::Path;
use std::time::Instant;

use futures::{StreamExt, stream};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::current_rows::read_current_rows;
use super::difference::{CompareRules, DifferenceKind, Finding, compare_images_under_key};
use super::error::ReconcileError;
use super::images::{IdScheme, TableImage, TableImageStatus};
use super::listing::{ListingSource, read_sorted_listing};
use super::report::ReconcileReport;
use super::scope::StoredScope;
use super::sort::{SortedPairs, from_json_bytes};
use crate::ingest::source::ImageEvent;
use crate::publish::{PublishError, PublishInput, PublishSummary, Publisher};
use crate::record::{Operation, VersionOrdering};
use crate::store::{ImageStore, Store};
use crate::table::Generation;
use crate::telemetry::event;

/// Objects that are checked concurrently before their deletes are sent.
const MAX_CONCURRENT_ABSENCE_CHECKS: usize = 32;

/// The result of a comparison, with the events that repair the differences.
pub struct Comparison {
    /// Counts of what was compared.
    pub report: ReconcileReport,
    /// Lines of JSON, each an array of a key and the event that repairs it.
    pub(super) repair_event_lines: BufReader<File>,
    temp_folder: String,
    /// The store that was listed, to check an object before its delete is sent; `None` for a list.
    listed_store: Option<ImageStore>,
    /// Id of an image whose sequence is not the time of its event, although it should be.
    sequence_not_time_example: Option<String>,
}

/// Compares the table of `generation` with `listing`; calls `on_finding` for each difference, in the order
/// of the keys. Needs some hundred bytes of disk space per image in `folder`.
pub async fn compare_with_listing(
    catalogue: &Store,
    generation: &Generation,
    listing: ListingSource,
    rules: CompareRules,
    folder: &Path,
    on_finding: impl FnMut(&Finding) + Send + 'static,
    token: &CancellationToken,
) -> Result<Comparison, ReconcileError> {
    let started = Instant::now();
    let temp_error =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let scope = StoredScope::new(&listing, &rules.event_template.id_prefix);
    let report = ReconcileReport {
        target: listing.name(),
        listing_started_at: Some(rules.listing_started_at),
        ..ReconcileReport::default()
    };
    let listed_store = match &listing {
        ListingSource::Store(store) => Some(store.clone()),
        ListingSource::List { .. } => None,
    };
    // Read the listing before the table: what is stored after the listing started is recent, and the
    // grace period covers it.
    let listed = tokio::select! {
        listed = read_sorted_listing(listing, &rules.event_template.id_prefix, folder) => listed?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let rows = tokio::select! {
        rows = read_current_rows(catalogue, generation, folder) => rows?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let (folder, token) = (folder.to_owned(), token.clone());
    let (temp_folder, mut on_finding) = (folder.display().to_string(), on_finding);
    let compared = tokio::task::spawn_blocking(move || {
        let stored = scope.sort_by_compare_key(rows, &folder)?;
        merge_and_compare(listed, stored, &rules, &folder, report, &mut on_finding, &token)
    });
    let compared = compared.await.map_err(|panic| ReconcileError::Internal(panic.to_string()))?;
    let (report, events, sequence_not_time_example) = compared.map_err(|error| match error {
        CompareStopped::TempFolder(error) => temp_error(error),
        CompareStopped::Interrupted => ReconcileError::Interrupted,
    })?;
    info!(
        event = event::RECONCILE,
        listing_target = report.target,
        listed = report.listed,
        stored = report.stored,
        unchanged = report.unchanged,
        too_recent = report.too_recent,
        new = report.new,
        changed = report.changed,
        removed = report.removed,
        unrepairable = report.unrepairable,
        deleted = report.deleted,
        id_conflicts = report.id_conflicts,
        ignored = report.ignored,
        unaddressable = report.unaddressable,
        duration_ms = started.elapsed().as_millis() as u64,
        "the table was compared with a listing"
    );
    Ok(Comparison {
        report,
        repair_event_lines: BufReader::new(events),
        temp_folder,
        listed_store,
        sequence_not_time_example,
    })
}

impl Comparison {
    /// Fails if a repair could do harm: if it would delete more than the share `max_deletes` (0 to 1) of the
    /// stored images, or if sequences are not times although they should be.
    pub fn check_repair_is_safe(&self, max_deletes: f64) -> Result<(), ReconcileError> {
        let (delete_events, stored) = (self.report.delete_events, self.report.stored);
        if delete_events as f64 > stored as f64 * max_deletes {
            let limit = max_deletes;
            return Err(ReconcileError::TooManyDeletes { delete_events, stored, limit });
        }
        match &self.sequence_not_time_example {
            Some(example) => Err(ReconcileError::SequenceNotTime { example: example.clone() }),
            None => Ok(()),
        }
    }

    /// Sends the repair events; calls `on_event` with each event that was sent, or with the key of an object
    /// for which none was. A delete is sent only if a request for that object confirms that it does not
    /// exist, because a listing may skip objects that it cannot read.
    pub async fn send_repair_events(
        self,
        publisher: &Publisher,
        token: &CancellationToken,
        on_event: impl FnMut(&PublishInput),
    ) -> Result<PublishSummary, ReconcileError> {
        let (temp_folder, listed_store) = (&self.temp_folder, self.listed_store.as_ref());
        let read_event = async |line: io::Result<String>| {
            let line =
                line.map_err(|e| PublishError::ReadLines { name: temp_folder.clone(), source: e })?;
            let (key, event) = match serde_json::from_str::<(String, ImageEvent)>(&line) {
                Ok(key_and_event) => key_and_event,
                Err(error) => return Ok(Err(error.to_string())),
            };
            match listed_store {
                Some(store) if event.operation == Operation::Delete => {
                    let may_exist = store.may_contain(key.as_bytes()).await?;
                    Ok((!may_exist).then_some(event).ok_or(key))
                }
                _ => Ok(Ok(event)),
            }
        };
        let events = stream::iter(self.repair_event_lines.lines())
            .map(read_event)
            .buffered(MAX_CONCURRENT_ABSENCE_CHECKS);
        Ok(publisher.send_all(events, token, on_event).await?)
    }
}

/// Why a comparison stopped.
enum CompareStopped {
    TempFolder(io::Error),
    Interrupted,
}

impl From<io::Error> for CompareStopped {
    fn from(error: io::Error) -> Self {
        Self::TempFolder(error)
    }
}

/// Reads listing and table in the order of their keys and compares each key. Returns the counts, a file of
/// repair events, and [`Comparison::sequence_not_time_example`].
fn merge_and_compare(
    mut listed: SortedPairs,
    (mut stored, id_scheme): (SortedPairs, IdScheme),
    rules: &CompareRules,
    folder: &Path,
    mut report: ReconcileReport,
    on_finding: &mut impl FnMut(&Finding),
    token: &CancellationToken,
) -> Result<(ReconcileReport, File, Option<String>), CompareStopped> {
    let mut events = BufWriter::new(tempfile::tempfile_in(folder)?);
    let mut sequence_not_time_example = None;
    let min_key = |a: Option<&[u8]>, b: Option<&[u8]>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b).to_vec()),
        (a, b) => a.or(b).map(<[u8]>::to_vec),
    };
    while let Some(key) = min_key(listed.peek_key(), stored.peek_key()) {
        if token.is_cancelled() {
            return Err(CompareStopped::Interrupted);
        }
        let table_images = stored
            .next_values(&key)?
            .iter()
            .map(|v| from_json_bytes(v))
            .collect::<io::Result<Vec<TableImage>>>()?;
        let listed_values = listed.next_values(&key)?;
        // If a list contains an id several times, the last one in the order of the bytes counts.
        let listed_image = listed_values.last().map(|value| from_json_bytes(value)).transpose()?;
        if rules.sequence_is_time && rules.event_template.ordering == VersionOrdering::Sequence {
            let mismatches = table_images.iter().filter(|image| {
                image.status == TableImageStatus::Present && !image.has_time_sequence()
            });
            for image in mismatches {
                report.sequence_mismatches += 1;
                sequence_not_time_example.get_or_insert_with(|| image.image_id.clone());
            }
        }
        let key = String::from_utf8_lossy(&key);
        for finding in compare_images_under_key(
            &key,
            listed_image,
            &table_images,
            &id_scheme,
            rules,
            &mut report,
        ) {
            match &finding.event {
                Some(event) => {
                    report.delete_events +=
                        u64::from(finding.difference == DifferenceKind::Removed);
                    serde_json::to_writer(&mut events, &(&key, event)).map_err(io::Error::from)?;
                    events.write_all(b"\n")?;
                }
                None => report.unrepairable += 1,
            }
            on_finding(&finding);
        }
    }
    let mut events = events.into_inner().map_err(io::IntoInnerError::into_error)?;
    events.rewind()?;
    Ok((report, events, sequence_not_time_example))
}
