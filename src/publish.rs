//! Announcing images: files, folders, bucket prefixes and JSON lines become new-image events.
//!
//! Folders and buckets are listed; an event's time and sequence are the object's last change, so
//! that announcing the same folder twice brings nothing new. JSON lines are checked by the rules
//! that workers apply, before anything is sent.

use std::collections::BTreeMap;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::stream::{BoxStream, once};
use futures::{Stream, StreamExt};
use object_store::{ObjectMeta, ObjectStoreExt};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};
use tokio_util::sync::CancellationToken;
use tracing::info;
use url::Url;

use crate::ingest::source::{Decoder, ImageEvent};
use crate::kafka;
use crate::record::{
    AttributeType, AttributeTypes, Attributes, KafkaMessage, Operation, SequenceKey,
    TopicPartition, VersionOrdering,
};
use crate::retry::{Classify, Disposition};
use crate::store::{self, Store, StoreError};
use crate::telemetry::event;

/// Events handed to Kafka that are not acknowledged yet.
const MAX_UNACKNOWLEDGED_EVENTS: usize = 512;
/// Longest JSON line: Kafka's usual limit for a message.
const MAX_LINE_BYTES: usize = 1 << 20;
/// What is taken for a picture when a folder or a bucket is listed.
const IMAGE_EXTENSIONS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// Why nothing more can be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A folder or bucket cannot be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A path is not there, or is nothing that can be announced.
    #[error("{target}: {reason}")]
    InvalidTarget {
        /// As given.
        target: String,
        /// Why.
        reason: String,
    },
    /// Lines cannot be read.
    #[error("{name}: {source}")]
    ReadLines {
        /// The file.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// Kafka did not take an event.
    #[error("topic {topic} at {brokers}: {source}")]
    Kafka {
        /// The topic.
        topic: String,
        /// The brokers.
        brokers: String,
        /// Why.
        source: rdkafka::error::KafkaError,
    },
}

impl Classify for PublishError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Kafka { source, .. } => kafka::classify_error(source),
            Self::InvalidTarget { .. } | Self::ReadLines { .. } => Disposition::Fatal,
        }
    }
}

/// An event to send, or an input that is none, with the reason.
pub type PublishInput = Result<ImageEvent, String>;

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishSummary {
    /// Events acknowledged by Kafka.
    pub published: u64,
    /// Inputs that are no events.
    pub skipped: u64,
}

/// Sends events to a topic, keyed by image id.
pub struct Publisher {
    producer: FutureProducer,
    topic: String,
    brokers: String,
}

impl Publisher {
    /// Makes the producer; no connection is opened yet.
    pub fn new(kafka: &kafka::KafkaOptions, topic: &str) -> Result<Self, PublishError> {
        let producer = kafka.producer_config().create().map_err(|source| PublishError::Kafka {
            topic: topic.to_owned(),
            brokers: kafka.brokers.clone(),
            source,
        })?;
        Ok(Self { producer, topic: topic.to_owned(), brokers: kafka.brokers.clone() })
    }

    /// Sends one event and returns when all in-sync replicas have it.
    pub async fn send(&self, event: &ImageEvent) -> Result<(), PublishError> {
        self.send_with_headers(event, &[]).await
    }

