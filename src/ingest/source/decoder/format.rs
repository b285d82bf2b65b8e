//! From a message to the events in it.
//!
//! Formats are told apart by each message on its own. A further one (Debezium, a schema registry's)
//! is a module beside `json` and a line in [`Decoder::events`].

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::again::{self, Again};
use super::{bucket, cloud_event, json};
use crate::ingest::source::Options;
use crate::record::{
    AttributeType, AttributeTypes, Attributes, Change, Event, ImageId, Invalid, Message, Operation,
    Ordering, Sequence,
};

/// A message that cannot be used. Permanent: it belongs among the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The value is not in any known format.
    #[error("not a known event format: {0}")]
    Format(String),
    /// The format is known, but not this kind of event.
    #[error("not a known kind of event: {0}")]
    Kind(String),
    /// A field is missing or wrong.
    #[error(transparent)]
    Field(#[from] Invalid),
    /// Whether the image was deleted after this event is not remembered any more.
    #[error(
        "is of {0}; deleted images are remembered for {1} days (upkeep.tombstone_days), so an older event could bring one back: publish the image anew if it is there"
    )]
    TooOld(DateTime<Utc>, i64),
    /// One of several records is wrong, and so the whole message.
    #[error("record {index}: {fault}")]
    Record {
        /// Which, counted from 0.
        index: usize,
        /// Why.
        fault: Box<Rejected>,
    },
}

impl Rejected {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(_) => "unknown_format",
            Self::Kind(_) => "unknown_kind",
            Self::Field(_) => "invalid_field",
            Self::TooOld(..) => "too_old",
            Self::Record { fault, .. } => fault.code(),
        }
    }

    /// Which of several records is wrong, counted from 0.
    pub fn record(&self) -> Option<usize> {
        match self {
            Self::Record { index, .. } => Some(*index),
            _ => None,
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
    /// What CloudEvents do, by their `type`.
    pub cloud_event_types: BTreeMap<String, Operation>,
    /// For how long a deleted image is remembered; none: for ever.
    pub remembered: Option<TimeDelta>,
    /// The image id of an object in a bucket, with `{bucket}` and `{key}` to be filled in.
    pub object_id: String,
    /// Where images come from that are to be embedded again; none: from nowhere.
    pub again: Option<Again>,
}

/// What an event says of its version; which of it counts, the catalogue's ordering says.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Versions<'a> {
    pub sequence: Option<u64>,
    pub event_time: Option<DateTime<Utc>>,
    pub sequencer: Option<&'a str>,
}

impl Decoder {
    /// The rules of a configuration.
    pub fn new(options: &Options, attributes: &AttributeTypes) -> Self {
        Self {
            ordering: options.ordering,
            max_clock_skew: TimeDelta::seconds(options.max_clock_skew_seconds.into()),
            attributes: attributes.clone(),
            cloud_event_types: options.cloud_event_types.clone(),
            remembered: None,
            object_id: options.object_id.clone(),
            again: None,
        }
    }

    /// Refuses events older than `days`, for which deleted images are remembered; 0: for ever.
    #[must_use]
    pub fn remembering(mut self, days: u32) -> Self {
        self.remembered = (days > 0).then(|| TimeDelta::days(days.into()));
        self
    }

    /// Reads another topic too, with images that are to be embedded again for one generation.
    #[must_use]
    pub fn embedding_again(mut self, topic: &str, generation: &str) -> Self {
        self.again = Some(Again { topic: topic.to_owned(), generation: generation.to_owned() });
        self
    }

    /// The events of `message`, all of a message or none of it. No events: the message is one that
    /// tells of no image, such as a bucket's test event.
    pub fn decode(&self, message: &Message, now: DateTime<Utc>) -> Result<Vec<Event>, Rejected> {
        let sent = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
        if let Some(of) = self.again.as_ref().filter(|of| *of.topic == *message.partition.topic) {
            let events = again::decode(self, &of.generation, message)?;
            // They keep their versions: what counts is since when they wait.
            self.young_enough(&events, now, |_| sent)?;
            return Ok(events);
        }
        let events = self.events(message)?;
        self.young_enough(&events, now, |event| event.event_time.or(sent))?;
        for (index, event) in events.iter().enumerate() {
            let checked = self.dated_plausibly(event, now).map_err(Rejected::from);
            checked.map_err(|fault| of_record(&events, index, fault))?;
        }
        Ok(events)
    }

