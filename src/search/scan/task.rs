//! The tasks that the threads of a pass share.

use super::request::ScanRequest;
use crate::search::snapshot::{Chunk, Snapshot};

/// Groups of a task: 4,096 rows, two megabytes of codes at 512 dimensions, so that threads share
/// the work evenly and a task's overhead does not show.
const GROUPS_PER_TASK: usize = 64;
/// With a filter, the background is taken from the live rows of every so many-th group: its own hits
/// would say little of what unrelated images get.
pub const BACKGROUND_GROUP_STRIDE: usize = 8;

/// A run of groups of one chunk.
#[derive(Debug, Clone, Copy)]
pub struct ScanTask {
    pub chunk_index: usize,
    /// First group in the chunk.
    pub first_group: usize,
    pub end_group: usize,
    /// Number of the first group over all chunks.
    pub global_first_group: usize,
}

impl ScanTask {
    /// The rows of this task's chunk that may be found in its `g`-th group.
    pub fn bitmap_word(&self, request: &ScanRequest, chunk: &Chunk, g: usize) -> u64 {
        match &request.row_mask {
            Some(mask) => mask[self.global_first_group + g],
            None => chunk.live_bitmap[self.first_group + g],
        }
    }

    /// The rows of that group that the background is made of.
    pub fn background_word(&self, request: &ScanRequest, chunk: &Chunk, g: usize) -> u64 {
        let counts = request.row_mask.is_none()
            || (self.global_first_group + g).is_multiple_of(BACKGROUND_GROUP_STRIDE);
        if counts { chunk.live_bitmap[self.first_group + g] } else { 0 }
    }
}

/// The tasks of a snapshot.
pub fn split_into_tasks(snapshot: &Snapshot) -> Vec<ScanTask> {
    let (mut tasks, mut first) = (Vec::new(), 0);
    for (chunk, c) in snapshot.chunks.iter().enumerate() {
        let groups = c.live_bitmap.len();
        for from in (0..groups).step_by(GROUPS_PER_TASK) {
            let to = (from + GROUPS_PER_TASK).min(groups);
            tasks.push(ScanTask {
                chunk_index: chunk,
                first_group: from,
                end_group: to,
                global_first_group: first + from,
            });
        }
        first += groups;
    }
    tasks
}
