//! From a message to the events in it.
//!
//! Formats are told apart by each message on its own. A further one (Debezium, a schema registry's)
//! is a module beside `json` and a line in [`Decoder::events`].

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::reembed::{self, ReembedTopic};
use super::{bucket_notification, cloud_event, image_event};
use crate::ingest::source::SourceOptions;
use crate::record::{
    AcceptedEvent, AttributeType, AttributeTypes, Attributes, ImageChange, ImageId, InvalidField,
    KafkaMessage, Operation, SequenceKey, VersionOrdering,
};

/// A message that cannot be used. Permanent: it belongs among the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventDecodeError {
    /// The value is not in any known format.
    #[error("not a known event format: {0}")]
    UnknownFormat(String),
    /// The format is known, but not this kind of event.
    #[error("not a known kind of event: {0}")]
    UnknownKind(String),
    /// A field is missing or wrong.
    #[error(transparent)]
    InvalidField(#[from] InvalidField),
    /// Whether the image was deleted after this event is not remembered any more.
    #[error(
        "is of {0}; deleted images are remembered for {1} days (maintenance.tombstone_retention_days), so an older event could bring one back: publish the image anew if it is there"
    )]
    TooOld(DateTime<Utc>, i64),
    /// One of several records is wrong, and so the whole message.
    #[error("record {index}: {fault}")]
    InvalidRecord {
        /// Which, counted from 0.
        index: usize,
        /// Why.
        fault: Box<EventDecodeError>,
    },
}

impl EventDecodeError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownFormat(_) => "unknown_format",
            Self::UnknownKind(_) => "unknown_event_type",
            Self::InvalidField(_) => "invalid_field",
            Self::TooOld(..) => "too_old",
            Self::InvalidRecord { fault, .. } => fault.code(),
        }
    }

    /// Which of several records is wrong, counted from 0.
    pub fn record_index(&self) -> Option<usize> {
        match self {
            Self::InvalidRecord { index, .. } => Some(*index),
            _ => None,
        }
    }
}

/// Turns messages into events by the rules of one catalogue.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// What orders the versions of an image.
    pub ordering: VersionOrdering,
    /// How far in the future an event may be dated.
    pub max_clock_skew: TimeDelta,
    /// Declared attributes.
    pub attributes: AttributeTypes,
    /// What CloudEvents do, by their `type`.
    pub cloud_event_types: BTreeMap<String, Operation>,
    /// For how long a deleted image is remembered; none: for ever.
    pub tombstone_retention: Option<TimeDelta>,
    /// The image id of an object in a bucket, with `{bucket}` and `{key}` to be filled in.
    pub object_id: String,
    /// Where images come from that are to be embedded again; none: from nowhere.
    pub reembed: Option<ReembedTopic>,
}

/// What an event says of its version; which of it counts, the catalogue's ordering says.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct VersionFields<'a> {
    pub sequence: Option<u64>,
    pub event_time: Option<DateTime<Utc>>,
    pub sequencer: Option<&'a str>,
}

impl Decoder {
    /// The rules of a configuration.
    pub fn new(options: &SourceOptions, attributes: &AttributeTypes) -> Self {
        Self {
            ordering: options.ordering,
            max_clock_skew: TimeDelta::seconds(options.max_clock_skew_seconds.into()),
            attributes: attributes.clone(),
            cloud_event_types: options.cloud_event_types.clone(),
            tombstone_retention: None,
            object_id: options.image_id_template.clone(),
            reembed: None,
        }
    }

    /// Refuses events older than `days`, for which deleted images are remembered; 0: for ever.
    #[must_use]
    pub fn with_tombstone_days(mut self, days: u32) -> Self {
        self.tombstone_retention = (days > 0).then(|| TimeDelta::days(days.into()));
        self
    }

    /// Reads another topic too, with images that are to be embedded again for one generation.
    #[must_use]
    pub fn with_reembed_topic(mut self, topic: &str, generation: &str) -> Self {
        self.reembed =
            Some(ReembedTopic { topic: topic.to_owned(), generation: generation.to_owned() });
        self
    }

