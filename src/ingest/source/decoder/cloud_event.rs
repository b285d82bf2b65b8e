//! CloudEvents 1.0 in structured and binary mode ("Kafka Protocol Binding for CloudEvents" 1.0).
//!
//! What an event does follows from its `type`, which the configuration maps. Its data is this
//! project's own event format, in which `image_id`, `event_time` and `sequence` may be left to
//! `subject`, `time` and the extension `sequence`; or the data is the picture itself.

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::format::{Decoder, EventDecodeError, deserialise};
use super::image_event;
use crate::record::{AcceptedEvent, InvalidField, KafkaMessage, Operation};

/// A CloudEvent in structured mode. In binary mode the attributes are headers with `ce_` before
/// their names (`content-type` for `datacontenttype`) and the message's value is the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CloudEvent {
    /// `1.0`.
    pub specversion: String,
    /// One of `source.cloud_event_types`: says whether the image is new or changed, or gone.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who sent it.
    pub source: String,
    /// Identifies the event at its source.
    pub id: String,
    /// The image's id, where the data does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// When the change happened, where the data does not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<DateTime<Utc>>,
    /// Version of the image, a whole number, where the data does not have it (extension "Sequence").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<Value>,
    /// `application/json` (also where it is left out) or `image/*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datacontenttype: Option<String>,
    /// An image event; `image_id` and `operation` may be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Map<String, Value>>,
    /// The picture itself, in base64, with `datacontenttype` `image/*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_base64: Option<String>,
}

/// Whether the message is a CloudEvent in binary mode.
pub(crate) fn is_binary(message: &KafkaMessage) -> bool {
    message.headers.iter().any(|(name, _)| name == "ce_specversion")
}

/// Whether the message says, or `object` shows, that it is a CloudEvent in structured mode.
pub(crate) fn is_structured(message: &KafkaMessage, object: &Map<String, Value>) -> bool {
    let required = ["specversion", "type", "source", "id"];
    content_type(message).is_some_and(|kind| kind.starts_with("application/cloudevents"))
        || required.iter().all(|name| object.contains_key(*name))
}

/// The message's content type, in lower case.
pub(crate) fn content_type(message: &KafkaMessage) -> Option<String> {
    let header = message.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let value = header?.1.as_deref()?;
    Some(String::from_utf8_lossy(value).trim().to_ascii_lowercase())
}

/// The event in a message in binary mode.
pub(crate) fn decode_binary(
    decoder: &Decoder,
    message: &KafkaMessage,
) -> Result<AcceptedEvent, EventDecodeError> {
    let mut attributes = Map::new();
    for (name, value) in &message.headers {
        let (Some(name), Some(value)) = (name.strip_prefix("ce_"), value) else { continue };
        let text = std::str::from_utf8(value)
            .map_err(|_| InvalidField::new(format!("ce_{name}"), "is not UTF-8"))?;
        if attributes.insert(name.to_owned(), text.into()).is_some() {
            return Err(InvalidField::new(format!("ce_{name}"), "stands twice").into());
        }
    }
    attributes.remove("data");
    let kind = content_type(message);
    let picture = kind.as_ref().is_some_and(|kind| kind.starts_with("image/"));
    if let Some(kind) = kind {
        attributes.insert("datacontenttype".into(), kind.into());
    }
    if let Some(payload) = message.payload.as_ref().filter(|p| !p.is_empty() && !picture) {
        let data: Value = serde_json::from_slice(payload).map_err(|error| {
            EventDecodeError::UnknownFormat(format!("the data is not JSON: {error}"))
        })?;
        attributes.insert("data".into(), data);
    }
    let inline = if picture { message.payload.clone() } else { None };
    decode_event(decoder, message, deserialise(attributes.into())?, inline)
}

/// The event in a message in structured mode.
pub(crate) fn decode_structured(
    decoder: &Decoder,
    message: &KafkaMessage,
    object: Map<String, Value>,
) -> Result<AcceptedEvent, EventDecodeError> {
    let mut found: CloudEvent = deserialise(object.into())?;
    let inline = found.data_base64.take().map(|data| {
        let decoded = base64::engine::general_purpose::STANDARD.decode(data);
        decoded.map_err(|e| InvalidField::new("data_base64", format!("is not base64: {e}")))
    });
    decode_event(decoder, message, found, inline.transpose()?.map(Bytes::from))
}

fn decode_event(
    decoder: &Decoder,
    message: &KafkaMessage,
    cloud_event: CloudEvent,
    picture: Option<Bytes>,
) -> Result<AcceptedEvent, EventDecodeError> {
    if cloud_event.specversion != "1.0" {
        let reason = format!("{:?} is not 1.0", cloud_event.specversion);
        return Err(InvalidField::new("specversion", reason).into());
    }
    let operation = *decoder.cloud_event_types.get(&cloud_event.kind).ok_or_else(|| {
        let known: Vec<&str> = decoder.cloud_event_types.keys().map(String::as_str).collect();
        EventDecodeError::UnknownKind(format!(
            "type {:?} is none of source.cloud_event_types: {}",
            cloud_event.kind,
            known.join(", ")
        ))
    })?;
    let mut data = cloud_event.data.unwrap_or_default();
    let name = match operation {
        Operation::Upsert => "upsert",
        Operation::Delete => "delete",
    };
    if data.insert("operation".into(), name.into()).is_some_and(|given| given != name) {
        let reason = format!("contradicts the type {:?}, which says {name}", cloud_event.kind);
        return Err(InvalidField::new("data.operation", reason).into());
    }
    if let Some(subject) = cloud_event.subject {
        data.entry("image_id").or_insert(subject.into());
    }
    if let Some(time) = cloud_event.time {
        data.entry("event_time").or_insert(time.to_rfc3339().into());
    }
    if let Some(sequence) = cloud_event.sequence {
        // The extension is text that holds a whole number.
        let number = match &sequence {
            Value::String(text) => text.parse::<u64>().ok(),
            other => other.as_u64(),
        };
        let number = number.ok_or_else(|| {
            InvalidField::new("sequence", format!("{sequence} is not a whole number below 2^64"))
        })?;
        data.entry("sequence").or_insert(number.into());
    }
    image_event::decode(decoder, message, data, picture.filter(|_| operation == Operation::Upsert))
}
