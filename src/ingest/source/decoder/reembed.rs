//! Stored images to be embedded again by another model. `bsap reindex model` writes them to a topic
//! of their own, as image events that keep the version under which the image is stored.

use serde_json::Value;

use super::error::EventDecodeError;
use super::image_event;
use super::rules::DecodeRules;
use crate::record::{AcceptedEvent, InvalidField, KafkaMessage, SequenceKey};

/// Header with the generation for which the image is to be embedded.
pub const GENERATION_HEADER: &str = "bsap-generation";
/// Header with the version of the image in the table.
pub const SEQUENCE_HEADER: &str = "bsap-sequence";

/// The part of the reembed topic that a worker reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReembedTopic {
    /// Name of the topic.
    pub topic: String,
    /// The generation that the worker writes; events for other generations are skipped.
    pub generation_id: String,
}

/// Decodes a message of the reembed topic; empty if it is for another generation.
pub(super) fn decode(
    rules: &DecodeRules,
    generation: &str,
    message: &KafkaMessage,
) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
    let header = |name: &str| {
        let header = message.headers.iter().find(|(header, _)| header == name);
        let value = header.and_then(|(_, value)| value.as_deref());
        let text = value.and_then(|value| std::str::from_utf8(value).ok());
        text.ok_or_else(|| {
            let reason = "is missing; only `bsap reindex model` writes to this topic";
            InvalidField::new(format!("header {name}"), reason)
        })
    };
    if header(GENERATION_HEADER)? != generation {
        return Ok(Vec::new());
    }
    let payload = message.payload.as_deref().unwrap_or_default();
    let value: Value = serde_json::from_slice(payload)
        .map_err(|error| EventDecodeError::UnknownFormat(format!("not JSON: {error}")))?;
    let Value::Object(object) = value else {
        return Err(EventDecodeError::UnknownFormat("JSON, but not an object".into()));
    };
    let sequence = SequenceKey::from_stored(header(SEQUENCE_HEADER)?);
    Ok(vec![AcceptedEvent {
        sequence,
        ..image_event::decode_without_sequence_key(rules, object, None)?.0
    }])
}
