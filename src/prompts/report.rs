//! What a prompt set does on a catalogue: how its scores spread, which prompts are the same, which
//! dominate, and which images they penalise. Pure.

use rayon::prelude::*;
use serde::Serialize;

use super::EmbeddedSet;
use crate::balance::normalise::{Balance, Scale};
use crate::balance::statistics::{Statistics, dot};
use crate::record::Embedding;

/// Bins of the histogram over the cosine range −1..1; a picture shows those that are used.
const BINS: usize = 400;
/// Images measured by one task, which share a histogram.
const PART: usize = 1024;
/// Prompts of a pair whose embeddings are this near say the same thing to the model.
pub const NEAR: f32 = 0.95;

/// What is reported of a set.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Images that were measured.
    pub images: usize,
    /// Share of all auxiliary scores in each bin of −1..1.
    #[serde(skip)]
    histogram: Vec<f64>,
    /// Over all auxiliary scores: 5th percentile, median, 95th percentile.
    pub scores: [f32; 3],
    /// An image's own standard deviation: 5th percentile, median, 95th percentile over images.
    pub spread: [f32; 3],
    /// An image's mean score, likewise. Where it differs much, images score on different scales.
    pub means: [f32; 3],
    /// Pairs of prompts nearer than [`NEAR`], nearest first.
    pub near_duplicates: Vec<Pair>,
    /// Prompts by how many images they are the strongest for, most first.
    pub dominating: Vec<Dominating>,
    /// How many prompts are the strongest one of no image: they say nothing about this catalogue.
    pub never_strongest: usize,
    /// Images that lose most by the balance, most first.
    pub penalised: Vec<Penalised>,
}

/// Two prompts that are nearly the same to the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    /// One.
    pub first: String,
    /// The other.
    pub second: String,
    /// Cosine of their embeddings.
    pub cosine: f32,
}

/// A prompt that is the strongest one of many images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dominating {
    /// The prompt.
    pub text: String,
    /// Images whose strongest prompt it is, of all images: 0 to 1.
    pub share: f64,
}

/// An image that loses much by the balance.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Penalised {
    /// Its index among the images that were given.
    pub image: usize,
    /// What a raw score of the catalogue's median strongest prompt loses beside the median image,
    /// in units of the raw score.
    pub loss: f32,
    /// The prompt that scores most on it.
    pub strongest: String,
    /// That score.
    pub score: f32,
}

