//! From the approximations of a pass to exact places.
//!
//! A row whose upper bound does not reach the k-th lower bound cannot be among the best k; all others
//! are scored in f64 on the stored vectors. The place of a row in a ranking is one more than the
//! number of rows above it: most are counted by their bounds, the few whose bounds hold the row's
//! own score are scored exactly. Ties go by id.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use pulp::{Arch, WithSimd};
use rayon::prelude::*;

use super::bounds::with_error;
use super::exact_dot_product::ExactDotProduct;
use super::hit::{Hit, TopK};
use super::pass::{ScanResult, TaskResult};
use super::request::ScanRequest;
use super::task::ScanTask;
use crate::balance::normalise::AffineTransform;
use crate::search::snapshot::{NO_STATISTICS, QuantisedQuery, ROWS_PER_GROUP, RowLocation};

/// Balanced, raw.
const BALANCED_INDEX: usize = 0;
const RAW_INDEX: usize = 1;

/// A row with its exact scores.
#[derive(Debug, Clone, Copy)]
struct ExactScores {
    location: RowLocation,
    /// Balanced, raw.
    scores: [f64; 2],
    affine: AffineTransform,
}

/// One query's pass, to be made exact.
pub struct ExactRanker<'a> {
    request: &'a ScanRequest,
    tasks: &'a [ScanTask],
    scan_result: &'a ScanResult,
    /// A query of each chunk, for the bounds of single rows.
    quantised_queries: Vec<QuantisedQuery>,
}

impl<'a> ExactRanker<'a> {
    /// Of `ask`, whose pass over `tasks` found `scanned`.
    pub fn new(
        request: &'a ScanRequest,
        tasks: &'a [ScanTask],
        scan_result: &'a ScanResult,
    ) -> Self {
        let mut integers = Vec::new();
        let mut prepared = Vec::with_capacity(request.snapshot.chunks.len());
        for chunk in &request.snapshot.chunks {
            integers.clear();
            prepared.push(chunk.data.quantised.quantise_query(&request.embedding, &mut integers));
        }
        Self { request, tasks, scan_result, quantised_queries: prepared }
    }

    /// The best from place `offset` on, up to the depth that was scanned for.
    pub fn top_k(&self, offset: usize) -> TopK {
        let candidates = self.candidates();
        let lists = [BALANCED_INDEX, RAW_INDEX].map(|by| self.sort_candidates(&candidates, by));
        let page = |list: &[ExactScores]| list.get(offset..).unwrap_or_default().to_vec();
        let [hits, raw_hits] = lists.each_ref().map(|list| page(list));
        let known: [HashMap<RowLocation, usize>; 2] = lists
            .map(|list| list.iter().enumerate().map(|(i, row)| (row.location, i + 1)).collect());
        TopK {
            hits: self.assign_ranks(&hits, &known),
            raw_hits: self.assign_ranks(&raw_hits, &known),
            matched: self.scan_result.matched,
            score_distribution: self.scan_result.score_distribution,
        }
    }

    /// One image and its places.
    pub fn rank_of(&self, place: RowLocation) -> Option<Hit> {
        let row = [self.exact_scores(place)];
        self.assign_ranks(&row, &Default::default()).pop()
    }

    /// Every row that can be among the best by either score.
    fn candidates(&self) -> Vec<ExactScores> {
        let kth_bound = self.scan_result.kth_bounds;
        let rows = |(task, piece): (&ScanTask, &TaskResult)| {
            let mut candidates = Vec::new();
            let either =
                [(BALANCED_INDEX, kth_bound[BALANCED_INDEX]), (RAW_INDEX, kth_bound[RAW_INDEX])];
            self.for_each_candidate(*task, piece, &either, |row| {
                candidates.push(self.exact_scores(row.location))
            });
            candidates
        };
        self.tasks.par_iter().zip(&self.scan_result.task_results).flat_map_iter(rows).collect()
    }

    fn sort_candidates(&self, candidates: &[ExactScores], score_index: usize) -> Vec<ExactScores> {
        let mut list = candidates.to_vec();
        let order = |a: &ExactScores, b: &ExactScores| {
            self.compare(score_index, (a.scores[score_index], a.location), b)
        };
        let depth = self.request.depth;
        if list.len() > depth {
            list.select_nth_unstable_by(depth - 1, order);
            list.truncate(depth);
        }
        list.sort_unstable_by(order);
        list
    }

