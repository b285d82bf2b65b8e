//! What is known of a bank of auxiliary prompts without judgements, and what is proposed for it.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fit::{
    BankFit, CORRECTION_TOP_K, RESAMPLED_QUERIES, SampledImage, concentration_of_corrections,
    sample_images,
};
use super::products::{Packed, map_scores};
use super::proposal::{BankMeasurement, propose_weight};
use super::statistics::StatisticsKey;

/// Images whose packed embeddings are in memory at one time: 16 MiB of dimension 512.
const IMAGES_PER_BLOCK: usize = 8_064;

/// Size, fit and concentration of a bank, and the weight that they propose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BankReport {
    /// Number of prompts.
    pub texts: usize,
    /// How well its corrections agree with those of queries; `None` if there are too few queries.
    pub fit: Option<BankFit>,
    /// How far the corrections of first results lie above the mean; `None` if there are too few queries.
    pub concentration: Option<f64>,
    /// The weight that is proposed; 0 is plain CLIP.
    pub proposed_weight: f32,
    /// What decided.
    pub reason: String,
}

impl BankReport {
    /// Proposes a weight for a bank of `texts` prompts, of which `distinct_texts` differ.
    pub fn new(
        texts: usize,
        distinct_texts: usize,
        fit: Option<BankFit>,
        concentration: Option<f64>,
    ) -> Self {
        let (proposed_weight, reason) = propose_weight(&BankMeasurement {
            texts: distinct_texts,
            fit: fit.map(|fit| fit.value),
            concentration,
        });
        Self { texts, fit, concentration, proposed_weight, reason }
    }
}

/// A prompt set as a query worker measured it with the queries that it answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MeasuredBank {
    /// Id of the generation that the images belong to.
    pub generation: String,
    /// Key of the prompt set.
    pub prompt_set: StatisticsKey,
    /// When it was measured.
    pub measured_at: DateTime<Utc>,
    /// Number of images that were measured: all, or a random part of a large catalogue.
    pub images: usize,
    /// Number of recent distinct queries; fit and concentration are known from 64 on.
    pub queries: usize,
    /// What was measured.
    #[serde(flatten)]
    pub report: BankReport,
}

/// Embeddings of images in memory, and what queries say about them.
pub struct QueriedImages<'a> {
    images: Vec<&'a [f32]>,
    queries: usize,
    corrections: Vec<f64>,
    first_images: FirstImages<'a>,
    sample: Vec<SampledImage>,
}

/// The first image of each query by plain CLIP.
#[derive(Debug, PartialEq)]
enum FirstImages<'a> {
    /// Indices of measured images.
    Indices(Vec<usize>),
    /// Embeddings of images that need not be among the measured ones.
    Embeddings(Vec<&'a [f32]>),
}

impl<'a> QueriedImages<'a> {
    /// Computes the corrections of images by distinct queries, all at unit length. Blocks for as long as the
    /// products take.
    pub fn new(images: Vec<&'a [f32]>, queries: &[Vec<f32>]) -> Self {
        let first_images = FirstImages::Indices(find_first_images(&images, queries));
        Self::with_first_images(images, queries, first_images)
    }

    /// Computes the corrections of a random part of a catalogue's images. `first_images` are those of the
    /// queries for which they are known, over the whole catalogue.
    pub fn from_sample(
        images: Vec<&'a [f32]>,
        queries: &[Vec<f32>],
        first_images: Vec<&'a [f32]>,
    ) -> Self {
        Self::with_first_images(images, queries, FirstImages::Embeddings(first_images))
    }

    fn with_first_images(
        images: Vec<&'a [f32]>,
        queries: &[Vec<f32>],
        first_images: FirstImages<'a>,
    ) -> Self {
        let dimension = images.first().map_or(0, |image| image.len());
        let panels = pack(queries, dimension);
        let sample = sample_images(images.len());
        let write = |i: usize, out: &mut [f32]| out.copy_from_slice(images[sample[i]]);
        let sample = sample_best_queries(&sample, write, &panels, dimension);
        Self {
            queries: queries.len(),
            corrections: correct_images(&images, &panels),
            first_images,
            sample,
            images,
        }
    }

