//! The best results and the ranks of one query under one configuration, collected from approximate scores
//! of which the largest error is known. Whatever the error could change is decided by exact scores.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use crate::balance::normalise::ExactTransform;
use crate::record::arrays::EmbeddingArray;

/// Scores that are looked at together: a panel of images.
pub(super) const CHUNK: usize = 48;
/// Candidates that are collected, per result that is wanted, before the worse ones are dropped.
const CANDIDATES_PER_RESULT: usize = 8;

/// Computes exact scores of a configuration.
#[derive(Clone, Copy)]
pub(super) struct ExactScorer<'a> {
    pub images: &'a EmbeddingArray,
    /// α and β of each image; empty for plain CLIP.
    pub transforms: &'a [ExactTransform],
}

impl ExactScorer<'_> {
    /// Returns the score of an image for a query.
    pub fn score(self, image: u32, query: &[f64]) -> f64 {
        self.balance(image, self.images.dot_product(image as usize, query))
    }

    /// Returns the score of an image of this raw score.
    pub fn balance(self, image: u32, raw: f64) -> f64 {
        let transform = self.transforms.get(image as usize).unwrap_or(&ExactTransform::RAW);
        transform.apply(raw)
    }
}

/// A relevant image whose rank is counted.
#[derive(Debug, Clone)]
pub(super) struct Target {
    image: u32,
    exact_score: f64,
    /// Approximate scores above `low` and up to `high` may be above or below the exact one.
    low: f32,
    high: f32,
    images_above: usize,
}

/// What is known of the ranking of one query under one configuration.
#[derive(Debug, Clone)]
pub(super) struct Candidates {
    depth: usize,
    /// Largest error of an approximate score.
    max_error: f64,
    /// Approximate scores up to this one are not among the best.
    threshold: f32,
    capacity: usize,
    /// Approximate score and image.
    best: Vec<(f32, u32)>,
    targets: Vec<Target>,
}

impl Candidates {
    /// Creates an empty ranking; `relevant` are images with their exact scores.
    pub fn new(depth: usize, max_error: f64, relevant: impl Iterator<Item = (u32, f64)>) -> Self {
        let target = |(image, exact_score): (u32, f64)| Target {
            image,
            exact_score,
            low: ((exact_score - max_error) as f32).next_down(),
            high: ((exact_score + max_error) as f32).next_up(),
            images_above: 0,
        };
        Self {
            depth,
            max_error,
            // Above −∞, which images have that only fill up a panel.
            threshold: f32::MIN,
            capacity: depth * CANDIDATES_PER_RESULT,
            best: Vec::new(),
            targets: relevant.map(target).collect(),
        }
    }

    /// Returns what an approximate score must exceed to be among the best.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Returns the relevant images.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Returns the relevant images, whose ranks are counted by the caller.
    pub fn targets_mut(&mut self) -> &mut [Target] {
        &mut self.targets
    }

    /// Adds the approximate scores of a chunk of images, of which `first_image` is the first.
    #[inline(always)]
    pub fn add_chunk(&mut self, scores: &[f32; CHUNK], first_image: u32) {
        // Counted, since a search that ends early is not vectorised.
        let mut count = 0;
        for score in scores {
            count += u32::from(*score > self.threshold);
        }
        if count > 0 {
            self.add_candidates(scores, first_image);
        }
    }

    #[inline(never)]
    fn add_candidates(&mut self, scores: &[f32; CHUNK], first_image: u32) {
        let threshold = self.threshold;
        let candidates = (first_image..).zip(scores).filter(|(_, score)| **score > threshold);
        self.best.extend(candidates.map(|(image, score)| (*score, image)));
        if self.best.len() >= self.capacity {
            self.drop_worse();
            // None of many equal scores can be dropped: wait for twice as many.
            self.capacity = self.capacity.max(self.best.len() * 2);
        }
    }

    /// Drops the candidates that cannot be among the best.
    fn drop_worse(&mut self) {
        if self.best.len() <= self.depth {
            return;
        }
        let last = self.depth - 1;
        let (_, last, _) = self.best.select_nth_unstable_by(last, |a, b| b.0.total_cmp(&a.0));
        let limit = f64::from(last.0) - 2.0 * self.max_error;
        self.threshold = self.threshold.max((limit as f32).next_down());
        let threshold = self.threshold;
        self.best.retain(|(score, _)| *score > threshold);
    }

