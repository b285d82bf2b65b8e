//! Exact scores and ranks from the bounds of a pass.
//!
//! A row with an upper bound below the k-th lower bound cannot be among the best k; all others are
//! scored in f64 from the stored embeddings. The rank of a row is one more than the number of rows
//! above it: most of these are counted by their bounds, and only rows whose bounds enclose the score
//! of the ranked row are scored exactly. Rows with equal scores are ordered by id.

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

/// Index of balanced scores in arrays of two.
const BALANCED_INDEX: usize = 0;
/// Index of raw scores in arrays of two.
const RAW_INDEX: usize = 1;

/// A row with its exact scores.
#[derive(Debug, Clone, Copy)]
struct ExactlyScoredRow {
    location: RowLocation,
    /// Balanced score, raw score.
    scores: [f64; 2],
    affine: AffineTransform,
}

/// Derives the exact results of one query from the result of its pass.
pub struct ExactRanker<'a> {
    request: &'a ScanRequest,
    tasks: &'a [ScanTask],
    scan_result: &'a ScanResult,
    /// The query as quantised for each chunk, from which the bounds of single rows are recomputed.
    quantised_queries: Vec<QuantisedQuery>,
}

impl<'a> ExactRanker<'a> {
    /// Creates a ranker for `request`, whose pass over `tasks` gave `scan_result`.
    pub fn new(
        request: &'a ScanRequest,
        tasks: &'a [ScanTask],
        scan_result: &'a ScanResult,
    ) -> Self {
        let mut integers = Vec::new();
        let mut quantised_queries = Vec::with_capacity(request.snapshot.chunks.len());
        for chunk in &request.snapshot.chunks {
            integers.clear();
            let quantised = &chunk.data.quantised;
            quantised_queries.push(quantised.quantise_query(&request.embedding, &mut integers));
        }
        Self { request, tasks, scan_result, quantised_queries }
    }

    /// Returns the best hits after the first `offset`, up to the depth of the request.
    pub fn top_k(&self, offset: usize) -> TopK {
        let candidates = self.candidates();
        let lists =
            [BALANCED_INDEX, RAW_INDEX].map(|index| self.sort_candidates(&candidates, index));
        let page = |list: &[ExactlyScoredRow]| list.get(offset..).unwrap_or_default().to_vec();
        let [hits, raw_hits] = lists.each_ref().map(|list| page(list));
        let known_ranks: [HashMap<RowLocation, usize>; 2] = lists
            .map(|list| list.iter().enumerate().map(|(i, row)| (row.location, i + 1)).collect());
        TopK {
            hits: self.assign_ranks(&hits, &known_ranks),
            raw_hits: self.assign_ranks(&raw_hits, &known_ranks),
            matched_image_count: self.scan_result.matched_row_count,
            score_distribution: self.scan_result.score_distribution,
        }
    }

    /// Returns one image with its ranks.
    pub fn ranked_hit(&self, location: RowLocation) -> Option<Hit> {
        let row = [self.exact_scores(location)];
        self.assign_ranks(&row, &Default::default()).pop()
    }

    /// Returns every row that can be among the best by the balanced or by the raw score.
    fn candidates(&self) -> Vec<ExactlyScoredRow> {
        let thresholds = [BALANCED_INDEX, RAW_INDEX]
            .map(|score_index| (score_index, self.scan_result.kth_bounds[score_index]));
        let score_candidates = |(task, result): (&ScanTask, &TaskResult)| {
            let mut candidates = Vec::new();
            self.for_each_candidate(*task, result, &thresholds, |row| {
                candidates.push(self.exact_scores(row.location));
            });
            candidates
        };
        let results = self.tasks.par_iter().zip(&self.scan_result.task_results);
        results.flat_map_iter(score_candidates).collect()
    }

    /// Returns the best candidates by one of the scores, at most as many as the depth of the request.
    fn sort_candidates(
        &self,
        candidates: &[ExactlyScoredRow],
        score_index: usize,
    ) -> Vec<ExactlyScoredRow> {
        let mut list = candidates.to_vec();
        let order = |a: &ExactlyScoredRow, b: &ExactlyScoredRow| {
            self.rank_order(score_index, (a.scores[score_index], a.location), b)
        };
        let depth = self.request.depth;
        if list.len() > depth {
            list.select_nth_unstable_by(depth - 1, order);
            list.truncate(depth);
        }
        list.sort_unstable_by(order);
        list
    }

    /// Orders a row with this exact score relative to `other`; `Less` if it ranks higher.
    fn rank_order(
        &self,
        score_index: usize,
        (score, location): (f64, RowLocation),
        other: &ExactlyScoredRow,
    ) -> Ordering {
        let id =
            |at: RowLocation| self.request.snapshot.chunks[at.chunk_index].data.id(at.row_index);
        let by_score = other.scores[score_index].total_cmp(&score);
        by_score.then_with(|| id(location).cmp(id(other.location)))
    }

