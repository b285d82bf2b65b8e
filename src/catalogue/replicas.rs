//! Reports of query workers about what they serve: small objects that become stale by themselves.
//!
//! A promotion waits until every query worker has the candidate in memory. Each writes the revision of
//! the state that it serves to `replicas/<id>.json` every few seconds. A query worker whose report is
//! older than [`REPORT_STALE_AFTER`] is considered stopped.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::balance::bank::MeasuredBank;
use crate::store::Store;
use crate::table::TableError;

/// Longest time between two reports of a query worker.
pub const REPLICA_REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// Age at which a report is stale. Several reports in a row may be late.
const REPORT_STALE_AFTER: TimeDelta = TimeDelta::seconds(30);
/// Age at which [`ReplicaReports::list_and_remove_expired`] removes a report.
const REPORT_RETENTION: TimeDelta = TimeDelta::hours(24);

/// The report of one query worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Random name of the process.
    pub id: String,
    /// Name of its host, for display.
    pub host: String,
    /// Id of the generation that it serves.
    pub generation: String,
    /// Revision of the state that it serves: everything that the revision names is in memory.
    pub revision: u64,
    /// Whether it answers queries.
    pub ready: bool,
    /// When this report was written.
    pub reported_at: DateTime<Utc>,
    /// Why it cannot serve a later revision; `None` if it can.
    #[serde(default)]
    pub problem: Option<String>,
    /// How well prompt sets fit the queries that it answered recently.
    #[serde(default)]
    pub banks: Vec<MeasuredBank>,
}

impl ReplicaReport {
    /// Whether the report is so old that nobody waits for its query worker.
    pub fn is_stale(&self, now: DateTime<Utc>) -> bool {
        now - self.reported_at > REPORT_STALE_AFTER
    }

    /// Whether it serves `revision` or a later one.
    pub fn serves_revision_or_later(&self, revision: u64) -> bool {
        self.ready && self.revision >= revision
    }
}

/// Reads and writes the reports of a catalogue's query workers.
#[derive(Debug, Clone)]
pub struct ReplicaReports {
    store: Store,
}

impl ReplicaReports {
    /// Opens the reports of `catalogue`.
    pub fn new(catalogue: &Store) -> Self {
        Self { store: catalogue.subfolder("replicas") }
    }

    /// Writes a report. It replaces the previous one of the same query worker.
    pub async fn write(&self, report: &ReplicaReport) -> Result<(), TableError> {
        let bytes = serde_json::to_vec(report).map_err(|error| TableError::Corrupt {
            file: self.store.url().to_string(),
            reason: error.to_string(),
        })?;
        let put = self.store.object_store().put(&report_path(&report.id), bytes.into()).await;
        put.map(drop).map_err(|e| self.store.wrap_error(e).into())
    }

    /// Removes the report of a query worker that stops.
    pub async fn remove(&self, id: &str) {
        // If this fails, the report becomes stale.
        let _ = self.store.object_store().delete(&report_path(id)).await;
    }

    /// Returns all reports, sorted by id, including stale ones. Removes those that are very old as of `now`.
    pub async fn list_and_remove_expired(
        &self,
        now: DateTime<Utc>,
    ) -> Result<Vec<ReplicaReport>, TableError> {
        let listed: Vec<Path> = self
            .store
            .object_store()
            .list(None)
            .map_ok(|object| object.location)
            .try_collect()
            .await
            .map_err(|e| self.store.wrap_error(e))?;
        let mut reports = Vec::new();
        for path in listed {
            let bytes = match self.store.object_store().get(&path).await {
                Ok(object) => object.bytes().await,
                Err(error) => Err(error),
            };
            match bytes {
                // Nobody waits for a report that cannot be parsed.
                Ok(bytes) => reports.extend(serde_json::from_slice::<ReplicaReport>(&bytes).ok()),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(self.store.wrap_error(error).into()),
            }
        }
        for old in reports.iter().filter(|report| now - report.reported_at > REPORT_RETENTION) {
            self.remove(&old.id).await;
        }
        reports.retain(|report| now - report.reported_at <= REPORT_RETENTION);
        reports.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(reports)
    }
}

fn report_path(id: &str) -> Path {
    Path::from(format!("{id}.json"))
}
