//! Images that change continuously, and their expected state.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use rand::RngExt;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::json;
use tokio::time::sleep;

use crate::fixture::TOPIC;

/// Changes random images continuously.
pub struct UpdateGenerator {
    /// Folder of the images.
    pub folder: PathBuf,
    /// An image is written here before it is moved to its folder.
    pub staging_file: PathBuf,
    pub pictures: Vec<Vec<u8>>,
    pub producer: FutureProducer,
    pub image_count: u64,
    /// Time between two changes.
    pub pause: Duration,
    /// Newest sequence of each image, and whether the image exists.
    pub expected_images: BTreeMap<String, (u64, bool)>,
    pub sent_events: u64,
}

impl UpdateGenerator {
    /// Writes a random image as `id`.
    pub fn write_picture(&self, id: &str) {
        let picture = &self.pictures[rand::rng().random_range(0..self.pictures.len())];
        // Renaming is atomic: a reader sees the old image or the new one.
        std::fs::write(&self.staging_file, picture).unwrap();
        std::fs::rename(&self.staging_file, self.folder.join(id)).unwrap();
    }

    pub async fn send_change(&mut self, id: String, delete: bool) {
        let file = self.folder.join(&id);
        let mut event = json!({"image_id": id});
        if delete {
            let _ = std::fs::remove_file(file);
            event["operation"] = "delete".into();
        } else {
            self.write_picture(&id);
            event["uri"] = url::Url::from_file_path(file).unwrap().as_str().into();
        }
        let now = Utc::now();
        let sequence = now.timestamp_micros() as u64;
        event["sequence"] = sequence.into();
        // As in `bsap publish`; reconciling by time relies on it.
        event["event_time"] = now.to_rfc3339_opts(SecondsFormat::Micros, true).into();
        let event = event.to_string();
        let record = FutureRecord::to(TOPIC).key(&id).payload(&event);
        self.producer.send(record, Duration::from_secs(60)).await.unwrap();
        self.expected_images.insert(id, (sequence, !delete));
        self.sent_events += 1;
    }

    /// Returns the images that must exist, with their newest sequence.
    pub fn live_images(&self) -> BTreeMap<&String, u64> {
        self.expected_images.iter().filter(|(_, w)| w.1).map(|(id, w)| (id, w.0)).collect()
    }

    pub async fn run(mut self, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::SeqCst) {
            let id = image_name(rand::rng().random_range(0..self.image_count));
            let delete = rand::rng().random_ratio(1, 20);
            self.send_change(id, delete).await;
            sleep(self.pause).await;
        }
        self
    }
}

pub fn image_name(number: u64) -> String {
    format!("image-{number:05}.jpg")
}
