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

pub use compare::{Finding, Kind, Rules};
use compare::{Known, Place, What, compare, is_time};
pub use listing::Side;
use listing::list;
use sort::{Sorted, parsed};
use stored::Scope;
pub use stored::{Current, current};

use crate::catalogue::Generation;
use crate::ingest::source::ImageEvent;
use crate::publish::{Candidate, PublishError, Published, Publisher};
use crate::record::{Operation, Ordering};
use crate::retry::{Decide, Verdict};
use crate::store::{Store, StoreError};
use crate::table::TableError;
use crate::telemetry::event;

/// Bytes that each of at most three sorts holds in memory before it writes to its folder.
const SORT_BYTES: usize = 32 << 20;
/// Objects that are looked for at one time before their deletes are sent.
const LOOKS: usize = 32;

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
    Folder {
        /// The folder.
        folder: String,
        /// Why.
        source: io::Error,
    },
    /// A list cannot be read, or a line of it is wrong: what it hides would be taken for gone.
    #[error("{name}:{line}: {reason}; nothing was compared")]
    List {
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
    TooManyGone {
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
    NotTimes {
        /// An image.
        example: String,
    },
    /// A task ended by a fault of this program.
    #[error("the comparison failed: {0}; please report it")]
    Broken(String),
    /// Somebody asked to stop.
    #[error("interrupted; nothing was sent")]
    Interrupted,
}

impl Decide for ReconcileError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Store(error) => error.verdict(),
            Self::Table(error) => error.verdict(),
            Self::Publish(error) => error.verdict(),
            _ => Verdict::Fatal,
        }
    }
}

/// What was compared and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the table was compared with.
    pub target: String,
    /// When its listing started.
    pub started: Option<DateTime<Utc>>,
    /// Objects or ids in the listing.
    pub listed: u64,
    /// Images that are stored of this place.
    pub stored: u64,
    /// Images that are the same on both sides.
    pub same: u64,
    /// What is too young to be judged.
    pub recent: u64,
    /// Listed, not stored.
    pub new: u64,
    /// Stored, and changed since.
    pub changed: u64,
    /// Stored, not listed.
    pub gone: u64,
    /// Objects that are not pictures by their names.
    pub ignored: u64,
    /// Objects whose images were deleted by an event after their last change.
    pub deleted: u64,
    /// Objects whose id belongs to an image from elsewhere.
    pub elsewhere: u64,
    /// Differences that no event can mend.
    pub refused: u64,
    /// Deletes among the events that mend.
    pub deletes: u64,
    /// Images whose sequence is not their time, where it was said to be.
    pub not_times: u64,
    /// Events that were sent.
    pub published: u64,
    /// Deletes that were not sent, because the object is there after all.
    pub kept: u64,
}

impl Report {
    /// Differences.
    pub fn differences(&self) -> u64 {
        self.new + self.changed + self.gone
    }
}

/// A comparison with the events that would mend what was found.
pub struct Comparison {
    /// What was found.
    pub report: Report,
    /// Lines of JSON, each a key and the event that mends what is there.
    events: BufReader<File>,
    folder: String,
    /// Where objects were listed, to look again before one is taken for gone.
    place: Option<Store>,
    /// An image whose sequence is not its time.
    not_time: Option<String>,
}

