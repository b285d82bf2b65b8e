//! The stored table in memory as an evaluation needs it: every image once, with the embeddings of
//! one or two models.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::clip::{ClipError, Encoders};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{Attributes, Embedding, ImageId, ImageRow, RowVersion, StoredImage};
use crate::retry::{Classify, Disposition};
use crate::store::Store;
use crate::table::{Follower, Generation, TableError};

/// Maximum number of images of a table that is evaluated. All embeddings are held in memory, 4
/// bytes per value (2 GB for a million embeddings of dimension 512).
pub const MAX_IMAGES: usize = 5_000_000;

/// Why an evaluation fails.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
    /// The table has more images than [`MAX_IMAGES`].
    #[error(
        "the table has more than {MAX_IMAGES} images, which is the maximum that an evaluation holds in memory; evaluate a smaller catalogue made from a part of the images"
    )]
    TooManyImages,
    /// The work was interrupted.
    #[error("interrupted")]
    Cancelled,
}

impl Classify for EvaluationError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Table(error) => error.disposition(),
            Self::Model(_) | Self::TooManyImages | Self::Cancelled => Disposition::Fatal,
        }
    }
}

/// What a report shows of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct CorpusImage {
    /// The image's id.
    pub image_id: ImageId,
    /// Where the image's bytes are; `None` if they came inline with the event.
    pub uri: Option<String>,
    /// Declared attributes.
    pub attributes: Attributes,
}

/// The model whose embeddings a table holds, as reports describe it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelInfo {
    /// Role of the generation: `live`, `standby`, or `drawn` for a synthetic catalogue.
    pub role: String,
    /// Id of the generation.
    pub generation: String,
    /// Name of the model.
    pub model: String,
    /// Fingerprint of the model.
    pub fingerprint: String,
    /// The model's logit scale L.
    pub logit_scale: f32,
    /// Number of images in the table.
    pub images: usize,
    /// Version of the table that was read.
    pub table_version: u64,
}

/// The images of one generation that are not deleted, with their embeddings.
pub struct CorpusTable {
    /// The model whose embeddings it holds.
    pub model_info: ModelInfo,
    encoders: Arc<dyn Encoders>,
    /// Index of each row's image in [`Corpus::images`], ascending.
    image_positions: Vec<u32>,
    embeddings: Vec<Embedding>,
    stored_statistics: Vec<BTreeMap<StatisticsKey, ScoreStatistics>>,
}

/// Every image once, and the tables that hold it.
#[derive(Default)]
pub struct Corpus {
    /// All images, ordered by id.
    pub images: Vec<CorpusImage>,
    /// The live table, then the standby table if it is evaluated too.
    pub tables: Vec<CorpusTable>,
}

/// One generation with its model and its images that are not deleted.
pub struct LoadedGeneration {
    model_info: ModelInfo,
    encoders: Arc<dyn Encoders>,
    images: BTreeMap<ImageId, StoredImage>,
}

impl LoadedGeneration {
    /// Reads the newest version of every image of `generation`. `progress` is called with the
    /// number of files read and the total number of files.
    pub async fn load(
        store: &Store,
        role: &str,
        generation: &Generation,
        encoders: Arc<dyn Encoders>,
        token: &CancellationToken,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self, EvaluationError> {
        let mut follower = Follower::open(store, generation).await?;
        let mut newest: HashMap<ImageId, ImageRow> = HashMap::new();
        let mut version = 0;
        while let Some(changes) = follower.next(progress).await? {
            if token.is_cancelled() {
                return Err(EvaluationError::Cancelled);
            }
            if changes.is_full_snapshot {
                newest.clear();
            }
            version = changes.table_version;
            for row in changes.rows {
                let newer = newest
                    .get(&row.image_id)
                    .is_none_or(|known| RowVersion::from_row(&row) > RowVersion::from_row(known));
                if newer {
                    newest.insert(row.image_id.clone(), row);
                }
            }
            if newest.len() > MAX_IMAGES {
                return Err(EvaluationError::TooManyImages);
            }
        }
        // A row without an image is a tombstone.
        let images = newest.into_values().filter_map(|row| Some((row.image_id, row.image?)));
        Ok(Self::new(role, &generation.id, version, encoders, images.collect()))
    }

    /// Creates a generation from images that are in memory already.
    pub fn new(
        role: &str,
        generation: &str,
        version: u64,
        encoders: Arc<dyn Encoders>,
        images: BTreeMap<ImageId, StoredImage>,
    ) -> Self {
        let card = encoders.card();
        let model_info = ModelInfo {
            role: role.to_owned(),
            generation: generation.to_owned(),
            model: card.name.clone(),
            fingerprint: card.fingerprint.clone(),
            logit_scale: card.logit_scale,
            images: images.len(),
            table_version: version,
        };
        Self { model_info, encoders, images }
    }
}

impl Corpus {
    /// Joins generations. URI and attributes of an image come from the first generation that has
    /// it.
    pub fn from_generations(generations: Vec<LoadedGeneration>) -> Self {
        let mut all: BTreeMap<&ImageId, &StoredImage> = BTreeMap::new();
        for (id, image) in generations.iter().flat_map(|rows| &rows.images) {
            all.entry(id).or_insert(image);
        }
        let images: Vec<CorpusImage> = all
            .into_iter()
            .map(|(id, image)| CorpusImage {
                image_id: id.clone(),
                uri: image.uri.clone(),
                attributes: image.attributes.clone(),
            })
            .collect();
        let mut corpus = Self { images, tables: Vec::new() };
        for rows in generations {
            let mut table = CorpusTable {
                model_info: rows.model_info,
                encoders: rows.encoders,
                image_positions: Vec::with_capacity(rows.images.len()),
                embeddings: Vec::with_capacity(rows.images.len()),
                stored_statistics: Vec::with_capacity(rows.images.len()),
            };
            for (id, image) in rows.images {
                let Some(position) = corpus.image_position(&id) else { continue };
                table.image_positions.push(position);
                table.embeddings.push(image.embedding);
                table.stored_statistics.push(image.statistics);
            }
            corpus.tables.push(table);
        }
        corpus
    }

    /// Returns the index of an image in [`Corpus::images`].
    pub fn image_position(&self, id: &ImageId) -> Option<u32> {
        self.images.binary_search_by(|p| p.image_id.cmp(id)).ok().map(|i| i as u32)
    }
}

impl CorpusTable {
    /// Returns the model whose embeddings the table holds.
    pub fn encoders(&self) -> &Arc<dyn Encoders> {
        &self.encoders
    }

    /// Returns the index of each row's image in [`Corpus::images`], ascending.
    pub fn image_positions(&self) -> &[u32] {
        &self.image_positions
    }

    /// Returns the embeddings, one per row.
    pub fn embeddings(&self) -> &[Embedding] {
        &self.embeddings
    }

    /// Returns the statistics of a prompt set, one per row: the stored ones, or if a row has none,
    /// those computed from its stored embedding, as the query worker computes them.
    pub fn statistics_of_set(&self, set: &EmbeddedPromptSet) -> Vec<ScoreStatistics> {
        let rows = self.embeddings.par_iter().zip(&self.stored_statistics);
        rows.filter_map(|(embedding, stored)| {
            stored.get(&set.statistics_key).copied().or_else(|| set.compute_statistics(embedding))
        })
        .collect()
    }
}
