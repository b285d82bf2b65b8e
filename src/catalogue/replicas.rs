//! Query workers say what they serve: small objects that grow old by themselves.
//!
//! A promotion waits until every query worker has the candidate in memory. Each tells the revision
//! of the state that it has taken up in `readers/<id>.json`, again and again; one that was not heard
//! for [`STALE`] is taken to be gone.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::table::TableError;

/// How often a query worker reports, at least.
pub const REPLICA_REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// A query worker that was not heard for so long is taken to be gone: some reports may be late.
const REPORT_STALE_AFTER: TimeDelta = TimeDelta::seconds(30);
/// Reports this old are removed by whoever lists them.
const REPORT_RETENTION: TimeDelta = TimeDelta::hours(24);

/// What a query worker says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Name of the process, random.
    pub id: String,
    /// Where it runs, for people.
    pub host: String,
    /// Generation that it serves.
    pub generation: String,
    /// Revision of the state that it has taken up: all that it names is in memory.
    pub revision: u64,
    /// Whether it answers queries.
    pub ready: bool,
    /// When this was said.
    pub reported_at: DateTime<Utc>,
    /// Why it could not take up a later revision.
    #[serde(default)]
    pub problem: Option<String>,
}

impl ReplicaReport {
    /// Whether it was heard too long ago to be waited for.
    pub fn is_stale(&self, now: DateTime<Utc>) -> bool {
        now - self.reported_at > REPORT_STALE_AFTER
    }

    /// Whether it serves revision `revision`, or a later one.
    pub fn serves_revision(&self, revision: u64) -> bool {
        self.ready && self.revision >= revision
    }
}

/// The reports of a catalogue's query workers.
#[derive(Debug, Clone)]
pub struct ReplicaReports {
    store: Store,
}

impl ReplicaReports {
    /// Of the catalogue at `catalogue`.
    pub fn new(catalogue: &Store) -> Self {
        Self { store: catalogue.subfolder("replicas") }
    }

    /// Writes a report over the one before.
    pub async fn write(&self, report: &ReplicaReport) -> Result<(), TableError> {
        let bytes = serde_json::to_vec(report).map_err(|error| TableError::Corrupt {
            file: self.store.url().to_string(),
            reason: error.to_string(),
        })?;
        let put = self.store.object_store().put(&report_path(&report.id), bytes.into()).await;
        put.map(drop).map_err(|e| self.store.wrap_error(e).into())
    }

    /// Removes a report: its query worker stops.
    pub async fn remove(&self, id: &str) {
        // One that stays grows old.
        let _ = self.store.object_store().delete(&report_path(id)).await;
    }

    /// All reports, those of query workers that are gone included, sorted by name.
    pub async fn list(&self, now: DateTime<Utc>) -> Result<Vec<ReplicaReport>, TableError> {
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
                Ok(found) => found.bytes().await,
                Err(error) => Err(error),
            };
            match bytes {
                // One that says nothing readable is not waited for.
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
