//! What the Delta log keeps of the consumed partitions: the application ids, and the positions under them.
//!
//! Each id is a transaction identifier of Delta with one number. Those of a partition are always set in the commit
//! of its rows:
//!
//! | application id | number |
//! | --- | --- |
//! | `bsap:<topic>:<partition>` | position in the partition's first log, which is number 0 |
//! | `bsap-log-<n>:<topic>:<partition>` | position in its log number n |
//! | `bsap-log:<topic>:<partition>` | number of the log that is consumed |
//! | `bsap-anchor-offset:<topic>:<partition>` | offset of a message of this log; negative: none |
//! | `bsap-anchor:<topic>:<partition>` | fingerprint of that message |
//! | `bsap-anchor-last-offset:<topic>:<partition>` | offset of the last stored message |
//! | `bsap-anchor-last:<topic>:<partition>` | fingerprint of that message |
//!
//! Each log has a position of its own, so that no position ever goes back: what a worker that does not know of
//! the new log still commits changes nothing of it. A replay appends `:replay:<name>` to all of them.

use std::collections::HashMap;

use deltalake_core::kernel::{Action, Transaction};
use futures::future::join_all;

use super::error::TableError;
use super::log::DeltaLog;
use crate::record::{LogAnchor, StoredPosition, TopicPartition};

/// Prefix of the ids of anchors. Their numbers do not only grow.
pub const ANCHOR_PREFIX: &str = "bsap-anchor";
/// Offset of the anchor of a log of which no message was read yet.
pub const NO_ANCHOR: i64 = -1;

/// Commits that are read one by one for a position, newest first, before the whole log is searched. The
/// position of a partition that has messages is in one of them.
const MAX_LOOK_BACK_COMMITS: u64 = 40;

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

    pub fn last_offset(&self) -> String {
        format!("{ANCHOR_PREFIX}-last-offset:{}", self.name)
    }

    pub fn last_fingerprint(&self) -> String {
        format!("{ANCHOR_PREFIX}-last:{}", self.name)
    }
}

/// Positions as of one version of the table. They are collected from single commits: the library would read the
/// whole tail of the log for each of them.
pub struct Positions {
    /// Versions of the application ids that were looked up or read; `None` if the log has none.
    numbers: HashMap<String, Option<i64>>,
    /// Version up to which commits were read.
    version: u64,
    /// Oldest version whose commit was read.
    scanned_from_version: u64,
}

impl Positions {
    /// Creates the positions as of `version`; reads nothing yet.
    pub fn as_of(version: u64) -> Self {
        Self { numbers: HashMap::new(), version, scanned_from_version: version + 1 }
    }

    /// Returns how far the log was read: the newest version, the oldest one, and the number of ids.
    pub fn read_progress(&self) -> (u64, u64, usize) {
        (self.version, self.scanned_from_version, self.numbers.len())
    }

    /// Reads the commits up to the loaded snapshot of `log`. What was read before an error stays read.
    pub async fn read_new_commits(&mut self, log: &DeltaLog) -> Result<(), TableError> {
        while self.version < log.version() {
            let Some(actions) = log.read_commit(self.version + 1).await? else {
                // The commit was cleaned up: each position is searched in the log again.
                *self = Self::as_of(log.version());
                break;
            };
            self.record_commit(self.version + 1, transactions_of(actions));
        }
        Ok(())
    }

    /// Records what the commit after the last one has set.
    pub fn record_commit(
        &mut self,
        version: u64,
        transactions: impl IntoIterator<Item = Transaction>,
    ) {
        for transaction in transactions {
            self.numbers.insert(transaction.app_id, Some(transaction.version));
        }
        self.version = version;
    }

    /// Returns what is stored of a partition.
    pub async fn stored_position(
        &mut self,
        log: &DeltaLog,
        ids: &PartitionIds,
    ) -> Result<StoredPosition, TableError> {
        let marks = [
            ids.log_number(),
            ids.anchor_offset(),
            ids.anchor_fingerprint(),
            ids.last_offset(),
            ids.last_fingerprint(),
        ];
        self.look_up(log, &marks).await?;
        let log_number = self.known(&ids.log_number());
        let log_number = log_number.and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
        let position = ids.position(log_number);
        self.look_up(log, std::slice::from_ref(&position)).await?;
        let message = |offset: &str, fingerprint: &str| {
            let (offset, fingerprint) = self.known(offset).zip(self.known(fingerprint))?;
            Some(LogAnchor { offset, fingerprint })
        };
        let next_offset = self.known(&position);
        Ok(StoredPosition {
            log_number,
            next_offset,
            // A negative offset marks that the newest log has no anchor yet.
            anchor: message(&ids.anchor_offset(), &ids.anchor_fingerprint())
                .filter(|anchor| anchor.offset >= 0),
            // Otherwise it is of the log before, or a worker of an earlier version has stored more since.
            last_message: message(&ids.last_offset(), &ids.last_fingerprint())
                .filter(|last| next_offset == Some(last.offset + 1)),
        })
    }

    /// Finds the versions of `application_ids`, for [`Self::known`].
    pub async fn look_up(
        &mut self,
        log: &DeltaLog,
        application_ids: &[String],
    ) -> Result<(), TableError> {
        let oldest = self.version.saturating_sub(MAX_LOOK_BACK_COMMITS);
        let is_unknown = |numbers: &HashMap<String, Option<i64>>| {
            application_ids.iter().any(|id| !numbers.contains_key(id))
        };
        while is_unknown(&self.numbers) && self.scanned_from_version > oldest {
            let Some(actions) = log.read_commit(self.scanned_from_version - 1).await? else {
                break;
            };
            for transaction in transactions_of(actions) {
                self.numbers.entry(transaction.app_id).or_insert(Some(transaction.version));
            }
            self.scanned_from_version -= 1;
        }
        let unknown = application_ids.iter().filter(|id| !self.numbers.contains_key(*id));
        let unknown: Vec<&String> = unknown.collect();
        let (read_whole_log, mut failure) = (self.scanned_from_version == 0, None);
        let found = join_all(unknown.iter().map(|id| async {
            if read_whole_log { Ok(None) } else { log.transaction_version(id).await }
        }))
        .await;
        // What was found stays found, even if another one must be searched again.
        for (id, number) in unknown.into_iter().zip(found) {
            match number {
                Ok(number) => {
                    self.numbers.insert(id.clone(), number);
                }
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Returns the version of an application id that was looked up; `None` if there is none.
    pub fn known(&self, application_id: &str) -> Option<i64> {
        self.numbers.get(application_id).copied().flatten()
    }
}

/// Returns the transaction identifiers that a commit sets.
fn transactions_of(actions: Vec<Action>) -> impl Iterator<Item = Transaction> {
    actions.into_iter().filter_map(|action| match action {
        Action::Txn(transaction) => Some(transaction),
        _ => None,
    })
}
