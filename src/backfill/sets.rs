//! A worker takes up prompt sets that are added to the catalogue's state, and lets go of those that
//! are retired, without a restart.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ReindexError;
use crate::catalogue::{CatalogueState, StateStore};
use crate::clip::Towers;
use crate::prompts::ActiveSets;
use crate::store::Store;
use crate::telemetry::event;

/// Follows the state until `token` is cancelled: within `poll` and the time that embedding the
/// prompts takes, images are measured with the sets that the state knows for `generation`.
pub async fn follow_sets(
    catalogue: Store,
    generation: String,
    sets: ActiveSets,
    towers: Arc<dyn Towers>,
    poll: Duration,
    token: CancellationToken,
) {
    let states = StateStore::new(&catalogue);
    let mut known = 0;
    loop {
        match step(&states, &generation, &sets, &towers, &mut known).await {
            Ok(()) => {}
            Err(error) => {
                warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not taken up; the next look tries again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(poll) => {}
            () = token.cancelled() => return,
        }
    }
}

async fn step(
    states: &StateStore,
    generation: &str,
    sets: &ActiveSets,
    towers: &Arc<dyn Towers>,
    known: &mut u64,
) -> Result<(), ReindexError> {
    let next = if *known == 0 { states.newest().await? } else { states.after(*known).await? };
    let Some(mut state) = next else { return Ok(()) };
    while let Some(newer) = states.after(state.revision).await? {
        state = newer;
    }
    take_up(&state, generation, sets, towers).await?;
    *known = state.revision;
    Ok(())
}

async fn take_up(
    state: &CatalogueState,
    generation: &str,
    sets: &ActiveSets,
    towers: &Arc<dyn Towers>,
) -> Result<(), ReindexError> {
    let Some(records) = state.sets_of(generation).map(<[_]>::to_vec) else { return Ok(()) };
    let before = sets.get();
    let (towers, active) = (towers.clone(), sets.clone());
    let embedded = tokio::task::spawn_blocking(move || active.with_records(&records, &*towers))
        .await
        .map_err(|panic| ReindexError::Broken(panic.to_string()))??;
    let same =
        before.len() == embedded.len() && before.iter().zip(&embedded).all(|(a, b)| a.key == b.key);
    if !same {
        let names: Vec<&str> = embedded.iter().map(|set| set.key.as_str()).collect();
        info!(
            event = event::STATE,
            revision = state.revision,
            prompt_sets = names.join(" "),
            "new images are measured with these prompt sets"
        );
        sets.set(embedded);
    }
    Ok(())
}
