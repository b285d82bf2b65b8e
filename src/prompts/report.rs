//! What a prompt set does on a catalogue: how its scores spread, which prompts are the same, which
//! dominate, and which images they penalise. Pure.

use rayon::prelude::*;
use serde::Serialize;

use super::EmbeddedPromptSet;
use crate::balance::normalise::{BalanceParameters, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, dot_product};
use crate::record::Embedding;

/// Bins of the histogram over the cosine range −1..1; a picture shows those that are used.
const HISTOGRAM_BINS: usize = 400;
/// Images measured by one task, which share a histogram.
const IMAGES_PER_TASK: usize = 1024;
/// Prompts of a pair whose embeddings are this near say the same thing to the model.
pub const NEAR_DUPLICATE_COSINE: f32 = 0.95;

/// What is reported of a set.
#[derive(Debug, Clone, Serialize)]
pub struct PromptSetReport {
    /// Images that were measured.
    pub images: usize,
    /// Share of all auxiliary scores in each bin of −1..1.
    #[serde(skip)]
    histogram: Vec<f64>,
    /// Over all auxiliary scores: 5th percentile, median, 95th percentile.
    pub score_percentiles: [f32; 3],
    /// An image's own standard deviation: 5th percentile, median, 95th percentile over images.
    pub std_percentiles: [f32; 3],
    /// An image's mean score, likewise. Where it differs much, images score on different scales.
    pub mean_percentiles: [f32; 3],
    /// Pairs of prompts nearer than [`NEAR`], nearest first.
    pub near_duplicates: Vec<NearDuplicatePair>,
    /// Prompts by how many images they are the strongest for, most first.
    pub dominant_prompts: Vec<DominatingPrompt>,
    /// How many prompts are the strongest one of no image: they say nothing about this catalogue.
    pub never_strongest: usize,
    /// Images that lose most by the balance, most first.
    pub penalised_images: Vec<PenalisedImage>,
}

/// Two prompts that are nearly the same to the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearDuplicatePair {
    /// One.
    pub first: String,
    /// The other.
    pub second: String,
    /// Cosine of their embeddings.
    pub cosine: f32,
}

/// A prompt that is the strongest one of many images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DominatingPrompt {
    /// The prompt.
    pub text: String,
    /// Images whose strongest prompt it is, of all images: 0 to 1.
    pub share: f64,
}

/// An image that loses much by the balance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PenalisedImage {
    /// Its index among the images that were given.
    pub image_index: usize,
    /// What a raw score of the catalogue's median strongest prompt loses beside the median image,
    /// in units of the raw score.
    pub score_loss: f32,
    /// The prompt that scores most on it.
    pub strongest_prompt: String,
    /// That score.
    pub strongest_prompt_score: f32,
}

