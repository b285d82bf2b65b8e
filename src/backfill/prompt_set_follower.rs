//! A worker takes up prompt sets that are added to the catalogue's state, and lets go of those that
//! are retired, without a restart.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ReindexError;
use crate::catalogue::{CatalogueState, StateStore};
use crate::clip::Encoders;
use crate::prompts::ActivePromptSets;
use crate::store::Store;
use crate::telemetry::event;

/// Follows the state until `token` is cancelled: within `poll` and the time that embedding the
/// prompts takes, images are measured with the sets that the state knows for `generation`.
pub async fn follow_prompt_sets(
    catalogue: Store,
    generation: String,
    sets: ActivePromptSets,
    encoders: Arc<dyn Encoders>,
    poll: Duration,
    token: CancellationToken,
) {
    let states = StateStore::new(&catalogue);
    let mut known = 0;
    loop {
        let applied = apply_newest_revision(&states, &generation, &sets, &encoders, &mut known);
        match token.run_until_cancelled(applied).await {
            None => return,
            Some(Ok(())) => {}
            Some(Err(error)) => {
                warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not taken up; the next look tries again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(poll) => {}
            () = token.cancelled() => return,
        }
    }
}

async fn apply_newest_revision(
    states: &StateStore,
    generation: &str,
    sets: &ActivePromptSets,
    encoders: &Arc<dyn Encoders>,
    known: &mut u64,
) -> Result<(), ReindexError> {
    let next =
        if *known == 0 { states.read_newest().await? } else { states.read_next(*known).await? };
    let Some(mut state) = next else { return Ok(()) };
    while let Some(newer) = states.read_next(state.revision).await? {
        state = newer;
    }
    apply_prompt_sets(&state, generation, sets, encoders).await?;
    *known = state.revision;
    Ok(())
}

async fn apply_prompt_sets(
    state: &CatalogueState,
    generation: &str,
    sets: &ActivePromptSets,
    encoders: &Arc<dyn Encoders>,
) -> Result<(), ReindexError> {
    let Some(records) = state.prompt_sets_of_generation(generation).map(<[_]>::to_vec) else {
        return Ok(());
    };
    let before = sets.current();
    let (towers, active) = (encoders.clone(), sets.clone());
    let embedded = tokio::task::spawn_blocking(move || active.resolve_records(&records, &*towers))
        .await
        .map_err(|panic| ReindexError::Panicked(panic.to_string()))??;
    let same = before.len() == embedded.len()
        && before.iter().zip(&embedded).all(|(a, b)| a.statistics_key == b.statistics_key);
    if !same {
        let names: Vec<&str> = embedded.iter().map(|set| set.statistics_key.as_str()).collect();
        info!(
            event = event::STATE_APPLIED,
            revision = state.revision,
            prompt_sets = names.join(" "),
            "new images are measured with these prompt sets"
        );
        sets.replace(embedded);
    }
    Ok(())
}
