//! What is known of every file: whether it is stored, on its way, or skipped.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::error::WatchError;
use super::item::{FoundItem, FoundPicture, ItemVersion, SkipReason};
use crate::ingest::source::{ImageEvent, canonical_attribute_text};
use crate::record::{AttributeTypes, Attributes, Operation, SequenceKey};

/// Most events that were sent and are neither stored nor rejected yet. At most [`MAX_EVENT_BYTES_IN_TRANSIT`]
/// of them are in the topic, whatever it can keep.
pub const MAX_EVENTS_IN_TRANSIT: usize = 2_048;
/// Most bytes of these events.
const MAX_EVENT_BYTES_IN_TRANSIT: usize = 2 << 20;
/// Bytes of an event besides its texts.
const EVENT_OVERHEAD_BYTES: usize = 256;
/// Most files that are followed, skipped ones included: some 500 bytes of memory each.
const MAX_FILES: usize = 2_000_000;
/// Most rejections that are kept for the next call of [`Tracker::take_new_rejections`].
const MAX_NEW_REJECTIONS: usize = 1_000;
/// How long after a picture could not be fetched it is tried again.
const FETCH_RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// A stored image, as the table describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredImageVersion {
    /// Version of the row.
    pub sequence: SequenceKey,
    /// When the file last changed; `None` if that is unknown.
    pub event_time: Option<DateTime<Utc>>,
    /// Size of the file.
    pub size_bytes: u64,
    /// Address of the image.
    pub uri: Option<String>,
    /// Stored attributes.
    pub attributes: Attributes,
}

/// What happened to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageAction {
    /// It is stored for the first time.
    Added,
    /// Another version of it is stored.
    Changed,
    /// It was removed.
    Removed,
}

/// An image whose event is now visible in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledImage {
    /// Id of the image.
    pub image_id: String,
    /// What happened to it.
    pub action: ImageAction,
}

/// Counts of what was found. `found` is the sum of the next three.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrackerCounts {
    /// Files and addresses.
    pub found: usize,
    /// Those that are stored in their newest version.
    pub stored: usize,
    /// Those that are not stored, each for a reason.
    pub skipped: usize,
    /// Those that are waiting or on their way.
    pub pending: usize,
    /// Skipped ones that should have been stored.
    pub failed: usize,
    /// Stored ones that were stored before this process started.
    pub unchanged: usize,
    /// Pictures that were stored or rejected since this process started.
    pub finished: usize,
    /// Removed images whose deletes are waiting or on their way.
    pub pending_deletes: usize,
}

/// What is known of the files of all sources.
#[derive(Default)]
pub struct Tracker {
    attribute_types: AttributeTypes,
    /// Pictures by id.
    pictures: HashMap<String, TrackedPicture>,
    /// What is no picture, or shares its id with another one, by path.
    others: BTreeMap<String, TrackedOther>,
    /// Stored images that no source has named yet in this process, with the sequence of each.
    unclaimed: HashMap<String, StoredImageVersion>,
    /// Ids whose events are to be sent, in order.
    queue: VecDeque<String>,
    /// The last event of each id that was sent and is neither stored nor rejected yet.
    in_transit: HashMap<String, SentEvent>,
    bytes_in_transit: usize,
    /// Path and reason of what workers rejected since they were last asked for.
    new_rejections: Vec<(String, String)>,
    /// Number of the current pass over the sources.
    pass: u64,
    last_sequence: u64,
    is_full: bool,
}

struct SentEvent {
    sequence: SequenceKey,
    is_delete: bool,
    /// Bytes of this event and of the earlier ones of the same id that are on their way.
    bytes: usize,
}

