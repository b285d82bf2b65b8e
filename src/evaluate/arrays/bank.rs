//! What a bank of prompts says about each image: statistics and correction, in f64.

use crate::balance::fit::CORRECTION_TOP_K;
use crate::balance::products::{Packed, map_scores};
use crate::balance::statistics::{ExactStatistics, StatisticsSettings};
use crate::record::arrays::EmbeddingArray;

/// Statistics and correction of every image.
pub(super) struct BankScores {
    /// Statistics of every image, by settings in the given order.
    pub statistics: Vec<Vec<ExactStatistics>>,
    /// Mean of the best scores of every image, from which fit and concentration are computed.
    pub corrections: Vec<f64>,
}

/// Measures every image against all prompts.
pub(super) fn measure_bank(
    images: &EmbeddingArray,
    prompts: &EmbeddingArray,
    settings: &[StatisticsSettings],
    logit_scale: f32,
) -> BankScores {
    let dimension = images.dimension();
    let write_unit = |array: &EmbeddingArray, row: usize, out: &mut [f64]| {
        out.copy_from_slice(&array.unit_row(row));
    };
    let panels =
        Packed::panels(prompts.rows(), dimension, |row, out| write_unit(prompts, row, out));
    let largest_k =
        settings.iter().map(|settings| settings.top_k).fold(CORRECTION_TOP_K, usize::max);
    let measure = |_, scores: &mut [f64]| {
        let k = largest_k.min(scores.len());
        scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        scores[..k].sort_unstable_by(|a, b| b.total_cmp(a));
        let compute = |settings: &StatisticsSettings| {
            let softmax_scale = f64::from(settings.temperature) * f64::from(logit_scale);
            ExactStatistics::from_partitioned(scores, softmax_scale, settings.top_k)
        };
        let best = &scores[..scores.len().min(CORRECTION_TOP_K)];
        let correction = best.iter().sum::<f64>() / best.len() as f64;
        (settings.iter().filter_map(compute).collect::<Vec<_>>(), correction)
    };
    let write = |row: usize, out: &mut [f64]| write_unit(images, row, out);
    let measured = map_scores(images.rows(), write, &panels, dimension, measure);
    let mut statistics = vec![Vec::with_capacity(images.rows()); settings.len()];
    let mut corrections = Vec::with_capacity(images.rows());
    for (of_image, correction) in measured {
        statistics.iter_mut().zip(of_image).for_each(|(all, one)| all.push(one));
        corrections.push(correction);
    }
    BankScores { statistics, corrections }
}
