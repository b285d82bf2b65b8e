//! Ranks many queries under every configuration in one pass over the images.
//!
//! Scores are computed in f32 in blocks; the best results and the ranks of relevant images are decided by
//! scores in f64 wherever the error of f32 could change them (`candidates`). All configurations are affine
//! in the raw score, so that one product serves all of them.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::candidates::{CHUNK, Candidates, ExactScorer, Target};
use crate::balance::bank::sample_best_queries;
use crate::balance::fit::{LargestScores, SampledImage, sample_images};
use crate::balance::normalise::ExactTransform;
use crate::balance::products::{
    Element, GROUP_ROWS, PANELS_IN_CACHE, Packed, count_roundings, multiply,
};
use crate::record::arrays::EmbeddingArray;

/// Images whose packed embeddings are in memory at one time, for all cores together: 16 MiB of dimension 512.
const IMAGES_PER_BLOCK: usize = 168 * CHUNK;
/// Most groups of queries per task: their packed embeddings stay in the cache.
const MAX_GROUPS_PER_TASK: usize = 32;
/// Tasks per core, so that cores that finish early take over work of others.
const TASKS_PER_CORE: usize = 4;
/// Relative error of one operation in f32: 2⁻²⁴.
const ROUNDING: f64 = 5.960_464_477_539_063e-8;

/// The best results of one query under one configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ExactRanking {
    /// Image and score, best first.
    pub best: Vec<(u32, f64)>,
    /// Ranks of the relevant images, from 1, ascending.
    pub right_ranks: Vec<usize>,
}

/// What is ranked.
pub(super) struct Scan<'a> {
    pub images: &'a EmbeddingArray,
    /// All queries at unit length.
    pub queries: &'a [Vec<f64>],
    /// Number of the first queries from which the images' corrections are computed.
    pub correcting_queries: usize,
    /// Relevant images of each query.
    pub relevant: &'a [Vec<u32>],
    /// α and β of each image, by configuration; empty for plain CLIP.
    pub transforms: &'a [Vec<ExactTransform>],
    /// Number of results per ranking.
    pub depth: usize,
}

/// Rankings and corrections.
pub(super) struct ScanResult {
    /// By query, then by configuration.
    pub rankings: Vec<Vec<ExactRanking>>,
    /// Correction of each image by the queries; empty without queries.
    pub corrections: Vec<f64>,
    /// Images with their best queries, for the interval of the fit.
    pub sample: Vec<SampledImage>,
}

/// α and β of the images of a block in f32, filled up to whole panels with images that are never found.
struct BlockTransforms {
    alpha: Vec<f32>,
    beta: Vec<f32>,
}

