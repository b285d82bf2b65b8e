//! One pass over the codes of a snapshot for several queries at once.
//!
//! The pass gives each row's approximate raw score, for each group of rows the highest that its exact
//! scores can be, and a lower bound of the k-th best score. What follows from them is exact and is
//! found in [`super::rank`].

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

pub(crate) mod batch_scanner;
pub(crate) mod no_match;
pub(crate) mod rank;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pulp::{Arch, WithSimd};
use rayon::prelude::*;

use super::snapshot::Snapshot;
use super::snapshot::chunk::{Chunk, ROWS_PER_GROUP};
use super::snapshot::quantise::{self, QuantisedQuery};
use crate::balance::calibration::ScoreDistribution;
use crate::balance::normalise::{AffineTransform, AffineTransforms, BalanceParameters};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};

/// Groups of a task: 4,096 rows, two megabytes of codes at 512 dimensions, so that threads share
/// the work evenly and a task's overhead does not show.
const GROUPS_PER_TASK: usize = 64;
/// With a filter, the background is taken from the live rows of every so many-th group: its own hits
/// would say little of what unrelated images get.
pub const BACKGROUND_GROUP_STRIDE: usize = 8;
/// Values that are folded at one time: the widest vector there is.
const SIMD_LANES: usize = 16;
/// Bounds arithmetic of scores in f32, relative to the terms.
const ROUNDING_SLACK: f32 = 1e-6;

/// A query, ready to be scanned for.
#[derive(Debug, Clone)]
pub struct ScanRequest {
    /// What is searched.
    pub snapshot: Arc<Snapshot>,
    /// The query's embedding.
    pub embedding: Arc<Vec<f32>>,
    /// Which statistics.
    pub statistics_key: StatisticsKey,
    /// How they balance.
    pub balance: BalanceParameters,
    /// L of the statistics.
    pub logit_scale: f32,
    /// Rows that may be found, a bit each, a word a group over all chunks; none: all live rows.
    pub row_mask: Option<Arc<[u64]>>,
    /// How many of the best are wanted, those of earlier pages counted.
    pub depth: usize,
}

impl ScanRequest {
    /// α and β of a row with these statistics.
    pub fn affine_transform(&self, statistics: &ScoreStatistics) -> AffineTransform {
        if statistics.n == 0 {
            return AffineTransform { alpha: 1.0, beta: 0.0 };
        }
        self.balance.affine_transform(statistics, self.logit_scale)
    }

    /// α and β of a group's rows with these statistics; where there are none, they stay 1 and 0.
    pub fn fill_affine_factors(
        &self,
        statistics: Option<&[ScoreStatistics]>,
        out: &mut [[f32; ROWS_PER_GROUP]; 2],
    ) {
        let Some(statistics) = statistics else { return };
        let [alpha, beta] = out;
        Arch::new().dispatch(AffineTransforms {
            balance: self.balance,
            statistics,
            logit_scale: self.logit_scale,
            alpha_beta: [alpha, beta],
        });
    }

    fn has_same_balance(&self, other: &Self) -> bool {
        self.statistics_key == other.statistics_key && self.balance == other.balance
    }
}

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
    fn background_word(&self, request: &ScanRequest, chunk: &Chunk, g: usize) -> u64 {
        let counts = request.row_mask.is_none()
            || (self.global_first_group + g).is_multiple_of(BACKGROUND_GROUP_STRIDE);
        if counts { chunk.live_bitmap[self.first_group + g] } else { 0 }
    }
}

/// What the pass found in one task for one query.
#[derive(Debug)]
pub struct TaskResult {
    /// Approximate raw score of each row.
    pub raw_scores: Vec<f32>,
    /// Of each group, the most that a balanced and a raw score can be.
    pub upper_bounds: Vec<[f32; 2]>,
    /// Balanced and raw lower bounds, the best of them at least.
    lower_bounds: [Vec<f32>; 2],
    matched: usize,
    background_sums: ScoreSums,
}

/// Of balanced scores.
#[derive(Debug, Clone, Copy, Default)]
struct ScoreSums {
    count: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl ScoreSums {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_of_squares += other.sum_of_squares;
    }
}

