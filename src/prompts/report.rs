//! Measures how a prompt set suits a catalogue: how its scores are distributed, which prompts are
//! nearly equal, which dominate, and which images they penalise. Pure functions.

use rayon::prelude::*;
use serde::Serialize;

use super::embedded::EmbeddedPromptSet;
use crate::balance::normalise::{BalanceParameters, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, dot_product};
use crate::record::Embedding;

/// Bins of the histogram over the cosine range −1..1.
const HISTOGRAM_BINS: usize = 400;
/// Images per parallel task; each task has a histogram of its own.
const IMAGES_PER_TASK: usize = 1024;
/// Two prompts whose embeddings have a higher cosine are near duplicates for the model.
pub const NEAR_DUPLICATE_COSINE: f32 = 0.95;

/// How a prompt set suits a catalogue.
#[derive(Debug, Clone, Serialize)]
pub struct PromptSetReport {
    /// Number of images measured.
    pub images: usize,
    /// Share of all auxiliary scores in each bin of −1..1.
    #[serde(skip)]
    histogram: Vec<f64>,
    /// 5th percentile, median and 95th percentile of all auxiliary scores.
    pub score_percentiles: [f32; 3],
    /// 5th percentile, median and 95th percentile over images of the standard deviation of an
    /// image's scores.
    pub std_percentiles: [f32; 3],
    /// 5th percentile, median and 95th percentile over images of an image's mean score. If they
    /// differ much, images score on different scales.
    pub mean_percentiles: [f32; 3],
    /// Pairs of prompts with a cosine above [`NEAR_DUPLICATE_COSINE`], most similar first.
    pub near_duplicates: Vec<NearDuplicatePair>,
    /// Prompts that are the strongest of most images.
    pub dominant_prompts: Vec<DominatingPrompt>,
    /// Number of prompts that are the strongest of no image, and hardly matter for this catalogue.
    pub never_strongest: usize,
    /// Images whose scores balancing lowers most.
    pub penalised_images: Vec<PenalisedImage>,
}

/// Two prompts that are nearly equal for the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NearDuplicatePair {
    /// The prompt that comes first in the set.
    pub first: String,
    /// The prompt that comes later in the set.
    pub second: String,
    /// Cosine of their embeddings.
    pub cosine: f32,
}

/// A prompt that is the strongest of many images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DominatingPrompt {
    /// The prompt.
    pub text: String,
    /// Share of the images of which it is the strongest prompt, 0 to 1.
    pub share: f64,
}

/// An image whose scores balancing lowers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PenalisedImage {
    /// Index of the image in the `images` given to [`measure_prompt_set`].
    pub image_index: usize,
    /// By how much balancing lowers a typical raw score for this image more than for the median
    /// image, in units of the raw score. The typical score is the median of the images' strongest
    /// prompts.
    pub score_loss: f32,
    /// The prompt with the highest score for the image.
    pub strongest_prompt: String,
    /// The raw score of that prompt.
    pub strongest_prompt_score: f32,
}

/// Measures `set` on the stored embeddings of a catalogue. Lists have at most `limit` entries. The
/// scale constants of `balance` are replaced by those of this set and catalogue. Returns `None` if
/// there are no images.
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
    let chunks: Vec<(Vec<MeasuredImage>, Vec<f64>)> = images
        .par_chunks(IMAGES_PER_TASK)
        .map(|chunk| {
            let mut histogram = vec![0f64; HISTOGRAM_BINS];
            let measure = |image: &&Embedding| {
                let scores = set.score_prompts(image);
                for score in &scores {
                    histogram[bin_of_score(*score)] += 1.0;
                }
                let (strongest, _) = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
                Some(MeasuredImage { statistics: set.statistics_from_scores(&scores)?, strongest })
            };
            (chunk.iter().filter_map(measure).collect(), histogram)
        })
        .collect();
    let mut measured = Vec::with_capacity(images.len());
    let mut histogram = vec![0f64; HISTOGRAM_BINS];
    for (images_of_chunk, counts) in chunks {
        measured.extend(images_of_chunk);
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
    let mut strongest_counts = vec![0usize; set.prompt_embeddings.len()];
    for image in &measured {
        strongest_counts[image.strongest] += 1;
    }
    let total: f64 = histogram.iter().sum();
    for share in &mut histogram {
        *share /= total;
    }

    let percentiles_of = |value: fn(&ScoreStatistics) -> f32| {
        percentiles(measured.iter().map(|m| value(&m.statistics)).collect())
    };
    // All images are compared at the same raw score, so that only their α and β make a difference.
    let typical_score = percentiles_of(|s| s.max)[1];
    let balanced = |m: &MeasuredImage| {
        balance.affine_transform(&m.statistics, set.softmax_scale()).apply(typical_score)
    };
    let median = percentiles(measured.iter().map(balanced).collect())[1];
    let mut penalised: Vec<PenalisedImage> = measured
        .iter()
        .enumerate()
        .map(|(image_index, m)| PenalisedImage {
            image_index,
            score_loss: median - balanced(m),
            strongest_prompt: set.prompt_set.texts[m.strongest].clone(),
            strongest_prompt_score: m.statistics.max,
        })
        .collect();
    penalised.sort_by(|a, b| {
        b.score_loss.total_cmp(&a.score_loss).then(a.image_index.cmp(&b.image_index))
    });
    penalised.truncate(limit);

    let mut dominating: Vec<DominatingPrompt> = strongest_counts
        .iter()
        .zip(&set.prompt_set.texts)
        .map(|(count, text)| DominatingPrompt {
            text: text.clone(),
            share: *count as f64 / measured.len() as f64,
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
        never_strongest: strongest_counts.iter().filter(|count| **count == 0).count(),
        penalised_images: penalised,
    })
}

