//! Adds prompt sets to a catalogue, and retires them.

use super::error::BackfillError;
use tokio_util::sync::CancellationToken;

use crate::catalogue::{CatalogueState, StateChange, StateStore};
use crate::prompts::EmbeddedPromptSet;
use crate::store::Store;
use crate::table::{Generation, StatisticsTable};

/// Adds `set` to the state for `generation`, which is live or the standby; does nothing if the
/// state has it. Workers that fill the generation notice within `table.state_poll_ms`; the rows
/// that they then write have the statistics of the set.
pub async fn add_prompt_set(
    catalogue: &Store,
    generation: &Generation,
    set: &EmbeddedPromptSet,
    actor: &str,
) -> Result<CatalogueState, BackfillError> {
    let states = StateStore::new(catalogue);
    let update = states.update(actor, |mut state| {
        let is_standby = state.is_standby(generation);
        let sets = match &mut state.standby {
            Some(standby) if is_standby => &mut standby.prompt_sets,
            _ => {
                state.live.ensure_compatible(generation)?;
                &mut state.prompt_sets
            }
        };
        if sets.iter().any(|known| known.key == set.statistics_key) {
            return Ok(None);
        }
        sets.push(set.to_record());
        state.change = StateChange::PromptSets {
            keys: vec![set.statistics_key.to_string()],
            generation: is_standby.then(|| generation.id.clone()),
        };
        Ok::<_, BackfillError>(Some(state))
    });
    update.await
}

/// Removes a prompt set from the state: new rows no longer have its statistics, and its backfilled
/// statistics are deleted. Refused if the set is served or belongs to the candidate. `name` is a
/// stored key, name or name@version. Returns the key and the number of deleted statistics files.
pub async fn retire_prompt_set(
    catalogue: &Store,
    name: &str,
    max_commit_attempts: u32,
    actor: &str,
    cancel: &CancellationToken,
) -> Result<(String, usize), BackfillError> {
    let states = StateStore::new(catalogue);
    let newest = states.read_newest().await?;
    let key =
        newest.as_ref().and_then(|state| state.find_prompt_set(name)).map(|set| set.key.clone());
    let Some(key) = key else {
        let stored_keys = newest.map(|state| {
            state.prompt_sets.iter().map(|set| set.key.to_string()).collect::<Vec<_>>().join(", ")
        });
        return Err(BackfillError::Refused(format!(
            "{name:?} is not a stored prompt set; stored are {}",
            stored_keys.unwrap_or_default()
        )));
    };
    let state = states
        .update(actor, |mut state| {
            let refused = |reason: &str| Err(BackfillError::Refused(format!("{key} {reason}")));
            if state.serving.prompt_set == key {
                return refused("is served; promote another configuration first");
            }
            if let Some(candidate) = &state.candidate
                && candidate.serving.prompt_set == key
            {
                return refused("is the candidate's; `bsap candidate withdraw` first");
            }
            state.prompt_sets.retain(|set| set.key != key);
            state.change =
                StateChange::PromptSets { keys: vec![key.to_string()], generation: None };
            Ok(Some(state))
        })
        .await?;
    let deleted_files =
        match StatisticsTable::open_if_exists(catalogue, &state.live, max_commit_attempts).await? {
            Some(mut table) => table.remove_prompt_set(&key, cancel).await?,
            None => 0,
        };
    Ok((key.to_string(), deleted_files))
}
