//! New-image events from Kafka.
//!
//! [`consumer`] polls a topic on a thread of its own and hands messages over in order, together
//! with what happens to the assignment; [`format`] turns a message into events.

pub mod consumer;
pub mod decoder;
mod rebalance;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use consumer::{
    ConsumerEvent, ConsumerHandle, ConsumerStatus, OffsetProvider, Source, SourceError,
};
pub use decoder::bucket_notification::BucketNotification;
pub use decoder::cloud_event::CloudEvent;
pub use decoder::format::{Decoder, EventDecodeError, canonical_text};
pub use decoder::image_event::ImageEvent;

use crate::record::{Operation, VersionOrdering};
use crate::validate;

/// Where events come from and how they are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// Topic of new-image events.
    pub topic: String,
    /// Consumer group: the workers that share it share the partitions.
    pub group: String,
    /// Name of a deliberate replay. Under a name that is new, the whole topic is consumed again from
    /// its beginning, by a consumer group of its own and beside the usual workers. Events keep their
    /// versions: what is stored and newer stays. Empty: no replay.
    pub replay_name: String,
    /// Topic of requests to workers, for example for a reindex, as `schemas/control-request.schema.json`
    /// has them. Empty: none is heard.
    pub control_topic: String,
    /// Topic on which `bsap reindex model` asks for stored images to be embedded again by another
    /// model. Only workers of that model read it.
    pub reindex_topic: String,
    /// What orders the versions of an image: `sequence`, `event_time`, `offset` or `sequencer`.
    /// Fixed when the table is made; `offset` needs messages that are keyed by image id,
    /// `sequencer` takes bucket notifications alone.
    pub ordering: VersionOrdering,
    /// An event may be dated this far in the future before it is dead-lettered, in seconds. Only
    /// checked where `ordering` is `event_time`: one wrong clock would freeze an image for ever.
    pub max_clock_skew_seconds: u32,
    /// What CloudEvents do, by their `type`: `upsert` or `delete`. Other types are dead-lettered.
    pub cloud_event_types: BTreeMap<String, Operation>,
    /// The image id of an object that a bucket notification names, made of `{bucket}` and `{key}`.
    /// `bsap publish` names objects by `{key}` within the place that it lists.
    pub image_id_template: String,
    /// Name of this worker within the group across restarts (static membership). Empty: a new
    /// member each time. Must be unique in the group.
    pub instance_id: String,
    /// How long a worker may be silent before the group gives its partitions to others, in
    /// milliseconds. The brokers' own limits hold too (6 s to 30 min by default).
    pub session_timeout_ms: u32,
    /// Messages handed over but not yet taken up by the pipeline. Few: they wait in librdkafka's
    /// own buffer just as well.
    pub queue_messages: usize,
    /// Upper bound of librdkafka's own buffer, in MiB.
    pub prefetch_mib: u32,
    /// How long revoked partitions may take to drain before they are given up, in seconds. Work
    /// that is cut off is done again by the next owner.
    pub drain_seconds: u64,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            topic: "images".into(),
            group: "bsap".into(),
            replay_name: String::new(),
            control_topic: String::new(),
            reindex_topic: "images.reindex".into(),
            ordering: VersionOrdering::default(),
            max_clock_skew_seconds: 300,
            cloud_event_types: BTreeMap::from([
                ("bsap.image.upsert".into(), Operation::Upsert),
                ("bsap.image.delete".into(), Operation::Delete),
            ]),
            image_id_template: "{key}".into(),
            instance_id: String::new(),
            session_timeout_ms: 45_000,
            queue_messages: 64,
            prefetch_mib: 16,
            drain_seconds: 30,
        }
    }
}

impl SourceOptions {
    /// The consumer group that is joined: the configured one, or the replay's.
    pub fn group_id(&self) -> String {
        if self.replay_name.is_empty() {
            self.group.clone()
        } else {
            format!("{}.replay.{}", self.group, self.replay_name)
        }
    }

    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::check_topic_name(&mut problems, "topic", &self.topic);
        validate::check_topic_name(&mut problems, "reindex_topic", &self.reindex_topic);
        if !self.control_topic.is_empty() {
            validate::check_topic_name(&mut problems, "control_topic", &self.control_topic);
        }
        if self.group.is_empty() {
            problems.push("group: is empty; name the consumer group".into());
        }
        if !self.image_id_template.contains("{key}") {
            problems.push(format!(
                "object_id: {:?} lacks {{key}}; without it all objects would be one image",
                self.image_id_template
            ));
        }
        validate::check_range(
            &mut problems,
            "session_timeout_ms",
            self.session_timeout_ms.into(),
            6_000,
            1_800_000,
        );
        validate::check_range(
            &mut problems,
            "queue_messages",
            self.queue_messages as u64,
            1,
            100_000,
        );
        validate::check_range(&mut problems, "prefetch_mib", self.prefetch_mib.into(), 1, 1024);
        if !(1..=240).contains(&self.drain_seconds) {
            problems.push(format!(
                "drain_seconds: {} is not between 1 and 240 (max.poll.interval.ms is 5 minutes)",
                self.drain_seconds
            ));
        }
        problems
    }
}

#[cfg(test)]
mod tests;