    /// The events of `message`, all of a message or none of it. No events: the message is one that
    /// tells of no image, such as a bucket's test event.
    pub fn decode(
        &self,
        message: &KafkaMessage,
        now: DateTime<Utc>,
    ) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
        let sent = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
        if let Some(reembed_topic) =
            self.reembed.as_ref().filter(|of| *of.topic == *message.partition.topic)
        {
            let events = reembed::decode(self, &reembed_topic.generation, message)?;
            // They keep their versions: what counts is since when they wait.
            self.check_age(&events, now, |_| sent)?;
            return Ok(events);
        }
        let events = self.parse_events(message)?;
        self.check_age(&events, now, |event| event.event_time.or(sent))?;
        for (index, event) in events.iter().enumerate() {
            let checked = self.check_clock_skew(event, now).map_err(EventDecodeError::from);
            checked.map_err(|fault| with_record_index(&events, index, fault))?;
        }
        Ok(events)
    }

    /// Refuses a message whose images may have been deleted, and forgotten, after it.
    fn check_age(
        &self,
        events: &[AcceptedEvent],
        now: DateTime<Utc>,
        time_of: impl Fn(&AcceptedEvent) -> Option<DateTime<Utc>>,
    ) -> Result<(), EventDecodeError> {
        let Some(days) = self.tombstone_retention else { return Ok(()) };
        for (index, event) in events.iter().enumerate() {
            let time = time_of(event).filter(|time| *time < now - days);
            if let Some(time) = time.filter(|_| event.change != ImageChange::Delete) {
                return Err(with_record_index(
                    events,
                    index,
                    EventDecodeError::TooOld(time, days.num_days()),
                ));
            }
        }
        Ok(())
    }

    fn parse_events(&self, message: &KafkaMessage) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
        if cloud_event::is_binary(message) {
            return Ok(vec![cloud_event::decode_binary(self, message)?]);
        }
        let Some(payload) = &message.payload else {
            return Ok(vec![self.decode_tombstone(message)?]);
        };
        let value: Value = serde_json::from_slice(payload)
            .map_err(|error| EventDecodeError::UnknownFormat(format!("not JSON: {error}")))?;
        let Value::Object(object) = value else {
            return Err(EventDecodeError::UnknownFormat("JSON, but not an object".into()));
        };
        if cloud_event::is_structured(message, &object) {
            return Ok(vec![cloud_event::decode_structured(self, message, object)?]);
        }
        if bucket_notification::is_notification(&object) {
            return bucket_notification::decode(self, message, object);
        }
        Ok(vec![image_event::decode(self, message, object, None)?])
    }

    fn check_clock_skew(
        &self,
        event: &AcceptedEvent,
        now: DateTime<Utc>,
    ) -> Result<(), InvalidField> {
        match event.event_time {
            Some(time)
                if self.ordering == VersionOrdering::EventTime
                    && time > now + self.max_clock_skew =>
            {
                let reason = format!(
                    "{time} lies more than {} s in the future; correct the sender's clock",
                    self.max_clock_skew.num_seconds()
                );
                Err(InvalidField::new("event_time", reason))
            }
            _ => Ok(()),
        }
    }

    /// A null value with a key: the image with that id is gone.
    fn decode_tombstone(&self, message: &KafkaMessage) -> Result<AcceptedEvent, EventDecodeError> {
        let key = message
            .key
            .as_ref()
            .ok_or_else(|| EventDecodeError::UnknownFormat("null value without a key".into()))?;
        let id = std::str::from_utf8(key).map_err(|_| InvalidField::new("key", "is not UTF-8"))?;
        let image_id = ImageId::new(id)?;
        let event_time = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
        let versions = VersionFields { event_time, ..VersionFields::default() };
        Ok(AcceptedEvent {
            sequence: self.derive_sequence(message, &image_id, &versions)?,
            image_id,
            event_time,
            change: ImageChange::Delete,
        })
    }

    /// The version of an event by this catalogue's ordering; refused where the event lacks it.
    pub(crate) fn derive_sequence(
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
            VersionOrdering::Offset
                if message.key.as_deref() == Some(image_id.as_str().as_bytes()) =>
            {
                let offset = u64::try_from(message.offset)
                    .map_err(|_| InvalidField::new("offset", "is negative"))?;
                Ok(SequenceKey::from_number(offset))
            }
            VersionOrdering::Offset => Err(InvalidField::new(
                "key",
                "is not the image id; ordering by offset needs messages keyed by image id",
            )),
        }
    }

    /// The declared attributes among `given`, in canonical text. Names that are not declared are
    /// left out; a declared one of the wrong type is refused.
    pub(crate) fn parse_attributes(
        &self,
        given: &BTreeMap<String, Value>,
    ) -> Result<Attributes, InvalidField> {
        let mut attributes = Attributes::new();
        for (name, kind) in &self.attributes {
            match given.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let text = canonical_text(*kind, value).ok_or_else(|| {
                        let reason = format!("{value} is not of the declared type {kind:?}");
                        InvalidField::new(format!("attributes.{name}"), reason)
                    })?;
                    attributes.insert(name.clone(), text);
                }
            }
        }
        Ok(attributes)
    }
}

/// The fault of one event, which names the record where a message has several.
fn with_record_index(
    events: &[AcceptedEvent],
    index: usize,
    fault: EventDecodeError,
) -> EventDecodeError {
    match events.len() {
        1 => fault,
        _ => EventDecodeError::InvalidRecord { index, fault: Box::new(fault) },
    }
}

/// Reads `value` by its type; an error names the field by its path.
pub(crate) fn deserialise<T: DeserializeOwned>(value: Value) -> Result<T, InvalidField> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        // A missing field is reported at its parent; the message names it.
        match reason.strip_prefix("missing field `") {
            Some(rest) => {
                let parent = if path == "." { String::new() } else { format!("{path}.") };
                InvalidField::new(format!("{parent}{}", rest.trim_end_matches('`')), "is missing")
            }
            None => InvalidField::new(path, reason),
        }
    })
}

/// The stored text of `value` if it is of type `kind`.
pub fn canonical_text(kind: AttributeType, value: &Value) -> Option<String> {
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
