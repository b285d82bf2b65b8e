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

/// Result of one task for one query.
#[derive(Debug)]
pub struct TaskResult {
    /// Approximate raw score of each row of the task.
    pub raw_scores: Vec<f32>,
    /// Largest upper bound of each group: of the balanced scores, and of the raw scores.
    pub upper_bounds: Vec<[f32; 2]>,
    /// Largest lower bounds of the balanced and of the raw scores, at most `depth` of each. Values below
    /// the k-th bound of another task are left out.
    largest_lower_bounds: [Vec<f32>; 2],
    /// Number of rows that may be hits.
    matched_row_count: usize,
    background_sums: ScoreSums,
}

/// Result of a pass for one query.
#[derive(Debug)]
pub struct ScanResult {
    /// One result per task, in the order of the tasks.
    pub task_results: Vec<TaskResult>,
    /// Lower bounds of the k-th best balanced and of the k-th best raw score.
    pub kth_bounds: [f32; 2],
    /// Number of rows that may be hits.
    pub matched_row_count: usize,
    /// Mean and standard deviation of the balanced scores of all live rows; with a filter, of a sample
    /// of them.
    pub score_distribution: ScoreDistribution,
}

/// Scans `snapshot` once for all `requests`, which must be for this snapshot, in parallel on the current
/// thread pool. Returns one result per request.
pub fn scan_snapshot(
    snapshot: &Snapshot,
    tasks: &[ScanTask],
    requests: &[&ScanRequest],
) -> Vec<ScanResult> {
    // Per chunk: each query, quantised with the units of the chunk, and the integers of all of them.
    let quantised: Vec<(Vec<QuantisedQuery>, Vec<i16>)> = snapshot
        .chunks
        .par_iter()
        .map(|chunk| {
            let mut integers =
                Vec::with_capacity(requests.len() * chunk.data.quantised.padded_dimension());
            let quantise = |request: &&ScanRequest| {
                chunk.data.quantised.quantise_query(&request.embedding, &mut integers)
            };
            (requests.iter().map(quantise).collect(), integers)
        })
        .collect();
    let kth_bounds: Vec<[AtomicU32; 2]> = requests.iter().map(|_| Default::default()).collect();
    let results_by_task: Vec<Vec<TaskResult>> = tasks
        .par_iter()
        .map(|task| {
            let (quantised_queries, integers) = &quantised[task.chunk_index];
            scan_task(
                &snapshot.chunks[task.chunk_index],
                *task,
                requests,
                quantised_queries,
                integers,
                &kth_bounds,
            )
        })
        .collect();
    let mut results_by_query: Vec<Vec<TaskResult>> =
        requests.iter().map(|_| Vec::with_capacity(tasks.len())).collect();
    for results in results_by_task {
        for (task_results, result) in results_by_query.iter_mut().zip(results) {
            task_results.push(result);
        }
    }
    results_by_query
        .into_iter()
        .zip(requests)
        .map(|(task_results, request)| merge_task_results(task_results, request.depth))
        .collect()
}

/// Merges the results of all tasks for one query.
fn merge_task_results(mut task_results: Vec<TaskResult>, depth: usize) -> ScanResult {
    let kth_bounds = [0, 1].map(|score_index: usize| {
        let mut top = TopScores::new(depth, f32::NEG_INFINITY);
        for result in &mut task_results {
            for lower_bound in std::mem::take(&mut result.largest_lower_bounds[score_index]) {
                top.push(lower_bound);
            }
        }
        top.kth_bound()
    });
    let matched = task_results.iter().map(|result| result.matched_row_count).sum();
    let total = |part: fn(&ScoreSums) -> f64| {
        task_results.iter().map(|result| part(&result.background_sums)).sum::<f64>()
    };
    let n = total(|sums| sums.count as f64).max(1.0);
    let mean = total(|sums| sums.sum) / n;
    let variance = total(|sums| sums.sum_of_squares) / n - mean * mean;
    let score_distribution =
        ScoreDistribution { mean: mean as f32, std: variance.max(0.0).sqrt() as f32 };
    ScanResult { task_results, kth_bounds, matched_row_count: matched, score_distribution }
}

