//! The way back to what was live before: at once within a generation, with eyes open to another one.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tracing::info;

use super::candidate::load_newest_state;
use crate::backfill::{GenerationGap, ReindexError};
use crate::catalogue::{CatalogueState, StateChange, StateStore};
use crate::store::Store;
use crate::table::Generation;
use crate::telemetry::event;

/// Where a roll back leads: to what was live before the last promotion. Rolling back again leads
/// further back.
#[derive(Debug, Clone)]
pub struct RollbackPlan {
    /// The revision that was looked at.
    base_revision: u64,
    /// The generation that is live now.
    live: Generation,
    /// The revision that was live before.
    target: CatalogueState,
}

impl RollbackPlan {
    /// Refused where nothing was promoted, or where the generation is filled no longer.
    pub async fn load(catalogue: &Store) -> Result<Self, ReindexError> {
        let states = StateStore::new(catalogue);
        let newest = load_newest_state(&states, catalogue).await?;
        let before = find_previous_state(&states, &newest).await?;
        ensure_generation_is_filled(&newest, &before.live)?;
        Ok(Self { base_revision: newest.revision, live: newest.live, target: before })
    }

    /// The generation that it leads to.
    pub fn target_generation(&self) -> &Generation {
        &self.target.live
    }

    /// How that generation covers the images of the one that is live now, sorted in `folder`; none
    /// where they are one. What was taken in within `grace` may still be on its way.
    pub async fn compare_generations(
        &self,
        catalogue: &Store,
        folder: &Path,
        grace_period: Duration,
        now: DateTime<Utc>,
    ) -> Result<Option<GenerationGap>, ReindexError> {
        if self.live.id == self.target_generation().id {
            return Ok(None);
        }
        let cutoff = now - TimeDelta::from_std(grace_period).unwrap_or(TimeDelta::MAX);
        GenerationGap::compare(catalogue, &self.live, self.target_generation(), folder, cutoff)
            .await
            .map(Some)
    }

    /// Goes it, in one write; refused where the state has changed since. A candidate is withdrawn.
    pub async fn execute(
        &self,
        catalogue: &Store,
        by: &str,
    ) -> Result<CatalogueState, ReindexError> {
        let to = self.target.revision;
        let state = StateStore::new(catalogue)
            .update(by, |state| {
                if state.revision != self.base_revision {
                    return Err(ReindexError::Refused(format!(
                        "the state has changed meanwhile: revision {} by {}; look again",
                        state.revision, state.actor
                    )));
                }
                restore_serving(state, &self.target).map(Some)
            })
            .await?;
        info!(
            event = event::ROLLBACK,
            restored_revision = to,
            name = state.configuration_name,
            revision = state.revision,
            generation = state.live.id,
            actor = by,
            "rolled back"
        );
        Ok(state)
    }
}

/// `state` with what was served at `before`.
fn restore_serving(
    mut state: CatalogueState,
    before: &CatalogueState,
) -> Result<CatalogueState, ReindexError> {
    let to = before.revision;
    if state.live.id != before.live.id {
        restore_generation(&mut state, before)?;
    }
    // A set that was retired since comes back: what rows lack of it is computed by the query
    // workers until it is backfilled.
    let key = &before.serving.prompt_set;
    if !state.prompt_sets.iter().any(|set| set.key == *key) {
        let found = before.prompt_sets.iter().find(|set| set.key == *key).cloned();
        let mut set = found.ok_or_else(|| {
            ReindexError::Refused(format!("revision {to} does not have its own set {key}"))
        })?;
        set.since = Utc::now();
        state.prompt_sets.push(set);
    }
    state.serving = before.serving.clone();
    state.configuration_name.clone_from(&before.configuration_name);
    state.candidate = None;
    state.change = StateChange::RolledBack { restored_revision: to };
    Ok(state)
}

/// Makes the generation of `before` live again, which was filled beside the one that took its place.
fn restore_generation(
    state: &mut CatalogueState,
    before: &CatalogueState,
) -> Result<(), ReindexError> {
    ensure_generation_is_filled(state, &before.live)?;
    let previous_standby =
        before.standby.as_ref().filter(|beside| beside.generation.id == state.live.id);
    let checkpoint =
        previous_standby.map_or(state.live.model_name.clone(), |left| left.checkpoint.clone());
    state.swap_live_and_standby(&checkpoint);
    Ok(())
}

/// Refuses a generation that is neither live nor beside the live one.
fn ensure_generation_is_filled(
    state: &CatalogueState,
    back: &Generation,
) -> Result<(), ReindexError> {
    if state.find_generation(&back.id).is_some() {
        return Ok(());
    }
    Err(ReindexError::Refused(format!(
        "generation {} ({}) is no longer filled; `bsap reindex model` fills it again",
        back.id, back.model_name
    )))
}

/// The revision that was served before what is served at `state`.
async fn find_previous_state(
    states: &StateStore,
    state: &CatalogueState,
) -> Result<CatalogueState, ReindexError> {
    let nothing = || {
        ReindexError::Refused("nothing was promoted yet: there is nothing to go back to".to_owned())
    };
    let missing = |revision: u64| {
        ReindexError::Refused(format!("revision {revision} of the state is not there any more"))
    };
    let mut revision = state.revision;
    loop {
        let inspected = states.read_revision(revision).await?.ok_or_else(|| missing(revision))?;
        match inspected.change {
            StateChange::Promoted { previous_revision: from, .. } => {
                return states.read_revision(from).await?.ok_or_else(|| missing(from));
            }
            // What was live then was live before: go on from there.
            StateChange::RolledBack { restored_revision: to } => revision = to,
            _ => revision = revision.checked_sub(1).filter(|r| *r > 0).ok_or_else(nothing)?,
        }
    }
}
