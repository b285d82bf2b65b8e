//! The configuration that answers queries.

use std::sync::Arc;

use crate::catalogue::{CatalogueState, RolloutCandidate, ServingConfig};
use crate::prompts::EmbeddedPromptSet;

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The live configuration.
    Live,
    /// The candidate.
    Candidate,
}

/// By what queries are answered.
#[derive(Debug, Clone)]
pub struct ServingSnapshot {
    /// Revision of the catalogue's state that says so.
    pub state_revision: u64,
    /// Generation that the images are of.
    pub generation_id: String,
    /// Name of the configuration.
    pub configuration_name: String,
    /// What it is to the catalogue: the candidate where another generation is live.
    pub role: Route,
    /// Prompt sets that a query may name; rows that lack their statistics get them here.
    pub prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// How queries are answered unless they say otherwise.
    pub serving: ServingConfig,
    /// What may become live, answers those who ask for it, and its share; its set is among `sets`.
    pub candidate: Option<RolloutCandidate>,
}

impl ServingSnapshot {
    /// As a revision of the state says; `sets` are its prompt sets, embedded.
    pub fn from_state(state: &CatalogueState, sets: Vec<Arc<EmbeddedPromptSet>>) -> Self {
        Self {
            state_revision: state.revision,
            generation_id: state.live.id.clone(),
            configuration_name: state.configuration_name.clone(),
            role: Route::Live,
            prompt_sets: sets,
            serving: state.serving.clone(),
            // One that reads another generation is not in this snapshot.
            candidate: state.candidate.clone().filter(|c| c.generation == state.live.id),
        }
    }

    /// As a revision of the state says for the generation beside the live one: as its candidate;
    /// where it has none, as `before`.
    pub fn for_standby(
        state: &CatalogueState,
        generation: &str,
        sets: Vec<Arc<EmbeddedPromptSet>>,
        previous: Option<&Self>,
    ) -> Self {
        let candidate = state.candidate.as_ref().filter(|c| c.generation == generation);
        let known = previous.map_or((&state.configuration_name, &state.serving), |b| {
            (&b.configuration_name, &b.serving)
        });
        let (name, serving) = candidate.map_or(known, |c| (&c.name, &c.serving));
        Self {
            state_revision: state.revision,
            generation_id: generation.to_owned(),
            configuration_name: name.clone(),
            role: Route::Candidate,
            prompt_sets: sets,
            serving: serving.clone(),
            candidate: None,
        }
    }

    /// Name of the configuration that answers a query.
    pub(crate) fn configuration_for(&self, route: Route) -> &str {
        match (&self.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.name,
            _ => &self.configuration_name,
        }
    }
}
