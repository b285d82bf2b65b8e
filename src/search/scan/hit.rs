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
