//! The table in memory: one entry an image, the newest version of each.
//!
//! A snapshot is immutable. The follower builds the next one beside it and swaps a pointer, so that
//! readers never wait and an answer never mixes two versions. Entries are shared between
//! snapshots, so a swap copies pointers only.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::sync::Arc;

use arc_swap::ArcSwap;
use chrono::{DateTime, Utc};
use tokio::sync::broadcast;

use crate::normalise::{Normaliser, Scale};
use crate::prompts::EmbeddedSet;
use crate::record::{Image, ImageId, Row, Version};
use crate::statistics::{Statistics, StatisticsKey};
use crate::table::Changes;

/// Changes kept for listeners that are slow; a slower one misses the oldest.
const CHANGE_BUFFER: usize = 1024;

/// One live image.
#[derive(Debug)]
pub struct Entry {
    /// Which image.
    pub image_id: ImageId,
    /// Its version.
    pub version: Version,
    /// When the change happened, where known.
    pub event_time: Option<DateTime<Utc>>,
    /// When it was embedded.
    pub embedded_at: DateTime<Utc>,
    /// What is known of it.
    pub image: Image,
}

/// The live images at one version of the table.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Version of the table.
    pub version: u64,
    /// When that version was taken in.
    pub at: Option<DateTime<Utc>>,
    /// Live images, in the order in which they were first seen.
    pub entries: Vec<Arc<Entry>>,
    /// Images whose statistics were computed here, because their row came without them.
    pub computed: usize,
    by_id: HashMap<ImageId, usize>,
    scales: HashMap<(StatisticsKey, Normaliser), Scale>,
}

impl Snapshot {
    /// The image with this id, if it is live.
    pub fn get(&self, id: &str) -> Option<&Arc<Entry>> {
        let id = ImageId::new(id).ok()?;
        self.by_id.get(&id).map(|i| &self.entries[*i])
    }

    /// The constants c and m of a normaliser over the live images.
    pub fn scale(&self, key: &StatisticsKey, normaliser: Normaliser) -> Scale {
        let known = self.scales.get(&(key.clone(), normaliser));
        known.copied().unwrap_or_default()
    }
}

/// One change, for listeners.
#[derive(Debug, Clone)]
pub struct Change {
    /// Which image.
    pub image_id: ImageId,
    /// The image as it is now; none where it was deleted.
    pub entry: Option<Arc<Entry>>,
    /// The image as it was; none where it is new.
    pub before: Option<Arc<Entry>>,
    /// Version of the table that brought the change.
    pub version: u64,
}

/// The newest snapshot, and what changes.
pub struct Snapshots {
    newest: ArcSwap<Snapshot>,
    ready: std::sync::atomic::AtomicBool,
    changes: broadcast::Sender<Change>,
    sets: Vec<Arc<EmbeddedSet>>,
    /// Newest version seen of every image, deleted ones too: an older row may come later.
    versions: tokio::sync::Mutex<HashMap<ImageId, Version>>,
}