/// Measures `set` on the stored embeddings of a catalogue, at most `limit` entries a list; the
/// constants of `balance` are taken from this set and catalogue. `None` where there are no images.
pub fn report(
    set: &EmbeddedSet,
    images: &[&Embedding],
    balance: &Balance,
    limit: usize,
) -> Option<Report> {
    struct Measured {
        statistics: Statistics,
        strongest: usize,
    }
    let parts: Vec<(Vec<Measured>, Vec<f64>)> = images
        .par_chunks(PART)
        .map(|part| {
            let mut histogram = vec![0f64; BINS];
            let measure = |image: &&Embedding| {
                let scores = set.scores(image);
                for score in &scores {
                    histogram[bin(*score)] += 1.0;
                }
                let (strongest, _) = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
                Some(Measured { statistics: set.statistics_of(&scores)?, strongest })
            };
            (part.iter().filter_map(measure).collect(), histogram)
        })
        .collect();
    let mut measured = Vec::with_capacity(images.len());
    let mut histogram = vec![0f64; BINS];
    for (part, counts) in parts {
        measured.extend(part);
        histogram.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    if measured.is_empty() {
        return None;
    }
    let statistics = measured.iter().map(|m| m.statistics);
    let balance = Balance { scale: Scale::of(balance.normaliser, statistics), ..*balance };
    let mut wins = vec![0usize; set.embeddings.len()];
    for image in &measured {
        wins[image.strongest] += 1;
    }
    let total: f64 = histogram.iter().sum();
    for share in &mut histogram {
        *share /= total;
    }

    let over = |value: fn(&Statistics) -> f32| {
        percentiles(measured.iter().map(|m| value(&m.statistics)).collect())
    };
    // Compared at one raw score, an image's loss is what its own α and β take from it.
    let typical = over(|s| s.max)[1];
    let balanced = |m: &Measured| balance.affine(&m.statistics, set.scale).score(typical);
    let median = percentiles(measured.iter().map(balanced).collect())[1];
    let mut penalised: Vec<Penalised> = measured
        .iter()
        .enumerate()
        .map(|(image, m)| Penalised {
            image,
            loss: median - balanced(m),
            strongest: set.set.texts[m.strongest].clone(),
            score: m.statistics.max,
        })
        .collect();
    penalised.sort_by(|a, b| b.loss.total_cmp(&a.loss).then(a.image.cmp(&b.image)));
    penalised.truncate(limit);

    let mut dominating: Vec<Dominating> = wins
        .iter()
        .zip(&set.set.texts)
        .map(|(wins, text)| Dominating {
            text: text.clone(),
            share: *wins as f64 / measured.len() as f64,
        })
        .collect();
    dominating.sort_by(|a, b| b.share.total_cmp(&a.share));
    dominating.truncate(limit);

    Some(Report {
        images: measured.len(),
        scores: [0.05, 0.5, 0.95].map(|share| quantile(&histogram, share)),
        histogram,
        spread: over(|s| s.std),
        means: over(|s| s.mean),
        near_duplicates: near_duplicates(set, limit),
        dominating,
        never_strongest: wins.iter().filter(|w| **w == 0).count(),
        penalised,
    })
}

impl Report {
    /// The histogram of all auxiliary scores in at most `rows` rows of equal width, lowest first:
    /// lower edge, and share of all scores.
    pub fn rows(&self, rows: usize) -> Vec<(f32, f64)> {
        let used = |share: &f64| *share > 0.0;
        let first = self.histogram.iter().position(used).unwrap_or(0);
        let last = self.histogram.iter().rposition(used).unwrap_or(0);
        let width = (last + 1 - first).div_ceil(rows.max(1));
        self.histogram[first..=last]
            .chunks(width)
            .enumerate()
            .map(|(i, chunk)| (edge(first + i * width), chunk.iter().sum()))
            .collect()
    }
}

/// Pairs of prompts nearer than [`NEAR`], nearest first.
fn near_duplicates(set: &EmbeddedSet, limit: usize) -> Vec<Pair> {
    let mut pairs: Vec<Pair> = (0..set.embeddings.len())
        .into_par_iter()
        .flat_map_iter(|i| {
            (0..i).filter_map(move |j| {
                let cosine = dot(&set.embeddings[i], &set.embeddings[j]);
                (cosine > NEAR).then(|| Pair {
                    first: set.set.texts[j].clone(),
                    second: set.set.texts[i].clone(),
                    cosine,
                })
            })
        })
        .collect();
    pairs.sort_by(|a, b| b.cosine.total_cmp(&a.cosine));
    pairs.truncate(limit);
    pairs
}

fn bin(score: f32) -> usize {
    let place = f32::midpoint(score.clamp(-1.0, 1.0), 1.0) * BINS as f32;
    (place as usize).min(BINS - 1)
}

/// The lower edge of a bin.
fn edge(bin: usize) -> f32 {
    bin as f32 / BINS as f32 * 2.0 - 1.0
}

fn quantile(histogram: &[f64], share: f64) -> f32 {
    let mut sum = 0.0;
    let found = histogram.iter().position(|s| {
        sum += s;
        sum >= share
    });
    edge(found.unwrap_or(BINS - 1))
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

    fn set(embeddings: Vec<Vec<f32>>) -> EmbeddedSet {
        let texts = (0..embeddings.len()).map(|i| format!("prompt {i}")).collect();
        let set = PromptSet::new("t", texts);
        let key = StatisticsKey::new("t", 1, &set.fingerprint(), 10.0, 1);
        EmbeddedSet { set, key, embeddings, scale: 10.0, top_k: 1, vocabulary: OnceLock::new() }
    }

    #[test]
    fn what_a_set_does_is_found() {
        let near = (1.0f32 - 0.001).sqrt();
        let set = set(vec![
            vec![1.0, 0.0, 0.0],
            vec![0.0, 1.0, 0.0],
            vec![near, 0.0, (1.0 - near * near).sqrt()],
        ]);
        // Three images of the first prompt alone, and one that no prompt fits.
        let images = [[1.0, 0.1, 0.0], [1.0, 0.2, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]].map(
            |v: [f32; 3]| {
                let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
                Embedding::round(&v.map(|x| x / norm))
            },
        );
        let balance = Balance {
            normaliser: Normaliser::Nnn,
            weight: 1.0,
            lambda: 1.0,
            scale: Scale::default(),
        };
        let images: Vec<&Embedding> = images.iter().collect();
        let report = report(&set, &images, &balance, 2).unwrap();
        assert_eq!(report.images, 4);
        assert_eq!(report.near_duplicates.len(), 1);
        assert_eq!(report.near_duplicates[0].second, "prompt 2");
        assert_eq!(
            (report.dominating[0].text.as_str(), report.dominating[0].share),
            ("prompt 0", 0.75)
        );
        assert_eq!(report.never_strongest, 1);
        assert_eq!(report.penalised.len(), 2);
        assert_eq!(report.penalised[0].image, 2, "the image that a prompt describes exactly");
        assert!(report.penalised[0].loss >= report.penalised[1].loss);
        let rows = report.rows(12);
        assert!(rows.len() <= 12);
        assert!((rows.iter().map(|r| r.1).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn no_images_no_report() {
        let balance = Balance::RAW;
        assert!(report(&set(vec![vec![1.0], vec![-1.0]]), &[], &balance, 5).is_none());
    }
}
