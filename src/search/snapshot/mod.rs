//! The table in memory: the newest version of each image, and how it is served.
//!
//! A snapshot is immutable: chunks of rows, a bitmap of the live ones for each, and the configuration
//! by which queries are answered. [`super::snapshots`] makes the next one.

pub(crate) mod attributes;
pub(crate) mod chunk;
pub(crate) mod codes;
pub(crate) mod memory;
pub(crate) mod snapshots;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use chrono::{DateTime, Utc};

use super::engine::traffic::Route;
use crate::balance::normalise::{Normaliser, Scale};
use crate::balance::statistics::{Statistics, StatisticsKey};
use crate::catalogue::{Candidate, CatalogueState, Serving};
use crate::prompts::EmbeddedSet;
use crate::record::Embedding;
use attributes::Attribute;
use chunk::{Chunk, Entry};
use memory::Memory;

/// Constants of the catalogue that are not frozen are computed again when one row in so many has
/// changed.
const STALE_SCALE: u64 = 100;

/// By what queries are answered.
#[derive(Debug, Clone)]
pub struct Served {
    /// Revision of the catalogue's state that says so.
    pub revision: u64,
    /// Generation that the images are of.
    pub generation: String,
    /// Name of the configuration.
    pub name: String,
    /// What it is to the catalogue: the candidate where another generation is live.
    pub stands_as: Route,
    /// Prompt sets that a query may name; rows that lack their statistics get them here.
    pub sets: Vec<Arc<EmbeddedSet>>,
    /// How queries are answered unless they say otherwise.
    pub serving: Serving,
    /// What may become live, answers those who ask for it, and its share; its set is among `sets`.
    pub candidate: Option<Candidate>,
}

impl Served {
    /// As a revision of the state says; `sets` are its prompt sets, embedded.
    pub fn of(state: &CatalogueState, sets: Vec<Arc<EmbeddedSet>>) -> Self {
        Self {
            revision: state.revision,
            generation: state.live.id.clone(),
            name: state.name.clone(),
            stands_as: Route::Live,
            sets,
            serving: state.serving.clone(),
            // One that reads another generation is not in this snapshot.
            candidate: state.candidate.clone().filter(|c| c.generation == state.live.id),
        }
    }

    /// As a revision of the state says for the generation beside the live one: as its candidate;
    /// where it has none, as `before`.
    pub fn beside(
        state: &CatalogueState,
        generation: &str,
        sets: Vec<Arc<EmbeddedSet>>,
        before: Option<&Self>,
    ) -> Self {
        let candidate = state.candidate.as_ref().filter(|c| c.generation == generation);
        let known = before.map_or((&state.name, &state.serving), |b| (&b.name, &b.serving));
        let (name, serving) = candidate.map_or(known, |c| (&c.name, &c.serving));
        Self {
            revision: state.revision,
            generation: generation.to_owned(),
            name: name.clone(),
            stands_as: Route::Candidate,
            sets,
            serving: serving.clone(),
            candidate: None,
        }
    }

    /// Name of the configuration that answers a query.
    pub(crate) fn name_of(&self, route: Route) -> &str {
        match (&self.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.name,
            _ => &self.name,
        }
    }
}

/// The live images at one version of the table, and how they are served.
#[derive(Debug)]
pub struct Snapshot {
    /// Version of the table.
    pub version: u64,
    /// Tells snapshots apart: two of one version may be served differently.
    pub serial: u64,
    /// When that version was taken in.
    pub at: Option<DateTime<Utc>>,
    /// By what queries are answered.
    pub served: Arc<Served>,
    /// Statistics that were computed here, because the row came without them: one an image and set.
    pub computed: usize,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) count: usize,
    /// Rows that were taken in since the start.
    pub(crate) changed: u64,
    /// Bytes of what is remembered of deleted images.
    pub(crate) remembered: usize,
    pub(crate) scales: Scales,
    /// What there is to filter by, once asked for.
    pub(crate) attributes: OnceLock<Vec<Attribute>>,
}

pub(crate) type Scales = Arc<Mutex<HashMap<(StatisticsKey, Normaliser), (u64, Scale)>>>;

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub chunk: usize,
    pub row: usize,
}