/// Scans the rows of one task for all requests. `kth_bounds` are shared by all tasks of a request and
/// are only ever raised.
fn scan_task(
    chunk: &Chunk,
    task: ScanTask,
    requests: &[&ScanRequest],
    quantised_queries: &[QuantisedQuery],
    integers: &[i16],
    kth_bounds: &[[AtomicU32; 2]],
) -> Vec<TaskResult> {
    let codes = &chunk.data.quantised;
    let rows = chunk.data.row_count.min(task.end_group * ROWS_PER_GROUP)
        - task.first_group * ROWS_PER_GROUP;
    let groups = task.end_group - task.first_group;
    let mut task_results: Vec<TaskResult> = requests
        .iter()
        .map(|_| TaskResult {
            raw_scores: vec![0.0; rows],
            upper_bounds: vec![[f32::NEG_INFINITY; 2]; groups],
            largest_lower_bounds: Default::default(),
            matched_row_count: 0,
            background_sums: ScoreSums::default(),
        })
        .collect();
    let mut tops: Vec<[TopScores; 2]> = requests
        .iter()
        .zip(kth_bounds)
        .map(|(request, bounds)| {
            bounds.each_ref().map(|bound| TopScores::new(request.depth, load_bound(bound)))
        })
        .collect();
    // Queries with the same balance share α and β of a group.
    let first_with_same_balance: Vec<usize> = requests
        .iter()
        .map(|a| requests.iter().position(|b| a.has_same_balance(b)).unwrap_or(0))
        .collect();
    let columns: Vec<_> =
        requests.iter().map(|request| chunk.statistics.get(&request.statistics_key)).collect();
    let mut factors = vec![[[1f32; ROWS_PER_GROUP], [0f32; ROWS_PER_GROUP]]; requests.len()];
    let mut sums = vec![0i32; ROWS_PER_GROUP * requests.len()];
    let mut bounds = ScoreBounds::default();
    let arch = Arch::new();
    for g in 0..groups {
        let from = (task.first_group + g) * ROWS_PER_GROUP;
        let to = (from + ROWS_PER_GROUP).min(chunk.data.row_count);
        let n = to - from;
        let words = requests.iter().map(|request| {
            (task.bitmap_word(request, chunk, g), task.background_word(request, chunk, g))
        });
        if words.clone().all(|(word, background)| word | background == 0) {
            continue;
        }
        compute_dot_products(
            codes.codes_of_rows(from, to),
            integers,
            codes.padded_dimension(),
            &mut sums[..n * requests.len()],
        );
        for (q, request) in
            requests.iter().enumerate().filter(|(q, _)| first_with_same_balance[*q] == *q)
        {
            request
                .fill_affine_factors(columns[q].map(|column| &column[from..to]), &mut factors[q]);
        }
        for (q, (word, background)) in words.enumerate() {
            if word | background == 0 {
                continue;
            }
            let [alpha, beta] = &factors[first_with_same_balance[q]];
            let background_sums = arch.dispatch(BoundsKernel {
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
            let result = &mut task_results[q];
            result.background_sums.add(background_sums);
            result.raw_scores[from - task.first_group * ROWS_PER_GROUP..][..n]
                .copy_from_slice(&bounds.raw_scores[..n]);
            result.upper_bounds[g] = bounds.max_upper;
            for ((top, lower), max) in tops[q].iter_mut().zip(&bounds.lower).zip(bounds.max_lower) {
                top.push_all(&lower[..n], max);
            }
            result.matched_row_count += word.count_ones() as usize;
        }
    }
    for (((result, tops), kth_bounds), request) in
        task_results.iter_mut().zip(tops).zip(kth_bounds).zip(requests)
    {
        result.largest_lower_bounds = tops.map(|top| top.values);
        for (lower, kth_bound) in result.largest_lower_bounds.iter_mut().zip(kth_bounds) {
            if lower.len() >= request.depth {
                let order = |a: &f32, b: &f32| b.total_cmp(a);
                let (_, kth, _) = lower.select_nth_unstable_by(request.depth - 1, order);
                kth_bound.fetch_max(to_ordered_bits(*kth), Ordering::Relaxed);
                lower.truncate(request.depth);
            }
        }
    }
    task_results
}
