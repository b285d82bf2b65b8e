//! The tasks into which a pass is divided among its threads.

use super::request::ScanRequest;
use crate::search::snapshot::{Chunk, Snapshot};

/// Number of groups of a task. These are 4,096 rows, or two megabytes of codes at 512 dimensions: few
/// enough that threads share the work evenly, and enough that the overhead of a task is negligible.
const GROUPS_PER_TASK: usize = 64;
/// With a filter, the score distribution is measured over all live rows of every eighth group. The rows
/// that fulfil the filter would say little about the scores of unrelated images.
pub const BACKGROUND_GROUP_STRIDE: usize = 8;

/// A range of groups of one chunk.
#[derive(Debug, Clone, Copy)]
pub struct ScanTask {
    /// Index of the chunk in the snapshot.
    pub chunk_index: usize,
    /// Index of the first group in the chunk.
    pub first_group: usize,
    /// One more than the index of the last group in the chunk.
    pub end_group: usize,
    /// Index of the first group over all chunks.
    pub global_first_group: usize,
}

impl ScanTask {
    /// Returns the rows of the `g`-th group of this task that may be hits, one bit per row.
    pub fn bitmap_word(&self, request: &ScanRequest, chunk: &Chunk, g: usize) -> u64 {
        match &request.row_mask {
            Some(mask) => mask[self.global_first_group + g],
            None => chunk.live_bitmap[self.first_group + g],
        }
    }

    /// Returns the rows of the `g`-th group of this task over which the score distribution is measured.
    pub fn background_word(&self, request: &ScanRequest, chunk: &Chunk, g: usize) -> u64 {
        let is_measured = request.row_mask.is_none()
            || (self.global_first_group + g).is_multiple_of(BACKGROUND_GROUP_STRIDE);
        if is_measured { chunk.live_bitmap[self.first_group + g] } else { 0 }
    }
}

/// Divides the rows of a snapshot into tasks.
pub fn split_into_tasks(snapshot: &Snapshot) -> Vec<ScanTask> {
    let (mut tasks, mut groups_before) = (Vec::new(), 0);
    for (chunk_index, chunk) in snapshot.chunks.iter().enumerate() {
        let groups = chunk.live_bitmap.len();
        for first_group in (0..groups).step_by(GROUPS_PER_TASK) {
            tasks.push(ScanTask {
                chunk_index,
                first_group,
                end_group: (first_group + GROUPS_PER_TASK).min(groups),
                global_first_group: groups_before + first_group,
            });
        }
        groups_before += groups;
    }
    tasks
}