    /// Refuses a message whose images may have been deleted, and forgotten, after it.
    fn young_enough(
        &self,
        events: &[Event],
        now: DateTime<Utc>,
        time_of: impl Fn(&Event) -> Option<DateTime<Utc>>,
    ) -> Result<(), Rejected> {
        let Some(days) = self.remembered else { return Ok(()) };
        for (index, event) in events.iter().enumerate() {
            let time = time_of(event).filter(|time| *time < now - days);
            if let Some(time) = time.filter(|_| event.change != Change::Delete) {
                return Err(of_record(events, index, Rejected::TooOld(time, days.num_days())));
            }
        }
        Ok(())
    }

    fn events(&self, message: &Message) -> Result<Vec<Event>, Rejected> {
        if cloud_event::is_binary(message) {
            return Ok(vec![cloud_event::binary(self, message)?]);
        }
        let Some(payload) = &message.payload else {
            return Ok(vec![self.tombstone(message)?]);
        };
        let value: Value = serde_json::from_slice(payload)
            .map_err(|error| Rejected::Format(format!("not JSON: {error}")))?;
        let Value::Object(object) = value else {
            return Err(Rejected::Format("JSON, but not an object".into()));
        };
        if cloud_event::is_structured(message, &object) {
            return Ok(vec![cloud_event::structured(self, message, object)?]);
        }
        if bucket::is_notification(&object) {
            return bucket::decode(self, message, object);
        }
        Ok(vec![json::event(self, message, object, None)?])
    }

    fn dated_plausibly(&self, event: &Event, now: DateTime<Utc>) -> Result<(), Invalid> {
        match event.event_time {
            Some(time)
                if self.ordering == Ordering::EventTime && time > now + self.max_clock_skew =>
            {
                let reason = format!(
                    "{time} lies more than {} s in the future; correct the sender's clock",
                    self.max_clock_skew.num_seconds()
                );
                Err(Invalid::new("event_time", reason))
            }
            _ => Ok(()),
        }
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
        let versions = Versions { event_time, ..Versions::default() };
        Ok(Event {
            sequence: self.sequence(message, &image_id, &versions)?,
            image_id,
            event_time,
            change: Change::Delete,
        })
    }

    /// The version of an event by this catalogue's ordering; refused where the event lacks it.
    pub(crate) fn sequence(
        &self,
        message: &Message,
        image_id: &ImageId,
        versions: &Versions<'_>,
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
                versions.sequence.map(Sequence::from_number).ok_or_else(|| missing("sequence"))
            }
            Ordering::EventTime => {
                Sequence::from_time(versions.event_time.ok_or_else(|| missing("event_time"))?)
            }
            Ordering::Sequencer => {
                Sequence::from_sequencer(versions.sequencer.ok_or_else(|| missing("sequencer"))?)
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
    pub(crate) fn attributes(
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

/// The fault of one event, which names the record where a message has several.
fn of_record(events: &[Event], index: usize, fault: Rejected) -> Rejected {
    match events.len() {
        1 => fault,
        _ => Rejected::Record { index, fault: Box::new(fault) },
    }
}

/// Reads `value` by its type; an error names the field by its path.
pub(crate) fn read<T: DeserializeOwned>(value: Value) -> Result<T, Invalid> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        // A missing field is reported at its parent; the message names it.
        match reason.strip_prefix("missing field `") {
            Some(rest) => {
                let parent = if path == "." { String::new() } else { format!("{path}.") };
                Invalid::new(format!("{parent}{}", rest.trim_end_matches('`')), "is missing")
            }
            None => Invalid::new(path, reason),
        }
    })
}

/// The stored text of `value` if it is of type `kind`.
pub fn canonical(kind: AttributeType, value: &Value) -> Option<String> {
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
