//! Bucket notifications as Amazon S3 and MinIO send them ("Event message structure", Amazon S3 user
//! guide; MinIO uses the same structure). One message may hold several records.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use percent_encoding::percent_decode_str;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use url::Url;

use super::error::EventDecodeError;
use super::rules::{DecodeRules, VersionFields, deserialise};
use crate::record::{
    AcceptedEvent, Attributes, ImageChange, ImageId, ImageSource, InvalidField, KafkaMessage,
};
use crate::store::object_url;

/// S3 and MinIO send one record per message. A message is processed as a whole, so one with very many
/// records would block its partition.
const MAX_RECORDS: usize = 1_000;

/// A bucket notification. Fields that are not listed here are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketNotification {
    /// The changes, 1 to 1000 records; either all of them are accepted or none.
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
    /// The kind of store: Ceph (`ceph:s3`) writes keys as they are, all others write them URL-encoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_source: Option<String>,
    /// When it happened, as RFC 3339. Required if the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<DateTime<Utc>>,
    /// The object that changed.
    pub s3: BucketEntity,
}

/// Bucket and object of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketEntity {
    /// The bucket that holds the object.
    pub bucket: BucketName,
    /// The object that changed.
    pub object: BucketObject,
}

/// The bucket of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BucketName {
    /// Name of the bucket.
    pub name: String,
}

/// The object of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BucketObject {
    /// Key of the object, URL-encoded as in HTML forms (a space is `+`), but not by Ceph.
    pub key: String,
    /// Version of the object, if the bucket is versioned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// Orders the changes of one key: hexadecimal digits. Required if the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequencer: Option<String>,
}

/// Whether `object` is a bucket notification.
pub(super) fn is_notification(object: &Map<String, Value>) -> bool {
    object.get("Records").is_some_and(Value::is_array) || is_test_event(object)
}

/// Whether `object` is the test event that Amazon S3 sends when notifications are configured.
fn is_test_event(object: &Map<String, Value>) -> bool {
    object.get("Event").is_some_and(|event| event == "s3:TestEvent")
}

/// Decodes the records of a notification. Folder placeholders and test events yield no event.
pub(super) fn decode(
    rules: &DecodeRules,
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
        let event = event.and_then(|record| decode_record(rules, message, &record));
        event.map_err(|fault| EventDecodeError::InvalidRecord { index, fault: Box::new(fault) })
    });
    events.filter_map(Result::transpose).collect()
}

/// Returns `None` if the object is a folder placeholder.
fn decode_record(
    rules: &DecodeRules,
    message: &KafkaMessage,
    record: &BucketRecord,
) -> Result<Option<AcceptedEvent>, EventDecodeError> {
    let (bucket, object) = (&record.s3.bucket.name, &record.s3.object);
    let key = decode_key(record)?;
    // Consoles create an empty object of this kind when a user creates a "folder".
    if key.ends_with('/') {
        return Ok(None);
    }
    rules.bucket_watch.check(bucket, &rules.image_id_template);
    let version = object.version_id.clone().filter(|v| !v.is_empty() && v != "null");
    let uri = object_uri(bucket, &key)?;
    let name = record.event_name.trim_start_matches("s3:");
    let change = match name.split_once(':') {
        Some(("ObjectCreated", _)) => ImageChange::Upsert {
            content: ImageSource::Uri { uri, version },
            attributes: Attributes::new(),
        },
        Some(("ObjectRemoved" | "LifecycleExpiration", removal)) => {
            // One version was deleted permanently; the newest version may be another one.
            if version.is_some() && removal != "DeleteMarkerCreated" {
                ImageChange::Recheck { content: ImageSource::from_uri(uri) }
            } else {
                ImageChange::Delete
            }
        }
        _ => {
            let known = "ObjectCreated:*, ObjectRemoved:*, LifecycleExpiration:*";
            return Err(EventDecodeError::UnknownType(format!(
                "eventName {:?} is not one of {known}",
                record.event_name
            )));
        }
    };
    let image_id =
        ImageId::new(rules.image_id_template.replace("{bucket}", bucket).replace("{key}", &key))?;
    let versions = VersionFields {
        event_time: record.event_time,
        sequencer: object.sequencer.as_deref(),
        ..VersionFields::default()
    };
    Ok(Some(AcceptedEvent {
        sequence: rules.derive_sequence(message, &image_id, &versions)?,
        image_id,
        event_time: record.event_time,
        change,
    }))
}

/// Returns the key of the record's object as the bucket has it.
fn decode_key(record: &BucketRecord) -> Result<Cow<'_, str>, InvalidField> {
    let key = &record.s3.object.key;
    let is_ceph = record.event_source.as_ref().is_some_and(|source| source.starts_with("ceph:"));
    if is_ceph || key.chars().any(is_always_encoded) {
        return Ok(key.into());
    }
    percent_decode_str(&key.replace('+', " "))
        .decode_utf8()
        .map(|key| key.into_owned().into())
        .map_err(|_| InvalidField::new("s3.object.key", "is not UTF-8 once it is decoded"))
}

/// Whether URL encoding never leaves the character as it is: a key that has it is not encoded.
fn is_always_encoded(c: char) -> bool {
    !c.is_ascii()
        || c.is_ascii_control()
        || matches!(c, ' ' | '"' | '<' | '>' | '\\' | '^' | '`' | '{' | '|' | '}')
}

/// Builds the object's percent-encoded `s3://` URI.
fn object_uri(bucket: &str, key: &str) -> Result<String, InvalidField> {
    let invalid_bucket = |reason: String| InvalidField::new("s3.bucket.name", reason);
    let url = Url::parse(&format!("s3://{bucket}")).map_err(|e| invalid_bucket(e.to_string()))?;
    if url.host_str() != Some(bucket) {
        return Err(invalid_bucket(format!("{bucket:?} is not a bucket's name")));
    }
    let url = object_url(&url, key);
    url.map(Into::into)
        .map_err(|reason| InvalidField::new("s3.object.key", format!("{key:?}: {reason}")))
}
