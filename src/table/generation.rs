//! A generation: the tables that one model fills.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::TableError;
use crate::record::VersionOrdering;

/// One pair of tables, filled by one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generation {
    /// Its folder: the first 16 digits of the model's fingerprint.
    pub id: String,
    /// Name of the model, for people.
    pub model_name: String,
    /// Fingerprint of weights, preprocessing and architecture.
    pub model_fingerprint: String,
    /// Dimension of the embeddings.
    pub dimension: usize,
    /// The model's logit scale L.
    pub logit_scale: f32,
    /// What orders the versions of an image.
    pub ordering: VersionOrdering,
}

impl Generation {
    /// A generation for a model.
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

    /// Refuses `other` unless its rows can stand beside this generation's.
    pub fn ensure_compatible(&self, other: &Self) -> Result<(), TableError> {
        let check = |what, stored: &str, configured: &str, remedy| {
            if stored == configured {
                return Ok(());
            }
            let (stored, configured) = (stored.to_owned(), configured.to_owned());
            Err(TableError::Mismatch { property: what, stored, configured, remedy })
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
            "Set source.ordering to what the catalogue was made with, or start a new catalogue (table.url)",
        )
    }
}
