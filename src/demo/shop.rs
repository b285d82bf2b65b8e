//! A shop that stores its pictures in a folder and publishes an event per change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::Utc;
use rand::RngExt;
use rand::seq::IteratorRandom;
use rayon::prelude::*;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{PhotoStyle, Product, Scene, seeded_rng};
use super::draw::{DrawError, render_jpeg};
use crate::ingest::source::ImageEvent;
use crate::publish::{PublishError, Publisher};
use crate::record::{AttributeType, AttributeTypes, Operation};

/// Width and height of a picture in pixels.
const IMAGE_SIDE_PX: u32 = 256;
/// Pictures that are drawn before their events are published.
const DRAW_BATCH_SIZE: u64 = 32;

/// Why the shop stops.
#[derive(Debug, thiserror::Error)]
pub enum ShopError {
    /// A picture could not be drawn.
    #[error(transparent)]
    Draw(#[from] DrawError),
    /// A picture could not be written.
    #[error("{file}: {source}")]
    Write {
        /// Path of the file.
        file: PathBuf,
        /// Why it could not be written.
        source: std::io::Error,
    },
    /// An event could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// A change to the shop's pictures, to be shown to a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShopChange {
    /// `added`, `changed` or `deleted`.
    pub action: &'static str,
    /// Id of the image.
    pub image_id: String,
    /// Title of the picture, or of the deleted one.
    pub title: String,
}

/// A shop with its pictures, and the publisher of its events.
pub struct DemoShop {
    folder: PathBuf,
    publisher: Publisher,
    seed: u64,
    style: PhotoStyle,
    next_image_number: u64,
    scenes: BTreeMap<String, Scene>,
}

impl DemoShop {
    /// Creates a shop without pictures. `folder` must exist.
    pub fn new(folder: &Path, publisher: Publisher, seed: u64, style: PhotoStyle) -> Self {
        Self {
            folder: folder.to_owned(),
            publisher,
            seed,
            style,
            next_image_number: 0,
            scenes: BTreeMap::new(),
        }
    }

    /// Returns the attributes of the shop's events, with their types.
    pub fn attribute_types() -> AttributeTypes {
        let text = ["title", "kind", "colour", "pattern"]
            .map(|name| (name.to_owned(), AttributeType::Text));
        let mut types = AttributeTypes::from(text);
        types.insert("count".into(), AttributeType::Integer);
        types
    }

    /// Returns what each picture shows, by image id.
    pub fn scenes(&self) -> &BTreeMap<String, Scene> {
        &self.scenes
    }

    /// Draws and publishes `count` pictures. `on_published` is called after each.
    pub async fn publish_initial_images(
        &mut self,
        count: u64,
        token: &CancellationToken,
        mut on_published: impl FnMut(),
    ) -> Result<(), ShopError> {
        while self.next_image_number < count && !token.is_cancelled() {
            let numbers =
                self.next_image_number..(self.next_image_number + DRAW_BATCH_SIZE).min(count);
            let scenes = numbers.clone().map(|n| Scene::sample(self.seed, n, self.style)).collect();
            for (number, (scene, jpeg)) in numbers.zip(draw_scenes(scenes).await?) {
                self.publish_image(&format_image_id(number), scene, &jpeg).await?;
                self.next_image_number = number + 1;
                on_published();
            }
        }
        Ok(())
    }

