//! Options of the catalogue's storage and of its maintenance.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::RowVersion;
use crate::store;
use crate::validate;

/// Files up to this size, in bytes, are in the same tier.
const SMALLEST_TIER_BYTES: u64 = 64 << 10;

/// Where the catalogue is stored, and how it is polled and committed to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TableOptions {
    /// The catalogue's folder: s3://bucket/prefix, gs://…, az://…, file:///folder or a path.
    pub url: String,
    /// Options of the store, for example `aws_region` or `aws_endpoint`. Credentials are better
    /// given by the provider's standard environment variables.
    pub store_options: BTreeMap<String, String>,
    /// How often a commit is tried that conflicts with another writer's commit or meets a transient error
    /// of the store, with growing pauses of at most 2 s.
    pub max_commit_attempts: u32,
    /// How often workers and query workers poll the catalogue's state, in milliseconds, with one small
    /// request. New rows carry an added prompt set, and queries are answered as a promotion says, after
    /// this time and the time that the pipeline takes.
    pub state_poll_ms: u64,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            url: "./catalogue".into(),
            store_options: BTreeMap::new(),
            max_commit_attempts: 100,
            state_poll_ms: 1_000,
        }
    }
}

impl TableOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = store::parse_url(&self.url) {
            problems.push(format!("url: {error}"));
        }
        problems.extend(store::validate_options(&self.store_options));
        validate::check_range(
            &mut problems,
            "max_commit_attempts",
            self.max_commit_attempts.into(),
            1,
            1000,
        );
        validate::check_range(&mut problems, "state_poll_ms", self.state_poll_ms, 50, 60_000);
        problems
    }
}

/// How the tables are maintained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MaintenanceOptions {
    /// How often workers maintain the tables, in seconds; one worker at a time does it. 0: never; run
    /// `bsap compact` and `bsap vacuum` on a schedule of your own.
    pub interval_seconds: u64,
    /// Size up to which files are merged, in MiB. A worker holds about twice as much in memory while it
    /// writes such a file.
    pub target_file_mib: u64,
    /// Number of files of similar size that are merged into one. A row is rewritten about as often as
    /// this number must be multiplied by itself to get from the size of a commit's file to the largest.
    pub files_per_merge: usize,
    /// Percentage of superseded rows at which a file is rewritten without them.
    pub max_superseded_percent: u32,
    /// Hours after which the files that hold the embeddings of a deleted image are rewritten without
    /// them, whatever their percentage of superseded rows. All keys are read that often, which takes
    /// about 200 bytes of memory per image.
    pub erase_deleted_after_hours: u32,
    /// Days for which a deleted image is remembered. An older event is rejected as `too_old`, because
    /// nothing would show that the image was deleted after it. 0: forever.
    pub tombstone_retention_days: u32,
    /// Hours for which a file that is no longer part of the table is kept, for readers of an older
    /// version. Also the time within which an uploaded file must be committed.
    pub deleted_file_retention_hours: u32,
    /// Hours for which single commits are kept in the log. A query worker that was away for longer reads
    /// the whole table again.
    pub log_retention_hours: u32,
}

impl Default for MaintenanceOptions {
    fn default() -> Self {
        Self {
            interval_seconds: 600,
            target_file_mib: 128,
            files_per_merge: 8,
            max_superseded_percent: 20,
            erase_deleted_after_hours: 24,
            tombstone_retention_days: 0,
            deleted_file_retention_hours: 24,
            log_retention_hours: 72,
        }
    }
}

impl MaintenanceOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(p, "interval_seconds", self.interval_seconds, 0, 7 * 86_400);
        validate::check_range(p, "target_file_mib", self.target_file_mib, 1, 4_096);
        validate::check_range(p, "files_per_merge", self.files_per_merge as u64, 2, 1_000);
        validate::check_range(
            p,
            "max_superseded_percent",
            self.max_superseded_percent.into(),
            1,
            100,
        );
        validate::check_range(
            p,
            "erase_deleted_after_hours",
            self.erase_deleted_after_hours.into(),
            1,
            24 * 365,
        );
        validate::check_range(
            p,
            "tombstone_retention_days",
            self.tombstone_retention_days.into(),
            0,
            36_500,
        );
        validate::check_range(
            p,
            "deleted_file_retention_hours",
            self.deleted_file_retention_hours.into(),
            1,
            24 * 365,
        );
        validate::check_range(
            p,
            "log_retention_hours",
            self.log_retention_hours.into(),
            1,
            24 * 365,
        );
        if self.tombstone_retention_days > 0
            && self.tombstone_retention_days.saturating_mul(24) < self.erase_deleted_after_hours
        {
            problems.push(
                "tombstone_retention_days: is less than erase_deleted_after_hours; a deleted image must be remembered until its embedding is gone".into(),
            );
        }
        problems
    }

    /// Returns the tier of a file of `size` bytes; files of one tier have similar sizes. Returns `None` if
    /// the file is too large to be merged.
    pub(crate) fn size_tier(&self, size: u64) -> Option<u32> {
        let target = self.target_file_mib << 20;
        let factor = self.files_per_merge as u64;
        let (mut tier, mut limit) = (0, SMALLEST_TIER_BYTES.min(target / factor));
        while size > limit {
            (tier, limit) = (tier + 1, limit.saturating_mul(factor));
        }
        // Two larger files would not fit into one of the target size.
        (size <= target / 2).then_some(tier)
    }

    /// Whether the image was deleted long enough ago that its embeddings must be erased. `newest` is its
    /// newest version.
    pub(crate) fn is_erasure_due(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        newest.deleted
            && now - newest.embedded_at >= TimeDelta::hours(self.erase_deleted_after_hours.into())
    }

    /// Whether the retention of a tombstone is over. `newest` is the newest version of its image.
    pub(crate) fn may_drop_tombstone(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        // One hour longer than events are accepted: clocks differ, and an event may be in the pipeline.
        let retention = TimeDelta::days(self.tombstone_retention_days.into()) + TimeDelta::hours(1);
        newest.deleted && self.tombstone_retention_days > 0 && now - newest.embedded_at >= retention
    }
}