    /// The same with headers, each a name and a value.
    pub async fn send_with_headers(
        &self,
        event: &ImageEvent,
        headers: &[(&str, &str)],
    ) -> Result<(), PublishError> {
        let payload = serde_json::to_string(event).map_err(|e| PublishError::InvalidTarget {
            target: event.image_id.clone(),
            reason: e.to_string(),
        })?;
        let mut record = FutureRecord::to(&self.topic).key(&event.image_id).payload(&payload);
        if !headers.is_empty() {
            let all = headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
                all.insert(Header { key, value: Some(*value) })
            });
            record = record.headers(all);
        }
        let sent = self.producer.send(record, Duration::from_secs(30)).await;
        sent.map(|_| ()).map_err(|(source, _)| PublishError::Kafka {
            topic: self.topic.clone(),
            brokers: self.brokers.clone(),
            source,
        })
    }

    /// Sends every event of `candidates` in order until `token` is cancelled; `on_candidate` hears
    /// of each that was sent or skipped.
    pub async fn send_all(
        &self,
        inputs: impl Stream<Item = Result<PublishInput, PublishError>>,
        token: &CancellationToken,
        mut on_input: impl FnMut(&PublishInput),
    ) -> Result<PublishSummary, PublishError> {
        let mut summary = PublishSummary::default();
        let sent = inputs
            .take_until(token.cancelled())
            .map(|candidate| async {
                let candidate = candidate?;
                if let Ok(event) = &candidate {
                    self.send(event).await?;
                }
                Ok::<_, PublishError>(candidate)
            })
            .buffered(MAX_UNACKNOWLEDGED_EVENTS);
        let mut sent = std::pin::pin!(sent);
        while let Some(candidate) = sent.next().await {
            let candidate = candidate?;
            match candidate {
                Ok(_) => summary.published += 1,
                Err(_) => summary.skipped += 1,
            }
            on_input(&candidate);
        }
        info!(
            event = event::PUBLISH,
            published = summary.published,
            skipped = summary.skipped,
            "events published"
        );
        Ok(summary)
    }

    /// Waits until everything that was handed over is acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), PublishError> {
        self.producer.flush(timeout).map_err(|source| PublishError::Kafka {
            topic: self.topic.clone(),
            brokers: self.brokers.clone(),
            source,
        })
    }
}

/// How events are made from what is listed.
#[derive(Debug, Clone, Default)]
pub struct EventTemplate {
    /// Put before each image id.
    pub id_prefix: String,
    /// Attributes that every event gets.
    pub attributes: BTreeMap<String, serde_json::Value>,
    /// Date every event now instead of at the object's last change.
    pub use_current_time: bool,
    /// What orders the versions of an image: decides whether `sequence` is set.
    pub ordering: VersionOrdering,
}

impl EventTemplate {
    /// The event that announces `uri` as changed at `changed`.
    pub fn upsert_event(&self, id: &str, uri: &str, changed: DateTime<Utc>) -> ImageEvent {
        let time = if self.use_current_time { Utc::now() } else { changed };
        ImageEvent {
            uri: Some(uri.to_owned()),
            attributes: self.attributes.clone(),
            ..self.base_event(id, Operation::Upsert, time)
        }
    }

    /// The event that says that an image is gone.
    pub fn delete_event(&self, id: &str) -> ImageEvent {
        self.base_event(id, Operation::Delete, Utc::now())
    }

    /// The event that `id` changed at `time`, without what an upsert needs besides.
    pub fn base_event(&self, id: &str, operation: Operation, time: DateTime<Utc>) -> ImageEvent {
        let sequence = u64::try_from(time.timestamp_micros()).ok();
        ImageEvent {
            image_id: format!("{}{id}", self.id_prefix),
            operation,
            uri: None,
            data: None,
            sequence: sequence.filter(|_| self.ordering == VersionOrdering::Sequence),
            event_time: Some(time),
            attributes: BTreeMap::new(),
        }
    }
}

/// Stored attributes as events have them, by their declared types; one that is not declared any more
/// is left out.
pub fn attributes_to_json(
    attributes: &Attributes,
    types: &AttributeTypes,
) -> BTreeMap<String, Value> {
    let value = |(name, text): (&String, &String)| {
        let value = match types.get(name)? {
            AttributeType::Text | AttributeType::Time => Value::String(text.clone()),
            AttributeType::Integer | AttributeType::Number | AttributeType::Boolean => {
                serde_json::from_str(text).ok()?
            }
        };
        Some((name.clone(), value))
    };
    attributes.iter().filter_map(value).collect()
}

/// The events for a file, a folder, a bucket prefix, or a single http(s) address.
pub async fn discover(
    target: &str,
    options: &BTreeMap<String, String>,
    template: EventTemplate,
) -> Result<BoxStream<'static, Result<PublishInput, PublishError>>, PublishError> {
    let url = store::parse_url(target)?;
    match url.scheme() {
        "http" | "https" => {
            let id = url.path_segments().and_then(|mut s| s.next_back()).unwrap_or_default();
            let event = template.upsert_event(
                if id.is_empty() { url.as_str() } else { id },
                url.as_str(),
                Utc::now(),
            );
            Ok(once(async { Ok(Ok(event)) }).boxed())
        }
        "file" => discover_local(target, &url, template).await,
        _ => Ok(list_image_events(Store::open(target, options)?, template)),
    }
}