    /// Adds, changes or deletes one picture per `period` until `token` is cancelled.
    pub async fn publish_changes(
        &mut self,
        period: Duration,
        token: &CancellationToken,
        mut on_change: impl FnMut(ShopChange),
    ) -> Result<(), ShopError> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(period) => on_change(self.publish_one_change().await?),
                () = token.cancelled() => return Ok(()),
            }
        }
    }

    async fn publish_one_change(&mut self) -> Result<ShopChange, ShopError> {
        let rng = &mut seeded_rng(self.seed, 100 + self.next_image_number);
        let number = self.next_image_number;
        self.next_image_number += 1;
        let known_image_id = self.scenes.keys().choose(rng).cloned();
        let (action, image_id) = match (rng.random_range(0..3), known_image_id) {
            (0, Some(id)) => ("deleted", id),
            (1, Some(id)) => ("changed", id),
            _ => ("added", format_image_id(number)),
        };
        if action == "deleted" {
            let title = self.scenes.remove(&image_id).map(|s| s.title()).unwrap_or_default();
            self.publisher.send(&bare_event(&image_id, Operation::Delete)).await?;
            let file = self.image_path(&image_id);
            let removed = tokio::fs::remove_file(&file).await;
            removed.map_err(|source| ShopError::Write { file, source })?;
            return Ok(ShopChange { action, image_id, title });
        }
        let scene = Scene::sample(self.seed, number, self.style);
        let title = scene.title();
        for (scene, jpeg) in draw_scenes(vec![scene]).await? {
            self.publish_image(&image_id, scene, &jpeg).await?;
        }
        Ok(ShopChange { action, image_id, title })
    }

    /// Writes a picture, completely or not at all, and publishes its event.
    async fn publish_image(
        &mut self,
        image_id: &str,
        scene: Scene,
        jpeg: &[u8],
    ) -> Result<(), ShopError> {
        let file = self.image_path(image_id);
        let unfinished = file.with_extension("part");
        let write = async {
            tokio::fs::write(&unfinished, jpeg).await?;
            tokio::fs::rename(&unfinished, &file).await
        };
        write.await.map_err(|source| ShopError::Write { file: file.clone(), source })?;
        let attributes = scene.attributes().into_iter().map(|(name, text)| {
            let value = match name.as_str() {
                "count" => text.parse::<u8>().map_or_else(|_| text.clone().into(), Into::into),
                _ => text.into(),
            };
            (name, value)
        });
        let upsert = ImageEvent {
            uri: Url::from_file_path(&file).ok().map(String::from),
            attributes: attributes.collect(),
            ..bare_event(image_id, Operation::Upsert)
        };
        self.publisher.send(&upsert).await?;
        self.scenes.insert(image_id.to_owned(), scene);
        Ok(())
    }

    fn image_path(&self, image_id: &str) -> PathBuf {
        self.folder.join(format!("{image_id}.jpg"))
    }
}

fn format_image_id(number: u64) -> String {
    format!("p-{number:05}")
}

/// Returns an event without URI and attributes.
fn bare_event(image_id: &str, operation: Operation) -> ImageEvent {
    ImageEvent {
        image_id: image_id.to_owned(),
        operation,
        uri: None,
        data: None,
        embedding: None,
        model: None,
        sequence: None,
        event_time: Some(Utc::now()),
        attributes: BTreeMap::new(),
    }
}

/// Draws scenes in parallel.
async fn draw_scenes(scenes: Vec<Scene>) -> Result<Vec<(Scene, Vec<u8>)>, DrawError> {
    let draw = |scene: Scene| render_jpeg(&scene, IMAGE_SIDE_PX).map(|jpeg| (scene, jpeg));
    let drawing = tokio::task::spawn_blocking(move || scenes.into_par_iter().map(draw).collect());
    match drawing.await {
        Ok(drawn) => drawn,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// What a drawn picture shows: a line of `truth.jsonl`.
#[derive(Debug, Serialize)]
struct TruthRecord<'a> {
    file: &'a str,
    title: String,
    captions: Vec<String>,
    style: PhotoStyle,
    background: super::catalogue::Background,
    products: &'a [Product],
    attributes: BTreeMap<String, String>,
    held_out: bool,
}

/// Draws `count` pictures into `folder`, which must exist, and writes `truth.jsonl` next to them.
/// `on_drawn` is called with how many more are done.
pub fn render_catalogue(
    folder: &Path,
    seed: u64,
    count: u64,
    style: PhotoStyle,
    side: u32,
    on_drawn: impl Fn(u64),
) -> Result<(), ShopError> {
    use std::io::Write as _;
    let truth_file = folder.join("truth.jsonl");
    let failed = |file: &Path| {
        let file = file.to_owned();
        move |source| ShopError::Write { file, source }
    };
    let truth = std::fs::File::create(&truth_file).map_err(failed(&truth_file))?;
    let mut truth = std::io::BufWriter::new(truth);
    for first in (0..count).step_by(256) {
        let numbers: Vec<u64> = (first..(first + 256).min(count)).collect();
        let lines: Vec<String> = numbers
            .par_iter()
            .map(|number| {
                let scene = Scene::sample(seed, *number, style);
                let name = format!("{number:06}.jpg");
                let file = folder.join(&name);
                std::fs::write(&file, render_jpeg(&scene, side)?).map_err(failed(&file))?;
                let line = TruthRecord {
                    file: &name,
                    title: scene.title(),
                    captions: scene.captions(),
                    style,
                    background: scene.background,
                    products: &scene.products,
                    attributes: scene.attributes(),
                    held_out: scene.is_held_out(),
                };
                serde_json::to_string(&line).map_err(|e| failed(&truth_file)(e.into()))
            })
            .collect::<Result<_, ShopError>>()?;
        for line in &lines {
            writeln!(truth, "{line}").map_err(failed(&truth_file))?;
        }
        on_drawn(lines.len() as u64);
    }
    truth.flush().map_err(failed(&truth_file))
}
