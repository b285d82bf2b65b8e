//! The project's own event format, JSON; its schema is `schemas/image-event.schema.json`.

use std::collections::BTreeMap;

use base64::Engine as _;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::format::{Decoder, EventDecodeError, VersionFields, deserialise};
use crate::record::{
    AcceptedEvent, ImageChange, ImageContent, ImageId, InvalidField, KafkaMessage, Operation,
    SequenceKey,
};

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
pub(crate) fn decode(
    decoder: &Decoder,
    message: &KafkaMessage,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<AcceptedEvent, EventDecodeError> {
    let (event, number) = decode_unversioned(decoder, object, inline)?;
    let versions = VersionFields {
        sequence: number,
        event_time: event.event_time,
        ..VersionFields::default()
    };
    let sequence = decoder.derive_sequence(message, &event.image_id, &versions)?;
    Ok(AcceptedEvent { sequence, ..event })
}

/// The event in a JSON object before its version is known, and the `sequence` that it says.
pub(crate) fn decode_unversioned(
    decoder: &Decoder,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<(AcceptedEvent, Option<u64>), EventDecodeError> {
    let event: ImageEvent = deserialise(object.into())?;
    let image_id = ImageId::new(&event.image_id)?;
    let change = match event.operation {
        Operation::Delete => ImageChange::Delete,
        Operation::Upsert => ImageChange::Upsert {
            content: parse_content(event.uri, event.data, inline)?,
            attributes: decoder.parse_attributes(&event.attributes)?,
        },
    };
    let sequence = SequenceKey::from_number(0);
    let (number, event_time) = (event.sequence, event.event_time);
    Ok((AcceptedEvent { image_id, sequence, event_time, change }, number))
}

fn parse_content(
    uri: Option<String>,
    data: Option<String>,
    inline: Option<Bytes>,
) -> Result<ImageContent, InvalidField> {
    match (uri, data, inline) {
        (Some(uri), None, None) => Ok(ImageContent::from_uri(uri)),
        (None, None, Some(bytes)) => Ok(ImageContent::Inline(bytes)),
        (None, Some(data), None) => base64::engine::general_purpose::STANDARD
            .decode(&data)
            .map(|bytes| ImageContent::Inline(Bytes::from(bytes)))
            .map_err(|error| InvalidField::new("data", format!("is not base64: {error}"))),
        (None, None, None) => {
            Err(InvalidField::new("uri", "is missing; an upsert has uri or data"))
        }
        _ => Err(InvalidField::new("data", "stands beside uri; give one of them")),
    }
}
