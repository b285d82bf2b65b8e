//! Removes the tables of generations that are neither live nor standby. No command brings one back.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore};

use super::state::StateStore;
use crate::store::Store;
use crate::table::{MaintenanceOptions, TableError};

/// A generation that the catalogue's state does not name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetiredGeneration {
    /// Id, which is the name of its folder.
    pub id: String,
    /// Number of objects in the folder.
    pub object_count: usize,
    /// Size of the objects in bytes.
    pub byte_size: u64,
    /// When the newest object of the folder was written.
    pub last_modified: DateTime<Utc>,
    /// Whether nothing was written to it for `deleted_file_retention_hours`, so that it is removed. Before
    /// that a worker may still fill it, or a query worker read it.
    pub is_expired: bool,
}

/// Returns the retired generations, and removes those that have expired as of `now`, unless it is a
/// `dry_run`. Removes the Delta log before the data files that it names, so that nobody takes half
/// a table for a whole one.
pub async fn list_retired_and_remove_expired(
    catalogue: &Store,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vec<RetiredGeneration>, TableError> {
    let generations = catalogue.subfolder("generations");
    let failed = |error| TableError::from(generations.wrap_error(error));
    let mut objects_by_generation: BTreeMap<String, Vec<ObjectMeta>> = BTreeMap::new();
    let mut listing = generations.object_store().list(None);
    while let Some(object) = listing.try_next().await.map_err(failed)? {
        if let Some(folder) = object.location.parts().next() {
            let id = folder.as_ref().to_owned();
            objects_by_generation.entry(id).or_default().push(object);
        }
    }
    let retention = TimeDelta::hours(options.deleted_file_retention_hours.into());
    let mut retired = Vec::new();
    for (id, objects) in objects_by_generation {
        // Read again for each: somebody may have set up this generation in the meantime.
        let state = StateStore::new(catalogue).read_newest().await?;
        let Some(state) = state else { break };
        if state.find_generation(&id).is_some() {
            continue;
        }
        let last_modified = objects.iter().map(|object| object.last_modified).max().unwrap_or(now);
        let bytes = objects.iter().map(|object| object.size).sum();
        let is_expired = now - last_modified >= retention;
        if is_expired && !dry_run {
            let (logs, rest): (Vec<Path>, Vec<Path>) =
                objects.iter().map(|object| object.location.clone()).partition(is_delta_log_path);
            for paths in [logs, rest] {
                let paths = stream::iter(paths.into_iter().map(Ok)).boxed();
                let removed = generations.object_store().delete_stream(paths);
                removed.try_for_each(|_| async { Ok(()) }).await.map_err(failed)?;
            }
        }
        retired.push(RetiredGeneration {
            id,
            object_count: objects.len(),
            byte_size: bytes,
            last_modified,
            is_expired,
        });
    }
    Ok(retired)
}

fn is_delta_log_path(path: &Path) -> bool {
    path.parts().any(|part| part.as_ref() == "_delta_log")
}
