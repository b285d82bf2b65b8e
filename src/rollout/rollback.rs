//! Rolls back to the configuration that was live before the last promotion. Within a generation
//! that is immediate and loses nothing; a roll back to another generation first reports which
//! images it lacks.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tracing::info;

use super::error::RolloutError;
use super::newest_state::load_newest_state;
use crate::backfill::GenerationGap;
use crate::catalogue::{CatalogueState, StateChange, StateStore};
use crate::store::Store;
use crate::table::Generation;
use crate::telemetry::event;

/// A roll back to what was live before the last promotion. Another roll back after it goes further
/// back.
#[derive(Debug, Clone)]
pub struct RollbackPlan {
    /// The newest revision when the plan was made.
    base_revision: u64,
    /// The live generation of that revision.
    live_generation: Generation,
    /// The revision whose configuration is restored.
    target_state: CatalogueState,
}

impl RollbackPlan {
    /// Finds the revision to restore; refused if nothing was promoted, or if its generation is no
    /// longer filled.
    pub async fn prepare(catalogue: &Store) -> Result<Self, RolloutError> {
        let states = StateStore::new(catalogue);
        let newest = load_newest_state(&states, catalogue).await?;
        let target = find_state_before_promotion(&states, &newest).await?;
        ensure_generation_is_filled(&newest, &target.live)?;
        Ok(Self {
            base_revision: newest.revision,
            live_generation: newest.live,
            target_state: target,
        })
    }

    /// Returns the generation that becomes live.
    pub fn target_generation(&self) -> &Generation {
        &self.target_state.live
    }

    /// Compares the target generation with the live one, by means of temporary files in
    /// `temp_folder`; `None` if they are the same. Differences of the last `grace_period` do not
    /// count.
    pub async fn compare_generations(
        &self,
        catalogue: &Store,
        temp_folder: &Path,
        grace_period: Duration,
        now: DateTime<Utc>,
    ) -> Result<Option<GenerationGap>, RolloutError> {
        if self.live_generation.id == self.target_generation().id {
            return Ok(None);
        }
        let cutoff = now - TimeDelta::from_std(grace_period).unwrap_or(TimeDelta::MAX);
        let target = self.target_generation();
        let gap =
            GenerationGap::compare(catalogue, &self.live_generation, target, temp_folder, cutoff)
                .await?;
        Ok(Some(gap))
    }

    /// Writes the roll back as a revision, which has no candidate; refused if the state has changed
    /// since the plan was made.
    pub async fn execute(
        &self,
        catalogue: &Store,
        actor: &str,
    ) -> Result<CatalogueState, RolloutError> {
        let state = StateStore::new(catalogue)
            .update(actor, |state| {
                if state.revision != self.base_revision {
                    return Err(RolloutError::Refused(format!(
                        "the state has changed in the meantime: revision {} by {}; check again",
                        state.revision, state.actor
                    )));
                }
                restore_serving(state, &self.target_state).map(Some)
            })
            .await?;
        info!(
            event = event::ROLLBACK,
            restored_revision = self.target_state.revision,
            name = state.configuration_name,
            revision = state.revision,
            generation = state.live.id,
            actor,
            "rolled back"
        );
        Ok(state)
    }
}

/// Returns `state` with the configuration of `target`.
fn restore_serving(
    mut state: CatalogueState,
    target: &CatalogueState,
) -> Result<CatalogueState, RolloutError> {
    let revision = target.revision;
    if state.live.id != target.live.id {
        restore_generation(&mut state, target)?;
    }
    // A set that has been retired is added again. Until it is backfilled, query workers compute the
    // statistics that rows lack.
    let key = &target.serving.prompt_set;
    if !state.prompt_sets.iter().any(|set| set.key == *key) {
        let stored_set = target.prompt_sets.iter().find(|set| set.key == *key).cloned();
        let mut set = stored_set.ok_or_else(|| {
            RolloutError::Refused(format!("revision {revision} does not have its own set {key}"))
        })?;
        set.since = Utc::now();
        state.prompt_sets.push(set);
    }
    state.serving = target.serving.clone();
    state.configuration_name.clone_from(&target.configuration_name);
    state.candidate = None;
    state.change = StateChange::RolledBack { restored_revision: revision };
    Ok(state)
}

/// Makes the generation of `target` live again, and the live one the standby.
fn restore_generation(
    state: &mut CatalogueState,
    target: &CatalogueState,
) -> Result<(), RolloutError> {
    ensure_generation_is_filled(state, &target.live)?;
    // The generation that is live now was the standby then, so `target` has its checkpoint.
    let previous_standby =
        target.standby.as_ref().filter(|standby| standby.generation.id == state.live.id);
    let checkpoint = previous_standby
        .map_or(state.live.model_name.clone(), |standby| standby.checkpoint.clone());
    state.swap_live_and_standby(&checkpoint);
    Ok(())
}

/// Refuses a generation that is neither live nor the standby.
fn ensure_generation_is_filled(
    state: &CatalogueState,
    generation: &Generation,
) -> Result<(), RolloutError> {
    if state.find_generation(&generation.id).is_some() {
        return Ok(());
    }
    Err(RolloutError::Refused(format!(
        "generation {} ({}) is no longer filled; `bsap reindex model` fills it again",
        generation.id, generation.model_name
    )))
}

/// Returns the revision that was live before the promotion that led to what is live at `state`.
async fn find_state_before_promotion(
    states: &StateStore,
    state: &CatalogueState,
) -> Result<CatalogueState, RolloutError> {
    let nothing_promoted = || {
        RolloutError::Refused("nothing was promoted yet: there is nothing to go back to".to_owned())
    };
    let missing = |revision: u64| {
        RolloutError::Refused(format!("revision {revision} of the state no longer exists"))
    };
    let mut revision = state.revision;
    loop {
        let inspected = states.read_revision(revision).await?.ok_or_else(|| missing(revision))?;
        match inspected.change {
            StateChange::Promoted { previous_revision, .. } => {
                let previous = states.read_revision(previous_revision).await?;
                return previous.ok_or_else(|| missing(previous_revision));
            }
            // A roll back restored that revision: continue with what led to it.
            StateChange::RolledBack { restored_revision } => revision = restored_revision,
            _ => {
                let earlier = revision.checked_sub(1).filter(|earlier| *earlier > 0);
                revision = earlier.ok_or_else(nothing_promoted)?;
            }
        }
    }
}
