//! Thumbnails for the HTML report, embedded in it as data URIs.

use std::sync::Arc;

use crate::commands::shared::progress::progress_bar;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{StreamExt, stream};
use image::{RgbImage, imageops};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::demo::catalogue::Scene;
use crate::demo::draw::render_jpeg;
use crate::evaluate::{Corpus, EvaluationReport, ThumbnailUris, images_to_show};
use crate::ingest::decode;
use crate::ingest::fetch::Fetcher;
use crate::record::ImageSource;

/// Side of a thumbnail in pixels.
const THUMBNAIL_SIDE_PIXELS: u32 = 112;

/// JPEG quality of a thumbnail.
const JPEG_QUALITY: u8 = 72;

/// Most pictures in a report: at some 4 KB each, it can still be sent by email.
const MAX_THUMBNAILS: usize = 400;

/// Pictures fetched concurrently.
const MAX_CONCURRENT_FETCHES: usize = 8;

/// Where thumbnails come from.
pub enum ThumbnailSource<'a> {
    /// There are none.
    None,
    /// Fetched from the addresses of the images, as workers do it.
    Fetched(&'a Config),
    /// Drawn again from their content.
    Synthetic(&'a [Scene]),
}

impl ThumbnailSource<'_> {
    /// Returns thumbnails of the pictures that a report shows, and how many could not be loaded.
    pub async fn load_thumbnails(
        &self,
        report: &EvaluationReport,
        corpus: &Corpus,
        token: &CancellationToken,
    ) -> anyhow::Result<(ThumbnailUris, usize)> {
        let mut image_indices = images_to_show(report);
        image_indices.truncate(MAX_THUMBNAILS);
        let pictures: ThumbnailUris = match self {
            Self::None => return Ok((ThumbnailUris::new(), 0)),
            Self::Synthetic(scenes) => {
                let draw = |index: &u32| {
                    let jpeg =
                        render_jpeg(scenes.get(*index as usize)?, THUMBNAIL_SIDE_PIXELS).ok()?;
                    Some((*index, data_uri(&jpeg)))
                };
                tokio::task::block_in_place(|| image_indices.iter().filter_map(draw).collect())
            }
            Self::Fetched(config) => {
                let fetcher = Arc::new(Fetcher::new(&config.fetch)?);
                let bar = progress_bar("pictures", image_indices.len() as u64)?;
                let load = |index: u32| {
                    let uri = corpus.images[index as usize].uri.clone();
                    let (fetcher, bar) = (fetcher.clone(), bar.clone());
                    let options = config.decode.clone();
                    async move {
                        let content = ImageSource::from_uri(uri?);
                        let fetched = fetcher.fetch(&content, token).await;
                        bar.inc(1);
                        let bytes = fetched.ok()?.bytes;
                        let encode =
                            move || encode_thumbnail(&decode::decode_image(&bytes, &options).ok()?);
                        let jpeg = tokio::task::spawn_blocking(encode).await.ok()??;
                        Some((index, data_uri(&jpeg)))
                    }
                };
                let loaded = stream::iter(image_indices.iter().copied().map(load))
                    .buffer_unordered(MAX_CONCURRENT_FETCHES);
                let pictures = loaded.filter_map(async |thumbnail| thumbnail).collect().await;
                bar.finish_and_clear();
                pictures
            }
        };
        let missing = image_indices.len() - pictures.len();
        Ok((pictures, missing))
    }
}

fn data_uri(jpeg: &[u8]) -> String {
    format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg))
}

/// Scales a picture down to fit a square of [`THUMBNAIL_SIDE_PIXELS`], and encodes it as JPEG.
fn encode_thumbnail(picture: &RgbImage) -> Option<Vec<u8>> {
    let (width, height) = picture.dimensions();
    let longest = width.max(height).max(1);
    let scaled = |side: u32| (side * THUMBNAIL_SIDE_PIXELS.min(longest) / longest).max(1);
    let (w, h) = (scaled(width), scaled(height));
    let thumbnail = imageops::thumbnail(picture, w, h);
    let mut jpeg = Vec::new();
    jpeg_encoder::Encoder::new(&mut jpeg, JPEG_QUALITY)
        .encode(thumbnail.as_raw(), w as u16, h as u16, jpeg_encoder::ColorType::Rgb)
        .ok()?;
    Some(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbnail_keeps_the_shape_and_is_never_enlarged() {
        for (size, expected) in [((400, 200), (112, 56)), ((10, 5), (10, 5)), ((5000, 1), (112, 1))]
        {
            let jpeg = encode_thumbnail(&RgbImage::new(size.0, size.1)).unwrap();
            let decoded = decode::decode_image(&jpeg, &decode::DecodeOptions::default()).unwrap();
            assert_eq!(decoded.dimensions(), expected);
        }
    }
}
