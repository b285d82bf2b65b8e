//! Options of the catalogue's storage and of its maintenance.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::RowVersion;
use crate::store;
use crate::validate;

/// Size below which files are all alike: no merge is worth telling them apart.
const SMALLEST_TIER_BYTES: u64 = 64 << 10;

/// Where the catalogue is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TableOptions {
    /// The catalogue's folder: s3://bucket/prefix, gs://…, az://…, file:///folder or a path.
    pub url: String,
    /// Options of the store, for example `aws_region` or `aws_endpoint`. Credentials are better
    /// given by the provider's standard environment variables.
    pub store_options: BTreeMap<String, String>,
    /// How often a commit that meets another writer's, or a passing fault of the store, is tried,
    /// with growing pauses of at most 2 s.
    pub max_commit_attempts: u32,
    /// How often workers and query workers look whether the catalogue's state has changed, in
    /// milliseconds: one small request. A prompt set that is added is carried by new rows, and a
    /// promotion is served, within this time and what is in the pipeline.
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
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = store::parse_url(&self.url) {
            problems.push(format!("url: {error}"));
        }
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

/// How the table is tidied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MaintenanceOptions {
    /// How often workers tidy the table, in seconds, one of them at a time. 0: never; run
    /// `bsap compact` and `bsap vacuum` on a schedule of your own.
    pub interval_seconds: u64,
    /// Size up to which files are merged, in MiB. Workers hold about twice as much in memory while
    /// they write one.
    pub target_file_mib: u64,
    /// Files of similar size that are merged into one. A row is rewritten about as often as this
    /// number has to be multiplied by itself to get from a commit's file to the largest.
    pub files_per_merge: usize,
    /// Share of superseded rows, in percent, from which on a file is rewritten without them.
    pub max_superseded_percent: u32,
    /// After how many hours the embeddings of a deleted image are rewritten out of their files,
    /// whatever the share. All keys are read that often, which costs about 200 bytes of memory an
    /// image.
    pub erase_deleted_after_hours: u32,
    /// For how many days a deleted image is remembered. An event that is older is refused as
    /// `too_old`, since nothing could tell any more that the image was deleted after it. 0: for ever.
    pub tombstone_retention_days: u32,
    /// For how many hours a file that is no longer part of the table stays readable, for those who
    /// are still reading an older version. Also for how long a file may wait for its commit.
    pub deleted_file_retention_hours: u32,
    /// For how many hours the log of single commits stays. A query worker that was away for longer
    /// reads the whole table anew.
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
    /// What is wrong with these options, a line each.
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
            && self.tombstone_retention_days * 24 < self.erase_deleted_after_hours
        {
            problems.push(
                "tombstone_days: is less than erase_hours; a deleted image must be remembered until its embedding is gone".into(),
            );
        }
        problems
    }

    /// The tier of a file of `size` bytes: files of one tier are similar. None where it is as large
    /// as a merge would make it.
    pub(crate) fn size_tier(&self, size: u64) -> Option<u32> {
        let target = self.target_file_mib << 20;
        let factor = self.files_per_merge as u64;
        let (mut tier, mut limit) = (0, SMALLEST_TIER_BYTES.min(target / factor));
        while size > limit {
            (tier, limit) = (tier + 1, limit.saturating_mul(factor));
        }
        // Two of them would not fit into one.
        (size <= target / 2).then_some(tier)
    }

    /// Whether the image was deleted long enough ago that its embeddings must go.
    pub(crate) fn is_erasure_due(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        newest.deleted
            && now - newest.embedded_at >= TimeDelta::hours(self.erase_deleted_after_hours.into())
    }

    /// Whether a tombstone has been remembered for long enough.
    pub(crate) fn may_drop_tombstone(&self, newest: &RowVersion, now: DateTime<Utc>) -> bool {
        // An hour more than events are refused after: clocks differ, and one may be on its way.
        let days = TimeDelta::days(self.tombstone_retention_days.into()) + TimeDelta::hours(1);
        newest.deleted && self.tombstone_retention_days > 0 && now - newest.embedded_at >= days
    }
}
