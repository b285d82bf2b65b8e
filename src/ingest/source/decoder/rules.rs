//! What all formats share: the catalogue's rules for versions and attributes, and typed reading of
//! JSON with errors that name the field.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::bucket_watch::BucketWatch;
use crate::record::{
    AttributeType, AttributeTypes, Attributes, ImageId, InvalidField, KafkaMessage, Operation,
    SequenceKey, VersionOrdering, whole_number,
};

/// How the events of one catalogue are read, whatever their format.
#[derive(Debug, Clone)]
pub struct DecodeRules {
    /// What orders the versions of an image.
    pub ordering: VersionOrdering,
    /// Declared attributes.
    pub attribute_types: AttributeTypes,
    /// The operation of a CloudEvent by its `type`.
    pub cloud_event_types: BTreeMap<String, Operation>,
    /// The image id of an object in a bucket, with the placeholders `{bucket}` and `{key}`.
    pub image_id_template: String,
    /// Notices that objects of several buckets share ids.
    pub bucket_watch: BucketWatch,
}

/// The fields of an event that may carry its version. The catalogue's ordering decides which one is used.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct VersionFields<'a> {
    pub sequence: Option<u64>,
    pub event_time: Option<DateTime<Utc>>,
    pub sequencer: Option<&'a str>,
}

impl DecodeRules {
    /// Derives the version of an event by this catalogue's ordering. Fails if the event lacks the
    /// field that the ordering needs.
    pub(super) fn derive_sequence(
        &self,
        message: &KafkaMessage,
        image_id: &ImageId,
        versions: &VersionFields<'_>,
    ) -> Result<SequenceKey, InvalidField> {
        let missing = |field: &str| {
            let reason = format!(
                "is missing; this catalogue orders the versions of an image by {}",
                self.ordering.as_str()
            );
            InvalidField::new(field, reason)
        };
        match self.ordering {
            VersionOrdering::Sequence => {
                versions.sequence.map(SequenceKey::from_number).ok_or_else(|| missing("sequence"))
            }
            VersionOrdering::EventTime => {
                SequenceKey::from_time(versions.event_time.ok_or_else(|| missing("event_time"))?)
            }
            VersionOrdering::Sequencer => {
                SequenceKey::from_sequencer(versions.sequencer.ok_or_else(|| missing("sequencer"))?)
            }
            VersionOrdering::Offset if key_text(message).as_deref() == Some(image_id.as_str()) => {
                SequenceKey::from_log_position(message.log_number, message.offset)
            }
            VersionOrdering::Offset => Err(InvalidField::new(
                "key",
                "is not the image id; ordering by offset needs messages keyed by image id",
            )),
        }
    }

    /// Returns the declared attributes among `given`, in canonical text. Undeclared names are
    /// ignored; a declared attribute of the wrong type is an error.
    pub(super) fn parse_attributes(
        &self,
        given: &BTreeMap<String, Value>,
    ) -> Result<Attributes, InvalidField> {
        let mut attributes = Attributes::new();
        for (name, attribute_type) in &self.attribute_types {
            match given.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let text =
                        canonical_attribute_text(*attribute_type, value).ok_or_else(|| {
                            let reason =
                                format!("{value} is not of the declared type {attribute_type:?}");
                            InvalidField::new(format!("attributes.{name}"), reason)
                        })?;
                    attributes.insert(name.clone(), text);
                }
            }
        }
        Ok(attributes)
    }
}

/// Returns the key of a message as text; `None` if it has none that is UTF-8. A key in the quotes of JSON, as
/// Kafka Connect's converter writes it, is that text without them.
pub(super) fn key_text(message: &KafkaMessage) -> Option<Cow<'_, str>> {
    let key = std::str::from_utf8(message.key.as_deref()?).ok()?;
    let unquoted = key.starts_with('"').then(|| serde_json::from_str::<String>(key).ok()).flatten();
    Some(unquoted.map_or(key.into(), Into::into))
}

/// Deserialises `value`; an error names the field by its path.
pub(super) fn deserialise<T: DeserializeOwned>(value: Value) -> Result<T, InvalidField> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        // serde reports a missing field at its parent; only the message names the field.
        match reason.strip_prefix("missing field `") {
            Some(rest) => {
                let parent = if path == "." { String::new() } else { format!("{path}.") };
                InvalidField::new(format!("{parent}{}", rest.trim_end_matches('`')), "is missing")
            }
            None => InvalidField::new(path, reason),
        }
    })
}

/// Returns the text under which an attribute value is stored; `None` if it is not of `attribute_type`.
pub fn canonical_attribute_text(attribute_type: AttributeType, value: &Value) -> Option<String> {
    match (attribute_type, value) {
        (AttributeType::Text, Value::String(text)) => Some(text.clone()),
        (AttributeType::Integer, Value::Number(n)) => whole_number(n).map(|n| n.to_string()),
        (AttributeType::Number, Value::Number(n)) => Some(n.to_string()),
        (AttributeType::Boolean, Value::Bool(b)) => Some(b.to_string()),
        (AttributeType::Time, Value::String(text)) => {
            let time = DateTime::parse_from_rfc3339(text).ok()?;
            Some(time.to_utc().to_rfc3339_opts(chrono::SecondsFormat::Micros, true))
        }
        _ => None,
    }
}