    /// Returns `rows` as hits with both ranks, taken from `known_ranks` or counted.
    fn assign_ranks(
        &self,
        rows: &[ExactlyScoredRow],
        known_ranks: &[HashMap<RowLocation, usize>; 2],
    ) -> Vec<Hit> {
        let counted_ranks = [BALANCED_INDEX, RAW_INDEX].map(|index| {
            let mut unknown: Vec<ExactlyScoredRow> = rows
                .iter()
                .filter(|r| !known_ranks[index].contains_key(&r.location))
                .copied()
                .collect();
            unknown
                .sort_unstable_by(|a, b| self.rank_order(index, (a.scores[index], a.location), b));
            let counted = self.count_ranks(index, &unknown);
            unknown.iter().map(|r| r.location).zip(counted).collect::<HashMap<_, _>>()
        });
        let rank = |index: usize, row: &ExactlyScoredRow| {
            known_ranks[index]
                .get(&row.location)
                .or_else(|| counted_ranks[index].get(&row.location))
                .copied()
                .unwrap_or(0)
        };
        let hit = |row: &ExactlyScoredRow| {
            let chunk = &self.request.snapshot.chunks[row.location.chunk_index];
            Some(Hit {
                image_metadata: Arc::new(chunk.data.metadata(row.location.row_index)?),
                raw_score: row.scores[RAW_INDEX] as f32,
                raw_rank: rank(RAW_INDEX, row),
                score: row.scores[BALANCED_INDEX] as f32,
                rank: rank(BALANCED_INDEX, row),
                affine: row.affine,
            })
        };
        rows.iter().filter_map(hit).collect()
    }

    /// Returns the ranks of `rows`, which must be sorted best first.
    fn count_ranks(&self, score_index: usize, rows: &[ExactlyScoredRow]) -> Vec<usize> {
        let Some(last) = rows.last() else { return Vec::new() };
        // Rounded down in f32, so that a row whose upper bound is lower cannot rank above the last of `rows`.
        let threshold = (last.scores[score_index] as f32).next_down();
        let scores: Vec<f64> = rows.iter().map(|row| row.scores[score_index]).collect();
        // above[i] counts the rows that rank above rows[i..] but not above any of rows[..i].
        let count_in_task = |(task, result): (&ScanTask, &TaskResult)| {
            let mut above = vec![0usize; rows.len() + 1];
            self.for_each_candidate(*task, result, &[(score_index, threshold)], |row| {
                let (lower, upper) =
                    (f64::from(row.lower[score_index]), f64::from(row.upper[score_index]));
                // The row certainly ranks above rows[certain..], and possibly above rows[possible..].
                let certain = scores.partition_point(|score| *score >= lower);
                let possible = scores.partition_point(|score| *score > upper);
                let first_below = if certain == possible {
                    certain
                } else {
                    let exact = self.exact_scores(row.location).scores[score_index];
                    let ranks_above = |r: &ExactlyScoredRow| {
                        self.rank_order(score_index, (exact, row.location), r).is_lt()
                    };
                    possible + rows[possible..certain].partition_point(|r| !ranks_above(r))
                };
                above[first_below] += 1;
            });
            above
        };
        let add = |mut a: Vec<usize>, b: Vec<usize>| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
            a
        };
        let zeros = || vec![0; rows.len() + 1];
        let above = self
            .tasks
            .par_iter()
            .zip(&self.scan_result.task_results)
            .map(count_in_task)
            .reduce(zeros, add);
        let ranks = above.iter().scan(0, |rows_above, count| {
            *rows_above += count;
            Some(*rows_above + 1)
        });
        ranks.take(rows.len()).collect()
    }

    /// Visits the rows of a task that may be hits and whose upper bound is at least the threshold of one
    /// of the scores. `thresholds` are pairs of score index and threshold; only these scores have
    /// bounds in the visited rows.
    fn for_each_candidate(
        &self,
        task: ScanTask,
        result: &TaskResult,
        thresholds: &[(usize, f32)],
        mut visit: impl FnMut(BoundedRow),
    ) {
        let chunk = &self.request.snapshot.chunks[task.chunk_index];
        let column = chunk.statistics.get(&self.request.statistics_key);
        let balanced = thresholds.iter().any(|(index, _)| *index == BALANCED_INDEX);
        let (arch, mut bounds) = (Arch::new(), GroupBounds::default());
        let mut factors = [[1f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]];
        let has_candidates = |upper: &[f32; 2]| {
            thresholds.iter().any(|(index, threshold)| upper[*index] >= *threshold)
        };
        let groups = result.upper_bounds.iter().enumerate();
        for (g, _) in groups.filter(|(_, upper)| has_candidates(upper)) {
            let from = (task.first_group + g) * ROWS_PER_GROUP;
            let raw_scores = &result.raw_scores[g * ROWS_PER_GROUP..];
            let raw_scores = &raw_scores[..raw_scores.len().min(ROWS_PER_GROUP)];
            let n = raw_scores.len();
            if balanced {
                let statistics = column.map(|column| &column[from..][..n]);
                self.request.fill_affine_factors(statistics, &mut factors);
            }
            let mut bitmap_word = 0;
            for (score_index, threshold) in thresholds {
                bitmap_word |= arch.dispatch(UpperBoundFilter {
                    bounds: &mut bounds,
                    score_index: *score_index,
                    threshold: *threshold,
                    raw_scores,
                    error_norms: &chunk.data.quantised.error_norms[from..][..n],
                    affine_factors: (*score_index == BALANCED_INDEX).then_some(&factors),
                    query: self.quantised_queries[task.chunk_index],
                });
            }
            bitmap_word &= task.bitmap_word(self.request, chunk, g);
            while bitmap_word != 0 {
                let i = bitmap_word.trailing_zeros() as usize;
                bitmap_word &= bitmap_word - 1;
                visit(BoundedRow {
                    location: RowLocation { chunk_index: task.chunk_index, row_index: from + i },
                    lower: [bounds.lower[0][i], bounds.lower[1][i]],
                    upper: [bounds.upper[0][i], bounds.upper[1][i]],
                });
            }
        }
    }

    /// Computes the exact scores of a row.
    fn exact_scores(&self, location: RowLocation) -> ExactlyScoredRow {
        let chunk = &self.request.snapshot.chunks[location.chunk_index];
        let (query, row) = (&self.request.embedding, chunk.data.stored_vector(location.row_index));
        let raw = Arch::new().dispatch(ExactDotProduct { query, row });
        let column = chunk.statistics.get(&self.request.statistics_key);
        let statistics = column.map_or(&NO_STATISTICS, |column| &column[location.row_index]);
        let affine = self.request.affine_transform(statistics);
        let score = f64::from(affine.alpha) * raw + f64::from(affine.beta);
        ExactlyScoredRow { location, scores: [score, raw], affine }
    }
}

