//! The prompt sets that are in use.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::embedded::EmbeddedPromptSet;
use super::prompt_set::PromptError;
use crate::catalogue::PromptSetRecord;
use crate::clip::Encoders;

/// The prompt sets that are in use, shared between the tasks that use them and the task that
/// follows the catalogue's state.
#[derive(Debug, Clone, Default)]
pub struct ActivePromptSets(Arc<ArcSwap<Vec<Arc<EmbeddedPromptSet>>>>);

impl ActivePromptSets {
    /// Creates the active prompt sets, initially `sets`.
    pub fn new(sets: Vec<Arc<EmbeddedPromptSet>>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(sets)))
    }

    /// Returns the sets that are in use now.
    pub fn current(&self) -> Arc<Vec<Arc<EmbeddedPromptSet>>> {
        self.0.load_full()
    }

    /// Replaces the sets.
    pub fn replace(&self, sets: Vec<Arc<EmbeddedPromptSet>>) {
        self.0.store(Arc::new(sets));
    }

    /// Returns the sets of `records`. Sets in use are taken as they are; the others are embedded,
    /// which blocks for as long as the computation takes.
    pub fn resolve_records(
        &self,
        records: &[PromptSetRecord],
        encoders: &dyn Encoders,
    ) -> Result<Vec<Arc<EmbeddedPromptSet>>, PromptError> {
        let known = self.current();
        records
            .iter()
            .map(|record| match known.iter().find(|set| set.statistics_key == record.key) {
                Some(set) => Ok(set.clone()),
                None => EmbeddedPromptSet::from_record(record, encoders).map(Arc::new),
            })
            .collect()
    }
}
