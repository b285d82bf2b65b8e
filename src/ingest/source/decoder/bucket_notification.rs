//! Bucket notifications as Amazon S3 and MinIO send them ("Event message structure", Amazon S3 user
//! guide; MinIO follows it). One message may hold several records.

use chrono::{DateTime, Utc};
use percent_encoding::percent_decode_str;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use url::Url;

use super::format::{Decoder, EventDecodeError, VersionFields, deserialise};
use crate::record::{
    AcceptedEvent, Attributes, ImageChange, ImageContent, ImageId, InvalidField, KafkaMessage,
};

/// Most records of one message. S3 and MinIO send one; a message is settled as a whole, so a huge
/// one would hold up its partition.
const MAX_RECORDS: usize = 1_000;

/// A bucket notification. Fields that are not listed here are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketNotification {
    /// What happened, at most 1000 records; all of them are taken in or none.
    #[serde(rename = "Records")]
    pub records: Vec<BucketRecord>,
}

/// One change of one object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BucketRecord {
    /// `ObjectCreated:*`, `ObjectRemoved:*` or `LifecycleExpiration:*`, with or without `s3:`
    /// before it.
    pub event_name: String,
    /// When it happened, as RFC 3339. Required where the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<DateTime<Utc>>,
    /// Where it happened.
    pub s3: BucketEntity,
}

/// Bucket and object of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketEntity {
    /// The bucket.
    pub bucket: BucketName,
    /// The object.
    pub object: BucketObject,
}

/// The bucket of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketName {
    /// Its name.
    pub name: String,
}

/// The object of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BucketObject {
    /// Its key, URL-encoded as forms are (a space is `+`).
    pub key: String,
    /// Its version, where the bucket keeps versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// Orders the changes of one key: hexadecimal digits. Required where the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequencer: Option<String>,
}

/// Whether `object` is a bucket notification.
pub(crate) fn is_notification(object: &Map<String, Value>) -> bool {
    object.get("Records").is_some_and(Value::is_array) || is_test_event(object)
}

/// Amazon S3 sends this once, when notifications are configured.
fn is_test_event(object: &Map<String, Value>) -> bool {
    object.get("Event").is_some_and(|event| event == "s3:TestEvent")
}

/// The events in a notification; none where it tells of nothing that is an image.
pub(crate) fn decode(
    decoder: &Decoder,
    message: &KafkaMessage,
    mut object: Map<String, Value>,
) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
    let Some(Value::Array(records)) = object.remove("Records") else {
        return Ok(Vec::new());
    };
    if records.is_empty() || records.len() > MAX_RECORDS {
        let reason = format!("has {} records, not 1 to {MAX_RECORDS}", records.len());
        return Err(InvalidField::new("Records", reason).into());
    }
    let events = records.into_iter().enumerate().map(|(index, record)| {
        let event = deserialise(record).map_err(EventDecodeError::from);
        let event = event.and_then(|record| decode_record(decoder, message, &record));
        event.map_err(|fault| EventDecodeError::InvalidRecord { index, fault: Box::new(fault) })
    });
    events.filter_map(Result::transpose).collect()
}

fn decode_record(
    decoder: &Decoder,
    message: &KafkaMessage,
    record: &BucketRecord,
) -> Result<Option<AcceptedEvent>, EventDecodeError> {
    let (bucket, object) = (&record.s3.bucket.name, &record.s3.object);
    let encoded = object.key.replace('+', " ");
    let key = percent_decode_str(&encoded)
        .decode_utf8()
        .map_err(|_| InvalidField::new("s3.object.key", "is not UTF-8 once it is decoded"))?;
    // Consoles make an empty object of this kind where people make a "folder".
    if key.ends_with('/') {
        return Ok(None);
    }
    let version = object.version_id.clone().filter(|v| !v.is_empty() && v != "null");
    let uri = object_uri(bucket, &key)?;
    let name = record.event_name.trim_start_matches("s3:");
    let change = match name.split_once(':') {
        Some(("ObjectCreated", _)) => ImageChange::Upsert {
            content: ImageContent::Uri { uri, version },
            attributes: Attributes::new(),
        },
        Some(("ObjectRemoved" | "LifecycleExpiration", what)) => {
            // Removing one version for good says nothing about the one that is newest.
            if version.is_some() && what != "DeleteMarkerCreated" {
                ImageChange::Recheck { content: ImageContent::from_uri(uri) }
            } else {
                ImageChange::Delete
            }
        }
        _ => {
            let known = "ObjectCreated:*, ObjectRemoved:*, LifecycleExpiration:*";
            return Err(EventDecodeError::UnknownKind(format!(
                "eventName {:?} is none of {known}",
                record.event_name
            )));
        }
    };
    let image_id =
        ImageId::new(decoder.object_id.replace("{bucket}", bucket).replace("{key}", &key))?;
    let versions = VersionFields {
        event_time: record.event_time,
        sequencer: object.sequencer.as_deref(),
        ..VersionFields::default()
    };
    Ok(Some(AcceptedEvent {
        sequence: decoder.derive_sequence(message, &image_id, &versions)?,
        image_id,
        event_time: record.event_time,
        change,
    }))
}

/// The object's URI, encoded as URLs are.
fn object_uri(bucket: &str, key: &str) -> Result<String, InvalidField> {
    if key.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        let reason = format!("{key:?} has a segment that is empty, `.` or `..`; use another key");
        return Err(InvalidField::new("s3.object.key", reason));
    }
    let wrong = |reason: String| InvalidField::new("s3.bucket.name", reason);
    let mut url = Url::parse(&format!("s3://{bucket}")).map_err(|e| wrong(e.to_string()))?;
    if url.host_str() != Some(bucket) {
        return Err(wrong(format!("{bucket:?} is not a bucket's name")));
    }
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.extend(key.split('/'));
    }
    Ok(url.into())
}
