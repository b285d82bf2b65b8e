//! Small pictures for a report, within it.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fast_image_resize::images::Image;
use fast_image_resize::{PixelType, ResizeOptions, Resizer};
use futures::{StreamExt, stream};
use image::RgbImage;
use tokio_util::sync::CancellationToken;

use super::bar;
use crate::config::Config;
use crate::demo::catalogue::Scene;
use crate::demo::draw::render;
use crate::evaluate::{Pictures, Report, World, pictured};
use crate::ingest::decode;
use crate::ingest::fetch::Fetcher;
use crate::record::Content;

/// Side of a thumbnail in pixels.
const SIDE: u32 = 112;
/// JPEG quality of a thumbnail.
const QUALITY: u8 = 72;
/// Most pictures of a report: at some 4 KB each it stays small enough to be mailed.
const MOST: usize = 400;
/// Pictures fetched at one time.
const AT_ONCE: usize = 8;

/// Where thumbnails come from.
pub enum Source<'a> {
    /// Nowhere.
    None,
    /// From where the images are, as workers fetch them.
    Fetched(&'a Config),
    /// Drawn again.
    Drawn(&'a [Scene]),
}

impl Source<'_> {
    /// Thumbnails of the pictures that a report shows, and how many could not be had.
    pub async fn of(
        &self,
        report: &Report,
        world: &World,
        token: &CancellationToken,
    ) -> anyhow::Result<(Pictures, usize)> {
        let mut wanted = pictured(report);
        wanted.truncate(MOST);
        let pictures: Pictures = match self {
            Self::None => return Ok((Pictures::new(), 0)),
            Self::Drawn(scenes) => {
                let drawn = |place: &u32| {
                    let jpeg = render(scenes.get(*place as usize)?, SIDE).ok()?;
                    Some((*place, uri(&jpeg)))
                };
                tokio::task::block_in_place(|| wanted.iter().filter_map(drawn).collect())
            }
            Self::Fetched(config) => {
                let fetcher = Arc::new(Fetcher::new(&config.fetch)?);
                let bar = bar("pictures", wanted.len() as u64)?;
                let one = |place: u32| {
                    let uri = world.pictures[place as usize].uri.clone();
                    let (fetcher, bar) = (fetcher.clone(), bar.clone());
                    let options = config.decode.clone();
                    async move {
                        let content = Content::uri(uri?);
                        let fetched = fetcher.fetch(&content, token).await;
                        bar.inc(1);
                        let bytes = fetched.ok()?.bytes;
                        let small = move || thumbnail(&decode::decode(&bytes, &options).ok()?);
                        let jpeg = tokio::task::spawn_blocking(small).await.ok()??;
                        Some((place, self::uri(&jpeg)))
                    }
                };
                let all = stream::iter(wanted.iter().copied().map(one)).buffer_unordered(AT_ONCE);
                let pictures = all.filter_map(async |found| found).collect().await;
                bar.finish_and_clear();
                pictures
            }
        };
        let missing = wanted.len() - pictures.len();
        Ok((pictures, missing))
    }
}

fn uri(jpeg: &[u8]) -> String {
    format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg))
}

/// A picture within a square of [`SIDE`], as JPEG.
fn thumbnail(picture: &RgbImage) -> Option<Vec<u8>> {
    let (width, height) = picture.dimensions();
    let longest = width.max(height).max(1);
    let scaled = |side: u32| (side * SIDE.min(longest) / longest).max(1);
    let (w, h) = (scaled(width), scaled(height));
    let from = Image::from_vec_u8(width, height, picture.as_raw().clone(), PixelType::U8x3).ok()?;
    let mut to = Image::new(w, h, PixelType::U8x3);
    Resizer::new().resize(&from, &mut to, &ResizeOptions::new()).ok()?;
    let mut jpeg = Vec::new();
    jpeg_encoder::Encoder::new(&mut jpeg, QUALITY)
        .encode(to.buffer(), w as u16, h as u16, jpeg_encoder::ColorType::Rgb)
        .ok()?;
    Some(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbnail_keeps_the_shape_and_never_grows() {
        for (size, expected) in [((400, 200), (112, 56)), ((10, 5), (10, 5)), ((5000, 1), (112, 1))]
        {
            let jpeg = thumbnail(&RgbImage::new(size.0, size.1)).unwrap();
            let back = decode::decode(&jpeg, &decode::Options::default()).unwrap();
            assert_eq!(back.dimensions(), expected);
        }
    }
}
