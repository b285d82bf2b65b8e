//! Bitmaps of the rows that a filter lets through.
//!
//! A filter is evaluated once for each different value of an attribute in a chunk, then looked up for
//! each row, and becomes a bitmap. Bitmaps of recent filters are kept for each chunk: chunks never
//! change, so a commit costs those of its own rows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rayon::prelude::*;

use super::filter::{
    FilterField, FilterNode, Literal, Predicate, ValidatedFilter, parse_stored_value,
};
use crate::record::AttributeType;
use crate::search::snapshot::{AttributeColumn, ChunkData, ROWS_PER_GROUP, Snapshot};

/// Filters whose bitmaps are kept: an eighth of a byte an image each.
const MAX_CACHED_FILTERS: usize = 32;

impl FilterNode {
    /// A bit a row of `body`, set where this holds; what stands beyond the rows means nothing.
    fn to_bitmap(&self, body: &ChunkData) -> Vec<u64> {
        let fold = |nodes: &[Self], with: fn(u64, u64) -> u64| {
            let words = nodes.iter().map(|node| node.to_bitmap(body));
            words.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| with(*a, *b)).collect())
        };
        match self {
            Self::And(all) => fold(all, |a, b| a & b).unwrap_or_default(),
            Self::Or(any) => fold(any, |a, b| a | b).unwrap_or_default(),
            Self::Not(one) => one.to_bitmap(body).into_iter().map(|word| !word).collect(),
            Self::Condition(FilterField::Attribute(name, kind), test) => {
                match body.attributes.get(name) {
                    Some(column) => column_bitmap(column, *kind, test),
                    None => vec![0; body.len.div_ceil(ROWS_PER_GROUP)],
                }
            }
            Self::Condition(FilterField::EventTime, test) => time_bitmap(&body.event_times, test),
            Self::Condition(FilterField::EmbeddedAt, test) => time_bitmap(&body.embedded_at, test),
        }
    }
}

fn column_bitmap(column: &AttributeColumn, kind: AttributeType, test: &Predicate) -> Vec<u64> {
    let holds =
        |text: &str| parse_stored_value(kind, text).is_some_and(|value| test.matches(&value));
    let by_value: Vec<bool> =
        (0..column.values.len()).map(|i| holds(column.values.get(i))).collect();
    // A missing value's code is beyond all values.
    pack_bitmap(&column.value_indices, |code| {
        by_value.get(*code as usize).copied().unwrap_or(false)
    })
}

fn time_bitmap(times: &[i64], test: &Predicate) -> Vec<u64> {
    pack_bitmap(times, |time| {
        *time != ChunkData::UNKNOWN_TIME && test.matches(&Literal::Time(*time))
    })
}

fn pack_bitmap<T>(rows: &[T], holds: impl Fn(&T) -> bool) -> Vec<u64> {
    let word = |group: &[T]| {
        group.iter().enumerate().fold(0, |word, (i, row)| word | u64::from(holds(row)) << i)
    };
    rows.chunks(ROWS_PER_GROUP).map(word).collect()
}

/// A bitmap of a chunk's rows.
type ChunkBitmap = (Weak<ChunkData>, Arc<[u64]>);

/// Bitmaps of recent filters.
#[derive(Debug, Default)]
pub(crate) struct FilterCache {
    /// The last used at the end.
    recent: Mutex<VecDeque<(String, Vec<ChunkBitmap>)>>,
}

impl FilterCache {
    /// The live rows of `snapshot` that `filter` lets through, a word a group over all chunks.
    pub fn row_mask(&self, filter: &ValidatedFilter, snapshot: &Snapshot) -> Vec<u64> {
        let kept = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            kept().iter().find(|(text, _)| text == filter.as_json()).map(|(_, w)| w.clone());
        let known = known.unwrap_or_default();
        let words = |body: &Arc<ChunkData>| {
            let same = |(other, _): &&ChunkBitmap| other.as_ptr() == Arc::as_ptr(body);
            known
                .iter()
                .find(same)
                .map_or_else(|| filter.root.to_bitmap(body).into(), |(_, w)| w.clone())
        };
        let all: Vec<ChunkBitmap> = snapshot
            .chunks
            .par_iter()
            .map(|chunk| (Arc::downgrade(&chunk.data), words(&chunk.data)))
            .collect();
        let chunks = snapshot.chunks.iter().zip(&all);
        let mask = chunks
            .flat_map(|(chunk, (_, words))| {
                chunk.live_bitmap.iter().zip(&**words).map(|(a, b)| a & b)
            })
            .collect();
        let mut kept = kept();
        kept.retain(|(text, _)| text != filter.as_json());
        if kept.len() >= MAX_CACHED_FILTERS {
            kept.pop_front();
        }
        kept.push_back((filter.as_json().to_owned(), all));
        mask
    }
}
