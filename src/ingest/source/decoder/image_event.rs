//! This project's own event format: JSON, by the schema `schemas/image-event.schema.json`.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::EventDecodeError;
use super::rules::{DecodeRules, VersionFields, deserialise};
use crate::ingest::decode::decode_image_text;
use crate::record::arrays::JsonEmbedding;
use crate::record::{
    AcceptedEvent, ImageChange, ImageId, ImageSource, InvalidField, KafkaMessage, Operation,
    SequenceKey,
};

/// A new-image event. Fields that are not listed here are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImageEvent {
    /// Id of the image within the catalogue: 1 to 1024 bytes without control characters.
    pub image_id: String,
    /// `upsert` (the image is new or has changed) or `delete`.
    #[serde(default)]
    pub operation: Operation,
    /// Address of the image: s3://, gs://, az://, http(s)://, file:// or data:. An upsert has
    /// either this or `data`, unless it has `embedding`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// The bytes of the image in base64 or as a `data:` address, for small images (Kafka limits a
    /// message to 1 MB by default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Embedding of the image, if somebody has computed it already: numbers, or base64 of floats of 16 or 32 bits,
    /// little-endian. Nothing is fetched then; `uri` is only stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<JsonEmbedding>,
    /// Fingerprint of the model that computed `embedding`, as `bsap model inspect` and `/v1/state` name it. An embedding by
    /// any other model than the worker's is dead-lettered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Version of the image, which grows with each change. Required if the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// When the change happened, as RFC 3339. Required if the catalogue orders by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<DateTime<Utc>>,
    /// Attributes of the image by name; undeclared ones are ignored.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, Value>,
}

/// Decodes an event; `inline` are the bytes of the image, if they came outside of `object`.
pub(super) fn decode(
    rules: &DecodeRules,
    message: &KafkaMessage,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<AcceptedEvent, EventDecodeError> {
    let (event, number) = decode_without_sequence_key(rules, object, inline)?;
    let versions = VersionFields {
        sequence: number,
        event_time: event.event_time,
        ..VersionFields::default()
    };
    let sequence = rules.derive_sequence(message, &event.image_id, &versions)?;
    Ok(AcceptedEvent { sequence, ..event })
}

/// Decodes an event without its version: returns it with a placeholder for the sequence key, and the
/// value of its field `sequence`.
pub(super) fn decode_without_sequence_key(
    rules: &DecodeRules,
    object: Map<String, Value>,
    inline: Option<Bytes>,
) -> Result<(AcceptedEvent, Option<u64>), EventDecodeError> {
    let event: ImageEvent = deserialise(object.into())?;
    let image_id = ImageId::new(&event.image_id)?;
    let change = match event.operation {
        Operation::Delete => ImageChange::Delete,
        Operation::Upsert => {
            let attributes = rules.parse_attributes(&event.attributes)?;
            match event.embedding {
                None => ImageChange::Upsert {
                    content: parse_content(event.uri, event.data, inline)?,
                    attributes,
                },
                Some(_) if event.data.is_some() || inline.is_some() => {
                    let reason =
                        "is given together with the bytes of the image; give only one of them";
                    return Err(InvalidField::new("embedding", reason).into());
                }
                Some(embedding) => {
                    let model = event.model.ok_or_else(|| {
                        let reason = "is missing; an embedding comes with the fingerprint of its model (`bsap model inspect`)";
                        InvalidField::new("model", reason)
                    })?;
                    ImageChange::Embedded { embedding, model, uri: event.uri, attributes }
                }
            }
        }
    };
    let placeholder = SequenceKey::from_number(0);
    let accepted =
        AcceptedEvent { image_id, sequence: placeholder, event_time: event.event_time, change };
    Ok((accepted, event.sequence))
}

fn parse_content(
    uri: Option<String>,
    data: Option<String>,
    inline: Option<Bytes>,
) -> Result<ImageSource, InvalidField> {
    match (uri, data, inline) {
        (Some(uri), None, None) => Ok(ImageSource::from_uri(uri)),
        (None, None, Some(bytes)) => Ok(ImageSource::Inline(bytes)),
        (None, Some(data), None) => decode_image_text(&data)
            .map(|bytes| ImageSource::Inline(Bytes::from(bytes)))
            .map_err(|reason| InvalidField::new("data", reason)),
        (None, None, None) => {
            Err(InvalidField::new("uri", "is missing; an upsert has uri, data or embedding"))
        }
        _ => Err(InvalidField::new("data", "is given together with uri; give only one of them")),
    }
}
