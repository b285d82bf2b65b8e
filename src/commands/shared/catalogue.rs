//! Opens the catalogue, and provides what commands that change it need.

use std::time::Duration;

use anyhow::Context;

use crate::catalogue::{CatalogueState, StateStore};
use crate::config::Config;
use crate::store::Store;
use crate::table::TableError;

/// How long the store may take to answer at the start of a command. Later failures are retried.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens the store of `table.url` and checks that it answers.
pub async fn open_store(config: &Config) -> anyhow::Result<Store> {
    let store = Store::open(&config.table.url, &config.table.store_options).context("table.url")?;
    store.check_reachable(STORE_TIMEOUT).await.context("table.url")?;
    Ok(store)
}

/// Returns the store of the catalogue and its newest state; [`TableError::NotFound`] if no worker has
/// created the catalogue yet.
pub async fn open_catalogue(config: &Config) -> anyhow::Result<(Store, CatalogueState)> {
    let store = open_store(config).await?;
    let state = StateStore::new(&store).read_newest().await.context("table.url")?;
    let state = state.ok_or_else(|| TableError::NotFound { location: store.url().to_string() })?;
    Ok((store, state))
}

/// Returns who changes the catalogue, for its history: `BSAP_ACTOR` or the user of this process, and
/// the command.
pub fn actor(command: &str) -> String {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let user =
        variable("BSAP_ACTOR").or_else(|| variable("USER")).unwrap_or_else(|| "unknown".into());
    format!("{user} ({command})")
}

/// Returns how many files a statistics backfill measures concurrently.
pub fn backfill_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns for how long after a prompt set was added workers may still write rows without its
/// statistics: they poll the state every `table.state_poll_ms`, embed the prompts, and commit the rows
/// that they have.
pub fn prompt_set_propagation_delay(config: &Config) -> Duration {
    Duration::from_millis(2 * config.table.state_poll_ms + config.ingest.commit_ms + 1_000)
}
