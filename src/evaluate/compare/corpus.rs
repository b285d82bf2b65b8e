//! The stored table in memory, as an evaluation needs it: every image once, with the embeddings of one
//! or more models.

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

/// Most images of a table that is evaluated: all their embeddings are held in memory, 4 bytes a value
/// (2 GB for a million of dimension 512).
pub const MAX_IMAGES: usize = 5_000_000;

/// Why an evaluation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
    /// The table is larger than what fits in memory.
    #[error(
        "the table has more than {MAX_IMAGES} images; evaluate on a machine with more memory is not possible yet: evaluate a smaller catalogue made from a part of the images"
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

/// What is shown of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct CorpusImage {
    /// Which image.
    pub image_id: ImageId,
    /// Where its bytes are; none where they came inline.
    pub uri: Option<String>,
    /// Declared attributes.
    pub attributes: Attributes,
}

/// Which model filled a table, for reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelInfo {
    /// `live` or `beside`.
    pub role: String,
    /// The generation.
    pub generation: String,
    /// The model's name.
    pub model: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// Its logit scale L.
    pub logit_scale: f32,
    /// Images in its table.
    pub images: usize,
    /// Version of the table.
    pub table_version: u64,
}

/// The live images of one generation.
pub struct CorpusTable {
    /// Which model filled it.
    pub model_info: ModelInfo,
    encoders: Arc<dyn Encoders>,
    /// Place of each row's picture in [`World::pictures`], ascending.
    image_positions: Vec<u32>,
    embeddings: Vec<Embedding>,
    stored_statistics: Vec<BTreeMap<StatisticsKey, ScoreStatistics>>,
}

/// Every image once, and the tables that hold it.
#[derive(Default)]
pub struct Corpus {
    /// All images, by id.
    pub images: Vec<CorpusImage>,
    /// One or two tables.
    pub tables: Vec<CorpusTable>,
}

/// A generation with the model that fills it, and its live images by id.
pub struct LoadedGeneration {
    model_info: ModelInfo,
    encoders: Arc<dyn Encoders>,
    images: BTreeMap<ImageId, StoredImage>,
}

impl LoadedGeneration {
    /// Reads the live images of `generation`. `progress` hears of files read and files in all.
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
            version = changes.version;
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
        let live = newest.into_values().filter_map(|row| Some((row.image_id, row.image?)));
        Ok(Self::new(role, &generation.id, version, encoders, live.collect()))
    }

    /// From images that are there already.
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
    /// Joins tables. What is shown of an image comes from the first that has it.
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
                let Some(place) = corpus.image_position(&id) else { continue };
                table.image_positions.push(place);
                table.embeddings.push(image.embedding);
                table.stored_statistics.push(image.statistics);
            }
            corpus.tables.push(table);
        }
        corpus
    }

    /// Place of an image in [`World::pictures`].
    pub fn image_position(&self, id: &ImageId) -> Option<u32> {
        self.images.binary_search_by(|p| p.image_id.cmp(id)).ok().map(|i| i as u32)
    }
}

impl CorpusTable {
    /// The model.
    pub fn encoders(&self) -> &Arc<dyn Encoders> {
        &self.encoders
    }

    /// Place of each row's picture in [`World::pictures`], ascending.
    pub fn image_positions(&self) -> &[u32] {
        &self.image_positions
    }

    /// The embeddings, a row an image.
    pub fn embeddings(&self) -> &[Embedding] {
        &self.embeddings
    }

    /// Statistics of a prompt set, a row an image: those that are stored; what is missing is computed
    /// from the stored embedding, as the query worker does.
    pub fn statistics(&self, set: &EmbeddedPromptSet) -> Vec<ScoreStatistics> {
        let rows = self.embeddings.par_iter().zip(&self.stored_statistics);
        rows.filter_map(|(embedding, stored)| {
            stored.get(&set.statistics_key).copied().or_else(|| set.statistics(embedding))
        })
        .collect()
    }
}
