//! A generation: the tables that one model fills.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::TableError;
use crate::record::VersionOrdering;

/// The pair of tables that one model fills: images and statistics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generation {
    /// Name of its folder: the first 16 digits of the model's fingerprint.
    pub id: String,
    /// Name of the model, for display.
    pub model_name: String,
    /// Fingerprint of the model's weights, preprocessing and architecture.
    pub model_fingerprint: String,
    /// Number of values of an embedding.
    pub dimension: usize,
    /// The model's logit scale *L*, by which cosines are multiplied.
    pub logit_scale: f32,
    /// How the versions of an image are ordered.
    pub ordering: VersionOrdering,
}

impl Generation {
    /// Creates a generation for a model.
    pub fn new(
        model_name: &str,
        model_fingerprint: &str,
        dimension: usize,
        logit_scale: f32,
        ordering: VersionOrdering,
    ) -> Self {
        let id = model_fingerprint.get(..16).unwrap_or(model_fingerprint);
        Self {
            id: id.to_owned(),
            model_name: model_name.to_owned(),
            model_fingerprint: model_fingerprint.to_owned(),
            dimension,
            logit_scale,
            ordering,
        }
    }

    /// Fails with [`TableError::Mismatch`] unless rows of `other`, which is configured, can be stored in
    /// the tables of this generation.
    pub fn ensure_compatible(&self, other: &Self) -> Result<(), TableError> {
        let check = |property, stored: &str, configured: &str, remedy| {
            if stored == configured {
                return Ok(());
            }
            let (stored, configured) = (stored.to_owned(), configured.to_owned());
            Err(TableError::Mismatch { property, stored, configured, remedy })
        };
        check(
            "model fingerprint",
            &self.model_fingerprint,
            &other.model_fingerprint,
            "Set model.checkpoint to the model that filled this catalogue, set up a generation for the new one (bsap reindex model), or start a new catalogue (table.url)",
        )?;
        check(
            "ordering",
            self.ordering.as_str(),
            other.ordering.as_str(),
            "Set source.ordering to what the catalogue was created with, or start a new catalogue (table.url)",
        )
    }
}