/// Compares the table of `generation` with `side`. `on_finding` hears of each difference, in the
/// order of the keys. Needs room for some hundred bytes an image in `folder`.
pub async fn reconcile(
    catalogue: &Store,
    generation: &Generation,
    side: Side,
    rules: Rules,
    folder: &Path,
    on_finding: impl FnMut(&Finding) + Send + 'static,
    token: &CancellationToken,
) -> Result<Comparison, ReconcileError> {
    let started = Instant::now();
    let in_folder =
        |source| ReconcileError::Folder { folder: folder.display().to_string(), source };
    let scope = Scope::of(&side, &rules.naming.id_prefix);
    let report = Report { target: side.name(), started: Some(rules.started), ..Report::default() };
    let place = match &side {
        Side::Place(store) => Some(store.clone()),
        Side::List { .. } => None,
    };
    // The listing first: what comes into the table after it is younger than the grace allows.
    let listed = tokio::select! {
        listed = list(side, &rules.naming.id_prefix, folder) => listed?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let rows = tokio::select! {
        rows = current(catalogue, generation, folder) => rows?,
        () = token.cancelled() => return Err(ReconcileError::Interrupted),
    };
    let (folder, token) = (folder.to_owned(), token.clone());
    let (name, mut on_finding) = (folder.display().to_string(), on_finding);
    let compared = tokio::task::spawn_blocking(move || {
        let known = scope.places(rows, &folder)?;
        side_by_side(listed, known, &rules, &folder, report, &mut on_finding, &token)
    });
    let compared = compared.await.map_err(|panic| ReconcileError::Broken(panic.to_string()))?;
    let (report, events, not_time) = compared.map_err(|error| match error {
        Stopped::Folder(error) => in_folder(error),
        Stopped::Interrupted => ReconcileError::Interrupted,
    })?;
    info!(
        event = event::RECONCILE,
        place = report.target,
        listed = report.listed,
        stored = report.stored,
        same = report.same,
        recent = report.recent,
        new = report.new,
        changed = report.changed,
        gone = report.gone,
        refused = report.refused,
        deleted = report.deleted,
        elsewhere = report.elsewhere,
        ignored = report.ignored,
        ms = started.elapsed().as_millis() as u64,
        "the table was compared with a listing"
    );
    Ok(Comparison { report, events: BufReader::new(events), folder: name, place, not_time })
}

impl Comparison {
    /// Refuses to go on where a repair would do harm: more than the share `max_deletes` of the
    /// stored images would go, or versions are not what they were said to be.
    pub fn check(&self, max_deletes: f64) -> Result<(), ReconcileError> {
        let (gone, stored) = (self.report.deletes, self.report.stored);
        if gone as f64 > stored as f64 * max_deletes {
            return Err(ReconcileError::TooManyGone { gone, stored, limit: max_deletes });
        }
        match &self.not_time {
            Some(example) => Err(ReconcileError::NotTimes { example: example.clone() }),
            None => Ok(()),
        }
    }

    /// Sends the events that mend what was found; `on_event` hears of each that was sent, or the key of the
    /// object for which none was. A delete is sent only where the store says, asked
    /// for that object alone, that it is not there: a listing may pass over what it cannot read.
    pub async fn repair(
        self,
        publisher: &Publisher,
        token: &CancellationToken,
        on_event: impl FnMut(&Candidate),
    ) -> Result<Published, ReconcileError> {
        let (folder, place) = (&self.folder, self.place.as_ref());
        let read = async |line: io::Result<String>| {
            let line = line.map_err(|e| PublishError::Read { name: folder.clone(), source: e })?;
            let read = serde_json::from_str::<(String, ImageEvent)>(&line);
            let (key, event) = match read {
                Ok(read) => read,
                Err(error) => return Ok(Err(error.to_string())),
            };
            match place {
                Some(place) if event.operation == Operation::Delete => {
                    Ok(is_gone(place, &key).await?.then_some(event).ok_or(key))
                }
                _ => Ok(Ok(event)),
            }
        };
        let events = stream::iter(self.events.lines()).map(read).buffered(LOOKS);
        Ok(publisher.send_all(events, token, on_event).await?)
    }
}

/// Whether nothing is at `key`, by a request for it alone.
async fn is_gone(place: &Store, key: &str) -> Result<bool, StoreError> {
    // A name that the store cannot have: nothing can be there.
    let Ok(path) = object_store::path::Path::parse(key) else { return Ok(true) };
    match place.objects().head(&path).await {
        Ok(_) => Ok(false),
        Err(object_store::Error::NotFound { .. }) => Ok(true),
        Err(error) => Err(place.error(error)),
    }
}

/// Why a comparison stopped.
enum Stopped {
    Folder(io::Error),
    Interrupted,
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Folder(error)
    }
}

/// Both sides, read in the order of their keys.
fn side_by_side(
    mut listed: Sorted,
    (mut known, place): (Sorted, Place),
    rules: &Rules,
    folder: &Path,
    mut report: Report,
    on_finding: &mut impl FnMut(&Finding),
    token: &CancellationToken,
) -> Result<(Report, File, Option<String>), Stopped> {
    let mut events = BufWriter::new(tempfile::tempfile_in(folder)?);
    let mut not_time = None;
    let first = |a: Option<&[u8]>, b: Option<&[u8]>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b).to_vec()),
        (a, b) => a.or(b).map(<[u8]>::to_vec),
    };
    while let Some(key) = first(listed.peek(), known.peek()) {
        if token.is_cancelled() {
            return Err(Stopped::Interrupted);
        }
        let here =
            known.values(&key)?.iter().map(|v| parsed(v)).collect::<io::Result<Vec<Known>>>()?;
        let there = listed.values(&key)?;
        // An id that a list has several times: the last in the order of their bytes counts.
        let there = there.last().map(|value| parsed(value)).transpose()?;
        if rules.sequence_is_time && rules.naming.ordering == Ordering::Sequence {
            let wrong = here.iter().filter(|k| k.what == What::Here && !is_time(k));
            for known in wrong {
                report.not_times += 1;
                not_time.get_or_insert_with(|| known.image_id.clone());
            }
        }
        let key = String::from_utf8_lossy(&key);
        for finding in compare(&key, there, &here, &place, rules, &mut report) {
            match &finding.event {
                Some(event) => {
                    report.deletes += u64::from(finding.finding == Kind::Gone);
                    serde_json::to_writer(&mut events, &(&key, event)).map_err(io::Error::from)?;
                    events.write_all(b"\n")?;
                }
                None => report.refused += 1,
            }
            on_finding(&finding);
        }
    }
    let mut events = events.into_inner().map_err(io::IntoInnerError::into_error)?;
    events.rewind()?;
    Ok((report, events, not_time))
}

/// Where files are sorted unless another folder is named.
pub fn temporary_folder() -> PathBuf {
    std::env::temp_dir()
}

#[cfg(test)]
mod tests;
