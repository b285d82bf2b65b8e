//! Publishes image events for files, folders, bucket prefixes and JSON lines.
//!
//! Folders and buckets are listed. The time and sequence of an event are the object's last change, so that
//! publishing the same folder twice creates no new versions. JSON lines are checked by the rules of
//! workers before anything is sent.

mod backlog;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::stream::{BoxStream, once};
use futures::{Stream, StreamExt};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::Url;

use self::backlog::{Backlog, Reservation};
pub use self::backlog::{BacklogLimit, BacklogSize};
use crate::diagnosis::describe;
use crate::diagnosis::redact::redact;
use crate::ingest::source::{Decoder, ImageEvent};
use crate::kafka;
use crate::record::{
    AttributeType, AttributeTypes, Attributes, ImageId, KafkaMessage, Operation, SequenceKey,
    TopicPartition, VersionOrdering,
};
use crate::retry::{Classify, Disposition};
use crate::store::{self, ImageStore, ListedObject, StoreError};
use crate::telemetry::event;

/// Maximum number of events sent to Kafka that are not acknowledged yet.
const MAX_UNACKNOWLEDGED_EVENTS: usize = 512;
/// Maximum length of a JSON line: Kafka's default limit for a message.
const MAX_LINE_BYTES: usize = 1 << 20;
/// Extensions by which images are recognised when a folder or a bucket is listed.
pub const IMAGE_EXTENSIONS: &[&str] = &[
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "heic",
    "heif",
    "jxl",
    #[cfg(feature = "avif")]
    "avif",
];

/// Why publishing failed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A folder or bucket cannot be listed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A target does not exist, or cannot be published.
    #[error("{target}: {reason}")]
    InvalidTarget {
        /// The target as given by the user.
        target: String,
        /// Why it cannot be published.
        reason: String,
    },
    /// Lines cannot be read.
    #[error("{name}: {}", describe(.source))]
    ReadLines {
        /// Name of the file.
        name: String,
        /// The error of the file.
        source: std::io::Error,
    },
    /// Kafka did not accept an event.
    #[error("topic {topic} at {brokers}: {}", describe(.source))]
    Kafka {
        /// The topic of the event.
        topic: String,
        /// The configured brokers.
        brokers: String,
        /// The error of librdkafka.
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

/// An event to send, or why an input is not an event.
pub type PublishInput = Result<ImageEvent, String>;

/// Counts of published events and of skipped inputs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishSummary {
    /// Events acknowledged by Kafka.
    pub published_events: u64,
    /// Inputs that are not events.
    pub skipped_inputs: u64,
}

/// Sends events to a topic, keyed by image id.
pub struct Publisher {
    producer: FutureProducer,
    topic: String,
    brokers: String,
    backlog: Option<Backlog>,
}

impl Publisher {
    /// Creates the producer; opens no connection yet.
    pub fn new(kafka: &kafka::KafkaOptions, topic: &str) -> Result<Self, PublishError> {
        let producer = kafka.producer_config().create().map_err(|source| PublishError::Kafka {
            topic: topic.to_owned(),
            brokers: kafka.brokers.clone(),
            source,
        })?;
        let (topic, brokers) = (topic.to_owned(), kafka.brokers.clone());
        Ok(Self { producer, topic, brokers, backlog: None })
    }

    /// Makes every send wait while the topic holds as much as `limit` allows. Only one publisher of a topic
    /// may send to it then: others are not counted.
    pub fn with_backlog_limit(
        mut self,
        kafka: &kafka::KafkaOptions,
        limit: BacklogLimit,
    ) -> Result<Self, PublishError> {
        let backlog = Backlog::new(kafka, &self.topic, limit);
        self.backlog = Some(backlog.map_err(|source| self.kafka_error(source))?);
        Ok(self)
    }

    /// Returns what the topic holds that is not stored yet; `None` without a limit.
    pub fn backlog_size(&self) -> Option<BacklogSize> {
        self.backlog.as_ref().map(Backlog::size)
    }

