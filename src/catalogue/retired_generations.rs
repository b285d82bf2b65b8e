//! Tables of generations that are neither live nor beside the live one: no command brings one back.

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
    /// Its folder.
    pub id: String,
    /// Objects in it.
    pub object_count: usize,
    /// Their size.
    pub bytes: u64,
    /// When the newest of them was written.
    pub last_modified: DateTime<Utc>,
    /// Whether it goes: nothing was written to it for `retention_hours`. Else a worker may still
    /// run, or a query worker read it.
    pub is_expired: bool,
}

/// Finds retired generations as things are `now`; removes those whose time is over, unless it is a
/// `dry_run`. The log goes before the files that it names, so that nobody takes half a table for a
/// whole one.
pub async fn remove_retired_generations(
    catalogue: &Store,
    options: &MaintenanceOptions,
    now: DateTime<Utc>,
    dry_run: bool,
) -> Result<Vec<RetiredGeneration>, TableError> {
    let generations = catalogue.subfolder("generations");
    let failed = |error| TableError::from(generations.wrap_error(error));
    let mut found: BTreeMap<String, Vec<ObjectMeta>> = BTreeMap::new();
    let mut listing = generations.object_store().list(None);
    while let Some(object) = listing.try_next().await.map_err(failed)? {
        if let Some(folder) = object.location.parts().next() {
            found.entry(folder.as_ref().to_owned()).or_default().push(object);
        }
    }
    let retention = TimeDelta::hours(options.deleted_file_retention_hours.into());
    let mut all = Vec::new();
    for (id, objects) in found {
        // Read for each anew: somebody may set a generation up again meanwhile.
        let state = StateStore::new(catalogue).read_newest().await?;
        let Some(state) = state else { break };
        if state.find_generation(&id).is_some() {
            continue;
        }
        let newest = objects.iter().map(|object| object.last_modified).max().unwrap_or(now);
        let bytes = objects.iter().map(|object| object.size).sum();
        let is_over = now - newest >= retention;
        if is_over && !dry_run {
            let (logs, rest): (Vec<Path>, Vec<Path>) =
                objects.iter().map(|object| object.location.clone()).partition(is_delta_log_path);
            for some in [logs, rest] {
                let paths = stream::iter(some.into_iter().map(Ok)).boxed();
                let removed = generations.object_store().delete_stream(paths);
                removed.try_for_each(|_| async { Ok(()) }).await.map_err(failed)?;
            }
        }
        all.push(RetiredGeneration {
            id,
            object_count: objects.len(),
            bytes,
            last_modified: newest,
            is_expired: is_over,
        });
    }
    Ok(all)
}

fn is_delta_log_path(path: &Path) -> bool {
    path.parts().any(|part| part.as_ref() == "_delta_log")
}
