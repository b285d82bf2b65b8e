//! Exact results.

use std::sync::Arc;

use crate::balance::calibration::ScoreDistribution;
use crate::balance::normalise::AffineTransform;
use crate::search::snapshot::ImageMetadata;

/// One image among the results.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The image.
    pub image: Arc<ImageMetadata>,
    /// Cosine of query and image: plain CLIP.
    pub raw_score: f32,
    /// Place in the ranking of plain CLIP, from 1.
    pub raw_rank: usize,
    /// Balanced score α·raw + β.
    pub score: f32,
    /// Place in the balanced ranking, from 1.
    pub rank: usize,
    /// The image's own factor and shift.
    pub affine: AffineTransform,
}

/// Exact results of one query.
#[derive(Debug)]
pub struct TopK {
    /// Best by balanced score, from the wanted place on.
    pub hits: Vec<Hit>,
    /// Best by raw score, from the same place on.
    pub raw_hits: Vec<Hit>,
    /// Rows that were ranked.
    pub matched: usize,
    /// Moments of the balanced scores of all images; with a filter, of a part of them.
    pub score_distribution: ScoreDistribution,
}