impl Snapshot {
    pub(crate) fn empty(served: Arc<Served>) -> Self {
        Self {
            version: 0,
            serial: 0,
            at: None,
            served,
            computed: 0,
            chunks: Vec::new(),
            count: 0,
            changed: 0,
            remembered: 0,
            scales: Scales::default(),
            attributes: OnceLock::new(),
        }
    }

    /// What the next one begins with.
    pub(crate) fn copy(&self) -> Self {
        Self {
            served: self.served.clone(),
            chunks: self.chunks.clone(),
            scales: self.scales.clone(),
            attributes: OnceLock::new(),
            ..*self
        }
    }

    /// How many images are live.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether no image is live.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What is known of the image with this id, if it is live.
    pub fn get(&self, id: &str) -> Option<Arc<Entry>> {
        let place = self.find(id)?;
        self.chunks[place.chunk].body.entry(place.row).map(Arc::new)
    }

    /// The stored embedding of the image with this id, if it is live.
    pub fn embedding(&self, id: &str) -> Option<Embedding> {
        let place = self.find(id)?;
        Some(self.chunks[place.chunk].body.embedding(place.row))
    }

    /// The statistics of a live image.
    pub fn statistics(&self, id: &str, key: &StatisticsKey) -> Option<Statistics> {
        let place = self.find(id)?;
        let column = self.chunks[place.chunk].statistics.get(key)?;
        Some(column[place.row]).filter(|s| s.n > 0)
    }

    /// All live images with their embeddings, in no particular order.
    pub fn images(&self) -> impl Iterator<Item = (Entry, Embedding)> + '_ {
        let of = |chunk: &'_ Chunk, row: usize| {
            Some((chunk.body.entry(row)?, chunk.body.embedding(row)))
        };
        self.chunks.iter().flat_map(move |c| c.rows().filter_map(move |row| of(c, row)))
    }

    pub(crate) fn find(&self, id: &str) -> Option<Place> {
        self.chunks.iter().enumerate().find_map(|(chunk, c)| {
            let row = c.body.find(id).filter(|row| c.is_live(*row))?;
            Some(Place { chunk, row })
        })
    }

    /// The constants c and m of a normaliser over the live images. They are kept while less than
    /// one row in [`STALE_SCALE`] has changed.
    pub fn scale(&self, key: &StatisticsKey, normaliser: Normaliser) -> Scale {
        if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
            return Scale::default();
        }
        let name = (key.clone(), normaliser);
        let scales = || self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        let known = scales().get(&name).copied();
        let fresh = |at: u64| self.changed.abs_diff(at) <= self.count as u64 / STALE_SCALE;
        if let Some((_, scale)) = known.filter(|(at, _)| fresh(*at)) {
            return scale;
        }
        let scale = Scale::of(normaliser, self.all_statistics(key));
        scales().insert(name, (self.changed, scale));
        scale
    }

    /// The statistics of the live images that have them.
    pub(crate) fn all_statistics<'a>(
        &'a self,
        key: &'a StatisticsKey,
    ) -> impl Iterator<Item = Statistics> + 'a {
        let columns = self.chunks.iter().filter_map(|c| Some((c, c.statistics.get(key)?)));
        columns.flat_map(|(c, all)| c.rows().map(|row| all[row])).filter(|s| s.n > 0)
    }

    /// Bytes in memory, and how they are spent.
    pub fn memory(&self) -> Memory {
        let (mut named, mut rest) = (self.remembered, 0);
        for chunk in &self.chunks {
            let (n, r) = chunk.bytes();
            named += n;
            rest += r;
        }
        Memory { images: self.count, named, rest }
    }

    /// The same with the statistics of so many sets.
    pub(crate) fn memory_with(&self, sets: usize) -> Memory {
        let memory = self.memory();
        let column = |chunk: &Chunk| chunk.body.len * size_of::<Statistics>();
        let now: usize = self.chunks.iter().map(|c| c.statistics.len() * column(c)).sum();
        let then = sets * self.chunks.iter().map(column).sum::<usize>();
        Memory { rest: memory.rest - now + then, ..memory }
    }
}
