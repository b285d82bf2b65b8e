//! How much memory a loaded generation needs, and how much it may use.

use super::quantise::CODE_ALIGNMENT;
use crate::record::ImageRow;
use crate::retry::{Classify, Disposition};

/// Bytes of a row with one prompt set, apart from its embedding, ids, address and attributes.
pub const ROW_OVERHEAD_BYTES: u64 = 150;
/// Bytes that each prompt set after the first adds to a row.
pub const EXTRA_PROMPT_SET_BYTES_PER_ROW: u64 = 28;
const MIB: u64 = 1 << 20;

/// Memory of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotMemory {
    /// Number of live images.
    pub image_count: usize,
    /// Bytes of ids, addresses and attributes, and of the tombstones of deleted images.
    pub text_bytes: usize,
    /// Bytes of everything else.
    pub other_bytes: usize,
}

/// The generation does not fit into the memory limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{image_count} images need {needed_mib} MiB, and search.memory_mib allows {limit_mib} MiB; nothing more is loaded. Raise the limit, give the machine more memory, or serve fewer images or prompt sets"
)]
pub struct MemoryLimitExceeded {
    /// Number of images that were to be loaded.
    pub image_count: usize,
    /// Memory that they need, in MiB, rounded up.
    pub needed_mib: u64,
    /// Memory limit, in MiB.
    pub limit_mib: u64,
}

impl Classify for MemoryLimitExceeded {
    fn disposition(&self) -> Disposition {
        Disposition::Fatal
    }
}

impl SnapshotMemory {
    /// Returns the bytes of everything.
    pub fn total_bytes(&self) -> u64 {
        (self.text_bytes + self.other_bytes) as u64
    }

    /// Returns an error if more than `limit` bytes are needed.
    pub fn check_limit(&self, limit: u64) -> Result<(), MemoryLimitExceeded> {
        check_bytes(self.image_count, self.total_bytes(), limit)
    }

    /// Returns an error if `rows`, in addition to what is loaded, certainly need more than `limit`
    /// bytes. This is checked before anything is built from them.
    pub(crate) fn check_limit_with_rows(
        &self,
        rows: &[ImageRow],
        limit: u64,
    ) -> Result<(), MemoryLimitExceeded> {
        let mut dimensions =
            rows.iter().filter_map(|row| Some(row.image.as_ref()?.embedding.values().len()));
        // Each value takes two bytes as f16 and one as a code.
        let embedding_bytes = rows.len() * 3 * dimensions.next().unwrap_or(0);
        let needed = self.total_bytes() + embedding_bytes as u64;
        check_bytes(self.image_count + rows.len(), needed, limit)
    }
}

/// Returns the bytes that `images` with embeddings of `dimension` values and `sets` prompt sets
/// need, apart from ids, addresses and attributes.
pub fn memory_required_bytes(images: u64, dimension: usize, sets: usize) -> u64 {
    let embedding = dimension.next_multiple_of(CODE_ALIGNMENT) + 2 * dimension;
    images
        * (embedding as u64
            + ROW_OVERHEAD_BYTES
            + EXTRA_PROMPT_SET_BYTES_PER_ROW * (sets as u64).saturating_sub(1))
}

/// Returns an error if `needed` is above `limit`, both in bytes.
fn check_bytes(images: usize, needed: u64, limit: u64) -> Result<(), MemoryLimitExceeded> {
    if needed <= limit {
        return Ok(());
    }
    Err(MemoryLimitExceeded {
        image_count: images,
        needed_mib: needed.div_ceil(MIB),
        limit_mib: limit / MIB,
    })
}

/// Returns `configured` MiB in bytes; for 0, four fifths of the memory of the machine or of its
/// control group.
pub fn memory_limit_bytes(configured: u64) -> u64 {
    if configured > 0 {
        return configured.saturating_mul(MIB);
    }
    available_bytes().map_or(u64::MAX, |bytes| bytes / 5 * 4)
}

/// Returns the bytes that this process may use, or `None` if Linux does not report them.
fn available_bytes() -> Option<u64> {
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
