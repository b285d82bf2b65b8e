//! Keeps chunks few and complete.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::chunk::{Chunk, ChunkData, MAX_CHUNK_ROWS, NO_STATISTICS, ROWS_PER_GROUP};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{ImageRow, StoredImage};

/// Computes the statistics that rows came without; how many that were.
pub fn add_missing_statistics(rows: &mut [ImageRow], sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let one = |image: &mut StoredImage| {
        let mut computed = 0;
        for set in sets {
            if image.statistics.contains_key(&set.statistics_key) {
                continue;
            }
            if let Some(statistics) = set.statistics(&image.embedding) {
                image.statistics.insert(set.statistics_key.clone(), statistics);
                computed += 1;
            }
        }
        computed
    };
    rows.par_iter_mut().filter_map(|row| row.image.as_mut()).map(one).sum()
}

/// Columns of statistics by the chunk and the set that they are of.
pub type StatisticsColumns = HashMap<(*const ChunkData, StatisticsKey), Arc<[ScoreStatistics]>>;

/// Has a chunk carry the statistics of exactly `sets`: what it lacks is taken from `columns`, or computed; how
/// many that were.
pub fn complete_statistics(
    chunk: &mut Chunk,
    sets: &[Arc<EmbeddedPromptSet>],
    columns: &mut StatisticsColumns,
) -> usize {
    let mut computed = 0;
    for set in sets {
        if chunk.statistics.contains_key(&set.statistics_key) {
            continue;
        }
        let name = (Arc::as_ptr(&chunk.data), set.statistics_key.clone());
        let column = columns.remove(&name).unwrap_or_else(|| compute_statistics_column(chunk, set));
        chunk.statistics.insert(set.statistics_key.clone(), column);
        computed += chunk.live_count;
    }
    chunk.statistics.retain(|key, _| sets.iter().any(|set| set.statistics_key == *key));
    computed
}

/// Statistics of a set for every live row of a chunk.
pub fn compute_statistics_column(chunk: &Chunk, set: &EmbeddedPromptSet) -> Arc<[ScoreStatistics]> {
    let of = |row: usize| {
        let live = chunk.is_live(row).then(|| set.statistics(&chunk.data.embedding(row)));
        live.flatten().unwrap_or(NO_STATISTICS)
    };
    (0..chunk.data.len).into_par_iter().map(of).collect::<Vec<_>>().into()
}

/// Drops empty chunks, writes half-empty ones anew and merges the newest while one is less than
/// twice as long as the one after it: a row is written anew some log₂([`MAX_ROWS`]) times at most,
/// and small chunks stay few. What rows lack of the statistics of `sets`, because these are being
/// adopted, is computed; how many that were.
pub fn compact_chunks(chunks: &mut Vec<Chunk>, sets: &[Arc<EmbeddedPromptSet>]) -> usize {
    let keys: Vec<StatisticsKey> = sets.iter().map(|set| set.statistics_key.clone()).collect();
    let mut computed = 0;
    let mut rebuild = |mut rows: Vec<ImageRow>| {
        computed += add_missing_statistics(&mut rows, sets);
        Chunk::from_rows(&rows, &keys)
    };
    chunks.retain(|chunk| chunk.live_count > 0);
    for chunk in chunks.iter_mut() {
        if chunk.data.len > ROWS_PER_GROUP && chunk.live_count * 2 < chunk.data.len {
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
