//! The configuration that answers the queries over a snapshot.

use std::sync::Arc;

use crate::catalogue::{CatalogueState, RolloutCandidate, ServingConfig};
use crate::prompts::EmbeddedPromptSet;

/// Which configuration answers a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServingRole {
    /// The live configuration, which answers by default.
    Live,
    /// The configuration that may become live.
    Candidate,
}

/// How queries over one generation are answered, as one revision of the catalogue's state defines it.
#[derive(Debug, Clone)]
pub struct ServingSnapshot {
    /// Revision of the catalogue's state that this configuration comes from.
    pub state_revision: u64,
    /// Generation that the images belong to.
    pub generation_id: String,
    /// Name of the configuration in answers, logs and requests.
    pub configuration_name: String,
    /// Role in the catalogue: [`ServingRole::Candidate`] if another generation is live.
    pub role: ServingRole,
    /// Prompt sets that a query may name. Statistics that rows lack are computed for each of them.
    pub prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// Prompt set, normaliser and weight of queries that do not set their own.
    pub serving: ServingConfig,
    /// Candidate of the same generation: it answers queries that request it and its share of the
    /// traffic. Its prompt set is among `prompt_sets`. `None` if there is no candidate, or if it reads
    /// another generation.
    pub candidate: Option<RolloutCandidate>,
}

impl ServingSnapshot {
    /// Creates the configuration of the live generation; `sets` are the embedded prompt sets of `state`.
    pub fn from_state(state: &CatalogueState, sets: Vec<Arc<EmbeddedPromptSet>>) -> Self {
        Self {
            state_revision: state.revision,
            generation_id: state.live.id.clone(),
            configuration_name: state.configuration_name.clone(),
            role: ServingRole::Live,
            prompt_sets: sets,
            serving: state.serving.clone(),
            // A candidate that reads another generation belongs to that generation's snapshot.
            candidate: state.candidate.clone().filter(|c| c.generation == state.live.id),
        }
    }

    /// Creates the configuration of the standby generation: that of the candidate that reads it, or
    /// that of `previous` if there is none.
    pub fn for_standby(
        state: &CatalogueState,
        generation: &str,
        sets: Vec<Arc<EmbeddedPromptSet>>,
        previous: Option<&Self>,
    ) -> Self {
        let candidate = state.candidate.as_ref().filter(|c| c.generation == generation);
        let fallback = previous.map_or((&state.configuration_name, &state.serving), |previous| {
            (&previous.configuration_name, &previous.serving)
        });
        let (name, serving) = candidate.map_or(fallback, |c| (&c.name, &c.serving));
        Self {
            state_revision: state.revision,
            generation_id: generation.to_owned(),
            configuration_name: name.clone(),
            role: ServingRole::Candidate,
            prompt_sets: sets,
            serving: serving.clone(),
            candidate: None,
        }
    }

    /// Returns the name of the configuration that `route` leads to.
    pub(crate) fn configuration_for(&self, route: ServingRole) -> &str {
        match (&self.candidate, route) {
            (Some(candidate), ServingRole::Candidate) => &candidate.name,
            _ => &self.configuration_name,
        }
    }
}