    /// Sends one event and returns when all in-sync replicas have it.
    pub async fn send(&self, event: &ImageEvent) -> Result<(), PublishError> {
        self.send_with_headers(event, &[]).await
    }

    /// Like [`Publisher::send`], with headers of the given names and values.
    pub async fn send_with_headers(
        &self,
        event: &ImageEvent,
        headers: &[(&str, &str)],
    ) -> Result<(), PublishError> {
        let message = Message::new(event, headers)?;
        let reservation = self.reserve(&message).await?;
        self.deliver(message, reservation).await
    }

    /// Waits until the topic has capacity for the message.
    async fn reserve(
        &self,
        message: &Message<'_>,
    ) -> Result<Option<Reservation<'_>>, PublishError> {
        let Some(backlog) = &self.backlog else { return Ok(None) };
        let reserved = backlog.reserve(message.content_bytes()).await;
        reserved.map(Some).map_err(|source| self.kafka_error(source))
    }

    async fn deliver(
        &self,
        message: Message<'_>,
        reservation: Option<Reservation<'_>>,
    ) -> Result<(), PublishError> {
        let sent =
            self.producer.send(message.to_record(&self.topic), Duration::from_secs(30)).await;
        let delivery = sent.map_err(|(source, _)| self.kafka_error(source))?;
        if let Some(reservation) = reservation {
            reservation.acknowledge(delivery.partition, delivery.offset);
        }
        Ok(())
    }

    fn kafka_error(&self, source: rdkafka::error::KafkaError) -> PublishError {
        PublishError::Kafka { topic: self.topic.clone(), brokers: self.brokers.clone(), source }
    }

    /// Sends the events of `inputs` in order until `token` is cancelled; calls `on_input` for each input that
    /// was sent or skipped.
    pub async fn send_all(
        &self,
        inputs: impl Stream<Item = Result<PublishInput, PublishError>>,
        token: &CancellationToken,
        mut on_input: impl FnMut(&PublishInput),
    ) -> Result<PublishSummary, PublishError> {
        let mut summary = PublishSummary::default();
        let sent = inputs
            .take_until(token.cancelled())
            .map(|input| async {
                let input = input?;
                if let Ok(event) = &input {
                    let message = Message::new(event, &[])?;
                    let reservation = self.reserve(&message);
                    // Consumers that have stopped too would never make the topic have capacity.
                    let Some(reservation) = token.run_until_cancelled(reservation).await else {
                        return Ok(None);
                    };
                    self.deliver(message, reservation?).await?;
                }
                Ok::<_, PublishError>(Some(input))
            })
            .buffered(MAX_UNACKNOWLEDGED_EVENTS);
        let mut sent = std::pin::pin!(sent);
        while let Some(input) = sent.next().await {
            let Some(input) = input? else { continue };
            match input {
                Ok(_) => summary.published_events += 1,
                Err(_) => summary.skipped_inputs += 1,
            }
            on_input(&input);
        }
        info!(
            event = event::PUBLISH,
            published = summary.published_events,
            skipped = summary.skipped_inputs,
            "events published"
        );
        Ok(summary)
    }

    /// Waits until all sent events are acknowledged, at most `timeout`. Blocks.
    pub fn flush(&self, timeout: Duration) -> Result<(), PublishError> {
        self.producer.flush(timeout).map_err(|source| self.kafka_error(source))
    }
}

/// A message of an event.
struct Message<'a> {
    key: &'a str,
    payload: String,
    headers: &'a [(&'a str, &'a str)],
}

impl<'a> Message<'a> {
    fn new(event: &'a ImageEvent, headers: &'a [(&'a str, &'a str)]) -> Result<Self, PublishError> {
        let payload = serde_json::to_string(event).map_err(|e| PublishError::InvalidTarget {
            target: event.image_id.clone(),
            reason: e.to_string(),
        })?;
        Ok(Self { key: &event.image_id, payload, headers })
    }

