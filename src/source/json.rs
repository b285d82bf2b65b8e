//! The project's own event format, JSON; its schema is `schemas/image-event.schema.json`.

use std::collections::BTreeMap;

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::format::{Decoder, Rejected};
use crate::record::{Change, Content, Event, ImageId, Invalid, Message, Operation};

/// A new-image event. Fields that are not listed here are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImageEvent {
    /// The catalogue's own name of the image: 1 to 1024 bytes without control characters.
    pub image_id: String,
    /// `upsert` (the image is new or has changed) or `delete`.
    #[serde(default)]
    pub operation: Operation,
    /// Where the image is: s3://, gs://, az://, http(s)://, file:// or data:. An upsert has
    /// either this or `data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// The image itself, in base64, where it is small (Kafka's limit for a message is 1 MB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Version of the image: grows with each change. Required where the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// When the change happened, as RFC 3339. Required where the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<DateTime<Utc>>,
    /// Attributes of the image, by declared name; others are ignored.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, Value>,
}

/// The event in a JSON value.
pub(super) fn decode(
    rules: &Decoder,
    message: &Message,
    payload: &[u8],
) -> Result<Event, Rejected> {
    let value: Value = serde_json::from_slice(payload)
        .map_err(|error| Rejected::Format(format!("not JSON: {error}")))?;
    if !value.is_object() {
        return Err(Rejected::Format("JSON, but not an object".into()));
    }
    let event: ImageEvent = serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        // A missing field is reported at its parent; the message names it.
        match reason.strip_prefix("missing field `") {
            Some(rest) => Invalid::new(rest.trim_end_matches('`'), "is missing"),
            None => Invalid::new(path, reason),
        }
    })?;
    let image_id = ImageId::new(&event.image_id)?;
    let change = match event.operation {
        Operation::Delete => Change::Delete,
        Operation::Upsert => Change::Upsert {
            content: content(event.uri, event.data)?,
            attributes: rules.attributes(&event.attributes)?,
        },
    };
    Ok(Event {
        sequence: rules.sequence(message, &image_id, event.sequence, event.event_time)?,
        image_id,
        event_time: event.event_time,
        change,
    })
}

fn content(uri: Option<String>, data: Option<String>) -> Result<Content, Invalid> {
    match (uri, data) {
        (Some(uri), None) => Ok(Content::Uri(uri)),
        (None, Some(data)) => base64::engine::general_purpose::STANDARD
            .decode(&data)
            .map(|bytes| Content::Inline(Bytes::from(bytes)))
            .map_err(|error| Invalid::new("data", format!("is not base64: {error}"))),
        (None, None) => Err(Invalid::new("uri", "is missing; an upsert has uri or data")),
        (Some(_), Some(_)) => Err(Invalid::new("data", "stands beside uri; give one of them")),
    }
}