/// Bounds of the scores of the rows of a group: balanced, raw.
struct GroupBounds {
    lower: [[f32; ROWS_PER_GROUP]; 2],
    upper: [[f32; ROWS_PER_GROUP]; 2],
}

impl Default for GroupBounds {
    fn default() -> Self {
        let no_rows = [[f32::NEG_INFINITY; ROWS_PER_GROUP]; 2];
        Self { lower: no_rows, upper: no_rows }
    }
}

/// Computes the bounds of one score of the rows of a group. Returns the rows, one bit per row, whose
/// upper bound is at least `threshold`.
struct UpperBoundFilter<'a> {
    bounds: &'a mut GroupBounds,
    score_index: usize,
    threshold: f32,
    raw_scores: &'a [f32],
    error_norms: &'a [f32],
    /// α and β of each row; `None` for the raw score.
    affine_factors: Option<&'a [[f32; ROWS_PER_GROUP]; 2]>,
    query: QuantisedQuery,
}

impl WithSimd for UpperBoundFilter<'_> {
    type Output = u64;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> u64 {
        let n = self.raw_scores.len().min(ROWS_PER_GROUP);
        let (raw, error_norms) = (&self.raw_scores[..n], &self.error_norms[..n]);
        // Local arrays cannot overlap with the inputs, so that the compiler vectorises the loops.
        let (mut lower, mut upper) = ([0f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]);
        match self.affine_factors {
            None => {
                for i in 0..n {
                    let error_bound = self.query.error_bound(error_norms[i]);
                    lower[i] = raw[i] - error_bound;
                    upper[i] = raw[i] + error_bound;
                }
            }
            Some([alpha, beta]) => {
                for i in 0..n {
                    let error_bound = self.query.error_bound(error_norms[i]);
                    let (score, score_error) = with_error(alpha[i], beta[i], raw[i], error_bound);
                    lower[i] = score - score_error;
                    upper[i] = score + score_error;
                }
            }
        }
        self.bounds.lower[self.score_index] = lower;
        self.bounds.upper[self.score_index] = upper;
        (0..n).fold(0, |word, i| word | u64::from(upper[i] >= self.threshold) << i)
    }
}

/// A row and the bounds of its balanced and raw scores. Bounds that were not requested are meaningless.
struct BoundedRow {
    location: RowLocation,
    lower: [f32; 2],
    upper: [f32; 2],
}
