//! From a Kafka message to the events in it.
//!
//! The format is recognised for each message by itself, so that formats may be mixed in one topic. To
//! add a format (Debezium, say), add a module next to `image_event` and a branch in
//! `Decoder::parse_events`.

mod bucket_notification;
mod bucket_watch;
mod cloud_event;
mod error;
mod image_event;
pub mod reembed;
mod rules;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;

pub use bucket_notification::BucketNotification;
pub use cloud_event::CloudEvent;
pub use error::EventDecodeError;
pub use image_event::ImageEvent;
pub use rules::canonical_attribute_text;

use super::options::SourceOptions;
use crate::record::{
    AcceptedEvent, AttributeTypes, ImageChange, ImageId, InvalidField, KafkaMessage,
    VersionOrdering,
};
use bucket_watch::BucketWatch;
use reembed::ReembedTopic;
use rules::{DecodeRules, VersionFields, key_text};

/// Turns the messages of one catalogue's topics into events.
#[derive(Debug, Clone)]
pub struct Decoder {
    rules: DecodeRules,
    /// How far in the future an event may be dated; only checked when `event_time` orders versions.
    max_clock_skew: TimeDelta,
    /// How long deletes are remembered; `None`: forever.
    tombstone_retention: Option<TimeDelta>,
    /// Topic of stored images to be embedded again; `None` if this decoder does not read one.
    reembed_source: Option<ReembedTopic>,
}

impl Decoder {
    /// Creates a decoder for a configuration and its declared attributes.
    pub fn new(options: &SourceOptions, attributes: &AttributeTypes) -> Self {
        Self {
            rules: DecodeRules {
                ordering: options.ordering,
                attribute_types: attributes.clone(),
                cloud_event_types: options.cloud_event_types.clone(),
                image_id_template: options.image_id_template.clone(),
                bucket_watch: BucketWatch::default(),
            },
            max_clock_skew: TimeDelta::seconds(options.max_clock_skew_seconds.into()),
            tombstone_retention: None,
            reembed_source: None,
        }
    }

    /// Rejects events older than the `days` for which deletes are remembered; 0: forever.
    #[must_use]
    pub fn with_tombstone_retention_days(mut self, days: u32) -> Self {
        self.tombstone_retention = (days > 0).then(|| TimeDelta::days(days.into()));
        self
    }

    /// Also decodes `topic`, which holds stored images that workers of `generation` embed again.
    #[must_use]
    pub fn with_reembed_topic(mut self, topic: &str, generation: &str) -> Self {
        self.reembed_source =
            Some(ReembedTopic { topic: topic.to_owned(), generation_id: generation.to_owned() });
        self
    }

    /// What orders the versions of an image.
    pub fn ordering(&self) -> VersionOrdering {
        self.rules.ordering
    }

    /// The declared attributes with their types.
    pub fn attribute_types(&self) -> &AttributeTypes {
        &self.rules.attribute_types
    }

    /// The topic of images to be embedded again; `None` if this decoder does not read one.
    pub fn reembed_topic_name(&self) -> Option<&str> {
        self.reembed_source.as_ref().map(|reembed| reembed.topic.as_str())
    }

    /// Decodes `message`: either all of its events are accepted, or the message is rejected. The
    /// result is empty if the message describes no image, as a bucket's test event does.
    pub fn decode(
        &self,
        message: &KafkaMessage,
        now: DateTime<Utc>,
    ) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
        let sent_at = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
        let reembed = self
            .reembed_source
            .as_ref()
            .filter(|reembed| *reembed.topic == *message.partition.topic);
        if let Some(reembed) = reembed {
            let events = reembed::decode(&self.rules, &reembed.generation_id, message)?;
            // These events keep their stored versions, so their age is that of the request.
            self.check_age(&events, now, |_| sent_at)?;
            return Ok(events);
        }
        let events = self.parse_events(message)?;
        self.check_age(&events, now, |event| event.event_time.or(sent_at))?;
        for (index, event) in events.iter().enumerate() {
            let checked = self.check_clock_skew(event, now).map_err(EventDecodeError::from);
            checked.map_err(|fault| with_record_index(&events, index, fault))?;
        }
        Ok(events)
    }

    /// Recognises the format of `message` and reads its events.
    fn parse_events(&self, message: &KafkaMessage) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
        let rules = &self.rules;
        if cloud_event::is_binary_mode(message) {
            return Ok(vec![cloud_event::decode_binary(rules, message)?]);
        }
        let Some(payload) = &message.payload else {
            return Ok(vec![decode_tombstone(rules, message)?]);
        };
        let value: Value = serde_json::from_slice(payload)
            .map_err(|error| EventDecodeError::UnknownFormat(format!("not JSON: {error}")))?;
        let Value::Object(object) = value else {
            return Err(EventDecodeError::UnknownFormat("JSON, but not an object".into()));
        };
        if cloud_event::is_structured_mode(message, &object) {
            return Ok(vec![cloud_event::decode_structured(rules, message, object)?]);
        }
        if bucket_notification::is_notification(&object) {
            return bucket_notification::decode(rules, message, object);
        }
        Ok(vec![image_event::decode(rules, message, object, None)?])
    }

    /// Rejects upserts whose image may have been deleted since, without a tombstone to show it.
    fn check_age(
        &self,
        events: &[AcceptedEvent],
        now: DateTime<Utc>,
        event_time: impl Fn(&AcceptedEvent) -> Option<DateTime<Utc>>,
    ) -> Result<(), EventDecodeError> {
        let Some(retention) = self.tombstone_retention else { return Ok(()) };
        for (index, event) in events.iter().enumerate() {
            let expired = event_time(event).filter(|time| *time < now - retention);
            if let Some(time) = expired.filter(|_| event.change != ImageChange::Delete) {
                let fault = EventDecodeError::TooOld(time, retention.num_days());
                return Err(with_record_index(events, index, fault));
            }
        }
        Ok(())
    }

    fn check_clock_skew(
        &self,
        event: &AcceptedEvent,
        now: DateTime<Utc>,
    ) -> Result<(), InvalidField> {
        match event.event_time {
            Some(time)
                if self.rules.ordering == VersionOrdering::EventTime
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
}

/// Decodes a message with a key and a null value: the image with that id was deleted.
fn decode_tombstone(
    rules: &DecodeRules,
    message: &KafkaMessage,
) -> Result<AcceptedEvent, EventDecodeError> {
    if message.key.is_none() {
        return Err(EventDecodeError::UnknownFormat("null value without a key".into()));
    }
    let id = key_text(message).ok_or_else(|| InvalidField::new("key", "is not UTF-8"))?;
    let image_id = ImageId::new(id)?;
    let event_time = message.timestamp_ms.and_then(DateTime::from_timestamp_millis);
    let versions = VersionFields { event_time, ..VersionFields::default() };
    Ok(AcceptedEvent {
        sequence: rules.derive_sequence(message, &image_id, &versions)?,
        image_id,
        event_time,
        change: ImageChange::Delete,
    })
}

/// Adds the record's index to `fault` if the message holds several events.
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

#[cfg(test)]
mod tests;
