//! Random events of every kind, and the state of the catalogue that they must result in.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::record::to_hex;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Number of different images; each event appends a few bytes that no decoder reads.
const PICTURE_COUNT: u64 = 32;
/// Number of sent messages that may be repeated.
const MAX_HISTORY: usize = 20_000;
const BASE64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

/// A message as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentMessage {
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    pub timestamp_ms: i64,
}

/// The expected final state of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedImage {
    pub sequence: u64,
    /// SHA-256 of the image; `None` if it is deleted.
    pub content_hash: Option<String>,
}

/// Generates random messages and records the expected result.
pub struct EventGenerator {
    rng: ChaCha8Rng,
    folder: std::path::PathBuf,
    pictures: Vec<Vec<u8>>,
    /// Sent messages that may be repeated.
    history: Vec<SentMessage>,
    last_number: u64,
    /// Maximum number of different image ids.
    pub max_images: u64,
    pub expected_images: BTreeMap<String, ExpectedImage>,
    /// Id and sequence of the last upsert that is not superseded by an earlier message.
    pub last_upsert: Option<(String, u64)>,
    /// Ids and sequences of deletes.
    pub deleted: BTreeSet<(String, u64)>,
    /// Messages that result in one row each.
    pub expected_rows: u64,
    /// Messages whose image does not exist.
    pub missing_images: u64,
    /// Messages that must be dead-lettered, by partition and offset.
    pub poison_messages: BTreeMap<(i32, i64), SentMessage>,
    pub sent_messages: u64,
    pub duplicates: u64,
    /// Messages that carry an older version than was sent before.
    pub stale: u64,
    pub deletes: u64,
}

enum MessageKind {
    Valid,
    MissingImage,
    Poison,
}