    /// How a row with this exact score stands to `other`.
    fn compare(
        &self,
        score_index: usize,
        (score, place): (f64, RowLocation),
        other: &ExactScores,
    ) -> Ordering {
        let id = |place: RowLocation| self.request.snapshot.chunks[place.chunk].data.id(place.row);
        other.scores[score_index].total_cmp(&score).then_with(|| id(place).cmp(id(other.location)))
    }

    /// Hits of `rows` with both places, from `known` or counted.
    fn assign_ranks(
        &self,
        rows: &[ExactScores],
        known_ranks: &[HashMap<RowLocation, usize>; 2],
    ) -> Vec<Hit> {
        let counted_ranks = [BALANCED_INDEX, RAW_INDEX].map(|by| {
            let mut unknown: Vec<ExactScores> = rows
                .iter()
                .filter(|r| !known_ranks[by].contains_key(&r.location))
                .copied()
                .collect();
            unknown.sort_unstable_by(|a, b| self.compare(by, (a.scores[by], a.location), b));
            let counted = self.count_ranks(by, &unknown);
            unknown.iter().map(|r| r.location).zip(counted).collect::<HashMap<_, _>>()
        });
        let place = |by: usize, row: &ExactScores| {
            known_ranks[by]
                .get(&row.location)
                .or_else(|| counted_ranks[by].get(&row.location))
                .copied()
                .unwrap_or(0)
        };
        let hit = |row: &ExactScores| {
            let entry =
                self.request.snapshot.chunks[row.location.chunk].data.metadata(row.location.row)?;
            Some(Hit {
                image: Arc::new(entry),
                raw_score: row.scores[RAW_INDEX] as f32,
                raw_rank: place(RAW_INDEX, row),
                score: row.scores[BALANCED_INDEX] as f32,
                rank: place(BALANCED_INDEX, row),
                affine: row.affine,
            })
        };
        rows.iter().filter_map(hit).collect()
    }

    /// Places of `rows`, which are sorted best first.
    fn count_ranks(&self, score_index: usize, rows: &[ExactScores]) -> Vec<usize> {
        let Some(last) = rows.last() else { return Vec::new() };
        // Not above it in f32: a row that is left out cannot stand before the last.
        let threshold = (last.scores[score_index] as f32).next_down();
        let scores: Vec<f64> = rows.iter().map(|row| row.scores[score_index]).collect();
        // above[i]: rows that stand before rows[i..], and not before rows[..i].
        let counted = |(task, piece): (&ScanTask, &TaskResult)| {
            let mut above = vec![0usize; rows.len() + 1];
            self.for_each_candidate(*task, piece, &[(score_index, threshold)], |row| {
                let (low, high) =
                    (f64::from(row.lower[score_index]), f64::from(row.upper[score_index]));
                let certain = scores.partition_point(|score| *score >= low);
                let possible = scores.partition_point(|score| *score > high);
                let first = if certain == possible {
                    certain
                } else {
                    let exact = self.exact_scores(row.location).scores[score_index];
                    let before = |r: &ExactScores| {
                        self.compare(score_index, (exact, row.location), r).is_lt()
                    };
                    possible + rows[possible..certain].partition_point(|r| !before(r))
                };
                above[first] += 1;
            });
            above
        };
        let add = |mut a: Vec<usize>, b: Vec<usize>| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
            a
        };
        let none = || vec![0; rows.len() + 1];
        let above = self
            .tasks
            .par_iter()
            .zip(&self.scan_result.task_results)
            .map(counted)
            .reduce(none, add);
        let sums = above.iter().scan(0, |sum, more| {
            *sum += more;
            Some(*sum + 1)
        });
        sums.take(rows.len()).collect()
    }

    /// The rows of a task that may be found and whose upper bound of one of the scores `by` reaches
    /// what is asked of it, with the bounds of these scores.
    fn for_each_candidate(
        &self,
        task: ScanTask,
        piece: &TaskResult,
        thresholds: &[(usize, f32)],
        mut visit: impl FnMut(BoundedRow),
    ) {
        let chunk = &self.request.snapshot.chunks[task.chunk_index];
        let column = chunk.statistics.get(&self.request.statistics_key);
        let balanced = thresholds.iter().any(|(by, _)| *by == BALANCED_INDEX);
        let (arch, mut bounds) = (Arch::new(), GroupBounds::default());
        let mut factors = [[1f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]];
        let reaches_threshold =
            |high: &[f32; 2]| thresholds.iter().any(|(by, least)| high[*by] >= *least);
        for (g, _) in
            piece.upper_bounds.iter().enumerate().filter(|(_, high)| reaches_threshold(high))
        {
            let from = (task.first_group + g) * ROWS_PER_GROUP;
            let raw = &piece.raw_scores[g * ROWS_PER_GROUP..];
            let raw = &raw[..raw.len().min(ROWS_PER_GROUP)];
            if balanced {
                self.request
                    .fill_affine_factors(column.map(|all| &all[from..][..raw.len()]), &mut factors);
            }
            let mut bitmap_word = 0;
            for (by, least) in thresholds {
                bitmap_word |= arch.dispatch(UpperBoundFilter {
                    bounds: &mut bounds,
                    score_index: *by,
                    threshold: *least,
                    raw_scores: raw,
                    error_norms: &chunk.data.quantised.error_norms[from..][..raw.len()],
                    affine_factors: (*by == BALANCED_INDEX).then_some(&factors),
                    query: self.quantised_queries[task.chunk_index],
                });
            }
            bitmap_word &= task.bitmap_word(self.request, chunk, g);
            while bitmap_word != 0 {
                let i = bitmap_word.trailing_zeros() as usize;
                bitmap_word &= bitmap_word - 1;
                visit(BoundedRow {
                    location: RowLocation { chunk: task.chunk_index, row: from + i },
                    lower: [bounds.lower[0][i], bounds.lower[1][i]],
                    upper: [bounds.upper[0][i], bounds.upper[1][i]],
                });
            }
        }
    }

    fn exact_scores(&self, place: RowLocation) -> ExactScores {
        let chunk = &self.request.snapshot.chunks[place.chunk];
        let (query, row) = (&self.request.embedding, chunk.data.stored_vector(place.row));
        let raw = Arch::new().dispatch(ExactDotProduct { query, row });
        let column = chunk.statistics.get(&self.request.statistics_key);
        let affine =
            self.request.affine_transform(column.map_or(&NO_STATISTICS, |all| &all[place.row]));
        let score = f64::from(affine.alpha) * raw + f64::from(affine.beta);
        ExactScores { location: place, scores: [score, raw], affine }
    }
}

