//! Images that are to be embedded again, by another model: events that keep the version they were
//! stored with, on a topic of their own.

use serde_json::Value;

use super::format::{Decoder, EventDecodeError};
use super::image_event;
use crate::record::{AcceptedEvent, InvalidField, KafkaMessage, SequenceKey};

/// Header that says for which generation an image is to be embedded again.
pub const GENERATION_HEADER: &str = "bsap-generation";
/// Header with the version that the image has in the table.
pub const SEQUENCE_HEADER: &str = "bsap-sequence";

/// What a worker of one generation takes from that topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReembedTopic {
    /// The topic.
    pub topic: String,
    /// The generation that the worker fills.
    pub generation: String,
}

/// The event of a message for `generation`; none where it is for another one.
pub(crate) fn decode(
    decoder: &Decoder,
    generation: &str,
    message: &KafkaMessage,
) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
    let header = |name: &str| {
        let found = message.headers.iter().find(|(header, _)| header == name);
        let value = found.and_then(|(_, value)| value.as_deref());
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
        ..image_event::decode_unversioned(decoder, object, None)?.0
    }])
}
