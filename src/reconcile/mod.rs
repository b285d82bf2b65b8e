//! Reconciling the table with the world: what is new, changed or gone since events were lost.
//!
//! Both sides are brought into the order of their keys by a sort that spills to a temporary folder,
//! then read side by side, so that memory does not grow with their number. Nothing is sent before
//! all is compared: what would be sent waits in a file, and a listing that lacks too much is taken
//! for a fault of the listing.

pub(crate) mod compare;
pub(crate) mod listing;
mod sort;
pub(crate) mod stored;

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use object_store::ObjectStoreExt;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use compare::{CompareRules, DifferenceKind, Finding};
use compare::{IdScheme, StoredImage, StoredState, compare_key, has_time_sequence};
pub use listing::ListingSource;
use listing::read_sorted_listing;
use sort::{SortedPairs, from_json_bytes};
use stored::StoredScope;
pub use stored::{CurrentRows, read_current_rows};

use crate::ingest::source::ImageEvent;
use crate::publish::{PublishError, PublishInput, PublishSummary, Publisher};
use crate::record::{Operation, VersionOrdering};
use crate::retry::{Classify, Disposition};
use crate::store::{Store, StoreError};
use crate::table::{Generation, TableError};
use crate::telemetry::event;

/// Bytes that each of at most three sorts holds in memory before it writes to its folder.
const SORT_MEMORY_BYTES: usize = 32 << 20;
/// Objects that are looked for at one time before their deletes are sent.
const MAX_CONCURRENT_CHECKS: usize = 32;

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A bucket or folder cannot be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Events cannot be sent.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The temporary folder cannot be used.
    #[error("temporary folder {folder}: {source}; choose another by --temp")]
    TempFolder {
        /// The folder.
        folder: String,
        /// Why.
        source: io::Error,
    },
    /// A list cannot be read, or a line of it is wrong: what it hides would be taken for gone.
    #[error("{name}:{line}: {reason}; nothing was compared")]
    InvalidList {
        /// The file.
        name: String,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// Too much would be deleted.
    #[error(
        "{gone} of {stored} images would be deleted, more than the share {limit} that --max-deletes allows; nothing was sent. Is the listing whole? If so, allow more"
    )]
    TooManyDeletes {
        /// Images that are not listed.
        gone: u64,
        /// Images that are stored.
        stored: u64,
        /// The share that may go.
        limit: f64,
    },
    /// The catalogue's sequences are not what they were said to be.
    #[error(
        "image {example}: its sequence is not its event's time in microseconds; events with such times would win over all that its own producer sends. Nothing was sent; use --ids with events that carry sequences"
    )]
    SequenceNotTime {
        /// An image.
        example: String,
    },
    /// A task ended by a fault of this program.
    #[error("the comparison failed: {0}; please report it")]
    Internal(String),
    /// Somebody asked to stop.
    #[error("interrupted; nothing was sent")]
    Interrupted,
}

impl Classify for ReconcileError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Table(error) => error.disposition(),
            Self::Publish(error) => error.disposition(),
            _ => Disposition::Fatal,
        }
    }
}

/// What was compared and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReconcileReport {
    /// What the table was compared with.
    pub target: String,
    /// When its listing started.
    pub listing_started_at: Option<DateTime<Utc>>,
    /// Objects or ids in the listing.
    pub listed: u64,
    /// Images that are stored of this place.
    pub stored: u64,
    /// Images that are the same on both sides.
    pub unchanged: u64,
    /// What is too young to be judged.
    pub too_recent: u64,
    /// Listed, not stored.
    pub new: u64,
    /// Stored, and changed since.
    pub changed: u64,
    /// Stored, not listed.
    pub removed: u64,
    /// Objects that are not pictures by their names.
    pub ignored: u64,
    /// Objects whose images were deleted by an event after their last change.
    pub deleted: u64,
    /// Objects whose id belongs to an image from elsewhere.
    pub id_conflicts: u64,
    /// Differences that no event can mend.
    pub unrepairable: u64,
    /// Deletes among the events that mend.
    pub delete_events: u64,
    /// Images whose sequence is not their time, where it was said to be.
    pub sequence_mismatches: u64,
    /// Events that were sent.
    pub published: u64,
    /// Deletes that were not sent, because the object is there after all.
    pub skipped_deletes: u64,
}

impl ReconcileReport {
    /// Differences.
    pub fn difference_count(&self) -> u64 {
        self.new + self.changed + self.removed
    }
}

/// A comparison with the events that would mend what was found.
pub struct Comparison {
    /// What was found.
    pub report: ReconcileReport,
    /// Lines of JSON, each a key and the event that mends what is there.
    events: BufReader<File>,
    temp_folder: String,
    /// Where objects were listed, to look again before one is taken for gone.
    listed_store: Option<Store>,
    /// An image whose sequence is not its time.
    sequence_not_time_example: Option<String>,
}

