//! How much memory a loaded generation needs, and how much it may have.

use super::codes::LANES;
use crate::record::Row;
use crate::retry::{Decide, Verdict};

/// Bytes of a row besides its embedding, ids, address and attributes, with one prompt set.
pub const ROW: u64 = 150;
/// What each prompt set after the first adds to a row.
pub const SET: u64 = 28;
const MIB: u64 = 1 << 20;

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Live images.
    pub images: usize,
    /// Bytes of ids, addresses and attributes, and of what is remembered of deleted images.
    pub named: usize,
    /// Bytes of everything else.
    pub rest: usize,
}

/// The generation does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{images} images need {needed_mib} MiB, and search.memory_mib allows {limit_mib} MiB; nothing more is loaded. Raise the limit, give the machine more memory, or serve fewer images or prompt sets"
)]
pub struct OverMemory {
    /// Images that were to be loaded.
    pub images: usize,
    /// What they need.
    pub needed_mib: u64,
    /// What is allowed.
    pub limit_mib: u64,
}

impl Decide for OverMemory {
    fn verdict(&self) -> Verdict {
        Verdict::Fatal
    }
}

impl Memory {
    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        (self.named + self.rest) as u64
    }

    /// Refuses what is above `limit` bytes.
    pub fn within(&self, limit: u64) -> Result<(), OverMemory> {
        over(self.images, self.bytes(), limit)
    }

    /// Refuses `rows` beside what is loaded where that certainly needs more than `limit` bytes,
    /// before anything is built of them.
    pub(crate) fn expect(&self, rows: &[Row], limit: u64) -> Result<(), OverMemory> {
        let mut dimensions =
            rows.iter().filter_map(|row| Some(row.image.as_ref()?.embedding.values().len()));
        let more = rows.len() * 3 * dimensions.next().unwrap_or(0);
        over(self.images + rows.len(), self.bytes() + more as u64, limit)
    }
}

/// Bytes that `images` with embeddings of `dimension` values and `sets` prompt sets need, besides
/// ids, addresses and attributes.
pub fn needed(images: u64, dimension: usize, sets: usize) -> u64 {
    let embedding = dimension.next_multiple_of(LANES) + 2 * dimension;
    images * (embedding as u64 + ROW + SET * (sets as u64).saturating_sub(1))
}

fn over(images: usize, needed: u64, limit: u64) -> Result<(), OverMemory> {
    if needed <= limit {
        return Ok(());
    }
    Err(OverMemory { images, needed_mib: needed.div_ceil(MIB), limit_mib: limit / MIB })
}

/// `configured` MiB in bytes; for 0, four fifths of what the machine or its control group has.
pub fn limit(configured: u64) -> u64 {
    if configured > 0 {
        return configured.saturating_mul(MIB);
    }
    machine().map_or(u64::MAX, |bytes| bytes / 5 * 4)
}

/// Bytes that this process may use, where Linux says so.
fn machine() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let total = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    let group = read("/sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse::<u64>().ok());
    match (total, group) {
        (Some(total), Some(group)) => Some(total.min(group)),
        (total, group) => total.or(group),
    }
}