struct TrackedPicture {
    path: String,
    picture: FoundPicture,
    source: usize,
    seen_in_pass: u64,
    state: PictureState,
    /// Whether a version of it is in the table.
    has_row: bool,
    /// Whether what is stored was stored before this process started.
    is_unchanged: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum PictureState {
    /// Its event waits in the queue.
    Queued,
    /// Its event was sent.
    Sent,
    /// Its newest version is stored.
    Stored,
    /// Workers rejected it; it is tried again after this time, if there is one.
    Rejected(SkipReason, Option<Instant>),
    /// It was removed from its source, and its delete waits in the queue.
    DeleteQueued,
    /// Its delete was sent.
    DeleteSent,
}

struct TrackedOther {
    reason: SkipReason,
    source: usize,
    seen_in_pass: u64,
}

impl Tracker {
    /// Creates a tracker of sources of which `stored` is stored already.
    pub fn new(
        attribute_types: AttributeTypes,
        stored: impl IntoIterator<Item = (String, StoredImageVersion)>,
    ) -> Self {
        Self { attribute_types, unclaimed: stored.into_iter().collect(), ..Self::default() }
    }

    /// Starts a pass over all sources.
    pub fn begin_pass(&mut self) {
        self.pass += 1;
    }

    /// Records what was found in a source. Returns false if no more can be followed.
    pub fn observe(&mut self, source: usize, item: FoundItem) -> bool {
        let FoundItem { path, content } = item;
        if self.pictures.len() + self.others.len() >= MAX_FILES {
            self.is_full = true;
            return false;
        }
        let picture = match content {
            Ok(picture) => picture,
            Err(reason) => {
                self.observe_other(source, path, reason);
                return true;
            }
        };
        let pass = self.pass;
        let Some(known) = self.pictures.get_mut(&picture.image_id) else {
            self.add_picture(source, path, picture);
            return true;
        };
        if known.seen_in_pass == pass {
            let reason = SkipReason::failure(
                "the id of another picture",
                format!(
                    "has the same id as {}, {:?}; give each an id of its own",
                    known.path, picture.image_id
                ),
            );
            // A list may name a picture twice.
            let path = if known.path == path { format!("{path} (again)") } else { path };
            self.observe_other(source, path, reason);
            return true;
        }
        known.seen_in_pass = pass;
        (known.source, known.path) = (source, path);
        let must_send = match &known.state {
            PictureState::Rejected(_, Some(retry_at)) => Instant::now() >= *retry_at,
            PictureState::DeleteQueued | PictureState::DeleteSent => true,
            _ => false,
        };
        if known.picture != picture || must_send {
            if known.state != PictureState::Queued {
                self.queue.push_back(picture.image_id.clone());
            }
            known.state = PictureState::Queued;
            known.picture = picture;
            known.is_unchanged = false;
        }
        true
    }

    fn add_picture(&mut self, source: usize, path: String, picture: FoundPicture) {
        let id = picture.image_id.clone();
        let stored = self.unclaimed.remove(&id);
        let is_unchanged =
            stored.as_ref().is_some_and(|s| is_same(s, &picture, &self.attribute_types));
        if !is_unchanged {
            self.queue.push_back(id.clone());
        }
        let known = TrackedPicture {
            path,
            picture,
            source,
            seen_in_pass: self.pass,
            state: if is_unchanged { PictureState::Stored } else { PictureState::Queued },
            has_row: stored.is_some(),
            is_unchanged,
        };
        self.pictures.insert(id, known);
    }

    fn observe_other(&mut self, source: usize, path: String, reason: SkipReason) {
        let seen_in_pass = self.pass;
        self.others.insert(path, TrackedOther { reason, source, seen_in_pass });
    }

