//! Follows the catalogue's state so that a worker starts to use added prompt sets, and stops using
//! retired ones, without a restart.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::error::BackfillError;
use crate::catalogue::{CatalogueState, StateStore};
use crate::clip::Encoders;
use crate::prompts::ActivePromptSets;
use crate::store::Store;
use crate::telemetry::event;

/// Keeps `sets` equal to the prompt sets that the state has for `generation`, until `cancel` is
/// cancelled. The delay is at most `poll_interval` and the time to embed the prompts of new sets.
pub async fn follow_prompt_sets(
    catalogue: Store,
    generation: String,
    sets: ActivePromptSets,
    encoders: Arc<dyn Encoders>,
    poll_interval: Duration,
    cancel: CancellationToken,
) {
    let states = StateStore::new(&catalogue);
    let mut revision = 0;
    loop {
        match apply_newest_revision(&states, &generation, &sets, &encoders, &mut revision).await {
            Ok(()) => {}
            Err(error) => {
                warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not applied; the next poll tries again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(poll_interval) => {}
            () = cancel.cancelled() => return,
        }
    }
}

/// Applies the newest revision if it is later than `revision`, which it then becomes. 0 stands for
/// none.
async fn apply_newest_revision(
    states: &StateStore,
    generation: &str,
    sets: &ActivePromptSets,
    encoders: &Arc<dyn Encoders>,
    revision: &mut u64,
) -> Result<(), BackfillError> {
    let next = if *revision == 0 {
        states.read_newest().await?
    } else {
        states.read_next(*revision).await?
    };
    let Some(mut state) = next else { return Ok(()) };
    while let Some(newer) = states.read_next(state.revision).await? {
        state = newer;
    }
    apply_prompt_sets(&state, generation, sets, encoders).await?;
    *revision = state.revision;
    Ok(())
}

async fn apply_prompt_sets(
    state: &CatalogueState,
    generation: &str,
    sets: &ActivePromptSets,
    encoders: &Arc<dyn Encoders>,
) -> Result<(), BackfillError> {
    let Some(records) = state.prompt_sets_of_generation(generation).map(<[_]>::to_vec) else {
        return Ok(());
    };
    let current = sets.current();
    let (encoders, active) = (encoders.clone(), sets.clone());
    let resolved =
        tokio::task::spawn_blocking(move || active.resolve_records(&records, &*encoders))
            .await
            .map_err(|panic| BackfillError::Panicked(panic.to_string()))??;
    let is_unchanged = current.len() == resolved.len()
        && current.iter().zip(&resolved).all(|(a, b)| a.statistics_key == b.statistics_key);
    if !is_unchanged {
        let keys: Vec<&str> = resolved.iter().map(|set| set.statistics_key.as_str()).collect();
        info!(
            event = event::STATE_APPLIED,
            revision = state.revision,
            prompt_sets = keys.join(" "),
            "new images get the statistics of these prompt sets"
        );
        sets.replace(resolved);
    }
    Ok(())
}
