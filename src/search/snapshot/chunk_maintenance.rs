//! Keeps chunks few, and complete in statistics of the served prompt sets.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::chunk::{Chunk, ChunkData, MAX_CHUNK_ROWS, NO_STATISTICS, ROWS_PER_GROUP};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{ImageRow, StoredImage};

/// Computes the statistics that rows were stored without. Returns how many it computed.
pub fn add_missing_statistics(rows: &mut [ImageRow], sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let complete_image = |image: &mut StoredImage| {
        let mut computed = 0;
        for set in sets {
            if image.statistics.contains_key(&set.statistics_key) {
                continue;
            }
            if let Some(statistics) = set.compute_statistics(&image.embedding) {
                image.statistics.insert(set.statistics_key.clone(), statistics);
                computed += 1;
            }
        }
        computed
    };
    rows.par_iter_mut().filter_map(|row| row.image.as_mut()).map(complete_image).sum()
}

/// Columns of statistics by the address of the chunk's data and the prompt set.
pub type StatisticsColumns = HashMap<(*const ChunkData, StatisticsKey), Arc<[ScoreStatistics]>>;

/// Makes a chunk carry the statistics of exactly `sets`. Columns that it lacks are taken from `columns`
/// or computed. Returns how many statistics were added.
pub fn sync_statistics_columns(
    chunk: &mut Chunk,
    sets: &[Arc<EmbeddedPromptSet>],
    columns: &mut StatisticsColumns,
) -> usize {
    let mut computed = 0;
    for set in sets {
        if chunk.statistics.contains_key(&set.statistics_key) {
            continue;
        }
        let key = (Arc::as_ptr(&chunk.data), set.statistics_key.clone());
        let column = columns.remove(&key).unwrap_or_else(|| compute_statistics_column(chunk, set));
        chunk.statistics.insert(set.statistics_key.clone(), column);
        computed += chunk.live_count;
    }
    chunk.statistics.retain(|key, _| sets.iter().any(|set| set.statistics_key == *key));
    computed
}

/// Computes the statistics of a prompt set for every live row of a chunk; the other rows get
/// [`NO_STATISTICS`].
pub fn compute_statistics_column(chunk: &Chunk, set: &EmbeddedPromptSet) -> Arc<[ScoreStatistics]> {
    let statistics_of = |row: usize| {
        let statistics =
            chunk.is_live(row).then(|| set.compute_statistics(&chunk.data.embedding(row)));
        statistics.flatten().unwrap_or(NO_STATISTICS)
    };
    (0..chunk.data.row_count).into_par_iter().map(statistics_of).collect::<Vec<_>>().into()
}

/// Drops empty chunks, rebuilds half-empty ones, and merges the last two chunks as long as the first
/// of them has fewer than twice as many live rows as the second. A row is therefore rebuilt at most
/// about log₂([`MAX_CHUNK_ROWS`]) times, and small chunks stay few. Rows may lack statistics of `sets`
/// while these are being introduced; they are computed, and the function returns how many.
pub fn compact_chunks(chunks: &mut Vec<Chunk>, sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let keys: Vec<StatisticsKey> = sets.iter().map(|set| set.statistics_key.clone()).collect();
    let mut computed = 0;
    let mut rebuild = |mut rows: Vec<ImageRow>| {
        computed += add_missing_statistics(&mut rows, sets);
        Chunk::from_rows(&rows, &keys)
    };
    chunks.retain(|chunk| chunk.live_count > 0);
    for chunk in chunks.iter_mut() {
        if chunk.data.row_count > ROWS_PER_GROUP && chunk.live_count * 2 < chunk.data.row_count {
            *chunk = rebuild(chunk.to_rows());
        }
    }
    while let [.., before, last] = &chunks[..] {
        if before.live_count >= 2 * last.live_count
            || before.live_count + last.live_count > MAX_CHUNK_ROWS
        {
            break;
        }
        let mut rows = before.to_rows();
        rows.extend(last.to_rows());
        rows.sort_unstable_by(|a, b| a.image_id.cmp(&b.image_id));
        chunks.truncate(chunks.len() - 2);
        chunks.push(rebuild(rows));
    }
    computed
}