    /// Ends a pass: what the sources no longer contain is removed. `sources` says of each source whether it
    /// was listed completely, and the prefix of its ids. Returns the sources that contained something before
    /// and contain nothing now: of these nothing is removed, because a disk that is not mounted looks like
    /// that.
    pub fn finish_pass(&mut self, sources: &[(bool, &str)]) -> Result<Vec<usize>, WatchError> {
        if self.is_full {
            return Err(WatchError::TooManyFiles { limit: MAX_FILES });
        }
        let (mut seen, mut known) = (HashSet::new(), HashSet::new());
        let pictures = self.pictures.values().map(|p| (p.source, p.seen_in_pass));
        let others = self.others.values().map(|o| (o.source, o.seen_in_pass));
        for (source, seen_in_pass) in pictures.chain(others) {
            known.insert(source);
            if seen_in_pass == self.pass {
                seen.insert(source);
            }
        }
        let is_listed =
            |source: usize| sources.get(source).is_some_and(|s| s.0) && seen.contains(&source);
        let pass = self.pass;
        self.others.retain(|_, other| other.seen_in_pass == pass || !is_listed(other.source));
        let removed: Vec<String> = self
            .pictures
            .iter()
            .filter(|(_, p)| p.seen_in_pass != pass && is_listed(p.source))
            .map(|(id, _)| id.clone())
            .collect();
        for id in removed {
            self.remove_picture(&id);
        }
        let unlisted = (0..sources.len()).filter(|source| !is_listed(*source));
        let kept_prefixes: Vec<&str> = unlisted.map(|source| sources[source].1).collect();
        self.remove_unclaimed(&kept_prefixes);
        let is_emptied = |source: &usize| sources[*source].0 && !seen.contains(source);
        Ok((0..sources.len()).filter(is_emptied).filter(|s| known.contains(s)).collect())
    }

    fn remove_picture(&mut self, id: &str) {
        let Some(known) = self.pictures.get_mut(id) else { return };
        if matches!(known.state, PictureState::DeleteQueued | PictureState::DeleteSent) {
            return;
        }
        if !known.has_row && !self.in_transit.contains_key(id) {
            // There is nothing to delete.
            self.pictures.remove(id);
            return;
        }
        self.queue.push_back(id.to_owned());
        known.state = PictureState::DeleteQueued;
    }

    /// Removes stored images that no source contains, unless their ids have one of these prefixes.
    fn remove_unclaimed(&mut self, kept_prefixes: &[&str]) {
        let is_kept = |id: &str| kept_prefixes.iter().any(|prefix| id.starts_with(prefix));
        let removed: Vec<_> = self.unclaimed.extract_if(|id, _| !is_kept(id)).collect();
        for (id, stored) in removed {
            let picture = FoundPicture {
                image_id: id.clone(),
                uri: stored.uri.unwrap_or_default(),
                version: ItemVersion::default(),
                attributes: BTreeMap::new(),
            };
            self.queue.push_back(id.clone());
            let known = TrackedPicture {
                path: picture.uri.clone(),
                picture,
                source: usize::MAX,
                seen_in_pass: 0,
                state: PictureState::DeleteQueued,
                has_row: true,
                is_unchanged: false,
            };
            self.pictures.insert(id, known);
        }
    }

    /// Returns the next events to send, at most `limit`, and no more than may be on their way.
    pub fn take_events(&mut self, limit: usize) -> Vec<ImageEvent> {
        let mut events = Vec::new();
        while events.len() < limit
            && self.in_transit.len() < MAX_EVENTS_IN_TRANSIT
            && self.bytes_in_transit < MAX_EVENT_BYTES_IN_TRANSIT
        {
            let Some(id) = self.queue.pop_front() else { break };
            let Some(known) = self.pictures.get_mut(&id) else { continue };
            let now = Utc::now();
            let sequence = u64::try_from(now.timestamp_micros()).unwrap_or(0);
            let sequence = sequence.max(self.last_sequence + 1);
            let event = match &known.state {
                PictureState::Queued => {
                    known.state = PictureState::Sent;
                    upsert_event(&known.picture, sequence)
                }
                PictureState::DeleteQueued => {
                    known.state = PictureState::DeleteSent;
                    delete_event(&id, sequence, now)
                }
                PictureState::Rejected(_, None) if known.has_row => {
                    delete_event(&id, sequence, now)
                }
                _ => continue,
            };
            self.last_sequence = sequence;
            let bytes = event_bytes(&event);
            self.bytes_in_transit += bytes;
            let earlier = self.in_transit.get(&id).map_or(0, |sent| sent.bytes);
            let sent = SentEvent {
                sequence: SequenceKey::from_number(sequence),
                is_delete: event.operation == Operation::Delete,
                bytes: earlier + bytes,
            };
            self.in_transit.insert(id, sent);
            events.push(event);
        }
        events
    }

