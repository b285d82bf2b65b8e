//! Where the next page begins, and the snapshots that pages are read from.

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
/// Bytes of the checksum behind them.
const CHECKSUM_BYTES: usize = 4;

/// Where the next page of an answer begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cursor {
    /// Version of the table that pages are read from.
    pub table_version: u64,
    /// Revision of the catalogue's state by which they are ranked.
    pub state_revision: u64,
    /// Results on earlier pages.
    pub offset: u32,
    /// Constants of the catalogue that scores were made with.
    pub scale: ScaleConstants,
    /// Of the question, so that a cursor goes on with its own only.
    pub query_digest: [u8; DIGEST_BYTES],
}

impl Cursor {
    /// As clients get it.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(PAYLOAD_BYTES + CHECKSUM_BYTES);
        bytes.extend(self.table_version.to_le_bytes());
        bytes.extend(self.state_revision.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.scale.factor.to_le_bytes());
        bytes.extend(self.scale.shift.to_le_bytes());
        bytes.extend(self.query_digest);
        let check = Sha256::digest(&bytes);
        bytes.extend(&check[..CHECKSUM_BYTES]);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// From what a client sent; none where it is no cursor.
    pub fn decode(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (bytes, check) = bytes.split_at_checked(PAYLOAD_BYTES)?;
        if Sha256::digest(bytes)[..CHECKSUM_BYTES] != *check {
            return None;
        }
        let mut rest = bytes;
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

fn read_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

/// Of everything that decides an answer but the version, the page and its size.
pub fn query_digest(
    ask: &ScanRequest,
    filter: &str,
    excluded_image: Option<&str>,
    model: &str,
) -> [u8; DIGEST_BYTES] {
    let mut hasher = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(&ask.embedding.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    part(ask.statistics_key.as_str().as_bytes());
    part(ask.balance.normaliser.name().as_bytes());
    part(&ask.balance.weight.to_le_bytes());
    part(&ask.balance.lambda.to_le_bytes());
    part(filter.as_bytes());
    part(excluded_image.unwrap_or_default().as_bytes());
    part(model.as_bytes());
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&hasher.finalize()[..DIGEST_BYTES]);
    digest
}

/// Snapshots that cursors point to, for a while.
#[derive(Debug)]
pub struct PinnedSnapshots {
    max_age: Duration,
    /// Most bytes that they hold and the newest snapshot does not.
    max_bytes: u64,
    /// The oldest first.
    pinned: Mutex<VecDeque<PinnedSnapshot>>,
}

#[derive(Debug)]
struct PinnedSnapshot {
    last_used_at: Instant,
    snapshot: Arc<Snapshot>,
}

impl PinnedSnapshots {
    /// Holds snapshots for `age` after their last use, and less long where they take more than
    /// `bytes`.
    pub fn new(age: Duration, bytes: u64) -> Self {
        Self { max_age: age, max_bytes: bytes, pinned: Mutex::default() }
    }

    /// Holds `snapshot`, beside the newest.
    pub fn pin(&self, snapshot: &Arc<Snapshot>, newest: &Arc<Snapshot>) {
        let mut held = self.lock();
        let known = held.iter().position(|pin| Arc::ptr_eq(&pin.snapshot, snapshot));
        let known = known.and_then(|at| held.remove(at));
        held.push_back(PinnedSnapshot { last_used_at: Instant::now(), snapshot: snapshot.clone() });
        if known.is_none() {
            self.evict_from(&mut held, newest);
        }
    }

    /// Lets go of what is too old, and of the oldest where all take too much beside the newest.
    pub fn evict(&self, newest: &Arc<Snapshot>) {
        self.evict_from(&mut self.lock(), newest);
    }

    fn evict_from(&self, held: &mut VecDeque<PinnedSnapshot>, newest: &Arc<Snapshot>) {
        held.retain(|pin| pin.last_used_at.elapsed() <= self.max_age);
        while !held.is_empty() && bytes_not_shared_with(held, newest) > self.max_bytes {
            held.pop_front();
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<PinnedSnapshot>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot of this version and revision, where it is the newest or held.
    pub fn find_snapshot(
        &self,
        version: u64,
        revision: u64,
        newest: Arc<Snapshot>,
    ) -> Option<Arc<Snapshot>> {
        let is = |s: &Snapshot| {
            s.table_version == version && s.serving_snapshot.state_revision == revision
        };
        if is(&newest) {
            return Some(newest);
        }
        let held = self.lock();
        let pin = held
            .iter()
            .find(|pin| is(&pin.snapshot) && pin.last_used_at.elapsed() <= self.max_age)?;
        Some(pin.snapshot.clone())
    }

    /// Bytes that are held beside the newest snapshot.
    pub fn extra_bytes(&self, newest: &Arc<Snapshot>) -> u64 {
        bytes_not_shared_with(&self.lock(), newest)
    }
}

/// Snapshots share most of their chunks.
fn bytes_not_shared_with(held: &VecDeque<PinnedSnapshot>, newest: &Arc<Snapshot>) -> u64 {
    let all = held.iter().flat_map(|pin| &pin.snapshot.chunks);
    let mut parts: HashMap<*const (), u64> = all.flat_map(Chunk::shared_parts).collect();
    for (part, _) in newest.chunks.iter().flat_map(Chunk::shared_parts) {
        parts.remove(&part);
    }
    parts.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_as_it_was_written_and_a_changed_one_is_none() {
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
        for wrong in ["", "x", "äö", &text[1..], &format!("{text}A")] {
            assert_eq!(Cursor::decode(wrong), None, "{wrong}");
        }
    }
}