impl Scan<'_> {
    /// Ranks all queries. `progress` is called with how many more images are done.
    pub fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> ScanResult {
        let dimension = self.images.dimension();
        let groups = Packed::groups(self.queries.len(), dimension, |query, out| {
            out.iter_mut().zip(&self.queries[query]).for_each(|(out, v)| *out = *v as f32);
        });
        let groups: Vec<&[f32]> = groups.blocks().collect();
        let max_errors: Vec<f64> =
            self.transforms.iter().map(|transforms| self.max_error(transforms)).collect();
        let mut candidates: Vec<Vec<Candidates>> = (0..self.queries.len())
            .into_par_iter()
            .map(|query| self.new_candidates(query, &max_errors))
            .collect();
        let tasks = rayon::current_num_threads() * TASKS_PER_CORE;
        let groups_per_task = groups.len().div_ceil(tasks).clamp(1, MAX_GROUPS_PER_TASK);
        let mut corrections = Vec::with_capacity(self.images.rows());
        for first_image in (0..self.images.rows()).step_by(IMAGES_PER_BLOCK) {
            let count = IMAGES_PER_BLOCK.min(self.images.rows() - first_image);
            let panels = Packed::panels(count, dimension, |image, out| {
                self.images.write_unit_row(first_image + image, out);
            });
            let panels: Vec<&[f32]> = panels.blocks().collect();
            let transforms = self.block_transforms(first_image, count);
            let padded = panels.len() * CHUNK;
            // One collection per thread and not per task: most scores are kept of the first queries that a
            // collection is given.
            let collections = Mutex::new(Vec::new());
            let thresholds = Mutex::new(vec![f32::NEG_INFINITY; padded]);
            groups
                .par_chunks(groups_per_task)
                .zip(candidates.par_chunks_mut(groups_per_task * GROUP_ROWS))
                .enumerate()
                .for_each(|(task, (groups, candidates))| {
                    let collection = lock(&collections).pop();
                    let mut largest = collection.unwrap_or_else(|| LargestScores::new(padded));
                    largest.share_thresholds(&mut lock(&thresholds));
                    let first_group = task * groups_per_task;
                    let task = Task { scan: self, first_image, transforms: &transforms };
                    task.rank(first_group, groups, candidates, &panels, &mut largest);
                    lock(&collections).push(largest);
                });
            let largest = lock(&collections).drain(..).reduce(|mut a, b| {
                a.merge(&b);
                a
            });
            if let Some(largest) = largest {
                corrections.extend(largest.corrections().into_iter().take(count));
            }
            progress(count as u64);
        }
        let rankings = candidates.into_par_iter().enumerate().map(|(query, candidates)| {
            let finish = |(configuration, candidates): (usize, Candidates)| {
                let exact = self.exact_scorer(configuration);
                let (best, right_ranks) = candidates.finish(exact, &self.queries[query]);
                ExactRanking { best, right_ranks }
            };
            candidates.into_iter().enumerate().map(finish).collect()
        });
        ScanResult { rankings: rankings.collect(), corrections, sample: self.sample_best_queries() }
    }

    fn exact_scorer(&self, configuration: usize) -> ExactScorer<'_> {
        ExactScorer { images: self.images, transforms: &self.transforms[configuration] }
    }

    /// Returns an empty ranking of a query for each configuration.
    fn new_candidates(&self, query: usize, max_errors: &[f64]) -> Vec<Candidates> {
        let unit = &self.queries[query];
        let relevant: Vec<(u32, f64)> = self.relevant[query]
            .iter()
            .map(|image| (*image, self.images.dot_product(*image as usize, unit)))
            .collect();
        let new = |(configuration, max_error): (usize, &f64)| {
            let exact = self.exact_scorer(configuration);
            let scored = relevant.iter().map(|(image, raw)| (*image, exact.balance(*image, *raw)));
            Candidates::new(self.depth, *max_error, scored)
        };
        max_errors.iter().enumerate().map(new).collect()
    }

    /// Returns the largest error of a score in f32 under a configuration.
    fn max_error(&self, transforms: &[ExactTransform]) -> f64 {
        // Of numbers that were rounded, their products and the sums of these, each of at most length 1 (Higham,
        // Accuracy and Stability of Numerical Algorithms, 2002, §3.1), with something to spare.
        let roundings = count_roundings(self.images.dimension()) as f64 + 2.0;
        let raw = roundings * ROUNDING * 1.01 + 1e-30;
        let largest = |value: fn(&ExactTransform) -> f64, initial: f64| {
            transforms.iter().map(|t| value(t).abs()).fold(initial, f64::max)
        };
        let (alpha, beta) = (largest(|t| t.alpha, 1.0), largest(|t| t.beta, 0.0));
        // α, β, their product and their sum are rounded once each.
        alpha * raw + 4.0 * ROUNDING * (1.01 * alpha + beta)
    }

    fn block_transforms(&self, first_image: usize, count: usize) -> Vec<BlockTransforms> {
        let padded = count.next_multiple_of(CHUNK);
        let convert = |transforms: &Vec<ExactTransform>| {
            let mut block =
                BlockTransforms { alpha: vec![1.0; padded], beta: vec![f32::NEG_INFINITY; padded] };
            let images = block.alpha.iter_mut().zip(&mut block.beta).take(count);
            for (i, (alpha, beta)) in images.enumerate() {
                let transform = transforms.get(first_image + i).unwrap_or(&ExactTransform::RAW);
                (*alpha, *beta) = (transform.alpha as f32, transform.beta as f32);
            }
            block
        };
        self.transforms.iter().map(convert).collect()
    }

    /// Returns the best queries of the images from which the interval of the fit is computed.
    fn sample_best_queries(&self) -> Vec<SampledImage> {
        let dimension = self.images.dimension();
        let sample = sample_images(self.images.rows());
        let queries = &self.queries[..self.correcting_queries];
        let panels = Packed::panels(queries.len(), dimension, |query, out: &mut [f32]| {
            out.iter_mut().zip(&queries[query]).for_each(|(out, v)| *out = *v as f32);
        });
        let write = |i: usize, out: &mut [f32]| self.images.write_unit_row(sample[i], out);
        sample_best_queries(&sample, write, &panels, dimension)
    }
}

/// Ranks some groups of queries over one block of images.
struct Task<'a> {
    scan: &'a Scan<'a>,
    first_image: usize,
    transforms: &'a [BlockTransforms],
}