/// What the pass found for one query.
#[derive(Debug)]
pub struct ScanResult {
    /// A piece a task.
    pub task_results: Vec<TaskResult>,
    /// The k-th best balanced and raw score are at least this.
    pub kth_bounds: [f32; 2],
    /// Rows that may be found.
    pub matched: usize,
    /// Moments of the balanced scores of the live rows; with a filter, of a part of them.
    pub score_distribution: ScoreDistribution,
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

/// Scans `snapshot` once for all `asks`, which must be of this snapshot. Runs on the current
/// thread pool.
pub fn scan_snapshot(
    snapshot: &Snapshot,
    tasks: &[ScanTask],
    requests: &[&ScanRequest],
) -> Vec<ScanResult> {
    let prepared: Vec<(Vec<QuantisedQuery>, Vec<i16>)> = snapshot
        .chunks
        .par_iter()
        .map(|chunk| {
            let mut integers =
                Vec::with_capacity(requests.len() * chunk.data.quantised.padded_dimension());
            let of = |ask: &&ScanRequest| {
                chunk.data.quantised.quantise_query(&ask.embedding, &mut integers)
            };
            (requests.iter().map(of).collect(), integers)
        })
        .collect();
    let kth_bounds: Vec<[AtomicU32; 2]> = requests.iter().map(|_| Default::default()).collect();
    let found: Vec<Vec<TaskResult>> = tasks
        .par_iter()
        .map(|task| {
            let (prepared, integers) = &prepared[task.chunk_index];
            scan_task(
                &snapshot.chunks[task.chunk_index],
                *task,
                requests,
                prepared,
                integers,
                &kth_bounds,
            )
        })
        .collect();
    let mut by_query: Vec<Vec<TaskResult>> =
        requests.iter().map(|_| Vec::with_capacity(tasks.len())).collect();
    for pieces in found {
        for (query, piece) in by_query.iter_mut().zip(pieces) {
            query.push(piece);
        }
    }
    by_query
        .into_iter()
        .zip(requests)
        .map(|(pieces, ask)| merge_task_results(pieces, ask.depth))
        .collect()
}

fn merge_task_results(mut task_results: Vec<TaskResult>, depth: usize) -> ScanResult {
    let kth_bounds = [0, 1].map(|which| {
        let mut top = TopScores::new(depth, f32::NEG_INFINITY);
        for piece in &mut task_results {
            for low in std::mem::take(&mut piece.lower_bounds[which]) {
                top.push(low);
            }
        }
        top.kth_bound()
    });
    let matched = task_results.iter().map(|p| p.matched).sum();
    let of = |part: fn(&ScoreSums) -> f64| {
        task_results.iter().map(|p| part(&p.background_sums)).sum::<f64>()
    };
    let n = of(|m| m.count as f64).max(1.0);
    let mean = of(|m| m.sum) / n;
    let variance = of(|m| m.sum_of_squares) / n - mean * mean;
    let background = ScoreDistribution { mean: mean as f32, std: variance.max(0.0).sqrt() as f32 };
    ScanResult { task_results, kth_bounds, matched, score_distribution: background }
}

fn scan_task(
    chunk: &Chunk,
    task: ScanTask,
    requests: &[&ScanRequest],
    quantised_queries: &[QuantisedQuery],
    integers: &[i16],
    kth_bounds: &[[AtomicU32; 2]],
) -> Vec<TaskResult> {
    let codes = &chunk.data.quantised;
    let rows =
        chunk.data.len.min(task.end_group * ROWS_PER_GROUP) - task.first_group * ROWS_PER_GROUP;
    let groups = task.end_group - task.first_group;
    let mut task_results: Vec<TaskResult> = requests
        .iter()
        .map(|_| TaskResult {
            raw_scores: vec![0.0; rows],
            upper_bounds: vec![[f32::NEG_INFINITY; 2]; groups],
            lower_bounds: Default::default(),
            matched: 0,
            background_sums: ScoreSums::default(),
        })
        .collect();
    let mut tops: Vec<[TopScores; 2]> = requests
        .iter()
        .zip(kth_bounds)
        .map(|(ask, least)| least.each_ref().map(|l| TopScores::new(ask.depth, load_bound(l))))
        .collect();
    // Queries of one configuration share the factors of a group.
    let first_with_same_balance: Vec<usize> = requests
        .iter()
        .map(|a| requests.iter().position(|b| a.has_same_balance(b)).unwrap_or(0))
        .collect();
    let columns: Vec<_> =
        requests.iter().map(|ask| chunk.statistics.get(&ask.statistics_key)).collect();
    let mut factors = vec![[[1f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]]; requests.len()];
    let mut sums = vec![0i32; ROWS_PER_GROUP * requests.len()];
    let mut bounds = ScoreBounds::default();
    let arch = Arch::new();
    for g in 0..groups {
        let from = (task.first_group + g) * ROWS_PER_GROUP;
        let to = (from + ROWS_PER_GROUP).min(chunk.data.len);
        let n = to - from;
        let words = requests
            .iter()
            .map(|ask| (task.bitmap_word(ask, chunk, g), task.background_word(ask, chunk, g)));
        if words.clone().all(|(word, background)| word | background == 0) {
            continue;
        }
        quantise::compute_dot_products(
            codes.codes_of_rows(from, to),
            integers,
            codes.padded_dimension(),
            &mut sums[..n * requests.len()],
        );
        for (q, ask) in
            requests.iter().enumerate().filter(|(q, _)| first_with_same_balance[*q] == *q)
        {
            ask.fill_affine_factors(columns[q].map(|all| &all[from..to]), &mut factors[q]);
        }
        for (q, (word, background)) in words.enumerate() {
            if word | background == 0 {
                continue;
            }
            let [alpha, beta] = &factors[first_with_same_balance[q]];
            let moments = arch.dispatch(BoundsKernel {
                bounds: &mut bounds,
                bitmap_word: word,
                background_word: background,
                query: &quantised_queries[q],
                code_sums: &sums[q * n..(q + 1) * n],
                scales: &codes.scales[from..to],
                error_norms: &codes.error_norms[from..to],
                alpha,
                beta,
            });
            let piece = &mut task_results[q];
            piece.background_sums.add(moments);
            piece.raw_scores[from - task.first_group * ROWS_PER_GROUP..][..n]
                .copy_from_slice(&bounds.raw_scores[..n]);
            piece.upper_bounds[g] = bounds.max_high;
            for ((top, low), most) in tops[q].iter_mut().zip(&bounds.lower).zip(bounds.max_low) {
                top.push_all(&low[..n], most);
            }
            piece.matched += word.count_ones() as usize;
        }
    }
    for (((piece, tops), least), ask) in
        task_results.iter_mut().zip(tops).zip(kth_bounds).zip(requests)
    {
        piece.lower_bounds = tops.map(|top| top.values);
        for (low, least) in piece.lower_bounds.iter_mut().zip(least) {
            if low.len() >= ask.depth {
                let order = |a: &f32, b: &f32| b.total_cmp(a);
                let (_, kth, _) = low.select_nth_unstable_by(ask.depth - 1, order);
                least.fetch_max(to_ordered_bits(*kth), Ordering::Relaxed);
                low.truncate(ask.depth);
            }
        }
    }
    task_results
}

/// Scores of a group and how far they may be off.
struct ScoreBounds {
    raw_scores: [f32; ROWS_PER_GROUP],
    balanced_scores: [f32; ROWS_PER_GROUP],
    /// Balanced, raw.
    lower: [[f32; ROWS_PER_GROUP]; 2],
    upper: [[f32; ROWS_PER_GROUP]; 2],
    max_low: [f32; 2],
    max_high: [f32; 2],
}

impl Default for ScoreBounds {
    fn default() -> Self {
        let zeros = [0.0; ROWS_PER_GROUP];
        let most = [f32::NEG_INFINITY; 2];
        Self {
            raw_scores: zeros,
            balanced_scores: zeros,
            lower: [zeros; 2],
            upper: [zeros; 2],
            max_low: most,
            max_high: most,
        }
    }
}

impl ScoreBounds {
    /// Takes the rows out that may not be found.
    #[inline(always)]
    fn exclude_rows(&mut self, word: u64, n: usize) {
        if word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                for values in self.lower.iter_mut().chain(&mut self.upper) {
                    values[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Moments of the scores of the rows of `word`. Clears those of the others.
    #[inline(always)]
    fn sum_scores(&mut self, word: u64, n: usize) -> ScoreSums {
        if word == 0 {
            return ScoreSums::default();
        }
        if word != full_bitmap_word(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                self.balanced_scores[i] = 0.0;
            }
        }
        let (mut sum, mut squares) = ([0f32; SIMD_LANES], [0f32; SIMD_LANES]);
        let (whole, rest) = self.balanced_scores[..n].as_chunks::<SIMD_LANES>();
        for part in whole {
            for lane in 0..SIMD_LANES {
                sum[lane] += part[lane];
                squares[lane] += part[lane] * part[lane];
            }
        }
        for score in rest {
            sum[0] += score;
            squares[0] += score * score;
        }
        ScoreSums {
            count: word.count_ones() as usize,
            sum: f64::from(sum.iter().sum::<f32>()),
            sum_of_squares: f64::from(squares.iter().sum::<f32>()),
        }
    }
}

/// The word of a group of `n` rows that has them all.
fn full_bitmap_word(n: usize) -> u64 {
    if n == ROWS_PER_GROUP { u64::MAX } else { (1 << n) - 1 }
}

struct BoundsKernel<'a> {
    bounds: &'a mut ScoreBounds,
    query: &'a QuantisedQuery,
    code_sums: &'a [i32],
    scales: &'a [f32],
    error_norms: &'a [f32],
    alpha: &'a [f32; ROWS_PER_GROUP],
    beta: &'a [f32; ROWS_PER_GROUP],
    /// Rows that may be found.
    bitmap_word: u64,
    /// Rows that the background is made of.
    background_word: u64,
}

impl WithSimd for BoundsKernel<'_> {
    type Output = ScoreSums;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> ScoreSums {
        let n = self.code_sums.len().min(ROWS_PER_GROUP);
        let (sums, scale, error) =
            (&self.code_sums[..n], &self.scales[..n], &self.error_norms[..n]);
        let out = self.bounds;
        for i in 0..n {
            let raw = self.query.approximate_score(scale[i], sums[i]);
            let error_bound = self.query.error_bound(error[i]);
            let (score, width) = with_error(self.alpha[i], self.beta[i], raw, error_bound);
            out.raw_scores[i] = raw;
            out.balanced_scores[i] = score;
            out.lower[0][i] = score - width;
            out.upper[0][i] = score + width;
            out.lower[1][i] = raw - error_bound;
            out.upper[1][i] = raw + error_bound;
        }
        let moments = out.sum_scores(self.background_word, n);
        out.exclude_rows(self.bitmap_word, n);
        out.max_low = [max_value(&out.lower[0][..n]), max_value(&out.lower[1][..n])];
        out.max_high = [max_value(&out.upper[0][..n]), max_value(&out.upper[1][..n])];
        moments
    }
}

/// The balanced score of an approximate raw score, and how far it can be off.
#[inline(always)]
pub fn with_error(alpha: f32, beta: f32, raw: f32, error_bound: f32) -> (f32, f32) {
    let scaled = alpha * raw;
    (scaled + beta, alpha.abs() * error_bound + ROUNDING_SLACK * (scaled.abs() + beta.abs()))
}

#[inline(always)]
fn max_value(values: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; SIMD_LANES];
    let (whole, rest) = values.as_chunks::<SIMD_LANES>();
    for part in whole {
        for lane in 0..SIMD_LANES {
            max[lane] = if part[lane] > max[lane] { part[lane] } else { max[lane] };
        }
    }
    max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The largest values seen, at least `depth` of them.
struct TopScores {
    depth: usize,
    /// Smaller values are not among the best.
    threshold: f32,
    values: Vec<f32>,
}

impl TopScores {
    fn new(depth: usize, floor: f32) -> Self {
        Self { depth: depth.max(1), threshold: floor, values: Vec::new() }
    }

    /// Takes what it can use of `values`, the largest of which is `most`.
    fn push_all(&mut self, values: &[f32], max: f32) {
        if max > self.threshold {
            for value in values {
                self.push(*value);
            }
        }
    }

    fn push(&mut self, value: f32) {
        if value > self.threshold {
            self.values.push(value);
            if self.values.len() >= 2 * self.depth {
                self.truncate_to_depth();
            }
        }
    }

    fn truncate_to_depth(&mut self) {
        let order = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, kth, _) = self.values.select_nth_unstable_by(self.depth - 1, order);
        self.threshold = *kth;
        self.values.truncate(self.depth);
    }

    /// The k-th largest value; −∞ where there are fewer.
    fn kth_bound(mut self) -> f32 {
        if self.values.len() < self.depth {
            return f32::NEG_INFINITY;
        }
        self.truncate_to_depth();
        self.threshold
    }
}

/// Orders as f32 does.
fn to_ordered_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

fn load_bound(bound: &AtomicU32) -> f32 {
    match bound.load(Ordering::Relaxed) {
        0 => f32::NEG_INFINITY,
        bits if bits >> 31 == 1 => f32::from_bits(bits & !(1 << 31)),
        bits => f32::from_bits(!bits),
    }
}
