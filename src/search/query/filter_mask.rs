//! Bitmaps of the rows that fulfil a filter.
//!
//! A filter is evaluated once per different value of an attribute in a chunk; the result is then looked
//! up for each row and becomes a bitmap. The bitmaps of recent filters are cached per chunk. Chunks
//! never change, so that a commit only costs the bitmaps of its own rows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rayon::prelude::*;

use super::filter::{
    FilterField, FilterNode, Literal, Predicate, ValidatedFilter, parse_stored_value,
};
use crate::record::AttributeType;
use crate::search::snapshot::{AttributeColumn, ChunkData, ROWS_PER_GROUP, Snapshot};

/// Number of filters whose bitmaps are cached. Each takes one bit per image.
const MAX_CACHED_FILTERS: usize = 32;

impl FilterNode {
    /// Returns one bit per row of `data`, set if the condition holds. Bits beyond the last row have no
    /// meaning.
    fn to_bitmap(&self, data: &ChunkData) -> Vec<u64> {
        let combine = |nodes: &[Self], operation: fn(u64, u64) -> u64| {
            let bitmaps = nodes.iter().map(|node| node.to_bitmap(data));
            bitmaps.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| operation(*a, *b)).collect())
        };
        match self {
            Self::And(nodes) => combine(nodes, |a, b| a & b).unwrap_or_default(),
            Self::Or(nodes) => combine(nodes, |a, b| a | b).unwrap_or_default(),
            Self::Not(node) => node.to_bitmap(data).into_iter().map(|word| !word).collect(),
            Self::Condition(FilterField::Attribute(name, declared), predicate) => {
                match data.attribute_columns.get(name) {
                    Some(column) => column_bitmap(column, *declared, predicate),
                    None => vec![0; data.row_count.div_ceil(ROWS_PER_GROUP)],
                }
            }
            Self::Condition(FilterField::EventTime, predicate) => {
                time_bitmap(&data.event_times, predicate)
            }
            Self::Condition(FilterField::EmbeddedAt, predicate) => {
                time_bitmap(&data.embedded_at, predicate)
            }
        }
    }
}

/// Returns the bitmap of a predicate on an attribute of this declared type.
fn column_bitmap(
    column: &AttributeColumn,
    declared: AttributeType,
    predicate: &Predicate,
) -> Vec<u64> {
    let holds = |text: &str| {
        parse_stored_value(declared, text).is_some_and(|value| predicate.matches(&value))
    };
    let holds_for_value: Vec<bool> =
        (0..column.values.len()).map(|i| holds(column.values.get(i))).collect();
    // The index of a missing value is beyond all values.
    pack_bitmap(&column.value_indices, |index| {
        holds_for_value.get(*index as usize).copied().unwrap_or(false)
    })
}

/// Returns the bitmap of a predicate on times, in microseconds since 1970.
fn time_bitmap(times: &[i64], predicate: &Predicate) -> Vec<u64> {
    pack_bitmap(times, |time| {
        *time != ChunkData::UNKNOWN_TIME && predicate.matches(&Literal::Time(*time))
    })
}

/// Returns one bit per row.
fn pack_bitmap<T>(rows: &[T], holds: impl Fn(&T) -> bool) -> Vec<u64> {
    let word = |group: &[T]| {
        group.iter().enumerate().fold(0, |word, (i, row)| word | u64::from(holds(row)) << i)
    };
    rows.chunks(ROWS_PER_GROUP).map(word).collect()
}

/// The bitmap of a chunk. The weak reference identifies the chunk for as long as it exists.
type ChunkBitmap = (Weak<ChunkData>, Arc<[u64]>);

/// The bitmaps of recent filters, per chunk.
#[derive(Debug, Default)]
pub(crate) struct FilterCache {
    /// By the JSON of the filter; the most recently used is last.
    recent_bitmaps: Mutex<VecDeque<(String, Vec<ChunkBitmap>)>>,
}

impl FilterCache {
    /// Returns the live rows of `snapshot` that fulfil `filter`: one bit per row and one word per
    /// group, over all chunks.
    pub fn row_mask(&self, filter: &ValidatedFilter, snapshot: &Snapshot) -> Vec<u64> {
        let recent = || self.recent_bitmaps.lock().unwrap_or_else(PoisonError::into_inner);
        let cached: Vec<ChunkBitmap> = recent()
            .iter()
            .find(|(json, _)| json == filter.as_json())
            .map(|(_, bitmaps)| bitmaps.clone())
            .unwrap_or_default();
        let bitmap_of = |data: &Arc<ChunkData>| {
            let is_of_chunk = |(chunk, _): &&ChunkBitmap| chunk.as_ptr() == Arc::as_ptr(data);
            cached
                .iter()
                .find(is_of_chunk)
                .map_or_else(|| filter.root.to_bitmap(data).into(), |(_, bitmap)| bitmap.clone())
        };
        let bitmaps: Vec<ChunkBitmap> = snapshot
            .chunks
            .par_iter()
            .map(|chunk| (Arc::downgrade(&chunk.data), bitmap_of(&chunk.data)))
            .collect();
        let mask = snapshot
            .chunks
            .iter()
            .zip(&bitmaps)
            .flat_map(|(chunk, (_, bitmap))| {
                chunk.live_bitmap.iter().zip(&**bitmap).map(|(live, fulfils)| live & fulfils)
            })
            .collect();
        let mut recent = recent();
        recent.retain(|(json, _)| json != filter.as_json());
        if recent.len() >= MAX_CACHED_FILTERS {
            recent.pop_front();
        }
        recent.push_back((filter.as_json().to_owned(), bitmaps));
        mask
    }
}
