//! The stored table in memory, as an evaluation needs it: every image once, with the embeddings of one
//! or more models.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::balance::statistics::{Statistics, StatisticsKey};
use crate::catalogue::Generation;
use crate::clip::{ClipError, Towers};
use crate::prompts::EmbeddedSet;
use crate::record::{Attributes, Embedding, Image, ImageId, Row, Version};
use crate::retry::{Decide, Verdict};
use crate::store::Store;
use crate::table::{Follower, TableError};

/// Most images of a table that is evaluated: all their embeddings are held in memory, 4 bytes a value
/// (2 GB for a million of dimension 512).
pub const MAX_IMAGES: usize = 5_000_000;

/// Why an evaluation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
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
    TooLarge,
    /// The work was interrupted.
    #[error("interrupted")]
    Cancelled,
}

impl Decide for EvaluateError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Table(error) => error.verdict(),
            Self::Model(_) | Self::TooLarge | Self::Cancelled => Verdict::Fatal,
        }
    }
}

/// What is shown of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Which image.
    pub image_id: ImageId,
    /// Where its bytes are; none where they came inline.
    pub uri: Option<String>,
    /// Declared attributes.
    pub attributes: Attributes,
}

/// Which model filled a table, for reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelNote {
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
    pub version: u64,
}

/// The live images of one generation.
pub struct Table {
    /// Which model filled it.
    pub note: ModelNote,
    towers: Arc<dyn Towers>,
    /// Place of each row's picture in [`World::pictures`], ascending.
    pictures: Vec<u32>,
    embeddings: Vec<Embedding>,
    stored: Vec<BTreeMap<StatisticsKey, Statistics>>,
}

/// Every image once, and the tables that hold it.
#[derive(Default)]
pub struct World {
    /// All images, by id.
    pub pictures: Vec<Picture>,
    /// One or two tables.
    pub tables: Vec<Table>,
}

/// A generation with the model that fills it, and its live images by id.
pub struct Rows {
    note: ModelNote,
    towers: Arc<dyn Towers>,
    images: BTreeMap<ImageId, Image>,
}

impl Rows {
    /// Reads the live images of `generation`. `progress` hears of files read and files in all.
    pub async fn read(
        store: &Store,
        role: &str,
        generation: &Generation,
        towers: Arc<dyn Towers>,
        token: &CancellationToken,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self, EvaluateError> {
        let mut follower = Follower::open(store, generation).await?;
        let mut newest: HashMap<ImageId, Row> = HashMap::new();
        let mut version = 0;
        while let Some(changes) = follower.next(progress).await? {
            if token.is_cancelled() {
                return Err(EvaluateError::Cancelled);
            }
            if changes.whole {
                newest.clear();
            }
            version = changes.version;
            for row in changes.rows {
                let newer = newest
                    .get(&row.image_id)
                    .is_none_or(|known| Version::of(&row) > Version::of(known));
                if newer {
                    newest.insert(row.image_id.clone(), row);
                }
            }
            if newest.len() > MAX_IMAGES {
                return Err(EvaluateError::TooLarge);
            }
        }
        let live = newest.into_values().filter_map(|row| Some((row.image_id, row.image?)));
        Ok(Self::of(role, &generation.id, version, towers, live.collect()))
    }

    /// From images that are there already.
    pub fn of(
        role: &str,
        generation: &str,
        version: u64,
        towers: Arc<dyn Towers>,
        images: BTreeMap<ImageId, Image>,
    ) -> Self {
        let card = towers.card();
        let note = ModelNote {
            role: role.to_owned(),
            generation: generation.to_owned(),
            model: card.name.clone(),
            fingerprint: card.fingerprint.clone(),
            logit_scale: card.logit_scale,
            images: images.len(),
            version,
        };
        Self { note, towers, images }
    }
}

impl World {
    /// Joins tables. What is shown of an image comes from the first that has it.
    pub fn of(tables: Vec<Rows>) -> Self {
        let mut all: BTreeMap<&ImageId, &Image> = BTreeMap::new();
        for (id, image) in tables.iter().flat_map(|rows| &rows.images) {
            all.entry(id).or_insert(image);
        }
        let pictures: Vec<Picture> = all
            .into_iter()
            .map(|(id, image)| Picture {
                image_id: id.clone(),
                uri: image.uri.clone(),
                attributes: image.attributes.clone(),
            })
            .collect();
        let mut world = Self { pictures, tables: Vec::new() };
        for rows in tables {
            let mut table = Table {
                note: rows.note,
                towers: rows.towers,
                pictures: Vec::with_capacity(rows.images.len()),
                embeddings: Vec::with_capacity(rows.images.len()),
                stored: Vec::with_capacity(rows.images.len()),
            };
            for (id, image) in rows.images {
                let Some(place) = world.place(&id) else { continue };
                table.pictures.push(place);
                table.embeddings.push(image.embedding);
                table.stored.push(image.statistics);
            }
            world.tables.push(table);
        }
        world
    }

    /// Place of an image in [`World::pictures`].
    pub fn place(&self, id: &ImageId) -> Option<u32> {
        self.pictures.binary_search_by(|p| p.image_id.cmp(id)).ok().map(|i| i as u32)
    }
}

impl Table {
    /// The model.
    pub fn towers(&self) -> &Arc<dyn Towers> {
        &self.towers
    }

    /// Place of each row's picture in [`World::pictures`], ascending.
    pub fn pictures(&self) -> &[u32] {
        &self.pictures
    }

    /// The embeddings, a row an image.
    pub fn embeddings(&self) -> &[Embedding] {
        &self.embeddings
    }

    /// Statistics of a prompt set, a row an image: those that are stored; what is missing is computed
    /// from the stored embedding, as the query worker does.
    pub fn statistics(&self, set: &EmbeddedSet) -> Vec<Statistics> {
        let rows = self.embeddings.par_iter().zip(&self.stored);
        rows.filter_map(|(embedding, stored)| {
            stored.get(&set.key).copied().or_else(|| set.statistics(embedding))
        })
        .collect()
    }
}
