//! Opening the catalogue, and what commands that change it need.

use std::time::Duration;

use anyhow::Context;

use crate::catalogue::{CatalogueState, StateStore};
use crate::config::Config;
use crate::store::Store;
use crate::table::TableError;

/// How long the store may take to answer at the start. Later faults are waited out.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens the catalogue's folder and makes sure that the store answers.
pub async fn open_store(config: &Config) -> anyhow::Result<Store> {
    let store = Store::open(&config.table.url, &config.table.store_options).context("table.url")?;
    store.check_reachable(STORE_TIMEOUT).await.context("table.url")?;
    Ok(store)
}

/// The catalogue's folder and its state; `Missing` where no worker has made it yet.
pub async fn open_catalogue(config: &Config) -> anyhow::Result<(Store, CatalogueState)> {
    let store = open_store(config).await?;
    let state = StateStore::new(&store).read_newest().await.context("table.url")?;
    let state = state.ok_or_else(|| TableError::NotFound { location: store.url().to_string() })?;
    Ok((store, state))
}

/// Who changes the catalogue: `BSAP_ACTOR`, or the user of this process.
pub fn actor(command: &str) -> String {
    let named = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let who = named("BSAP_ACTOR").or_else(|| named("USER")).unwrap_or_else(|| "unknown".into());
    format!("{who} ({command})")
}

/// Files that a reindex measures at one time.
pub fn reindex_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How long after a set was made known workers may still write rows without it: they look every
/// `table.state_poll_ms`, embed the prompts, and commit what they have.
pub fn set_propagation_delay(config: &Config) -> Duration {
    Duration::from_millis(2 * config.table.state_poll_ms + config.ingest.commit_ms + 1_000)
}