/// Measures `set` on the stored embeddings of a catalogue, at most `limit` entries a list; the
/// constants of `balance` are taken from this set and catalogue. `None` where there are no images.
pub fn measure_prompt_set(
    set: &EmbeddedPromptSet,
    images: &[&Embedding],
    balance: &BalanceParameters,
    limit: usize,
) -> Option<PromptSetReport> {
    struct MeasuredImage {
        statistics: ScoreStatistics,
        strongest: usize,
    }
    let parts: Vec<(Vec<MeasuredImage>, Vec<f64>)> = images
        .par_chunks(IMAGES_PER_TASK)
        .map(|part| {
            let mut histogram = vec![0f64; HISTOGRAM_BINS];
            let measure = |image: &&Embedding| {
                let scores = set.score_prompts(image);
                for score in &scores {
                    histogram[bin_of_score(*score)] += 1.0;
                }
                let (strongest, _) = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
                Some(MeasuredImage { statistics: set.statistics_from_scores(&scores)?, strongest })
            };
            (part.iter().filter_map(measure).collect(), histogram)
        })
        .collect();
    let mut measured = Vec::with_capacity(images.len());
    let mut histogram = vec![0f64; HISTOGRAM_BINS];
    for (part, counts) in parts {
        measured.extend(part);
        histogram.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    if measured.is_empty() {
        return None;
    }
    let statistics = measured.iter().map(|m| m.statistics);
    let balance = BalanceParameters {
        scale: ScaleConstants::from_catalogue(balance.normaliser, statistics),
        ..*balance
    };
    let mut wins = vec![0usize; set.embeddings.len()];
    for image in &measured {
        wins[image.strongest] += 1;
    }
    let total: f64 = histogram.iter().sum();
    for share in &mut histogram {
        *share /= total;
    }

    let percentiles_of = |value: fn(&ScoreStatistics) -> f32| {
        percentiles(measured.iter().map(|m| value(&m.statistics)).collect())
    };
    // Compared at one raw score, an image's loss is what its own α and β take from it.
    let typical = percentiles_of(|s| s.max)[1];
    let balanced =
        |m: &MeasuredImage| balance.affine_transform(&m.statistics, set.logit_scale).apply(typical);
    let median = percentiles(measured.iter().map(balanced).collect())[1];
    let mut penalised: Vec<PenalisedImage> = measured
        .iter()
        .enumerate()
        .map(|(image, m)| PenalisedImage {
            image_index: image,
            score_loss: median - balanced(m),
            strongest_prompt: set.prompt_set.texts[m.strongest].clone(),
            strongest_prompt_score: m.statistics.max,
        })
        .collect();
    penalised.sort_by(|a, b| {
        b.score_loss.total_cmp(&a.score_loss).then(a.image_index.cmp(&b.image_index))
    });
    penalised.truncate(limit);

    let mut dominating: Vec<DominatingPrompt> = wins
        .iter()
        .zip(&set.prompt_set.texts)
        .map(|(wins, text)| DominatingPrompt {
            text: text.clone(),
            share: *wins as f64 / measured.len() as f64,
        })
        .collect();
    dominating.sort_by(|a, b| b.share.total_cmp(&a.share));
    dominating.truncate(limit);

    Some(PromptSetReport {
        images: measured.len(),
        score_percentiles: [0.05, 0.5, 0.95].map(|share| histogram_quantile(&histogram, share)),
        histogram,
        std_percentiles: percentiles_of(|s| s.std),
        mean_percentiles: percentiles_of(|s| s.mean),
        near_duplicates: find_near_duplicates(set, limit),
        dominant_prompts: dominating,
        never_strongest: wins.iter().filter(|w| **w == 0).count(),
        penalised_images: penalised,
    })
}

impl PromptSetReport {
    /// The histogram of all auxiliary scores in at most `rows` rows of equal width, lowest first:
    /// lower edge, and share of all scores.
    pub fn histogram_rows(&self, rows: usize) -> Vec<(f32, f64)> {
        let used = |share: &f64| *share > 0.0;
        let first = self.histogram.iter().position(used).unwrap_or(0);
        let last = self.histogram.iter().rposition(used).unwrap_or(0);
        let width = (last + 1 - first).div_ceil(rows.max(1));
        self.histogram[first..=last]
            .chunks(width)
            .enumerate()
            .map(|(i, chunk)| (bin_lower_edge(first + i * width), chunk.iter().sum()))
            .collect()
    }
}

/// Pairs of prompts nearer than [`NEAR`], nearest first.
fn find_near_duplicates(set: &EmbeddedPromptSet, limit: usize) -> Vec<NearDuplicatePair> {
    let mut pairs: Vec<NearDuplicatePair> = (0..set.embeddings.len())
        .into_par_iter()
        .flat_map_iter(|i| {
            (0..i).filter_map(move |j| {
                let cosine = dot_product(&set.embeddings[i], &set.embeddings[j]);
                (cosine > NEAR_DUPLICATE_COSINE).then(|| NearDuplicatePair {
                    first: set.prompt_set.texts[j].clone(),
                    second: set.prompt_set.texts[i].clone(),
                    cosine,
                })
            })
        })
        .collect();
    pairs.sort_by(|a, b| b.cosine.total_cmp(&a.cosine));
    pairs.truncate(limit);
    pairs
}

fn bin_of_score(score: f32) -> usize {
    let place = f32::midpoint(score.clamp(-1.0, 1.0), 1.0) * HISTOGRAM_BINS as f32;
    (place as usize).min(HISTOGRAM_BINS - 1)
}

/// The lower edge of a bin.
fn bin_lower_edge(bin: usize) -> f32 {
    bin as f32 / HISTOGRAM_BINS as f32 * 2.0 - 1.0
}

fn histogram_quantile(histogram: &[f64], share: f64) -> f32 {
    let mut sum = 0.0;
    let found = histogram.iter().position(|s| {
        sum += s;
        sum >= share
    });
    bin_lower_edge(found.unwrap_or(HISTOGRAM_BINS - 1))
}

/// 5th percentile, median, 95th percentile.
fn percentiles(mut values: Vec<f32>) -> [f32; 3] {
    values.sort_unstable_by(f32::total_cmp);
    let last = values.len().saturating_sub(1);
    [0.05, 0.5, 0.95].map(|share| values[(last as f64 * share).round() as usize])
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::balance::statistics::StatisticsKey;
    use crate::prompts::PromptSet;

    fn embedded_set(embeddings: Vec<Vec<f32>>) -> EmbeddedPromptSet {
        let texts = (0..embeddings.len()).map(|i| format!("prompt {i}")).collect();
        let set = PromptSet::new("t", texts);
        let key = StatisticsKey::new("t", 1, &set.fingerprint(), 10.0, 1);
        EmbeddedPromptSet {
            prompt_set: set,
            statistics_key: key,
            embeddings,
            logit_scale: 10.0,
            top_k: 1,
            vocabulary: OnceLock::new(),
        }
    }

    #[test]
    fn what_a_set_does_is_found() {
        let near = (1.0f32 - 0.001).sqrt();
        let set = embedded_set(vec![
            vec![1.0, 0.0, 0.0],
            vec![0.0, 1.0, 0.0],
            vec![near, 0.0, (1.0 - near * near).sqrt()],
        ]);
        // Three images of the first prompt alone, and one that no prompt fits.
        let images = [[1.0, 0.1, 0.0], [1.0, 0.2, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]].map(
            |v: [f32; 3]| {
                let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
                Embedding::from_unit_vector(&v.map(|x| x / norm))
            },
        );
        let balance = BalanceParameters {
            normaliser: Normaliser::Nnn,
            weight: 1.0,
            lambda: 1.0,
            scale: ScaleConstants::default(),
        };
        let images: Vec<&Embedding> = images.iter().collect();
        let report = measure_prompt_set(&set, &images, &balance, 2).unwrap();
        assert_eq!(report.images, 4);
        assert_eq!(report.near_duplicates.len(), 1);
        assert_eq!(report.near_duplicates[0].second, "prompt 2");
        assert_eq!(
            (report.dominant_prompts[0].text.as_str(), report.dominant_prompts[0].share),
            ("prompt 0", 0.75)
        );
        assert_eq!(report.never_strongest, 1);
        assert_eq!(report.penalised_images.len(), 2);
        assert_eq!(
            report.penalised_images[0].image_index, 2,
            "the image that a prompt describes exactly"
        );
        assert!(report.penalised_images[0].score_loss >= report.penalised_images[1].score_loss);
        let rows = report.histogram_rows(12);
        assert!(rows.len() <= 12);
        assert!((rows.iter().map(|r| r.1).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn no_images_no_report() {
        let balance = BalanceParameters::RAW;
        assert!(
            measure_prompt_set(&embedded_set(vec![vec![1.0], vec![-1.0]]), &[], &balance, 5)
                .is_none()
        );
    }
}