/// Compares the table of `generation` with `side`. `on_finding` hears of each difference, in the
/// order of the keys. Needs room for some hundred bytes an image in `folder`.
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
    let in_folder =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let scope = StoredScope::new(&listing, &rules.event_template.id_prefix);
    let report = ReconcileReport {
        target: listing.name(),
        listing_started_at: Some(rules.listing_started_at),
        ..ReconcileReport::default()
    };
    let place = match &listing {
        ListingSource::Store(store) => Some(store.clone()),
        ListingSource::List { .. } => None,
    };
    // The listing first: what comes into the table after it is younger than the grace allows.
    let listed = tokio::select! {
        listed = read_sorted_listing(listing, &rules.event_template.id_prefix, folder) => listed?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let rows = tokio::select! {
        rows = read_current_rows(catalogue, generation, folder) => rows?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let (folder, token) = (folder.to_owned(), token.clone());
    let (name, mut on_finding) = (folder.display().to_string(), on_finding);
    let compared = tokio::task::spawn_blocking(move || {
        let known = scope.sort_by_compare_key(rows, &folder)?;
        merge_and_compare(listed, known, &rules, &folder, report, &mut on_finding, &token)
    });
    let compared = compared.await.map_err(|panic| ReconcileError::Internal(panic.to_string()))?;
    let (report, events, not_time) = compared.map_err(|error| match error {
        CompareStopped::TempFolder(error) => in_folder(error),
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
        duration_ms = started.elapsed().as_millis() as u64,
        "the table was compared with a listing"
    );
    Ok(Comparison {
        report,
        events: BufReader::new(events),
        temp_folder: name,
        listed_store: place,
        sequence_not_time_example: not_time,
    })
}

impl Comparison {
    /// Refuses to go on where a repair would do harm: more than the share `max_deletes` of the
    /// stored images would go, or versions are not what they were said to be.
    pub fn check_repair_is_safe(&self, max_deletes: f64) -> Result<(), ReconcileError> {
        let (gone, stored) = (self.report.delete_events, self.report.stored);
        if gone as f64 > stored as f64 * max_deletes {
            return Err(ReconcileError::TooManyDeletes { gone, stored, limit: max_deletes });
        }
        match &self.sequence_not_time_example {
            Some(example) => Err(ReconcileError::SequenceNotTime { example: example.clone() }),
            None => Ok(()),
        }
    }

    /// Sends the events that mend what was found; `on_event` hears of each that was sent, or the key of the
    /// object for which none was. A delete is sent only where the store says, asked
    /// for that object alone, that it is not there: a listing may pass over what it cannot read.
    pub async fn send_repair_events(
        self,
        publisher: &Publisher,
        token: &CancellationToken,
        on_event: impl FnMut(&PublishInput),
    ) -> Result<PublishSummary, ReconcileError> {
        let (folder, place) = (&self.temp_folder, self.listed_store.as_ref());
        let read = async |line: io::Result<String>| {
            let line =
                line.map_err(|e| PublishError::ReadLines { name: folder.clone(), source: e })?;
            let read = serde_json::from_str::<(String, ImageEvent)>(&line);
            let (key, event) = match read {
                Ok(read) => read,
                Err(error) => return Ok(Err(error.to_string())),
            };
            match place {
                Some(place) if event.operation == Operation::Delete => {
                    Ok(is_absent(place, &key).await?.then_some(event).ok_or(key))
                }
                _ => Ok(Ok(event)),
            }
        };
        let events = stream::iter(self.events.lines()).map(read).buffered(MAX_CONCURRENT_CHECKS);
        Ok(publisher.send_all(events, token, on_event).await?)
    }
}

/// Whether nothing is at `key`, by a request for it alone.
async fn is_absent(place: &Store, key: &str) -> Result<bool, StoreError> {
    // A name that the store cannot have: nothing can be there.
    let Ok(path) = object_store::path::Path::parse(key) else { return Ok(true) };
    match place.object_store().head(&path).await {
        Ok(_) => Ok(false),
        Err(object_store::Error::NotFound { .. }) => Ok(true),
        Err(error) => Err(place.wrap_error(error)),
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

/// Both sides, read in the order of their keys.
fn merge_and_compare(
    mut listed: SortedPairs,
    (mut known, place): (SortedPairs, IdScheme),
    rules: &CompareRules,
    folder: &Path,
    mut report: ReconcileReport,
    on_finding: &mut impl FnMut(&Finding),
    token: &CancellationToken,
) -> Result<(ReconcileReport, File, Option<String>), CompareStopped> {
    let mut events = BufWriter::new(tempfile::tempfile_in(folder)?);
    let mut sequence_not_time_example = None;
    let first = |a: Option<&[u8]>, b: Option<&[u8]>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b).to_vec()),
        (a, b) => a.or(b).map(<[u8]>::to_vec),
    };
    while let Some(key) = first(listed.peek_key(), known.peek_key()) {
        if token.is_cancelled() {
            return Err(CompareStopped::Interrupted);
        }
        let stored_images = known
            .next_values(&key)?
            .iter()
            .map(|v| from_json_bytes(v))
            .collect::<io::Result<Vec<StoredImage>>>()?;
        let listed_values = listed.next_values(&key)?;
        // An id that a list has several times: the last in the order of their bytes counts.
        let listed_image = listed_values.last().map(|value| from_json_bytes(value)).transpose()?;
        if rules.sequence_is_time && rules.event_template.ordering == VersionOrdering::Sequence {
            let wrong = stored_images
                .iter()
                .filter(|k| k.status == StoredState::Present && !has_time_sequence(k));
            for known in wrong {
                report.sequence_mismatches += 1;
                sequence_not_time_example.get_or_insert_with(|| known.image_id.clone());
            }
        }
        let key = String::from_utf8_lossy(&key);
        for finding in compare_key(&key, listed_image, &stored_images, &place, rules, &mut report) {
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

/// Where files are sorted unless another folder is named.
pub fn default_temp_folder() -> PathBuf {
    std::env::temp_dir()
}

#[cfg(test)]
mod tests;