impl EventGenerator {
    /// Creates a generator that writes images with file addresses to `folder`.
    pub fn new(seed: u64, folder: &std::path::Path) -> Self {
        let picture = |n| render_jpeg(&Scene::sample(7, n, PhotoStyle::Studio), 64).unwrap();
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            folder: folder.to_owned(),
            pictures: (0..PICTURE_COUNT).map(picture).collect(),
            history: Vec::new(),
            last_number: 0,
            max_images: u64::MAX,
            expected_images: BTreeMap::new(),
            last_upsert: None,
            deleted: BTreeSet::new(),
            expected_rows: 0,
            missing_images: 0,
            poison_messages: BTreeMap::new(),
            sent_messages: 0,
            duplicates: 0,
            stale: 0,
            deletes: 0,
        }
    }

    /// Sends `count` messages to `topic` and waits until Kafka has them.
    pub async fn send(&mut self, producer: &FutureProducer, topic: &str, count: u64) {
        let mut waiting = Vec::new();
        for _ in 0..count {
            let (kind, sent) = self.draw_message();
            let headers = sent.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
                headers.insert(Header { key, value: value.as_ref() })
            });
            assert_eq!(headers.count(), sent.headers.len());
            let mut record = FutureRecord::to(topic).headers(headers).timestamp(sent.timestamp_ms);
            record.key = sent.key.as_ref();
            record.payload = sent.value.as_ref();
            let delivery = producer.send_result(record).map_err(|(e, _)| e).unwrap();
            waiting.push((kind, sent.clone(), delivery));
        }
        for (kind, sent, delivery) in waiting {
            let delivered = delivery.await.unwrap().map_err(|(e, _)| e).unwrap();
            self.sent_messages += 1;
            match kind {
                MessageKind::Valid => self.expected_rows += 1,
                MessageKind::MissingImage => self.missing_images += 1,
                MessageKind::Poison => {
                    self.poison_messages.insert((delivered.partition, delivered.offset), sent);
                }
            }
        }
    }

    fn draw_message(&mut self) -> (MessageKind, SentMessage) {
        self.last_number += 1;
        match self.rng.random_range(0..100) {
            0..4 => (MessageKind::Poison, self.poison_message()),
            4..5 => (MessageKind::MissingImage, self.missing_image_message()),
            5..13 if !self.history.is_empty() => {
                let repeated = self.rng.random_range(0..self.history.len());
                self.duplicates += 1;
                (MessageKind::Valid, self.history[repeated].clone())
            }
            kind => {
                let sent = self.change_message(kind < 20);
                if self.history.len() < MAX_HISTORY {
                    self.history.push(sent.clone());
                } else {
                    let replaced = self.rng.random_range(0..MAX_HISTORY);
                    self.history[replaced] = sent.clone();
                }
                (MessageKind::Valid, sent)
            }
        }
    }

    /// Generates a new version of an image; one in ten is older than the newest that was sent.
    fn change_message(&mut self, delete: bool) -> SentMessage {
        let image_count = self.last_number.div_ceil(2).min(self.max_images);
        let id = format!("image-{}", self.rng.random_range(0..image_count));
        let known = self.expected_images.get(&id).map_or(0, |newest| newest.sequence);
        let stale = known > 2 && self.rng.random_ratio(1, 10);
        // Odd sequences are left free for versions that arrive late.
        let sequence = if stale { known - 1 } else { known + 2 };
        let mut event = json!({"image_id": id, "sequence": sequence});
        let content = if delete {
            event["operation"] = "delete".into();
            self.deletes += 1;
            None
        } else {
            Some(self.add_picture(&id, sequence, &mut event))
        };
        if stale {
            self.stale += 1;
        } else {
            if content.is_some() {
                self.last_upsert = Some((id.clone(), sequence));
            } else {
                self.deleted.insert((id.clone(), sequence));
            }
            self.expected_images
                .insert(id.clone(), ExpectedImage { sequence, content_hash: content });
        }
        // Most events of an image are in one partition, as they should be; a few are not.
        let key = if self.rng.random_ratio(1, 6) {
            format!("elsewhere-{}", self.last_number)
        } else {
            id
        };
        self.build_message(Some(key.into_bytes()), Some(event.to_string().into_bytes()))
    }

    /// Adds an image to `event` that no other event has, inline or by address; returns its hash.
    fn add_picture(&mut self, id: &str, sequence: u64, event: &mut Value) -> String {
        let which = self.rng.random_range(0..self.pictures.len());
        let mut bytes = self.pictures[which].clone();
        bytes.extend(format!("{id}@{sequence}#{}", self.last_number).bytes());
        let hash = to_hex(&Sha256::digest(&bytes));
        if self.rng.random_ratio(1, 4) {
            let file = self.folder.join(format!("{}.jpg", self.last_number));
            std::fs::write(&file, bytes).unwrap();
            event["uri"] = url::Url::from_file_path(file).unwrap().as_str().into();
        } else {
            event["data"] = BASE64.encode(bytes).into();
        }
        hash
    }

    fn missing_image_message(&mut self) -> SentMessage {
        let file = self.folder.join(format!("never-{}.jpg", self.last_number));
        let uri = url::Url::from_file_path(file).unwrap();
        let id = format!("gone-{}", self.last_number);
        let event = json!({"image_id": id, "sequence": 1, "uri": uri.as_str()});
        self.build_message(Some(id.into_bytes()), Some(event.to_string().into_bytes()))
    }

    fn poison_message(&mut self) -> SentMessage {
        let id = format!("poison-{}", self.last_number);
        let event = match self.rng.random_range(0..8) {
            0 => {
                let noise = (0..200).map(|_| self.rng.random::<u8>()).collect();
                return self.build_message(None, Some(noise));
            }
            1 => return self.build_message(None, None),
            2 => json!({"image_id": id, "uri": "https://example.org/a.jpg"}),
            3 => {
                json!({"image_id": id, "sequence": 1, "data": BASE64.encode(b"\xff\xd8\xff no picture")})
            }
            4 => json!({"image_id": id, "sequence": 1, "uri": "file:///etc/passwd"}),
            5 => json!({"image_id": id, "sequence": 1, "uri": "http://127.0.0.1:9/a.jpg"}),
            6 => {
                json!({"specversion": "1.0", "type": "com.example.sold", "source": "/", "id": "1", "subject": id})
            }
            _ => {
                let record = |name: &str| {
                    json!({"eventName": name, "s3": {"bucket": {"name": "b"},
                    "object": {"key": "a.jpg", "sequencer": "1"}}})
                };
                json!({"Records": [record("ObjectCreated:Put"), record("ObjectTagging:Put")]})
            }
        };
        self.build_message(Some(id.into_bytes()), Some(event.to_string().into_bytes()))
    }

    fn build_message(&mut self, key: Option<Vec<u8>>, value: Option<Vec<u8>>) -> SentMessage {
        let number = self.last_number;
        let headers = match number % 3 {
            // A header name may occur twice, and a value may be null or not text.
            0 => vec![
                ("trace".into(), Some(number.to_be_bytes().to_vec())),
                ("trace".into(), None),
                ("bytes".into(), Some(vec![0, 0xff, 0xfe])),
            ],
            _ => Vec::new(),
        };
        SentMessage { key, value, headers, timestamp_ms: 1_600_000_000_000 + number as i64 }
    }
}
