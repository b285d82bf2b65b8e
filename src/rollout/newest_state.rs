//! Reads the newest revision of a catalogue's state.

use super::error::RolloutError;
use crate::catalogue::{CatalogueState, StateStore};
use crate::store::Store;
use crate::table::TableError;

/// Returns the newest revision; fails if the folder of `catalogue` has none.
pub async fn load_newest_state(
    states: &StateStore,
    catalogue: &Store,
) -> Result<CatalogueState, RolloutError> {
    let missing = || TableError::NotFound { location: catalogue.url().to_string() };
    Ok(states.read_newest().await?.ok_or_else(missing)?)
}
