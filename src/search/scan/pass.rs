//! One pass over the codes of a snapshot for several queries at once.

use std::sync::atomic::{AtomicU32, Ordering};

use pulp::Arch;
use rayon::prelude::*;

use super::bounds::{BoundsKernel, ScoreBounds, ScoreSums};
use super::request::ScanRequest;
use super::task::ScanTask;
use super::top_scores::{TopScores, load_bound, to_ordered_bits};
use crate::balance::calibration::ScoreDistribution;
use crate::search::snapshot::{
    Chunk, QuantisedQuery, ROWS_PER_GROUP, Snapshot, compute_dot_products,
};

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
        compute_dot_products(
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