    /// Measures a bank whose prompts have these embeddings, at unit length.
    pub fn measure_bank(&self, prompts: &[Vec<f32>]) -> BankReport {
        let dimension = self.images.first().map_or(0, |image| image.len());
        let panels = pack(prompts, dimension);
        let by_bank = correct_images(&self.images, &panels);
        let of_first_images = match &self.first_images {
            FirstImages::Indices(indices) => {
                indices.iter().filter_map(|i| by_bank.get(*i)).copied().collect()
            }
            FirstImages::Embeddings(embeddings) => correct_images(embeddings, &panels),
        };
        let bytes = |prompt: &Vec<f32>| -> Vec<u8> {
            prompt.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        BankReport::new(
            prompts.len(),
            prompts.iter().map(bytes).collect::<HashSet<_>>().len(),
            BankFit::from_corrections(&by_bank, &self.corrections, self.queries, &self.sample),
            concentration_of_corrections(&by_bank, &of_first_images),
        )
    }
}

fn pack(vectors: &[Vec<f32>], dimension: usize) -> Packed<f32> {
    Packed::panels(vectors.len(), dimension, |i, out| out.copy_from_slice(&vectors[i]))
}

/// Returns the mean of the best scores of each image for some texts; nothing without texts.
fn correct_images(images: &[&[f32]], texts: &Packed<f32>) -> Vec<f64> {
    let kept = CORRECTION_TOP_K.min(texts.count());
    if kept == 0 || images.is_empty() {
        return Vec::new();
    }
    let write = |i: usize, out: &mut [f32]| out.copy_from_slice(images[i]);
    map_scores(images.len(), write, texts, images[0].len(), |_, scores| {
        scores.select_nth_unstable_by(kept - 1, |a, b| b.total_cmp(a));
        scores[..kept].iter().map(|score| f64::from(*score)).sum::<f64>() / kept as f64
    })
}

/// Returns the first image of each query by plain CLIP; of equal ones the first.
fn find_first_images(images: &[&[f32]], queries: &[Vec<f32>]) -> Vec<usize> {
    let mut first: Vec<(f32, usize)> = vec![(f32::NEG_INFINITY, 0); queries.len()];
    for (start, block) in (0..).step_by(IMAGES_PER_BLOCK).zip(images.chunks(IMAGES_PER_BLOCK)) {
        let dimension = block[0].len();
        let panels = Packed::panels(block.len(), dimension, |i, out| out.copy_from_slice(block[i]));
        let write = |i: usize, out: &mut [f32]| out.copy_from_slice(&queries[i]);
        let best = map_scores(queries.len(), write, &panels, dimension, |_, scores| {
            let better = |best: (f32, usize), (i, score): (usize, &f32)| {
                if *score > best.0 { (*score, start + i) } else { best }
            };
            scores.iter().enumerate().fold((f32::NEG_INFINITY, start), better)
        });
        first.par_iter_mut().zip(best).for_each(|(first, best)| {
            if best.0 > first.0 {
                *first = best;
            }
        });
    }
    if images.is_empty() { Vec::new() } else { first.into_iter().map(|(_, image)| image).collect() }
}

/// Returns images with their best queries. `sample` are their indices, and `write` writes the embedding of
/// one of them, by its index in the sample.
pub(crate) fn sample_best_queries(
    sample: &[usize],
    write: impl Fn(usize, &mut [f32]) + Sync,
    queries: &Packed<f32>,
    dimension: usize,
) -> Vec<SampledImage> {
    map_scores(sample.len(), write, queries, dimension, |i, scores| {
        let mut best: Vec<(f32, u32)> = scores.iter().copied().zip(0..).collect();
        let by_score = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if best.len() > RESAMPLED_QUERIES {
            best.select_nth_unstable_by(RESAMPLED_QUERIES, by_score);
            best.truncate(RESAMPLED_QUERIES);
        }
        best.sort_unstable_by(by_score);
        SampledImage { image: sample[i], best_queries: best }
    })
}

#[cfg(test)]
mod tests {
    use rand::RngExt;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::balance::statistics::dot_product;

    /// Unit vectors around a common direction.
    fn vectors(count: usize, seed: u64) -> Vec<Vec<f32>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut vector = |_| {
            let vector: Vec<f32> = (0..24).map(|_| rng.random_range(-0.3..0.7f32)).collect();
            let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
            vector.iter().map(|v| v / length).collect()
        };
        (0..count).map(&mut vector).collect()
    }

    #[test]
    fn figures_are_those_of_plain_sums() {
        let (images, queries, prompts) = (vectors(9_000, 1), vectors(70, 2), vectors(40, 3));
        let correction = |image: &Vec<f32>, texts: &[Vec<f32>]| {
            let mut scores: Vec<f32> = texts.iter().map(|text| dot_product(text, image)).collect();
            scores.sort_unstable_by(|a, b| b.total_cmp(a));
            scores[..16].iter().map(|score| f64::from(*score)).sum::<f64>() / 16.0
        };
        let by_bank: Vec<f64> = images.iter().map(|image| correction(image, &prompts)).collect();
        let first = |query: &Vec<f32>| {
            let score = |image: &usize| dot_product(&images[*image], query);
            (0..images.len()).max_by(|a, b| score(a).total_cmp(&score(b)).then(b.cmp(a))).unwrap()
        };
        let first_images: Vec<usize> = queries.iter().map(first).collect();
        let queried = QueriedImages::new(images.iter().map(Vec::as_slice).collect(), &queries);
        assert_eq!(queried.first_images, FirstImages::Indices(first_images.clone()));
        for (own, image) in queried.corrections.iter().zip(&images) {
            assert!((own - correction(image, &queries)).abs() < 1e-6);
        }
        let report = queried.measure_bank(&prompts);
        let expected = crate::balance::fit::concentration(&by_bank, &first_images).unwrap();
        assert!((report.concentration.unwrap() - expected).abs() < 1e-4, "{report:?}");
        let fit = report.fit.unwrap();
        assert_eq!((report.texts, fit.queries), (40, 70));
        assert!(fit.low <= fit.value && fit.value <= fit.high, "{fit:?}");
    }

    #[test]
    fn few_queries_and_no_images_give_no_fit() {
        let (images, prompts) = (vectors(5, 1), vectors(40, 3));
        let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
        for (images, queries) in [(images.clone(), 63), (images, 0), (Vec::new(), 70)] {
            let report = QueriedImages::new(images, &vectors(queries, 2)).measure_bank(&prompts);
            assert_eq!((report.fit, report.concentration), (None, None));
            assert_eq!(report.proposed_weight, 0.25);
            assert!(report.reason.contains("not known"), "{}", report.reason);
        }
    }
}
