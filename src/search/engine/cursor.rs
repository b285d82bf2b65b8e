//! Cursors, which say where the next page begins, and the snapshots that they refer to.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::balance::normalise::ScaleConstants;
use crate::search::scan::ScanRequest;
use crate::search::snapshot::{Chunk, Snapshot};

/// Bytes of a query's digest in a cursor.
pub const DIGEST_BYTES: usize = 16;
const PAYLOAD_BYTES: usize = 8 + 8 + 4 + 4 + 4 + DIGEST_BYTES;
/// Bytes of the checksum that follows the payload.
const CHECKSUM_BYTES: usize = 4;

/// Position in the ranking of one query over one snapshot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cursor {
    /// Version of the table that all pages are read from.
    pub table_version: u64,
    /// Revision of the catalogue's state whose configuration ranks all pages.
    pub state_revision: u64,
    /// Number of results on earlier pages.
    pub offset: u32,
    /// Scale constants that the scores of all pages use.
    pub scale: ScaleConstants,
    /// Digest of the query: a cursor is only valid for the query that it was returned for.
    pub query_digest: [u8; DIGEST_BYTES],
}

impl Cursor {
    /// Returns the text that clients get: URL-safe base64 without padding.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(PAYLOAD_BYTES + CHECKSUM_BYTES);
        bytes.extend(self.table_version.to_le_bytes());
        bytes.extend(self.state_revision.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.scale.factor.to_le_bytes());
        bytes.extend(self.scale.shift.to_le_bytes());
        bytes.extend(self.query_digest);
        let checksum = Sha256::digest(&bytes);
        bytes.extend(&checksum[..CHECKSUM_BYTES]);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Reads the text that a client sent; `None` if it is not a cursor.
    pub fn decode(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (payload, checksum) = bytes.split_at_checked(PAYLOAD_BYTES)?;
        if Sha256::digest(payload)[..CHECKSUM_BYTES] != *checksum {
            return None;
        }
        let mut rest = payload;
        Some(Self {
            table_version: u64::from_le_bytes(read_array(&mut rest)?),
            state_revision: u64::from_le_bytes(read_array(&mut rest)?),
            offset: u32::from_le_bytes(read_array(&mut rest)?),
            scale: ScaleConstants {
                factor: f32::from_le_bytes(read_array(&mut rest)?),
                shift: f32::from_le_bytes(read_array(&mut rest)?),
            },
            query_digest: read_array(&mut rest)?,
        })
    }
}

/// Splits the first `N` bytes off.
fn read_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

/// Returns the digest of everything that determines a ranking, except the snapshot.
pub fn query_digest(
    request: &ScanRequest,
    filter: &str,
    excluded_image: Option<&str>,
    model: &str,
) -> [u8; DIGEST_BYTES] {
    let mut hasher = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(&request.embedding.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    add(request.statistics_key.as_str().as_bytes());
    add(request.balance.normaliser.name().as_bytes());
    add(&request.balance.weight.to_le_bytes());
    add(&request.balance.lambda.to_le_bytes());
    add(filter.as_bytes());
    add(excluded_image.unwrap_or_default().as_bytes());
    add(model.as_bytes());
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&hasher.finalize()[..DIGEST_BYTES]);
    digest
}

/// Snapshots that are kept in memory for the cursors that refer to them.
#[derive(Debug)]
pub struct PinnedSnapshots {
    /// Time after its last use for which a snapshot is kept.
    max_age: Duration,
    /// Maximum memory that the pinned snapshots take in addition to the newest one.
    max_bytes: u64,
    /// The least recently used is first.
    pinned: Mutex<VecDeque<PinnedSnapshot>>,
}

#[derive(Debug)]
struct PinnedSnapshot {
    last_used_at: Instant,
    snapshot: Arc<Snapshot>,
}

impl PinnedSnapshots {
    /// Keeps snapshots for `max_age` after their last use, and for a shorter time if they take more
    /// than `max_bytes`.
    pub fn new(max_age: Duration, max_bytes: u64) -> Self {
        Self { max_age, max_bytes, pinned: Mutex::default() }
    }

    /// Pins `snapshot`, or renews its pin.
    pub fn pin(&self, snapshot: &Arc<Snapshot>, newest: &Arc<Snapshot>) {
        let mut pinned = self.lock();
        let position = pinned.iter().position(|pin| Arc::ptr_eq(&pin.snapshot, snapshot));
        let previous_pin = position.and_then(|i| pinned.remove(i));
        let pin = PinnedSnapshot { last_used_at: Instant::now(), snapshot: snapshot.clone() };
        pinned.push_back(pin);
        if previous_pin.is_none() {
            self.evict_from(&mut pinned, newest);
        }
    }

    /// Drops snapshots that are too old, and the least recently used ones if all of them take too much
    /// memory in addition to the newest.
    pub fn evict(&self, newest: &Arc<Snapshot>) {
        self.evict_from(&mut self.lock(), newest);
    }

    fn evict_from(&self, pinned: &mut VecDeque<PinnedSnapshot>, newest: &Arc<Snapshot>) {
        pinned.retain(|pin| pin.last_used_at.elapsed() <= self.max_age);
        while !pinned.is_empty() && bytes_not_shared_with(pinned, newest) > self.max_bytes {
            pinned.pop_front();
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<PinnedSnapshot>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the snapshot of this table version and state revision if it is the newest or pinned.
    pub fn find_snapshot(
        &self,
        table_version: u64,
        state_revision: u64,
        newest: Arc<Snapshot>,
    ) -> Option<Arc<Snapshot>> {
        let matches = |s: &Snapshot| {
            s.table_version == table_version && s.serving_snapshot.state_revision == state_revision
        };
        if matches(&newest) {
            return Some(newest);
        }
        let pinned = self.lock();
        let pin = pinned
            .iter()
            .find(|pin| matches(&pin.snapshot) && pin.last_used_at.elapsed() <= self.max_age)?;
        Some(pin.snapshot.clone())
    }

    /// Returns the memory that pinned snapshots take in addition to the newest one, in bytes.
    pub fn extra_bytes(&self, newest: &Arc<Snapshot>) -> u64 {
        bytes_not_shared_with(&self.lock(), newest)
    }
}

/// Returns the bytes of the parts of chunks that `newest` does not share. Each part counts once.
fn bytes_not_shared_with(pinned: &VecDeque<PinnedSnapshot>, newest: &Arc<Snapshot>) -> u64 {
    let chunks = pinned.iter().flat_map(|pin| &pin.snapshot.chunks);
    let mut parts: HashMap<*const (), u64> = chunks.flat_map(Chunk::shared_parts).collect();
    for (part, _) in newest.chunks.iter().flat_map(Chunk::shared_parts) {
        parts.remove(&part);
    }
    parts.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_decodes_as_it_was_encoded_and_a_changed_text_is_rejected() {
        let cursor = Cursor {
            table_version: 12,
            state_revision: 3,
            offset: 48,
            scale: ScaleConstants { factor: 0.02, shift: 0.2 },
            query_digest: [7; DIGEST_BYTES],
        };
        let text = cursor.encode();
        assert_eq!(Cursor::decode(&text), Some(cursor));
        for i in 0..text.len() {
            let other = if text.as_bytes()[i] == b'A' { "B" } else { "A" };
            let changed = format!("{}{other}{}", &text[..i], &text[i + 1..]);
            assert_eq!(Cursor::decode(&changed), None, "{changed}");
        }
        for invalid in ["", "x", "äö", &text[1..], &format!("{text}A")] {
            assert_eq!(Cursor::decode(invalid), None, "{invalid}");
        }
    }
}