async fn discover_local(
    target: &str,
    url: &Url,
    template: EventTemplate,
) -> Result<BoxStream<'static, Result<PublishInput, PublishError>>, PublishError> {
    let wrong = |reason: String| PublishError::InvalidTarget { target: target.to_owned(), reason };
    let path = url.to_file_path().map_err(|()| wrong("is not a local path".into()))?;
    // Without the slash at its end that makes a path a folder's.
    let path: PathBuf = path.components().collect();
    let found = tokio::fs::metadata(&path).await.map_err(|e| wrong(e.to_string()))?;
    if found.is_dir() {
        return Ok(list_image_events(Store::open(target, &BTreeMap::new())?, template));
    }
    let (Some(folder), Some(name)) =
        (path.parent().and_then(FilePath::to_str), path.file_name().and_then(|n| n.to_str()))
    else {
        return Err(wrong("is not a path in UTF-8".into()));
    };
    let store = Store::open(folder, &BTreeMap::new())?;
    let key = object_store::path::Path::parse(name).map_err(|e| wrong(e.to_string()))?;
    let meta = store.object_store().head(&key).await.map_err(|e| store.wrap_error(e))?;
    let object = ListedObject::from_metadata(&store, &meta);
    let event = template.upsert_event(&object.key, object.uri.as_str(), object.last_modified);
    Ok(once(async { Ok(Ok(event)) }).boxed())
}

/// The events for every picture below a place.
fn list_image_events(
    store: Store,
    template: EventTemplate,
) -> BoxStream<'static, Result<PublishInput, PublishError>> {
    list_objects(store)
        .filter_map(move |object| {
            let candidate = match object {
                Err(error) => Some(Err(error.into())),
                Ok(object) => object.is_image.then(|| {
                    Ok(Ok(template.upsert_event(
                        &object.key,
                        object.uri.as_str(),
                        object.last_modified,
                    )))
                }),
            };
            std::future::ready(candidate)
        })
        .boxed()
}

/// An object as a listing has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Its key within the place that is listed.
    pub key: String,
    /// Its address.
    pub uri: Url,
    /// Its last change.
    pub last_modified: DateTime<Utc>,
    /// Its size.
    pub size_bytes: u64,
    /// Whether its name is one of a picture.
    pub is_image: bool,
}

impl ListedObject {
    fn from_metadata(store: &Store, meta: &ObjectMeta) -> Self {
        let mut uri = store.url().clone();
        if let Ok(mut segments) = uri.path_segments_mut() {
            segments
                .pop_if_empty()
                .extend(meta.location.parts().map(|part| part.as_ref().to_owned()));
        }
        Self {
            key: meta.location.as_ref().to_owned(),
            uri,
            last_modified: meta.last_modified,
            size_bytes: meta.size,
            is_image: has_image_extension(meta),
        }
    }
}

/// Every object below a place, in the order of the store.
pub fn list_objects(store: Store) -> BoxStream<'static, Result<ListedObject, StoreError>> {
    let listed = store.object_store().list(None);
    listed
        .map(move |object| match object {
            Ok(meta) => Ok(ListedObject::from_metadata(&store, &meta)),
            Err(error) => Err(store.wrap_error(error)),
        })
        .boxed()
}

fn has_image_extension(meta: &ObjectMeta) -> bool {
    let extension = meta.location.extension().map(str::to_ascii_lowercase);
    extension.is_some_and(|extension| IMAGE_EXTENSIONS.contains(&extension.as_str()))
}

/// The events in JSON lines; a line that a worker would refuse becomes a candidate that is none.
pub fn parse_lines(
    name: &str,
    reader: impl AsyncBufRead + Unpin + Send + 'static,
    decoder: Decoder,
) -> BoxStream<'static, Result<PublishInput, PublishError>> {
    let name = name.to_owned();
    let state = (reader, decoder, name, 0u64);
    futures::stream::try_unfold(state, |(mut reader, rules, name, number)| async move {
        let (mut line, mut number) = (String::new(), number);
        loop {
            line.clear();
            let read = reader.read_line(&mut line).await;
            let read =
                read.map_err(|source| PublishError::ReadLines { name: name.clone(), source })?;
            number += 1;
            if read == 0 {
                return Ok(None);
            }
            if !line.trim().is_empty() {
                break;
            }
        }
        let candidate = parse_line(line.trim(), &rules)
            .map(|(event, _)| event)
            .map_err(|reason| format!("{name}:{number}: {reason}"));
        Ok(Some((candidate, (reader, rules, name, number))))
    })
    .boxed()
}

