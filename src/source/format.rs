//! From a message to the events in it.
//!
//! A format is one function from a message to its events. A further one (CloudEvents, bucket
//! notifications, Debezium) is a module beside `json` and a line in [`Decoder::decode`].

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;

use super::json;
use crate::record::{
    AttributeType, AttributeTypes, Attributes, Change, Event, ImageId, Invalid, Message, Ordering,
    Sequence,
};

/// A message that cannot be used. Permanent: it belongs among the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The value is not in any known format.
    #[error("not a known event format: {0}")]
    Format(String),
    /// A field is missing or wrong.
    #[error(transparent)]
    Field(#[from] Invalid),
}

impl Rejected {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(_) => "unknown_format",
            Self::Field(_) => "invalid_field",
        }
    }
}

/// Turns messages into events by the rules of one catalogue.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// What orders the versions of an image.
    pub ordering: Ordering,
    /// How far in the future an event may be dated.
    pub max_clock_skew: TimeDelta,
    /// Declared attributes.
    pub attributes: AttributeTypes,
}

impl Decoder {
    /// The events of `message`, at least one; all of a message or none of it.
    pub fn decode(&self, message: &Message, now: DateTime<Utc>) -> Result<Vec<Event>, Rejected> {
        let event = match &message.payload {
            None => self.tombstone(message)?,
            Some(payload) => json::decode(self, message, payload)?,
        };
        if self.ordering == Ordering::EventTime
            && let Some(time) = event.event_time
            && time > now + self.max_clock_skew
        {
            let reason = format!(
                "{time} lies more than {} s in the future; correct the sender's clock",
                self.max_clock_skew.num_seconds()
            );
            return Err(Invalid::new("event_time", reason).into());
        }
        Ok(vec![event])
    }

    /// A null value with a key: the image with that id is gone.
    fn tombstone(&self, message: &Message) -> Result<Event, Rejected> {
        let key = message
            .key
            .as_ref()
            .ok_or_else(|| Rejected::Format("null value without a key".into()))?;
        let id = std::str::from_utf8(key).map_err(|_| Invalid::new("key", "is not UTF-8"))?;
        let image_id = ImageId::new(id)?;
        let event_time = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
        Ok(Event {
            sequence: self.sequence(message, &image_id, None, event_time)?,
            image_id,
            event_time,
            change: Change::Delete,
        })
    }

    /// The version of an event by this catalogue's ordering; refused where the event lacks it.
    pub(super) fn sequence(
        &self,
        message: &Message,
        image_id: &ImageId,
        sequence: Option<u64>,
        event_time: Option<DateTime<Utc>>,
    ) -> Result<Sequence, Invalid> {
        let missing = |field: &str| {
            let reason = format!(
                "is missing; this catalogue orders the versions of an image by {}",
                self.ordering.name()
            );
            Invalid::new(field, reason)
        };
        match self.ordering {
            Ordering::Sequence => {
                sequence.map(Sequence::from_number).ok_or_else(|| missing("sequence"))
            }
            Ordering::EventTime => {
                Sequence::from_time(event_time.ok_or_else(|| missing("event_time"))?)
            }
            Ordering::Offset if message.key.as_deref() == Some(image_id.as_str().as_bytes()) => {
                let offset = u64::try_from(message.offset)
                    .map_err(|_| Invalid::new("offset", "is negative"))?;
                Ok(Sequence::from_number(offset))
            }
            Ordering::Offset => Err(Invalid::new(
                "key",
                "is not the image id; ordering by offset needs messages keyed by image id",
            )),
        }
    }

    /// The declared attributes among `given`, in canonical text. Names that are not declared are
    /// left out; a declared one of the wrong type is refused.
    pub(super) fn attributes(
        &self,
        given: &BTreeMap<String, Value>,
    ) -> Result<Attributes, Invalid> {
        let mut attributes = Attributes::new();
        for (name, kind) in &self.attributes {
            match given.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let text = canonical(*kind, value).ok_or_else(|| {
                        let reason = format!("{value} is not of the declared type {kind:?}");
                        Invalid::new(format!("attributes.{name}"), reason)
                    })?;
                    attributes.insert(name.clone(), text);
                }
            }
        }
        Ok(attributes)
    }
}

