//! The application ids under which the Delta log keeps what was consumed of a partition.
//!
//! Each is a transaction identifier of Delta with one number. Those of a partition are always set in the commit
//! of its rows:
//!
//! | application id | number |
//! | --- | --- |
//! | `bsap:<topic>:<partition>` | position in the partition's first log, which is number 0 |
//! | `bsap-log-<n>:<topic>:<partition>` | position in its log number n |
//! | `bsap-log:<topic>:<partition>` | number of the log that is consumed |
//! | `bsap-anchor-offset:<topic>:<partition>` | offset of a message of this log; negative: none |
//! | `bsap-anchor:<topic>:<partition>` | fingerprint of that message |
//!
//! Each log has a position of its own, so that no position ever goes back: what a worker that does not know of
//! the new log still commits changes nothing of it. A replay appends `:replay:<name>` to all of them.

use crate::record::TopicPartition;

/// Prefix of the ids of anchors. Their numbers do not only grow.
pub const ANCHOR_PREFIX: &str = "bsap-anchor";
/// Offset of the anchor of a log of which no message was read yet.
pub const NO_ANCHOR: i64 = -1;

/// The application ids of one partition.
pub struct PartitionIds {
    /// Topic, partition and replay.
    name: String,
}

impl PartitionIds {
    pub fn new(partition: &TopicPartition, replay_name: &str) -> Self {
        let mut name = format!("{}:{}", partition.topic, partition.number);
        if !replay_name.is_empty() {
            name.push_str(":replay:");
            name.push_str(replay_name);
        }
        Self { name }
    }

    pub fn position(&self, log_number: u64) -> String {
        match log_number {
            0 => format!("bsap:{}", self.name),
            n => format!("bsap-log-{n}:{}", self.name),
        }
    }

    pub fn log_number(&self) -> String {
        format!("bsap-log:{}", self.name)
    }

    pub fn anchor_offset(&self) -> String {
        format!("{ANCHOR_PREFIX}-offset:{}", self.name)
    }

    pub fn anchor_fingerprint(&self) -> String {
        format!("{ANCHOR_PREFIX}:{}", self.name)
    }
}