impl Task<'_> {
    fn rank(
        &self,
        first_group: usize,
        groups: &[&[f32]],
        candidates: &mut [Vec<Candidates>],
        panels: &[&[f32]],
        largest: &mut LargestScores,
    ) {
        let mut tile = vec![0f32; GROUP_ROWS * PANELS_IN_CACHE * CHUNK];
        for (start, panels) in
            (0..).step_by(PANELS_IN_CACHE * CHUNK).zip(panels.chunks(PANELS_IN_CACHE))
        {
            let width = panels.len() * CHUNK;
            let tile = &mut tile[..GROUP_ROWS * width];
            for ((i, group), candidates) in
                groups.iter().enumerate().zip(candidates.chunks_mut(GROUP_ROWS))
            {
                multiply(group, panels.iter().copied(), tile);
                let first_query = (first_group + i) * GROUP_ROWS;
                let correcting = self.scan.correcting_queries.saturating_sub(first_query);
                let correcting = &tile[..correcting.min(GROUP_ROWS) * width];
                Arch::new().dispatch(KeepLargest { scores: correcting, width, start, largest });
                for (row, candidates) in candidates.iter_mut().enumerate() {
                    Arch::new().dispatch(RankRow {
                        task: self,
                        query: first_query + row,
                        scores: &tile[row * width..(row + 1) * width],
                        start,
                        candidates,
                    });
                }
            }
        }
        let queries = self.scan.correcting_queries.saturating_sub(first_group * GROUP_ROWS);
        largest.count_scores(queries.min(groups.len() * GROUP_ROWS));
    }
}

/// Keeps the largest scores of each image over rows of scores.
struct KeepLargest<'a> {
    scores: &'a [f32],
    width: usize,
    /// Index of the first image in the block.
    start: usize,
    largest: &'a mut LargestScores,
}

impl WithSimd for KeepLargest<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { scores, width, start, largest } = self;
        for row in scores.chunks_exact(width) {
            for (scores, image) in row.as_chunks::<CHUNK>().0.iter().zip((start..).step_by(CHUNK)) {
                let thresholds = &largest.thresholds()[image..image + CHUNK];
                // Counted, since a search that ends early is not vectorised.
                let mut kept = 0;
                for lane in 0..CHUNK {
                    kept += u32::from(scores[lane] > thresholds[lane]);
                }
                if kept > 0 {
                    insert_scores(scores, image, largest);
                }
            }
        }
    }
}

#[inline(never)]
fn insert_scores(scores: &[f32; CHUNK], first_image: usize, largest: &mut LargestScores) {
    let thresholds = &largest.thresholds()[first_image..first_image + CHUNK];
    // Collected without a branch per score, which would be mispredicted.
    let (mut lanes, mut count) = ([0; CHUNK], 0);
    for lane in 0..CHUNK {
        lanes[count] = lane;
        count += usize::from(scores[lane] > thresholds[lane]);
    }
    for lane in &lanes[..count] {
        largest.insert(first_image + lane, scores[*lane]);
    }
}

/// Ranks a row of scores under every configuration.
struct RankRow<'a> {
    task: &'a Task<'a>,
    query: usize,
    scores: &'a [f32],
    /// Index of the first image in the block.
    start: usize,
    candidates: &'a mut [Candidates],
}

impl WithSimd for RankRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { task, query, scores, start, candidates } = self;
        let unit = &task.scan.queries[query];
        let (scores, _) = scores.as_chunks::<CHUNK>();
        let configurations = candidates.iter_mut().zip(task.transforms).enumerate();
        for (configuration, (candidates, transforms)) in configurations {
            let row = BalancedRow {
                scores,
                alpha: transforms.alpha[start..].as_chunks().0,
                beta: transforms.beta[start..].as_chunks().0,
            };
            let first_image = task.first_image + start;
            let image_of = |chunk: usize| (first_image + chunk * CHUNK) as u32;
            // Most queries have one relevant image: its rank is counted together with the candidates.
            let [low, high] =
                candidates.targets().first().map_or([f32::INFINITY; 2], Target::bounds);
            let [found, from_low, above] = row.count_above([candidates.threshold(), low, high]);
            if found > 0 {
                row.for_each_chunk(
                    #[inline(always)]
                    |chunk, scores| candidates.add_chunk(scores, image_of(chunk)),
                );
            }
            let mut counts = [from_low, above];
            for (i, target) in candidates.targets_mut().iter_mut().enumerate() {
                if i > 0 {
                    counts = row.count_above(target.bounds());
                }
                let [from_low, above] = counts;
                target.count_above(above);
                if from_low > above {
                    let exact = task.scan.exact_scorer(configuration);
                    row.for_each_chunk(
                        #[inline(always)]
                        |chunk, scores| target.count_close(scores, image_of(chunk), exact, unit),
                    );
                }
            }
        }
    }
}

/// A row of scores under one configuration. Balanced scores are computed where they are needed, as that is
/// cheaper than to store them.
struct BalancedRow<'a> {
    scores: &'a [[f32; CHUNK]],
    alpha: &'a [[f32; CHUNK]],
    beta: &'a [[f32; CHUNK]],
}

