//! Compares imported embeddings with those that the model computes of the same images.

use std::sync::Arc;

use futures::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::error::ImportError;
use super::plan::ImportPlan;
use crate::clip::{Encoders, Pixels};
use crate::ingest::decode::{DecodeOptions, decode_image};
use crate::ingest::fetch::Fetcher;
use crate::record::ImageSource;

/// Images that are embedded again, spread over all rows that have an address.
pub const SAMPLED_IMAGES: usize = 64;
/// Cosine below which the median of the sample does not allow an import: pictures that were scaled by another
/// library reach 0.99 and more, other models of the same dimension are near 0.
pub const MIN_MEDIAN_COSINE: f64 = 0.99;

/// Images fetched concurrently.
const MAX_CONCURRENT_FETCHES: usize = 8;
/// Images that are embedded in one pass of the encoder.
const BATCH_IMAGES: usize = 16;

/// How far imported embeddings agree with the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Images that were sampled: those that have an address, at most [`SAMPLED_IMAGES`].
    pub sampled: usize,
    /// Row and cosine of each image that could be read, least cosine first.
    pub cosines: Vec<(usize, f64)>,
    /// Why the first image could not be read; `None` if all could.
    pub unreadable: Option<String>,
}

impl Agreement {
    /// Returns the median of the cosines; `None` if no image could be read.
    pub fn median(&self) -> Option<f64> {
        let (upper, lower) = (self.cosines.len() / 2, self.cosines.len().checked_sub(1)? / 2);
        Some(f64::midpoint(self.cosines[lower].1, self.cosines[upper].1))
    }
}

/// Embeds a sample of the images of `plan` and compares it with the plan's embeddings. `progress` is called once
/// per image that was fetched. Ends early, with what was compared, if `cancel` is cancelled.
pub async fn measure_agreement(
    plan: &ImportPlan,
    encoders: &Arc<dyn Encoders>,
    fetcher: &Fetcher,
    decode: &DecodeOptions,
    progress: &(dyn Fn() + Sync),
    cancel: &CancellationToken,
) -> Result<Agreement, ImportError> {
    let rows = plan.rows.iter().enumerate();
    let with_address: Vec<(usize, &str)> =
        rows.filter_map(|(row, image)| Some((row, image.as_ref()?.uri.as_deref()?))).collect();
    let sampled = with_address.len().min(SAMPLED_IMAGES);
    let sample = (0..sampled).map(|i| with_address[i * with_address.len() / sampled]);
    let sample = sample.map(|(row, uri)| (row, uri.to_owned()));
    let read = |(row, uri): (usize, String)| async move {
        let pixels = read_pixels(&uri, encoders, fetcher, decode, cancel).await;
        progress();
        (row, pixels)
    };
    let results = stream::iter(sample.map(read)).buffered(MAX_CONCURRENT_FETCHES);
    let mut batches = results.chunks(BATCH_IMAGES);
    let mut agreement = Agreement { sampled, cosines: Vec::new(), unreadable: None };
    while let Some(batch) = batches.next().await {
        let (mut rows, mut pixels) = (Vec::new(), Vec::new());
        for (row, result) in batch {
            match result {
                Ok(image) => {
                    rows.push(row);
                    pixels.push(image);
                }
                Err(reason) => _ = agreement.unreadable.get_or_insert(reason),
            }
        }
        if cancel.is_cancelled() {
            break;
        }
        if pixels.is_empty() {
            continue;
        }
        let encoders = encoders.clone();
        let embedded = tokio::task::spawn_blocking(move || encoders.embed_images(&pixels)).await;
        let embedded = embedded.map_err(|error| ImportError::Panicked(error.to_string()))??;
        for (row, embedding) in rows.into_iter().zip(embedded) {
            let embedding: Vec<f64> = embedding.iter().map(|v| f64::from(*v)).collect();
            agreement.cosines.push((row, plan.images.dot_product(row, &embedding)));
        }
    }
    agreement.cosines.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(agreement)
}

async fn read_pixels(
    uri: &str,
    encoders: &Arc<dyn Encoders>,
    fetcher: &Fetcher,
    decode: &DecodeOptions,
    cancel: &CancellationToken,
) -> Result<Pixels, String> {
    let fetched = fetcher.fetch(&ImageSource::from_uri(uri), cancel).await;
    let fetched = fetched.map_err(|error| error.to_string())?;
    let (encoders, decode) = (encoders.clone(), decode.clone());
    let preprocess = move || {
        let image = decode_image(fetched.as_ref(), &decode).map_err(|error| error.to_string())?;
        encoders.preprocess_image(&image).map_err(|error| error.to_string())
    };
    let pixels = tokio::task::spawn_blocking(preprocess).await;
    pixels.map_err(|error| error.to_string())?.map_err(|reason| format!("{uri}: {reason}"))
}