impl PromptSetReport {
    /// Returns the histogram of all auxiliary scores, merged to at most `rows` rows of equal width
    /// and without empty bins at the ends. Each row is its lower edge and its share of all scores,
    /// lowest first.
    pub fn histogram_rows(&self, rows: usize) -> Vec<(f32, f64)> {
        let is_used = |share: &f64| *share > 0.0;
        let first = self.histogram.iter().position(is_used).unwrap_or(0);
        let last = self.histogram.iter().rposition(is_used).unwrap_or(0);
        let width = (last + 1 - first).div_ceil(rows.max(1));
        self.histogram[first..=last]
            .chunks(width)
            .enumerate()
            .map(|(i, chunk)| (bin_lower_edge(first + i * width), chunk.iter().sum()))
            .collect()
    }
}

/// Returns the pairs of prompts with a cosine above [`NEAR_DUPLICATE_COSINE`], most similar first.
fn find_near_duplicates(set: &EmbeddedPromptSet, limit: usize) -> Vec<NearDuplicatePair> {
    let mut pairs: Vec<NearDuplicatePair> = (0..set.prompt_embeddings.len())
        .into_par_iter()
        .flat_map_iter(|i| {
            (0..i).filter_map(move |j| {
                let cosine = dot_product(&set.prompt_embeddings[i], &set.prompt_embeddings[j]);
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
    let bin = f32::midpoint(score.clamp(-1.0, 1.0), 1.0) * HISTOGRAM_BINS as f32;
    (bin as usize).min(HISTOGRAM_BINS - 1)
}

fn bin_lower_edge(bin: usize) -> f32 {
    bin as f32 / HISTOGRAM_BINS as f32 * 2.0 - 1.0
}

fn histogram_quantile(histogram: &[f64], share: f64) -> f32 {
    let mut sum = 0.0;
    let bin = histogram.iter().position(|s| {
        sum += s;
        sum >= share
    });
    bin_lower_edge(bin.unwrap_or(HISTOGRAM_BINS - 1))
}

/// Returns the 5th percentile, the median and the 95th percentile.
fn percentiles(mut values: Vec<f32>) -> [f32; 3] {
    values.sort_unstable_by(f32::total_cmp);
    let last = values.len().saturating_sub(1);
    [0.05, 0.5, 0.95].map(|share| values[(last as f64 * share).round() as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::balance::statistics::StatisticsSettings;
    use crate::prompts::PromptSet;

    fn embedded_set(embeddings: Vec<Vec<f32>>) -> EmbeddedPromptSet {
        let texts = (0..embeddings.len()).map(|i| format!("prompt {i}")).collect();
        let settings = StatisticsSettings::with_top_k(1);
        EmbeddedPromptSet::from_embeddings(PromptSet::new("t", texts), embeddings, 10.0, settings)
    }

    #[test]
    fn a_report_finds_duplicates_dominant_prompts_and_penalised_images() {
        let cosine = (1.0f32 - 0.001).sqrt();
        let set = embedded_set(vec![
            vec![1.0, 0.0, 0.0],
            vec![0.0, 1.0, 0.0],
            vec![cosine, 0.0, (1.0 - cosine * cosine).sqrt()],
        ]);
        // Three images that match the first prompt alone, and one that matches no prompt.
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
    fn there_is_no_report_without_images() {
        let balance = BalanceParameters::RAW;
        assert!(
            measure_prompt_set(&embedded_set(vec![vec![1.0], vec![-1.0]]), &[], &balance, 5)
                .is_none()
        );
    }
}