impl Snapshots {
    /// Empty, until the first [`Snapshots::apply`]. Statistics of `sets` are computed for images
    /// that come without them.
    pub fn new(sets: Vec<Arc<EmbeddedSet>>) -> Self {
        Self {
            newest: ArcSwap::default(),
            ready: false.into(),
            changes: broadcast::channel(CHANGE_BUFFER).0,
            sets,
            versions: tokio::sync::Mutex::default(),
        }
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Arc<Snapshot> {
        self.newest.load_full()
    }

    /// Whether the whole table has been taken in once.
    pub fn ready(&self) -> bool {
        self.ready.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Hears of every change from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Takes in what the follower brought and publishes the next snapshot.
    pub async fn apply(&self, changes: Changes) {
        let mut versions = self.versions.lock().await;
        let old = self.newest();
        let (mut entries, mut by_id, mut computed) = if changes.whole {
            versions.clear();
            (Vec::with_capacity(changes.rows.len()), HashMap::new(), 0)
        } else {
            (old.entries.clone(), old.by_id.clone(), old.computed)
        };
        let mut events = Vec::new();
        for row in changes.rows {
            let version = Version::of(&row);
            match versions.entry(row.image_id.clone()) {
                MapEntry::Occupied(known) if *known.get() >= version => continue,
                MapEntry::Occupied(mut known) => drop(known.insert(version.clone())),
                MapEntry::Vacant(new) => drop(new.insert(version.clone())),
            }
            let image_id = row.image_id.clone();
            let entry = self.entry(row, version, &mut computed).map(Arc::new);
            let before = put(&mut entries, &mut by_id, &image_id, entry.clone());
            events.push(Change { image_id, entry, before, version: changes.version });
        }
        let scales = self.scales(&entries);
        self.newest.store(Arc::new(Snapshot {
            version: changes.version,
            at: Some(Utc::now()),
            entries,
            computed,
            by_id,
            scales,
        }));
        self.ready.store(true, std::sync::atomic::Ordering::Release);
        if !changes.whole {
            for event in events {
                // An error means that nobody listens.
                let _ = self.changes.send(event);
            }
        }
    }

    fn entry(&self, row: Row, version: Version, computed: &mut usize) -> Option<Entry> {
        let mut image = row.image?;
        for set in &self.sets {
            if image.statistics.contains_key(&set.key) {
                continue;
            }
            if let Some(statistics) = set.statistics(&image.embedding) {
                image.statistics.insert(set.key.clone(), statistics);
                *computed += 1;
            }
        }
        Some(Entry {
            image_id: row.image_id,
            version,
            event_time: row.event_time,
            embedded_at: row.embedded_at,
            image,
        })
    }

    fn scales(&self, entries: &[Arc<Entry>]) -> HashMap<(StatisticsKey, Normaliser), Scale> {
        let mut scales = HashMap::new();
        for set in &self.sets {
            for normaliser in Normaliser::ALL {
                let all = entries.iter().filter_map(|e| e.image.statistics.get(&set.key));
                let all: Vec<Statistics> = all.copied().collect();
                scales
                    .insert((set.key.clone(), normaliser), Scale::of(normaliser, all.into_iter()));
            }
        }
        scales
    }
}

/// Puts, replaces or removes (by moving the last into its place) the entry of an image; gives what
/// was there before.
fn put(
    entries: &mut Vec<Arc<Entry>>,
    by_id: &mut HashMap<ImageId, usize>,
    id: &ImageId,
    entry: Option<Arc<Entry>>,
) -> Option<Arc<Entry>> {
    match (entry, by_id.get(id).copied()) {
        (Some(entry), Some(i)) => Some(std::mem::replace(&mut entries[i], entry)),
        (Some(entry), None) => {
            by_id.insert(id.clone(), entries.len());
            entries.push(entry);
            None
        }
        (None, Some(i)) => {
            by_id.remove(id);
            let before = entries.swap_remove(i);
            if let Some(moved) = entries.get(i) {
                by_id.insert(moved.image_id.clone(), i);
            }
            Some(before)
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Attributes, Embedding, Sequence};

    fn row(id: &str, sequence: u64, deleted: bool) -> Row {
        Row {
            image_id: ImageId::new(id).unwrap(),
            sequence: Sequence::from_number(sequence),
            event_time: None,
            embedded_at: DateTime::from_timestamp(1, 0).unwrap(),
            image: (!deleted).then(|| Image {
                uri: None,
                content_hash: String::new(),
                bytes: 0,
                width: 1,
                height: 1,
                attributes: Attributes::new(),
                embedding: Embedding::round(&[sequence as f32]),
                statistics: [].into(),
            }),
        }
    }

    async fn apply(snapshots: &Snapshots, version: u64, rows: Vec<Row>) -> Vec<String> {
        snapshots
            .apply(Changes { version, whole: version == 1, rows, statistics: Vec::new() })
            .await;
        let newest = snapshots.newest();
        for entry in &newest.entries {
            assert!(Arc::ptr_eq(newest.get(entry.image_id.as_str()).unwrap(), entry));
        }
        let mut ids: Vec<String> = newest
            .entries
            .iter()
            .map(|e| format!("{}@{}", e.image_id, e.image.embedding.values()[0]))
            .collect();
        ids.sort();
        ids
    }

    #[tokio::test]
    async fn the_newest_version_of_each_image_is_live_in_whatever_order_rows_come() {
        let snapshots = Snapshots::new(Vec::new());
        assert!(!snapshots.ready());
        let first = vec![row("a", 2, false), row("b", 1, false), row("a", 1, false)];
        assert_eq!(apply(&snapshots, 1, first).await, ["a@2", "b@1"]);
        assert!(snapshots.ready());
        assert_eq!(
            apply(&snapshots, 2, vec![row("c", 1, false), row("a", 3, true)]).await,
            ["b@1", "c@1"]
        );
        // An upsert that is older than the delete does not bring the image back.
        assert_eq!(apply(&snapshots, 3, vec![row("a", 2, false)]).await, ["b@1", "c@1"]);
        assert_eq!(apply(&snapshots, 4, vec![row("a", 4, false)]).await, ["a@4", "b@1", "c@1"]);
    }

    #[tokio::test]
    async fn a_reader_keeps_its_snapshot() {
        let snapshots = Snapshots::new(Vec::new());
        apply(&snapshots, 1, vec![row("a", 1, false)]).await;
        let held = snapshots.newest();
        apply(&snapshots, 2, vec![row("a", 2, true)]).await;
        assert_eq!((held.version, held.entries.len()), (1, 1));
        assert_eq!(snapshots.newest().entries.len(), 0);
    }
}