    fn content_bytes(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len());
        self.key.len() + self.payload.len() + headers.sum::<usize>()
    }

    fn to_record<'b>(&'b self, topic: &'b str) -> FutureRecord<'b, str, String> {
        let record = FutureRecord::to(topic).key(self.key).payload(&self.payload);
        if self.headers.is_empty() {
            return record;
        }
        record.headers(self.headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
            all.insert(Header { key, value: Some(*value) })
        }))
    }
}

/// How events are built from listed objects.
#[derive(Debug, Clone, Default)]
pub struct EventTemplate {
    /// Prefix of each image id.
    pub id_prefix: String,
    /// Attributes of every event.
    pub attributes: BTreeMap<String, serde_json::Value>,
    /// Whether events are dated now instead of at the object's last change.
    pub use_current_time: bool,
    /// What orders the versions of an image; `sequence` is only set if it orders them.
    pub ordering: VersionOrdering,
}

impl EventTemplate {
    /// Builds the upsert of an image at `uri` whose last change was at `modified_at`.
    pub fn upsert_event(&self, id: &str, uri: &str, modified_at: DateTime<Utc>) -> ImageEvent {
        let time = if self.use_current_time { Utc::now() } else { modified_at };
        ImageEvent {
            uri: Some(uri.to_owned()),
            attributes: self.attributes.clone(),
            ..self.event_without_content(id, Operation::Upsert, time)
        }
    }

    /// Builds the delete of an image, dated now.
    pub fn delete_event(&self, id: &str) -> ImageEvent {
        self.event_without_content(id, Operation::Delete, Utc::now())
    }

    /// Builds an event for `id` dated at `time`, without address and attributes.
    pub fn event_without_content(
        &self,
        id: &str,
        operation: Operation,
        time: DateTime<Utc>,
    ) -> ImageEvent {
        let sequence = u64::try_from(time.timestamp_micros()).ok();
        ImageEvent {
            image_id: format!("{}{id}", self.id_prefix),
            operation,
            uri: None,
            data: None,
            embedding: None,
            model: None,
            sequence: sequence.filter(|_| self.ordering == VersionOrdering::Sequence),
            event_time: Some(time),
            attributes: BTreeMap::new(),
        }
    }
}

/// Converts stored attributes to the JSON values of an event, by their declared types. Leaves out attributes
/// that are no longer declared.
pub fn attributes_to_json(
    attributes: &Attributes,
    types: &AttributeTypes,
) -> BTreeMap<String, Value> {
    let to_json = |(name, text): (&String, &String)| {
        let value = match types.get(name)? {
            AttributeType::Text | AttributeType::Time => Value::String(text.clone()),
            AttributeType::Integer | AttributeType::Number | AttributeType::Boolean => {
                serde_json::from_str(text).ok()?
            }
        };
        Some((name.clone(), value))
    };
    attributes.iter().filter_map(to_json).collect()
}

/// Returns the events for a file, a folder, a bucket prefix, or a single http(s) URL.
pub async fn discover_events(
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
        "file" => discover_local_events(target, &url, template).await,
        _ => Ok(list_image_events(&ImageStore::open(target, options)?, template)),
    }
}

/// Returns the events for a local file or folder.
async fn discover_local_events(
    target: &str,
    url: &Url,
    template: EventTemplate,
) -> Result<BoxStream<'static, Result<PublishInput, PublishError>>, PublishError> {
    let invalid_target =
        |reason: String| PublishError::InvalidTarget { target: target.to_owned(), reason };
    let path = url.to_file_path().map_err(|()| invalid_target("is not a local path".into()))?;
    // Drops a trailing slash.
    let path: PathBuf = path.components().collect();
    let metadata = tokio::fs::metadata(&path).await.map_err(|e| invalid_target(e.to_string()))?;
    if metadata.is_dir() {
        return Ok(list_image_events(&ImageStore::open(target, &BTreeMap::new())?, template));
    }
    let uri =
        Url::from_file_path(&path).map_err(|()| invalid_target("is not a local path".into()))?;
    let name = path.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| invalid_target("its name is not UTF-8; rename the file".into()))?;
    let modified_at = metadata.modified().map_err(|e| invalid_target(e.to_string()))?;
    let event = template.upsert_event(name, uri.as_str(), modified_at.into());
    check_image_id(&event).map_err(invalid_target)?;
    Ok(once(async { Ok(Ok(event)) }).boxed())
}