/// A line as an event, checked as a worker checks it, and its version by the catalogue's ordering.
pub fn parse_line(line: &str, decoder: &Decoder) -> Result<(ImageEvent, SequenceKey), String> {
    if line.len() > MAX_LINE_BYTES {
        return Err(format!(
            "has {} bytes, more than {MAX_LINE_BYTES}; give a uri instead of data",
            line.len()
        ));
    }
    let key = serde_json::from_str::<serde_json::Value>(line)
        .ok()
        .and_then(|value| Some(Bytes::from(value.get("image_id")?.as_str()?.to_owned())));
    let message = KafkaMessage {
        partition: TopicPartition { topic: "".into(), number: 0 },
        offset: 0,
        key,
        payload: Some(Bytes::copy_from_slice(line.as_bytes())),
        headers: Vec::new(),
        timestamp_ms: None,
    };
    let events = decoder.decode(&message, Utc::now()).map_err(|e| e.to_string())?;
    let Some(event) = events.into_iter().next() else {
        return Err("tells of no image".into());
    };
    Ok((serde_json::from_str(line).map_err(|e| e.to_string())?, event.sequence))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::source;
    use crate::record::AttributeTypes;

    fn event_template() -> EventTemplate {
        EventTemplate {
            id_prefix: "shop/".into(),
            ordering: VersionOrdering::Sequence,
            ..EventTemplate::default()
        }
    }

    async fn collect_sorted(
        stream: BoxStream<'static, Result<PublishInput, PublishError>>,
    ) -> Vec<PublishInput> {
        let mut all: Vec<PublishInput> = stream.map(Result::unwrap).collect().await;
        all.sort_by_key(|c| c.as_ref().map_or_else(Clone::clone, |e| e.image_id.clone()));
        all
    }

    #[tokio::test]
    async fn a_folder_announces_its_pictures_with_their_last_change() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a b")).unwrap();
        for name in ["x.JPG", "a b/ü 1.png", "notes.txt"] {
            std::fs::write(folder.path().join(name), b"x").unwrap();
        }
        let target = folder.path().to_str().unwrap();
        let events =
            collect_sorted(discover(target, &BTreeMap::new(), event_template()).await.unwrap())
                .await;
        let again =
            collect_sorted(discover(target, &BTreeMap::new(), event_template()).await.unwrap())
                .await;
        assert_eq!(events, again, "announcing twice brings nothing new");
        let events: Vec<&ImageEvent> = events.iter().map(|e| e.as_ref().unwrap()).collect();
        let ids: Vec<&str> = events.iter().map(|e| e.image_id.as_str()).collect();
        assert_eq!(ids, ["shop/a b/ü 1.png", "shop/x.JPG"]);
        for event in events {
            let path = Url::parse(event.uri.as_ref().unwrap()).unwrap().to_file_path().unwrap();
            assert!(path.is_file(), "{event:?}");
            assert!(event.sequence.is_some());
        }
        let one = folder.path().join("x.JPG");
        let one = collect_sorted(
            discover(one.to_str().unwrap(), &BTreeMap::new(), event_template()).await.unwrap(),
        )
        .await;
        assert_eq!(one.len(), 1);
        assert!(discover("nowhere/at/all.jpg", &BTreeMap::new(), event_template()).await.is_err());
    }

    #[tokio::test]
    async fn lines_that_a_worker_would_refuse_are_named() {
        let options = source::SourceOptions {
            ordering: VersionOrdering::Sequence,
            ..source::SourceOptions::default()
        };
        let rules = Decoder::new(&options, &AttributeTypes::new());
        let text = "{\"image_id\":\"a\",\"uri\":\"u\",\"sequence\":1}\n\nnonsense\n{\"image_id\":\"b\",\"uri\":\"u\"}\n";
        let all: Vec<PublishInput> =
            parse_lines("f.jsonl", text.as_bytes(), rules).map(Result::unwrap).collect().await;
        assert_eq!(all[0].as_ref().unwrap().image_id, "a");
        assert!(all[1].as_ref().unwrap_err().starts_with("f.jsonl:3: not a known"));
        assert!(all[2].as_ref().unwrap_err().starts_with("f.jsonl:4: sequence: is missing"));
    }
}
