//! Options of the section `source`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::{Operation, VersionOrdering};
use crate::validate;

/// Which topics are consumed, in which group, and how events are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// Topic of new-image events.
    pub topic: String,
    /// Consumer group: the workers of one group share the partitions of the topic.
    pub group: String,
    /// Name of a deliberate replay. Under a new name, the whole topic is consumed again from its
    /// beginning, by a consumer group of its own and in parallel with the usual workers. Events keep
    /// their versions: newer stored versions stay. Empty: no replay.
    pub replay_name: String,
    /// Topic of requests to workers, for example to reindex, in the format of
    /// `schemas/control-request.schema.json`. Empty: workers accept no requests.
    pub control_topic: String,
    /// Topic to which `bsap reindex model` writes the stored images that another model is to embed
    /// again. Only workers of that model read it.
    pub reindex_topic: String,
    /// What orders the versions of an image: `sequence`, `event_time`, `offset` or `sequencer`.
    /// Fixed when the table is created; `offset` needs messages keyed by image id, `sequencer` accepts
    /// only bucket notifications.
    pub ordering: VersionOrdering,
    /// How far in the future an event may be dated before it is dead-lettered, in seconds. Only checked
    /// if `ordering` is `event_time`: one wrong clock could otherwise freeze an image forever.
    pub max_clock_skew_seconds: u32,
    /// Operation of a CloudEvent by its `type`: `upsert` or `delete`. Other types are dead-lettered.
    pub cloud_event_types: BTreeMap<String, Operation>,
    /// Template of the image id of an object in a bucket notification, with the placeholders
    /// `{bucket}` and `{key}`. `bsap publish` uses the key below the URL that it lists.
    pub image_id_template: String,
    /// Name of this worker within the group across restarts (static membership); must be unique in
    /// the group. Empty: the worker joins as a new member at each start.
    pub instance_id: String,
    /// How long a worker may send no heartbeat before the group assigns its partitions to others, in
    /// milliseconds. Brokers limit it too (6 s to 30 min by default).
    pub session_timeout_ms: u32,
    /// How often it is checked that topics exist, that the credentials may read them, and that the log of each
    /// partition is still the one that was consumed, in seconds. The check reads one message per partition.
    pub log_check_seconds: u64,
    /// Messages queued between the consumer thread and the pipeline. A few are enough: the others wait
    /// in librdkafka's own buffer.
    pub queue_messages: usize,
    /// Size of librdkafka's own buffer, in MiB.
    pub prefetch_mib: u32,
    /// How long the messages of revoked partitions may take to drain before the partitions are released
    /// anyway, in seconds. The next owner repeats the work that was cut off.
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
            log_check_seconds: 15,
            queue_messages: 64,
            prefetch_mib: 16,
            drain_seconds: 30,
        }
    }
}

impl SourceOptions {
    /// The consumer group to join: the configured one, or one of its own for a replay.
    pub fn group_id(&self) -> String {
        if self.replay_name.is_empty() {
            self.group.clone()
        } else {
            format!("{}.replay.{}", self.group, self.replay_name)
        }
    }

    /// The consumer group that reads `control_topic`: one for all workers, those of a replay too.
    pub fn control_group_id(&self) -> String {
        format!("{}.control", self.group)
    }

    /// Returns one line per invalid option.
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
                "image_id_template: {:?} lacks {{key}}; without it all objects would be one image",
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
        validate::check_range(&mut problems, "log_check_seconds", self.log_check_seconds, 1, 3_600);
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