/// Returns the events for all images in `store`; the reason instead for those that cannot be announced.
fn list_image_events(
    store: &ImageStore,
    template: EventTemplate,
) -> BoxStream<'static, Result<PublishInput, PublishError>> {
    let url = redact(store.url().as_str()).into_owned();
    store
        .list()
        .filter_map(move |object| {
            let input = match object {
                Err(error) => Some(Err(error.into())),
                Ok(object) => has_image_extension(&object.key).then(|| {
                    Ok(announce_object(&object, &template).map_err(|reason| {
                        log_skipped_object(&url, &object.key_text(), &reason);
                        format!("{url}: {:?}: {reason}", object.key_text())
                    }))
                }),
            };
            std::future::ready(input)
        })
        .boxed()
}

/// Builds the event of a listed image, or says why it cannot be announced.
fn announce_object(object: &ListedObject, template: &EventTemplate) -> PublishInput {
    let uri = object.uri.as_ref().map_err(Clone::clone)?;
    let event = template.upsert_event(&object.key_text(), uri.as_str(), object.last_modified);
    check_image_id(&event)?;
    Ok(event)
}

fn check_image_id(event: &ImageEvent) -> Result<(), String> {
    ImageId::new(&event.image_id).map(|_| ()).map_err(|error| error.to_string())
}

/// Logs that a listed image cannot be announced and is left out.
pub fn log_skipped_object(url: &str, key: &str, reason: &str) {
    warn!(
        event = event::LISTING_OBJECT_SKIPPED,
        listing_target = url,
        key = format!("{key:?}"),
        reason,
        "a listed image cannot be announced and is left out"
    );
}

/// Whether the extension of a listed object is that of an image.
pub fn has_image_extension(key: &[u8]) -> bool {
    let name = key.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let extension = name.rsplit(|byte| *byte == b'.').next().filter(|rest| rest.len() < name.len());
    let extension = extension.map(<[u8]>::to_ascii_lowercase);
    extension
        .is_some_and(|extension| IMAGE_EXTENSIONS.iter().any(|known| known.as_bytes() == extension))
}

/// Reads events from JSON lines. A line that a worker would reject yields the reason, with `name` and the
/// number of the line.
pub fn parse_event_lines(
    name: &str,
    reader: impl AsyncBufRead + Unpin + Send + 'static,
    decoder: Decoder,
) -> BoxStream<'static, Result<PublishInput, PublishError>> {
    let name = name.to_owned();
    let state = (reader, decoder, name, 0u64);
    futures::stream::try_unfold(state, |(mut reader, decoder, name, number)| async move {
        let (mut line, mut number) = (String::new(), number);
        loop {
            line.clear();
            let read = reader.read_line(&mut line).await;
            let line_bytes =
                read.map_err(|source| PublishError::ReadLines { name: name.clone(), source })?;
            number += 1;
            if line_bytes == 0 {
                return Ok(None);
            }
            if !line.trim().is_empty() {
                break;
            }
        }
        let input = parse_event_line(line.trim(), &decoder)
            .map(|(event, _)| event)
            .map_err(|reason| format!("{name}:{number}: {reason}"));
        Ok(Some((input, (reader, decoder, name, number))))
    })
    .boxed()
}