    /// Records that workers rejected the event of an image with this sequence.
    pub fn record_rejection(&mut self, id: &str, sequence: u64, code: &str, explanation: &str) {
        let key = SequenceKey::from_number(sequence);
        if self.in_transit.get(id).is_none_or(|sent| sent.sequence != key) {
            return;
        }
        self.finish_transit(id);
        let Some(known) = self.pictures.get_mut(id) else { return };
        if known.state != PictureState::Sent {
            return;
        }
        let retry_at = (code == "fetch_failed").then(|| Instant::now() + FETCH_RETRY_INTERVAL);
        if known.has_row && retry_at.is_none() {
            // What is stored is a version that no longer exists.
            self.queue.push_back(id.to_owned());
        }
        if self.new_rejections.len() < MAX_NEW_REJECTIONS {
            self.new_rejections.push((known.path.clone(), explanation.to_owned()));
        }
        known.state =
            PictureState::Rejected(SkipReason::from_rejection(code, explanation), retry_at);
    }

    /// Returns the path and the reason of what workers rejected since the last call.
    pub fn take_new_rejections(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.new_rejections)
    }

    fn finish_transit(&mut self, id: &str) {
        if let Some(sent) = self.in_transit.remove(id) {
            self.bytes_in_transit -= sent.bytes;
        }
    }

    /// Compares events on their way with the table: `stored` returns the sequence of the newest row of an
    /// image, `None` if it has none or is deleted. Returns the images whose events are stored now.
    pub fn settle(&mut self, stored: impl Fn(&str) -> Option<SequenceKey>) -> Vec<SettledImage> {
        let is_stored = |(id, sent): &(&String, &SentEvent)| match stored(id) {
            Some(row) => !sent.is_delete && row >= sent.sequence,
            None => sent.is_delete,
        };
        let stored_ids = self.in_transit.iter().filter(is_stored);
        let stored_ids: Vec<(String, bool)> =
            stored_ids.map(|(id, sent)| (id.clone(), sent.is_delete)).collect();
        let mut settled = Vec::new();
        for (id, is_delete) in stored_ids {
            self.finish_transit(&id);
            let Some(known) = self.pictures.get_mut(&id) else { continue };
            let had_row = std::mem::replace(&mut known.has_row, !is_delete);
            let action = match known.state {
                PictureState::Sent if had_row => ImageAction::Changed,
                PictureState::Sent => ImageAction::Added,
                PictureState::DeleteSent => ImageAction::Removed,
                // It has changed again, or its last version was rejected.
                _ => continue,
            };
            if action == ImageAction::Removed {
                self.pictures.remove(&id);
            } else {
                known.state = PictureState::Stored;
            }
            settled.push(SettledImage { image_id: id, action });
        }
        settled
    }

    /// Whether no event waits or is on its way.
    pub fn is_settled(&self) -> bool {
        self.queue.is_empty() && self.in_transit.is_empty()
    }

    /// Whether a picture was found, whatever became of it.
    pub fn has_pictures(&self) -> bool {
        let is_found = |p: &TrackedPicture| {
            !matches!(p.state, PictureState::DeleteQueued | PictureState::DeleteSent)
        };
        self.pictures.values().any(is_found)
            || self.others.values().any(|other| other.reason.is_failure)
    }

    /// Counts what was found.
    pub fn counts(&self) -> TrackerCounts {
        let mut counts = TrackerCounts::default();
        for known in self.pictures.values() {
            match &known.state {
                PictureState::Stored => {
                    counts.stored += 1;
                    counts.unchanged += usize::from(known.is_unchanged);
                    counts.finished += usize::from(!known.is_unchanged);
                }
                PictureState::Queued | PictureState::Sent => counts.pending += 1,
                PictureState::Rejected(reason, _) => {
                    counts.skipped += 1;
                    counts.finished += 1;
                    counts.failed += usize::from(reason.is_failure);
                }
                PictureState::DeleteQueued | PictureState::DeleteSent => {
                    counts.pending_deletes += 1;
                }
            }
        }
        for other in self.others.values() {
            counts.skipped += 1;
            counts.failed += usize::from(other.reason.is_failure);
        }
        counts.found = counts.stored + counts.skipped + counts.pending;
        counts
    }

