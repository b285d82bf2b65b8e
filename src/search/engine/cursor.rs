//! Where the next page begins, and the snapshots that pages are read from.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::balance::normalise::Scale;
use crate::search::scan::Ask;
use crate::search::snapshot::Snapshot;
use crate::search::snapshot::chunk::Chunk;

/// Bytes of a query's digest in a cursor.
pub const DIGEST: usize = 16;
const BYTES: usize = 8 + 8 + 4 + 4 + 4 + DIGEST;
/// Bytes of the checksum behind them.
const CHECK: usize = 4;

/// Where the next page of an answer begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cursor {
    /// Version of the table that pages are read from.
    pub version: u64,
    /// Revision of the catalogue's state by which they are ranked.
    pub revision: u64,
    /// Results on earlier pages.
    pub offset: u32,
    /// Constants of the catalogue that scores were made with.
    pub scale: Scale,
    /// Of the question, so that a cursor goes on with its own only.
    pub digest: [u8; DIGEST],
}

impl Cursor {
    /// As clients get it.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(BYTES + CHECK);
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.revision.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.scale.c.to_le_bytes());
        bytes.extend(self.scale.m.to_le_bytes());
        bytes.extend(self.digest);
        let check = Sha256::digest(&bytes);
        bytes.extend(&check[..CHECK]);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// From what a client sent; none where it is no cursor.
    pub fn decode(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (bytes, check) = bytes.split_at_checked(BYTES)?;
        if Sha256::digest(bytes)[..CHECK] != *check {
            return None;
        }
        let mut rest = bytes;
        Some(Self {
            version: u64::from_le_bytes(next(&mut rest)?),
            revision: u64::from_le_bytes(next(&mut rest)?),
            offset: u32::from_le_bytes(next(&mut rest)?),
            scale: Scale {
                c: f32::from_le_bytes(next(&mut rest)?),
                m: f32::from_le_bytes(next(&mut rest)?),
            },
            digest: next(&mut rest)?,
        })
    }
}

fn next<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

/// Of everything that decides an answer but the version, the page and its size.
pub fn digest(ask: &Ask, filter: &str, without: Option<&str>, model: &str) -> [u8; DIGEST] {
    let mut hasher = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(&ask.embedding.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    part(ask.key.as_str().as_bytes());
    part(ask.balance.normaliser.name().as_bytes());
    part(&ask.balance.weight.to_le_bytes());
    part(&ask.balance.lambda.to_le_bytes());
    part(filter.as_bytes());
    part(without.unwrap_or_default().as_bytes());
    part(model.as_bytes());
    let mut digest = [0; DIGEST];
    digest.copy_from_slice(&hasher.finalize()[..DIGEST]);
    digest
}

/// Snapshots that cursors point to, for a while.
#[derive(Debug)]
pub struct Pins {
    age: Duration,
    /// Most bytes that they hold and the newest snapshot does not.
    bytes: u64,
    /// The oldest first.
    held: Mutex<VecDeque<Pin>>,
}

#[derive(Debug)]
struct Pin {
    used: Instant,
    snapshot: Arc<Snapshot>,
}

impl Pins {
    /// Holds snapshots for `age` after their last use, and less long where they take more than
    /// `bytes`.
    pub fn new(age: Duration, bytes: u64) -> Self {
        Self { age, bytes, held: Mutex::default() }
    }

    /// Holds `snapshot`, beside the newest.
    pub fn hold(&self, snapshot: &Arc<Snapshot>, newest: &Arc<Snapshot>) {
        let mut held = self.held();
        let known = held.iter().position(|pin| Arc::ptr_eq(&pin.snapshot, snapshot));
        let known = known.and_then(|at| held.remove(at));
        held.push_back(Pin { used: Instant::now(), snapshot: snapshot.clone() });
        if known.is_none() {
            self.shrink(&mut held, newest);
        }
    }

    /// Lets go of what is too old, and of the oldest where all take too much beside the newest.
    pub fn tidy(&self, newest: &Arc<Snapshot>) {
        self.shrink(&mut self.held(), newest);
    }

    fn shrink(&self, held: &mut VecDeque<Pin>, newest: &Arc<Snapshot>) {
        held.retain(|pin| pin.used.elapsed() <= self.age);
        while !held.is_empty() && beside(held, newest) > self.bytes {
            held.pop_front();
        }
    }

    fn held(&self) -> MutexGuard<'_, VecDeque<Pin>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot of this version and revision, where it is the newest or held.
    pub fn find(
        &self,
        version: u64,
        revision: u64,
        newest: Arc<Snapshot>,
    ) -> Option<Arc<Snapshot>> {
        let is = |s: &Snapshot| s.version == version && s.served.revision == revision;
        if is(&newest) {
            return Some(newest);
        }
        let held = self.held();
        let pin = held.iter().find(|pin| is(&pin.snapshot) && pin.used.elapsed() <= self.age)?;
        Some(pin.snapshot.clone())
    }

    /// Bytes that are held beside the newest snapshot.
    pub fn bytes(&self, newest: &Arc<Snapshot>) -> u64 {
        beside(&self.held(), newest)
    }
}

/// Snapshots share most of their chunks.
fn beside(held: &VecDeque<Pin>, newest: &Arc<Snapshot>) -> u64 {
    let all = held.iter().flat_map(|pin| &pin.snapshot.chunks);
    let mut parts: HashMap<*const (), u64> = all.flat_map(Chunk::parts).collect();
    for (part, _) in newest.chunks.iter().flat_map(Chunk::parts) {
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
            version: 12,
            revision: 3,
            offset: 48,
            scale: Scale { c: 0.02, m: 0.2 },
            digest: [7; DIGEST],
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
