//! The way back to what was live before: at once within a generation, with eyes open to another one.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tracing::info;

use super::candidate::newest;
use crate::backfill::{Gap, ReindexError};
use crate::catalogue::{CatalogueState, Change, Generation, StateStore};
use crate::store::Store;
use crate::telemetry::event;

/// Where a roll back leads: to what was live before the last promotion. Rolling back again leads
/// further back.
#[derive(Debug, Clone)]
pub struct WayBack {
    /// The revision that was looked at.
    revision: u64,
    /// The generation that is live now.
    from: Generation,
    /// The revision that was live before.
    before: CatalogueState,
}

impl WayBack {
    /// Refused where nothing was promoted, or where the generation is filled no longer.
    pub async fn of(catalogue: &Store) -> Result<Self, ReindexError> {
        let states = StateStore::new(catalogue);
        let newest = newest(&states, catalogue).await?;
        let before = before(&states, &newest).await?;
        filled(&newest, &before.live)?;
        Ok(Self { revision: newest.revision, from: newest.live, before })
    }

    /// The generation that it leads to.
    pub fn to(&self) -> &Generation {
        &self.before.live
    }

    /// How that generation covers the images of the one that is live now, sorted in `folder`; none
    /// where they are one. What was taken in within `grace` may still be on its way.
    pub async fn gap(
        &self,
        catalogue: &Store,
        folder: &Path,
        grace: Duration,
        now: DateTime<Utc>,
    ) -> Result<Option<Gap>, ReindexError> {
        if self.from.id == self.to().id {
            return Ok(None);
        }
        let before = now - TimeDelta::from_std(grace).unwrap_or(TimeDelta::MAX);
        Gap::of(catalogue, &self.from, self.to(), folder, before).await.map(Some)
    }

    /// Goes it, in one write; refused where the state has changed since. A candidate is withdrawn.
    pub async fn go(&self, catalogue: &Store, by: &str) -> Result<CatalogueState, ReindexError> {
        let to = self.before.revision;
        let state = StateStore::new(catalogue)
            .change(by, |state| {
                if state.revision != self.revision {
                    return Err(ReindexError::Refused(format!(
                        "the state has changed meanwhile: revision {} by {}; look again",
                        state.revision, state.by
                    )));
                }
                rolled_back(state, &self.before).map(Some)
            })
            .await?;
        info!(
            event = event::ROLLBACK,
            to,
            name = state.name,
            revision = state.revision,
            generation = state.live.id,
            by,
            "rolled back"
        );
        Ok(state)
    }
}

/// `state` with what was served at `before`.
fn rolled_back(
    mut state: CatalogueState,
    before: &CatalogueState,
) -> Result<CatalogueState, ReindexError> {
    let to = before.revision;
    if state.live.id != before.live.id {
        go_back(&mut state, before)?;
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
    state.name.clone_from(&before.name);
    state.candidate = None;
    state.change = Change::RolledBack { to };
    Ok(state)
}

/// Makes the generation of `before` live again, which was filled beside the one that took its place.
fn go_back(state: &mut CatalogueState, before: &CatalogueState) -> Result<(), ReindexError> {
    filled(state, &before.live)?;
    let left = before.beside.as_ref().filter(|beside| beside.generation.id == state.live.id);
    let checkpoint = left.map_or(state.live.model_name.clone(), |left| left.checkpoint.clone());
    state.swap_generations(&checkpoint);
    Ok(())
}

/// Refuses a generation that is neither live nor beside the live one.
fn filled(state: &CatalogueState, back: &Generation) -> Result<(), ReindexError> {
    if state.generation(&back.id).is_some() {
        return Ok(());
    }
    Err(ReindexError::Refused(format!(
        "generation {} ({}) is no longer filled; `bsap reindex model` fills it again",
        back.id, back.model_name
    )))
}

/// The revision that was served before what is served at `state`.
async fn before(
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
        let looked = states.at(revision).await?.ok_or_else(|| missing(revision))?;
        match looked.change {
            Change::Promoted { from, .. } => {
                return states.at(from).await?.ok_or_else(|| missing(from));
            }
            // What was live then was live before: go on from there.
            Change::RolledBack { to } => revision = to,
            _ => revision = revision.checked_sub(1).filter(|r| *r > 0).ok_or_else(nothing)?,
        }
    }
}