/// The stored text of `value` if it is of type `kind`.
fn canonical(kind: AttributeType, value: &Value) -> Option<String> {
    match (kind, value) {
        (AttributeType::Text, Value::String(text)) => Some(text.clone()),
        (AttributeType::Integer, Value::Number(n)) if n.is_i64() || n.is_u64() => {
            Some(n.to_string())
        }
        (AttributeType::Number, Value::Number(n)) => Some(n.to_string()),
        (AttributeType::Boolean, Value::Bool(b)) => Some(b.to_string()),
        (AttributeType::Time, Value::String(text)) => {
            let time = DateTime::parse_from_rfc3339(text).ok()?;
            Some(time.to_utc().to_rfc3339_opts(chrono::SecondsFormat::Micros, true))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Content, Partition};
    use bytes::Bytes;

    fn decoder(ordering: Ordering) -> Decoder {
        Decoder {
            ordering,
            max_clock_skew: TimeDelta::seconds(60),
            attributes: AttributeTypes::from([
                ("colour".into(), AttributeType::Text),
                ("price".into(), AttributeType::Number),
            ]),
        }
    }

    fn message(key: Option<&str>, payload: Option<&str>) -> Message {
        Message {
            partition: Partition { topic: "images".into(), number: 0 },
            offset: 7,
            key: key.map(|k| Bytes::copy_from_slice(k.as_bytes())),
            payload: payload.map(|p| Bytes::copy_from_slice(p.as_bytes())),
            headers: Vec::new(),
            timestamp_ms: Some(1_700_000_000_000),
        }
    }

    fn decode(ordering: Ordering, message: &Message) -> Result<Vec<Event>, Rejected> {
        let now = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        decoder(ordering).decode(message, now)
    }

    #[test]
    fn an_upsert_with_attributes() {
        let text = r#"{"image_id":"a","uri":"s3://b/a.jpg","sequence":3,
            "attributes":{"colour":"red","price":9.5,"unknown":1},"future_field":true}"#;
        let events = decode(Ordering::Sequence, &message(None, Some(text))).unwrap();
        let Change::Upsert { content, attributes } = &events[0].change else {
            panic!("not an upsert")
        };
        assert_eq!(content, &Content::Uri("s3://b/a.jpg".into()));
        assert_eq!(attributes.len(), 2);
        assert_eq!(attributes["price"], "9.5");
        assert_eq!(events[0].sequence, Sequence::from_number(3));
    }

    #[test]
    fn a_null_value_with_a_key_is_a_delete() {
        let events = decode(Ordering::Offset, &message(Some("a"), None)).unwrap();
        assert_eq!(events[0].change, Change::Delete);
        assert_eq!(events[0].sequence, Sequence::from_number(7));
        assert!(decode(Ordering::Offset, &message(None, None)).is_err());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (Ordering::Sequence, r#"{"image_id":"a","uri":"u"}"#, "sequence"),
            (Ordering::EventTime, r#"{"image_id":"a","uri":"u","sequence":1}"#, "event_time"),
            (
                Ordering::EventTime,
                r#"{"image_id":"a","uri":"u","event_time":"2033-01-01T00:00:00Z"}"#,
                "event_time",
            ),
            (Ordering::Sequence, r#"{"image_id":"a","sequence":1}"#, "uri"),
            (
                Ordering::Sequence,
                r#"{"image_id":"a","uri":"u","data":"QQ==","sequence":1}"#,
                "data",
            ),
            (Ordering::Sequence, r#"{"image_id":"a","data":"@","sequence":1}"#, "data"),
            (Ordering::Sequence, r#"{"image_id":"","uri":"u","sequence":1}"#, "image_id"),
            (Ordering::Sequence, r#"{"uri":"u","sequence":1}"#, "image_id"),
            (Ordering::Sequence, r#"{"image_id":"a","uri":"u","sequence":-1}"#, "sequence"),
            (Ordering::Offset, r#"{"image_id":"b","uri":"u"}"#, "key"),
            (
                Ordering::Sequence,
                r#"{"image_id":"a","uri":"u","sequence":1,"attributes":{"price":"x"}}"#,
                "attributes.price",
            ),
            (
                Ordering::Sequence,
                r#"{"image_id":"a","uri":"u","sequence":1,"operation":"merge"}"#,
                "operation",
            ),
        ];
        for (ordering, text, field) in cases {
            match decode(ordering, &message(Some("a"), Some(text))) {
                Err(Rejected::Field(invalid)) => assert_eq!(invalid.field, field, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_event_is_no_event() {
        for text in ["", "null", "[]", "hello", "{\"a\":", "\u{0}"] {
            let rejected = decode(Ordering::Sequence, &message(None, Some(text))).unwrap_err();
            assert_eq!(rejected.code(), "unknown_format", "{text}");
        }
    }
}