/// Bounds of the scores of a group's rows, balanced and raw.
struct GroupBounds {
    lower: [[f32; ROWS_PER_GROUP]; 2],
    upper: [[f32; ROWS_PER_GROUP]; 2],
}

impl Default for GroupBounds {
    fn default() -> Self {
        let none = [[f32::NEG_INFINITY; ROWS_PER_GROUP]; 2];
        Self { lower: none, upper: none }
    }
}

/// Finds bounds of one score of a group's rows, and the rows, a bit each, whose upper bound is at least
/// `least`.
struct UpperBoundFilter<'a> {
    bounds: &'a mut GroupBounds,
    score_index: usize,
    threshold: f32,
    raw_scores: &'a [f32],
    error_norms: &'a [f32],
    /// α and β of each row; of the raw score none are needed.
    affine_factors: Option<&'a [[f32; ROWS_PER_GROUP]; 2]>,
    query: QuantisedQuery,
}

impl WithSimd for UpperBoundFilter<'_> {
    type Output = u64;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> u64 {
        let n = self.raw_scores.len().min(ROWS_PER_GROUP);
        let (raw, error) = (&self.raw_scores[..n], &self.error_norms[..n]);
        // Arrays of its own: what cannot overlap is computed in vectors.
        let (mut low, mut high) = ([0f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]);
        match self.affine_factors {
            None => {
                for i in 0..n {
                    let error_bound = self.query.error_bound(error[i]);
                    low[i] = raw[i] - error_bound;
                    high[i] = raw[i] + error_bound;
                }
            }
            Some([alpha, beta]) => {
                for i in 0..n {
                    let error_bound = self.query.error_bound(error[i]);
                    let (score, width) = with_error(alpha[i], beta[i], raw[i], error_bound);
                    low[i] = score - width;
                    high[i] = score + width;
                }
            }
        }
        (self.bounds.lower[self.score_index], self.bounds.upper[self.score_index]) = (low, high);
        (0..n).fold(0, |word, i| word | u64::from(high[i] >= self.threshold) << i)
    }
}

/// A row and the bounds of its scores, balanced and raw; of those that were asked for.
struct BoundedRow {
    location: RowLocation,
    lower: [f32; 2],
    upper: [f32; 2],
}