/// Parses a line as an event and checks it as a worker would. Returns it with its version by the catalogue's
/// ordering.
pub fn parse_event_line(
    line: &str,
    decoder: &Decoder,
) -> Result<(ImageEvent, SequenceKey), String> {
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
        log_number: 0,
        offset: 0,
        key,
        payload: Some(Bytes::copy_from_slice(line.as_bytes())),
        headers: Vec::new(),
        timestamp_ms: None,
    };
    let events = decoder.decode(&message, Utc::now()).map_err(|e| e.to_string())?;
    let Some(event) = events.into_iter().next() else {
        return Err("describes no image".into());
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
    async fn images_of_a_folder_are_published_with_their_last_change() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a b")).unwrap();
        for name in ["x.JPG", "a b/ü 1.png", "notes.txt"] {
            std::fs::write(folder.path().join(name), b"x").unwrap();
        }
        let target = folder.path().to_str().unwrap();
        let events = collect_sorted(
            discover_events(target, &BTreeMap::new(), event_template()).await.unwrap(),
        )
        .await;
        let again = collect_sorted(
            discover_events(target, &BTreeMap::new(), event_template()).await.unwrap(),
        )
        .await;
        assert_eq!(events, again, "publishing twice creates no new versions");
        let events: Vec<&ImageEvent> = events.iter().map(|e| e.as_ref().unwrap()).collect();
        let ids: Vec<&str> = events.iter().map(|e| e.image_id.as_str()).collect();
        assert_eq!(ids, ["shop/a b/ü 1.png", "shop/x.JPG"]);
        for event in events {
            let path = Url::parse(event.uri.as_ref().unwrap()).unwrap().to_file_path().unwrap();
            assert!(path.is_file(), "{event:?}");
            assert!(event.sequence.is_some());
        }
        let file = folder.path().join("x.JPG");
        let single = collect_sorted(
            discover_events(file.to_str().unwrap(), &BTreeMap::new(), event_template())
                .await
                .unwrap(),
        )
        .await;
        assert_eq!(single.len(), 1);
        assert!(
            discover_events("nowhere/at/all.jpg", &BTreeMap::new(), event_template())
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn files_that_cannot_be_announced_are_skipped_and_named() {
        use std::os::unix::ffi::OsStrExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &[u8]| folder.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir(path(b"caf\xe9")).unwrap();
        for name in [&b"a.jpg"[..], b"caf\xe9/b.jpg", b"line\nbreak.jpg", b"z.jpg", b"caf\xe9.txt"]
        {
            std::fs::write(path(name), b"x").unwrap();
        }
        std::os::unix::fs::symlink(folder.path(), path(b"around")).unwrap();
        std::os::unix::fs::symlink("nowhere", path(b"broken.jpg")).unwrap();
        std::os::unix::fs::symlink("itself.jpg", path(b"itself.jpg")).unwrap();
        let target = folder.path().to_str().unwrap();
        let options = BTreeMap::new();
        let events = discover_events(target, &options, EventTemplate::default()).await;
        let inputs = collect_sorted(events.unwrap()).await;
        let ids: Vec<_> = inputs.iter().flatten().map(|event| event.image_id.as_str()).collect();
        assert_eq!(ids, ["a.jpg", "z.jpg"]);
        let skipped: Vec<_> = inputs.iter().filter_map(|input| input.as_ref().err()).collect();
        assert_eq!(skipped.len(), 2, "{skipped:?}");
        let named = |text: &str| skipped.iter().any(|reason| reason.contains(text));
        assert!(named("is not UTF-8") && named("line\\nbreak.jpg"), "{skipped:?}");
    }

    #[tokio::test]
    async fn lines_that_a_worker_would_reject_are_reported_with_their_number() {
        let options = source::SourceOptions {
            ordering: VersionOrdering::Sequence,
            ..source::SourceOptions::default()
        };
        let decoder = Decoder::new(&options, &AttributeTypes::new());
        let text = "{\"image_id\":\"a\",\"uri\":\"u\",\"sequence\":1}\n\nnonsense\n{\"image_id\":\"b\",\"uri\":\"u\"}\n";
        let all: Vec<PublishInput> = parse_event_lines("f.jsonl", text.as_bytes(), decoder)
            .map(Result::unwrap)
            .collect()
            .await;
        assert_eq!(all[0].as_ref().unwrap().image_id, "a");
        assert!(all[1].as_ref().unwrap_err().starts_with("f.jsonl:3: not a known"));
        assert!(all[2].as_ref().unwrap_err().starts_with("f.jsonl:4: sequence: is missing"));
    }
}
