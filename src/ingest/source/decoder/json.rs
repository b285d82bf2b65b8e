//! The project's own event format, JSON; its schema is `schemas/image-event.schema.json`.

use std::collections::BTreeMap;

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::format::{Decoder, Rejected, Versions, read};
use crate::record::{Change, Content, Event, ImageId, Invalid, Message, Operation, Sequence};

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

/// The event in a JSON object, by the catalogue's ordering; `inline` are the picture's bytes where they came beside it.
pub(crate) fn event(
    rules: &Decoder,
    message: &Message,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<Event, Rejected> {
    let (event, number) = unordered(rules, object, inline)?;
    let versions =
        Versions { sequence: number, event_time: event.event_time, ..Versions::default() };
    let sequence = rules.sequence(message, &event.image_id, &versions)?;
    Ok(Event { sequence, ..event })
}

/// The event in a JSON object before its version is known, and the `sequence` that it says.
pub(crate) fn unordered(
    rules: &Decoder,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<(Event, Option<u64>), Rejected> {
    let event: ImageEvent = read(object.into())?;
    let image_id = ImageId::new(&event.image_id)?;
    let change = match event.operation {
        Operation::Delete => Change::Delete,
        Operation::Upsert => Change::Upsert {
            content: content(event.uri, event.data, inline)?,
            attributes: rules.attributes(&event.attributes)?,
        },
    };
    let sequence = Sequence::from_number(0);
    let (number, event_time) = (event.sequence, event.event_time);
    Ok((Event { image_id, sequence, event_time, change }, number))
}

fn content(
    uri: Option<String>,
    data: Option<String>,
    inline: Option<Bytes>,
) -> Result<Content, Invalid> {
    match (uri, data, inline) {
        (Some(uri), None, None) => Ok(Content::uri(uri)),
        (None, None, Some(bytes)) => Ok(Content::Inline(bytes)),
        (None, Some(data), None) => base64::engine::general_purpose::STANDARD
            .decode(&data)
            .map(|bytes| Content::Inline(Bytes::from(bytes)))
            .map_err(|error| Invalid::new("data", format!("is not base64: {error}"))),
        (None, None, None) => Err(Invalid::new("uri", "is missing; an upsert has uri or data")),
        _ => Err(Invalid::new("data", "stands beside uri; give one of them")),
    }
}