impl BalancedRow<'_> {
    /// Calls `visit` with the index of each chunk and its scores.
    #[inline(always)]
    fn for_each_chunk(&self, mut visit: impl FnMut(usize, &[f32; CHUNK])) {
        let Self { scores, alpha, beta } = self;
        for i in 0..scores.len().min(alpha.len()).min(beta.len()) {
            let mut balanced = [0f32; CHUNK];
            for lane in 0..CHUNK {
                balanced[lane] = alpha[i][lane] * scores[i][lane] + beta[i][lane];
            }
            visit(i, &balanced);
        }
    }

    /// Returns how many scores lie above each of the thresholds.
    #[inline(always)]
    fn count_above<const N: usize>(&self, thresholds: [f32; N]) -> [usize; N] {
        let mut counts = [[0u32; CHUNK]; N];
        self.for_each_chunk(
            #[inline(always)]
            |_, scores| {
                for (counts, threshold) in counts.iter_mut().zip(thresholds) {
                    for lane in 0..CHUNK {
                        counts[lane] += u32::from(scores[lane] > threshold);
                    }
                }
            },
        );
        counts.map(|counts| counts.iter().sum::<u32>() as usize)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// A panel of images is what is looked at together.
const _: () = assert!(CHUNK == <f32 as Element>::PANEL_COLUMNS);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::fit::CORRECTION_TOP_K;
    use crate::record::arrays::Values;

    fn array(rows: usize, dimension: usize, seed: usize) -> EmbeddingArray {
        let value = |i: usize| ((i * 2_654_435_761 + seed * 97) % 10_007) as f64 / 10_007.0 - 0.4;
        let values = Values::F64((0..rows * dimension).map(value).collect());
        EmbeddingArray::new("a", values, [rows, dimension]).unwrap()
    }

    #[test]
    fn rankings_and_corrections_are_those_of_plain_f64() {
        let (images, queries, dimension) = (IMAGES_PER_BLOCK + 77, 27, 12);
        let images = array(images, dimension, 1);
        let queries = array(queries, dimension, 2);
        let units: Vec<Vec<f64>> = (0..queries.rows()).map(|q| queries.unit_row(q)).collect();
        let transform = |i: usize| ExactTransform {
            alpha: 0.8 + (i % 7) as f64 / 20.0,
            beta: (i % 11) as f64 / 50.0,
        };
        let transforms = [Vec::new(), (0..images.rows()).map(transform).collect::<Vec<_>>()];
        let relevant: Vec<Vec<u32>> =
            (0..queries.rows() as u32).map(|q| vec![q * 290, q * 290 + 5]).collect();
        let scan = Scan {
            images: &images,
            queries: &units,
            correcting_queries: 20,
            relevant: &relevant,
            transforms: &transforms,
            depth: 10,
        };
        let result = scan.run(&|_| {});
        let raw = |image: usize, query: usize| -> f64 {
            images.unit_row(image).iter().zip(&units[query]).map(|(a, b)| a * b).sum()
        };
        let mut by_image = vec![Vec::new(); images.rows()];
        for (query, rankings) in result.rankings.iter().enumerate() {
            let raws: Vec<f64> = (0..images.rows()).map(|image| raw(image, query)).collect();
            for (configuration, (ranking, transforms)) in
                rankings.iter().zip(&transforms).enumerate()
            {
                let score = |image: usize| {
                    let own = transforms.get(image);
                    own.unwrap_or(&ExactTransform::RAW).apply(raws[image])
                };
                let mut order: Vec<usize> = (0..images.rows()).collect();
                order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
                let found: Vec<usize> = ranking.best.iter().map(|(i, _)| *i as usize).collect();
                assert_eq!(found, order[..10], "{query} {configuration}");
                assert!((ranking.best[0].1 - score(order[0])).abs() < 1e-12);
                let rank = |image: &u32| {
                    1 + order.iter().position(|other| *other == *image as usize).unwrap()
                };
                let mut ranks: Vec<usize> = relevant[query].iter().map(rank).collect();
                ranks.sort_unstable();
                assert_eq!(ranking.right_ranks, ranks, "{query} {configuration}");
            }
            if query < scan.correcting_queries {
                by_image.iter_mut().zip(raws).for_each(|(all, raw)| all.push(raw));
            }
        }
        assert_eq!(result.corrections.len(), images.rows());
        for (scores, correction) in by_image.iter_mut().zip(&result.corrections) {
            scores.sort_unstable_by(|a, b| b.total_cmp(a));
            let expected = scores[..CORRECTION_TOP_K].iter().sum::<f64>() / 16.0;
            assert!((correction - expected).abs() < 1e-6, "{correction} {expected}");
        }
        let sampled = &result.sample[3];
        assert_eq!(sampled.best_queries.len(), scan.correcting_queries);
        assert!((f64::from(sampled.best_queries[0].0) - by_image[sampled.image][0]).abs() < 1e-6);
    }
}