    /// Returns the best results with their exact scores, best first and equal scores by image, and the
    /// ranks of the relevant images, ascending.
    pub fn finish(mut self, exact: ExactScorer, query: &[f64]) -> (Vec<(u32, f64)>, Vec<usize>) {
        self.drop_worse();
        let mut best: Vec<(u32, f64)> =
            self.best.iter().map(|(_, image)| (*image, exact.score(*image, query))).collect();
        best.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        best.truncate(self.depth);
        let mut ranks: Vec<usize> =
            self.targets.iter().map(|target| target.images_above + 1).collect();
        ranks.sort_unstable();
        (best, ranks)
    }
}

impl Target {
    /// Returns two thresholds: approximate scores above the first one may lie above the exact one, and those
    /// above the second one do.
    pub fn bounds(&self) -> [f32; 2] {
        [self.low, self.high]
    }

    /// Counts images whose approximate scores lie above the bounds.
    pub fn count_above(&mut self, images: usize) {
        self.images_above += images;
    }

    /// Counts the images of a chunk whose approximate scores lie within the bounds, and whose exact ones lie
    /// above.
    #[inline(always)]
    pub fn count_close(
        &mut self,
        scores: &[f32; CHUNK],
        first_image: u32,
        exact: ExactScorer,
        query: &[f64],
    ) {
        let mut close = 0;
        for score in scores {
            close += u32::from(*score > self.low) & u32::from(*score <= self.high);
        }
        if close > 0 {
            self.count_close_exactly(scores, first_image, exact, query);
        }
    }

    #[cold]
    fn count_close_exactly(
        &mut self,
        scores: &[f32; CHUNK],
        first_image: u32,
        exact: ExactScorer,
        query: &[f64],
    ) {
        for (image, score) in (first_image..).zip(scores) {
            if *score <= self.low || *score > self.high || image == self.image {
                continue;
            }
            let score = exact.score(image, query);
            let is_above =
                score > self.exact_score || (score == self.exact_score && image < self.image);
            self.images_above += usize::from(is_above);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::arrays::Values;

    /// Scores with an error of up to `max_error` must rank as exact ones do.
    #[test]
    fn rankings_are_exact_whatever_the_error_does() {
        let images = 480;
        // Cosines with the first axis, many of them equal or closer than the error.
        let cosine = |i: usize| f64::from((i * 7919 % 97) as u32) / 100.0;
        let values =
            (0..images).flat_map(|i| [cosine(i), (1.0 - cosine(i).powi(2)).sqrt()]).collect();
        let array = EmbeddingArray::new("a", Values::F64(values), [images, 2]).unwrap();
        let query = [1.0, 0.0];
        let exact = ExactScorer { images: &array, transforms: &[] };
        let mut order: Vec<u32> = (0..images as u32).collect();
        order.sort_by(|a, b| exact.score(*b, &query).total_cmp(&exact.score(*a, &query)));
        let rank = |image: u32| 1 + order.iter().position(|other| *other == image).unwrap();
        let relevant = [5, 100, 479];
        for max_error in [1e-9, 0.01, 0.3] {
            let with_scores = relevant.iter().map(|image| (*image, exact.score(*image, &query)));
            let mut candidates = Candidates::new(10, max_error, with_scores);
            for first in (0..images).step_by(CHUNK) {
                let scores = std::array::from_fn(|i| {
                    let sign = if (first + i) % 3 == 0 { -0.99 } else { 0.99 };
                    (cosine(first + i) + sign * max_error) as f32
                });
                candidates.add_chunk(&scores, first as u32);
                for target in candidates.targets_mut() {
                    let [_, high] = target.bounds();
                    target.count_above(scores.iter().filter(|score| **score > high).count());
                    target.count_close(&scores, first as u32, exact, &query);
                }
            }
            let (best, ranks) = candidates.finish(exact, &query);
            let found: Vec<u32> = best.iter().map(|(image, _)| *image).collect();
            assert_eq!(found, order[..10], "{max_error}");
            let mut expected = relevant.map(rank);
            expected.sort_unstable();
            assert_eq!(ranks, expected, "{max_error}");
        }
    }
}
