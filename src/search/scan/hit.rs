//! Exact results of a query.

use std::sync::Arc;

use crate::balance::calibration::ScoreDistribution;
use crate::balance::normalise::AffineTransform;
use crate::search::snapshot::ImageMetadata;

/// One image of the results.
#[derive(Debug, Clone)]
pub struct Hit {
    /// Metadata of the image.
    pub image_metadata: Arc<ImageMetadata>,
    /// Cosine similarity of query and image, as plain CLIP scores it.
    pub raw_score: f32,
    /// Rank by raw score, from 1.
    pub raw_rank: usize,
    /// Balanced score α·raw_score + β.
    pub score: f32,
    /// Rank by balanced score, from 1.
    pub rank: usize,
    /// α and β of the image.
    pub affine: AffineTransform,
}

impl Hit {
    /// Returns the raw score as answers and logs report it: within -1 and 1, which the cosine of two
    /// vectors in f32 exceeds by rounding, and never -0.0.
    pub fn reported_raw_score(&self) -> f32 {
        report_raw_score(self.raw_score)
    }

    /// Returns the balanced score as answers and logs report it; that of plain CLIP is the raw score.
    pub fn reported_score(&self) -> f32 {
        report_score(self.score, self.affine)
    }
}

/// Returns a raw score as [`Hit::reported_raw_score`] does.
pub fn report_raw_score(raw_score: f32) -> f32 {
    raw_score.clamp(-1.0, 1.0) + 0.0
}

/// Returns a balanced score as [`Hit::reported_score`] does.
pub fn report_score(score: f32, affine: AffineTransform) -> f32 {
    if affine == AffineTransform::RAW { report_raw_score(score) } else { score + 0.0 }
}

/// Exact results of one query.
#[derive(Debug)]
pub struct TopK {
    /// Best hits by balanced score, without those of earlier pages.
    pub hits: Vec<Hit>,
    /// Best hits by raw score, without those of earlier pages.
    pub raw_hits: Vec<Hit>,
    /// Number of images that were ranked.
    pub matched_image_count: usize,
    /// Mean and standard deviation of the balanced scores of all images; with a filter, of a sample of
    /// them.
    pub score_distribution: ScoreDistribution,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reported_cosine_is_at_most_1_and_no_score_is_negative_zero() {
        let plain = AffineTransform::RAW;
        let balanced = AffineTransform { alpha: 2.0, beta: 0.0 };
        assert_eq!([1.000_000_1, -1.000_000_1, 0.5].map(report_raw_score), [1.0, -1.0, 0.5]);
        assert_eq!(report_score(1.000_000_1, plain), 1.0);
        assert_eq!(report_score(2.000_000_2, balanced), 2.000_000_2);
        let zeros =
            [report_raw_score(-0.0), report_score(-0.0, plain), report_score(-0.0, balanced)];
        assert!(zeros.iter().all(|zero| zero.is_sign_positive()), "{zeros:?}");
    }
}
