//! CloudEvents 1.0 in structured and binary mode ("Kafka Protocol Binding for CloudEvents" 1.0).
//!
//! The configuration maps the `type` of an event to its operation. The data is either an image event
//! in this project's own format, whose `image_id`, `event_time` and `sequence` default to `subject`,
//! `time` and the extension `sequence`, or the bytes of the image.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::EventDecodeError;
use super::image_event;
use super::rules::{DecodeRules, deserialise};
use crate::ingest::decode::decode_base64;
use crate::record::{AcceptedEvent, InvalidField, KafkaMessage, Operation};

/// A CloudEvent in structured mode. In binary mode the attributes are headers named `ce_<attribute>`
/// (`content-type` for `datacontenttype`) and the message's value is the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CloudEvent {
    /// Version of the specification: `1.0`.
    pub specversion: String,
    /// One of `source.cloud_event_types`, which maps it to `upsert` or `delete`.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Identifies the sender.
    pub source: String,
    /// Identifies the event at its source.
    pub id: String,
    /// The image id, if the data does not contain it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// When the change happened, if the data does not contain it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<DateTime<Utc>>,
    /// Version of the image, a whole number, if the data does not contain it (extension "Sequence").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<Value>,
    /// `application/json` (the default) or `image/*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datacontenttype: Option<String>,
    /// An image event; `image_id` and `operation` may be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Map<String, Value>>,
    /// The bytes of the image in base64, if `datacontenttype` is `image/*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_base64: Option<String>,
}

/// Whether the message is a CloudEvent in binary mode.
pub(super) fn is_binary_mode(message: &KafkaMessage) -> bool {
    message.headers.iter().any(|(name, _)| name == "ce_specversion")
}

/// Whether the message is a CloudEvent in structured mode, by its content type or by the required
/// attributes in `object`.
pub(super) fn is_structured_mode(message: &KafkaMessage, object: &Map<String, Value>) -> bool {
    let required_attributes = ["specversion", "type", "source", "id"];
    content_type(message).is_some_and(|name| name.starts_with("application/cloudevents"))
        || required_attributes.iter().all(|name| object.contains_key(*name))
}

/// Returns the message's content type in lower case.
fn content_type(message: &KafkaMessage) -> Option<String> {
    let header = message.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let value = header?.1.as_deref()?;
    Some(String::from_utf8_lossy(value).trim().to_ascii_lowercase())
}

/// Decodes a message in binary mode.
pub(super) fn decode_binary(
    rules: &DecodeRules,
    message: &KafkaMessage,
) -> Result<AcceptedEvent, EventDecodeError> {
    let mut attributes = Map::new();
    for (name, value) in &message.headers {
        let (Some(name), Some(value)) = (name.strip_prefix("ce_"), value) else { continue };
        let text = std::str::from_utf8(value)
            .map_err(|_| InvalidField::new(format!("ce_{name}"), "is not UTF-8"))?;
        if attributes.insert(name.to_owned(), text.into()).is_some() {
            return Err(InvalidField::new(format!("ce_{name}"), "is given twice").into());
        }
    }
    attributes.remove("data");
    let content_type = content_type(message);
    let is_image = content_type.as_ref().is_some_and(|name| name.starts_with("image/"));
    if let Some(name) = content_type {
        attributes.insert("datacontenttype".into(), name.into());
    }
    if let Some(payload) = message.payload.as_ref().filter(|p| !p.is_empty() && !is_image) {
        let data: Value = serde_json::from_slice(payload).map_err(|error| {
            EventDecodeError::UnknownFormat(format!("the data is not JSON: {error}"))
        })?;
        attributes.insert("data".into(), data);
    }
    let inline = if is_image { message.payload.clone() } else { None };
    decode_event(rules, message, deserialise(attributes.into())?, inline)
}

/// Decodes a message in structured mode, whose value is `object`.
pub(super) fn decode_structured(
    rules: &DecodeRules,
    message: &KafkaMessage,
    object: Map<String, Value>,
) -> Result<AcceptedEvent, EventDecodeError> {
    let mut cloud_event: CloudEvent = deserialise(object.into())?;
    let inline = cloud_event.data_base64.take().map(|data| {
        decode_base64(&data).map_err(|reason| InvalidField::new("data_base64", reason))
    });
    decode_event(rules, message, cloud_event, inline.transpose()?.map(Bytes::from))
}

/// Decodes a CloudEvent of either mode; `inline` are the bytes of the image, if the event carries them.
fn decode_event(
    rules: &DecodeRules,
    message: &KafkaMessage,
    cloud_event: CloudEvent,
    inline: Option<Bytes>,
) -> Result<AcceptedEvent, EventDecodeError> {
    if cloud_event.specversion != "1.0" {
        let reason = format!("{:?} is not 1.0", cloud_event.specversion);
        return Err(InvalidField::new("specversion", reason).into());
    }
    let operation = *rules.cloud_event_types.get(&cloud_event.event_type).ok_or_else(|| {
        let known: Vec<&str> = rules.cloud_event_types.keys().map(String::as_str).collect();
        EventDecodeError::UnknownType(format!(
            "type {:?} is not one of source.cloud_event_types: {}",
            cloud_event.event_type,
            known.join(", ")
        ))
    })?;
    let mut data = cloud_event.data.unwrap_or_default();
    let name = match operation {
        Operation::Upsert => "upsert",
        Operation::Delete => "delete",
    };
    if data.insert("operation".into(), name.into()).is_some_and(|given| given != name) {
        let reason =
            format!("contradicts the type {:?}, which means {name}", cloud_event.event_type);
        return Err(InvalidField::new("data.operation", reason).into());
    }
    if let Some(subject) = cloud_event.subject {
        data.entry("image_id").or_insert(subject.into());
    }
    if let Some(time) = cloud_event.time {
        data.entry("event_time").or_insert(time.to_rfc3339().into());
    }
    if let Some(sequence) = cloud_event.sequence {
        // The "Sequence" extension writes the number as text.
        let number = match &sequence {
            Value::String(text) => text.parse::<u64>().ok(),
            other => other.as_u64(),
        };
        let number = number.ok_or_else(|| {
            InvalidField::new("sequence", format!("{sequence} is not a whole number below 2^64"))
        })?;
        data.entry("sequence").or_insert(number.into());
    }
    image_event::decode(rules, message, data, inline.filter(|_| operation == Operation::Upsert))
}