    /// Returns how often each reason without details is why something is skipped, the most frequent first.
    pub fn count_reasons(&self) -> Vec<(String, usize)> {
        let rejected = self.pictures.values().filter_map(|known| match &known.state {
            PictureState::Rejected(reason, _) => Some(reason),
            _ => None,
        });
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for reason in rejected.chain(self.others.values().map(|other| &other.reason)) {
            *counts.entry(&reason.group).or_default() += 1;
        }
        let mut counts: Vec<(String, usize)> =
            counts.into_iter().map(|(reason, count)| (reason.to_owned(), count)).collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        counts
    }

    /// Returns the path of everything that is skipped, with the reason, in the order of the paths.
    pub fn skipped(&self) -> Vec<(&str, &SkipReason)> {
        let rejected = self.pictures.values().filter_map(|known| match &known.state {
            PictureState::Rejected(reason, _) => Some((known.path.as_str(), reason)),
            _ => None,
        });
        let others = self.others.iter().map(|(path, other)| (path.as_str(), &other.reason));
        let mut all: Vec<_> = rejected.chain(others).collect();
        all.sort_by_key(|(path, _)| *path);
        all
    }

    /// Returns the ids of the pictures that a user may have meant by a name: an id, the path as it is
    /// shown, or the end of either after a slash.
    pub fn ids_named(&self, name: &str) -> Vec<&str> {
        if let Some((id, _)) = self.pictures.get_key_value(name) {
            return vec![id];
        }
        let end = format!("/{}", name.trim_start_matches("./"));
        let is_meant = |id: &str, known: &TrackedPicture| {
            known.path == name || id.ends_with(&end) || known.path.ends_with(&end)
        };
        let meant = self.pictures.iter().filter(|(id, known)| is_meant(id, known));
        meant.map(|(id, _)| id.as_str()).collect()
    }
}

/// Whether what is stored is what was found.
fn is_same(stored: &StoredImageVersion, found: &FoundPicture, types: &AttributeTypes) -> bool {
    let attributes: Attributes = found
        .attributes
        .iter()
        .filter_map(|(name, value)| {
            let text = canonical_attribute_text(*types.get(name)?, value)?;
            Some((name.clone(), text))
        })
        .collect();
    stored.event_time == found.version.modified_at
        && found.version.size_bytes.is_none_or(|size| size == stored.size_bytes)
        && stored.uri.as_deref() == Some(found.uri.as_str())
        && stored.attributes == attributes
}

/// The sequence of an event is when it was sent, because times of files go back when an older file is
/// copied over a newer one; its time is that of the file.
fn upsert_event(picture: &FoundPicture, sequence: u64) -> ImageEvent {
    ImageEvent {
        image_id: picture.image_id.clone(),
        operation: Operation::Upsert,
        uri: Some(picture.uri.clone()),
        data: None,
        embedding: None,
        model: None,
        sequence: Some(sequence),
        event_time: picture.version.modified_at,
        attributes: picture.attributes.clone(),
    }
}

fn delete_event(id: &str, sequence: u64, now: DateTime<Utc>) -> ImageEvent {
    ImageEvent {
        image_id: id.to_owned(),
        operation: Operation::Delete,
        uri: None,
        data: None,
        embedding: None,
        model: None,
        sequence: Some(sequence),
        event_time: Some(now),
        attributes: BTreeMap::new(),
    }
}

fn event_bytes(event: &ImageEvent) -> usize {
    let attributes =
        event.attributes.iter().map(|(name, value)| name.len() + value.to_string().len());
    EVENT_OVERHEAD_BYTES
        // The id is the key of the message too.
        + 2 * event.image_id.len()
        + event.uri.as_ref().map_or(0, String::len)
        + attributes.sum::<usize>()
}
