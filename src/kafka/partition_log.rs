//! Recognises the log of a partition.
//!
//! If a topic is deleted and created again, its partitions keep their names and numbers, and a position of the
//! old log says nothing about the new one. Clients do not see the id of a topic, so the table keeps a message
//! of each log ([`LogAnchor`]) and the last stored message: the log is the same one if both are still at their
//! offsets. The first says that a worker has stored messages of another log before it noticed. The last says that
//! the log has lost its end and has grown again, or that it is a copy with other offsets.
//!
//! What cannot be recognised: a log whose retention or compaction has removed these very messages, and a table of
//! an earlier version, which has none. Such a log is taken for the same one, unless it ends before the stored
//! position.

use std::collections::{BTreeMap, BTreeSet};

use super::failure::KafkaFailure;
use super::probe::KafkaProbe;
use crate::record::{LogAnchor, StoredPosition, TopicPartition};

/// Whether the log of a partition is the one that was consumed before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogIdentity {
    /// It is the same log.
    Same,
    /// Nothing says that it is another one: nothing of it was stored, or the message by which it would be
    /// recognised was removed.
    Unknown,
    /// It is another log: the topic was deleted and created again, restored from a backup, or has lost its end.
    Other(String),
}

impl LogIdentity {
    /// Returns `same`, `unknown` or `other`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Unknown => "unknown",
            Self::Other(_) => "other",
        }
    }
}

/// The log of a partition as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionLog {
    /// The first offset that still exists.
    pub earliest_offset: i64,
    /// The offset after the last message.
    pub end_offset: i64,
    /// Whether it is the log that was consumed before.
    pub identity: LogIdentity,
}

/// Compares the log from offset `earliest` to `end` with what is stored of it. `found` are the first messages at
/// or after the anchor and at or after the last stored message, if they were read.
pub fn identify_log(
    stored: &StoredPosition,
    (earliest, end): (i64, i64),
    found: [Option<LogAnchor>; 2],
) -> LogIdentity {
    if let Some(position) = stored.next_offset.filter(|position| *position > end) {
        return LogIdentity::Other(format!(
            "it ends at offset {end}, and messages up to offset {position} were stored"
        ));
    }
    let mut identity = LogIdentity::Unknown;
    for (expected, found) in [stored.anchor, stored.last_message].into_iter().zip(found) {
        let Some(LogAnchor { offset, .. }) = expected else { continue };
        if offset >= end {
            let reason = format!("it ends at offset {end}, and offset {offset} was read");
            return LogIdentity::Other(reason);
        }
        if found.is_some() && found == expected {
            identity = LogIdentity::Same;
        } else if found.is_some_and(|found| found.offset == offset && offset >= earliest) {
            return LogIdentity::Other(format!("another message is at offset {offset}"));
        }
    }
    identity
}

/// The logs of several partitions.
#[derive(Debug)]
pub struct PartitionLogs {
    /// The log of each partition, in the order of the request.
    pub logs: Vec<PartitionLog>,
    /// Why no message could be read, so that no log was recognised.
    pub read_failure: Option<KafkaFailure>,
}

/// Returns the log of each partition, compared with what is stored of it. Blocks.
pub fn identify_logs(
    probe: &KafkaProbe,
    partitions: &[(TopicPartition, StoredPosition)],
) -> Result<PartitionLogs, KafkaFailure> {
    let mut ranges = Vec::with_capacity(partitions.len());
    // Otherwise the client would not know of partitions that were added since it last asked.
    for topic in partitions.iter().map(|(one, _)| &one.topic).collect::<BTreeSet<_>>() {
        probe.count_partitions(topic)?;
    }
    for (partition, _) in partitions {
        ranges.push(probe.fetch_watermarks(partition)?);
    }
    let mut read_failure = None;
    let mut read = |message: fn(&StoredPosition) -> Option<LogAnchor>| {
        let offsets = partitions.iter().zip(&ranges).filter_map(|((partition, stored), range)| {
            let offset = message(stored)?.offset;
            (range.0..range.1).contains(&offset).then(|| (partition.clone(), offset))
        });
        probe.read_messages_at(&offsets.collect::<Vec<_>>()).unwrap_or_else(|failure| {
            read_failure = Some(failure);
            BTreeMap::new()
        })
    };
    let (anchors, last) = (read(|stored| stored.anchor), read(|stored| stored.last_message));
    let logs = partitions.iter().zip(ranges).map(|((partition, stored), range)| PartitionLog {
        earliest_offset: range.0,
        end_offset: range.1,
        identity: identify_log(
            stored,
            range,
            [&anchors, &last].map(|found| found.get(partition).copied()),
        ),
    });
    Ok(PartitionLogs { logs: logs.collect(), read_failure })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_recognised_by_one_of_its_messages() {
        let anchor = LogAnchor { offset: 4, fingerprint: 77 };
        let stored = |next_offset, anchor| StoredPosition {
            next_offset,
            anchor,
            ..StoredPosition::default()
        };
        let consumed = stored(Some(5), Some(anchor));
        let other = LogAnchor { fingerprint: 78, ..anchor };
        let later = LogAnchor { offset: 6, ..anchor };
        for (stored, range, found, expected) in [
            (consumed, (0, 12), Some(anchor), "same"),
            (consumed, (0, 5), Some(anchor), "same"),
            // Created again: longer, just as long, shorter, empty.
            (consumed, (0, 12), Some(other), "other"),
            (consumed, (0, 5), Some(other), "other"),
            (consumed, (0, 3), None, "other"),
            (consumed, (0, 0), None, "other"),
            // Retention or compaction has removed the message, or it was not read in time.
            (consumed, (5, 12), None, "unknown"),
            (consumed, (9, 12), None, "unknown"),
            (consumed, (0, 12), Some(later), "unknown"),
            (consumed, (0, 12), None, "unknown"),
            // A message that was read and not stored yet is lost as well.
            (stored(None, Some(anchor)), (0, 3), None, "other"),
            // A table of an earlier version.
            (stored(Some(5), None), (0, 12), None, "unknown"),
            (stored(Some(5), None), (0, 3), None, "other"),
            (StoredPosition::default(), (0, 0), None, "unknown"),
        ] {
            let identity = identify_log(&stored, range, [found, None]);
            assert_eq!(identity.as_str(), expected, "{stored:?} {range:?} {found:?}: {identity:?}");
        }
    }
    #[test]
    fn a_log_is_another_one_if_its_anchor_or_the_last_stored_message_differs() {
        let (anchor, last) =
            (LogAnchor { offset: 4, fingerprint: 77 }, LogAnchor { offset: 8, fingerprint: 78 });
        let stored = StoredPosition {
            log_number: 0,
            next_offset: Some(9),
            anchor: Some(anchor),
            last_message: Some(last),
        };
        let other = |message: LogAnchor| Some(LogAnchor { fingerprint: 79, ..message });
        for (range, found, expected) in [
            ((0, 12), [Some(anchor), Some(last)], "same"),
            // The end was lost and has grown again; a worker has stored messages of a new log.
            ((0, 12), [Some(anchor), other(last)], "other"),
            ((0, 12), [other(anchor), Some(last)], "other"),
            // Retention has removed one of them, or both.
            ((5, 12), [None, Some(last)], "same"),
            ((5, 12), [None, other(last)], "other"),
            ((9, 12), [None, None], "unknown"),
        ] {
            let identity = identify_log(&stored, range, found);
            assert_eq!(identity.as_str(), expected, "{range:?} {found:?}: {identity:?}");
        }
    }
}
