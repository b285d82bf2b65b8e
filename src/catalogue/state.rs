//! The catalogue's state: which generation is live, which prompt sets are known, how is served.
//!
//! One small JSON object a revision, `state/<revision>.json`, created and never changed. A writer
//! that creates revision n+1 has seen revision n, because only one writer can create it; this works
//! on every store that can create an object conditionally, and keeps the history by itself.

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::balance::calibration::Calibration;
use crate::balance::normalise::{Normaliser, Scale};
use crate::balance::statistics::StatisticsKey;
use crate::record::Ordering;
use crate::store::Store;
use crate::table::TableError;

/// Version of this schema; a state written by a newer program is refused.
pub const FORMAT: u32 = 2;

/// One revision of the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogueState {
    /// Version of this schema.
    pub format: u32,
    /// Counts up by one with each change.
    pub revision: u64,
    /// When this revision was written.
    pub at: DateTime<Utc>,
    /// What wrote it, and why.
    pub by: String,
    /// The generation that is served.
    pub live: Generation,
    /// Prompt sets whose statistics every new row carries.
    pub prompt_sets: Vec<PromptSetRecord>,
    /// How queries are answered unless a request says otherwise.
    pub serving: Serving,
    /// Name of that configuration: that of the candidate that became it.
    #[serde(default = "first_name")]
    pub name: String,
    /// What this revision did.
    #[serde(default)]
    pub change: Change,
    /// A generation that is filled beside the live one: by another model, or the former live one,
    /// kept up to date so that a roll back loses nothing.
    #[serde(default)]
    pub beside: Option<Beside>,
    /// What may become live: compared, shadowed, served to a share of the queries.
    #[serde(default)]
    pub candidate: Option<Candidate>,
}

/// A generation beside the live one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Beside {
    /// The generation.
    pub generation: Generation,
    /// The model's checkpoint, as a worker that fills it was given it.
    pub checkpoint: String,
    /// Prompt sets whose statistics its new rows carry.
    pub prompt_sets: Vec<PromptSetRecord>,
    /// Since when live events feed it.
    pub since: DateTime<Utc>,
}

/// A configuration that may become live.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Candidate {
    /// Name, for people and for requests that ask for it.
    pub name: String,
    /// Which generation it reads: the live one or the one beside it.
    pub generation: String,
    /// How it answers.
    pub serving: Serving,
    /// Share of the queries that it answers, 0..=1; who gets it is decided by the caller's key.
    pub share: f32,
    /// Share of the queries that it answers in the shadow, unseen, differences being logged, 0..=1.
    pub shadow: f32,
    /// Only queries whose filter holds this attribute's value are served from it, `name=value`.
    #[serde(default)]
    pub only: Option<String>,
    /// Since when.
    pub since: DateTime<Utc>,
    /// The evaluation that speaks for it: the fingerprint of its report.
    #[serde(default)]
    pub evaluation: Option<String>,
}

/// What a revision did, for `bsap history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Change {
    /// The catalogue was made, or nobody said.
    #[default]
    Created,
    /// New rows carry the statistics of more prompt sets.
    PromptSets {
        /// Keys of the sets that were added or retired.
        keys: Vec<String>,
        /// The generation beside the live one, where they are its sets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        generation: Option<String>,
    },
    /// A generation is filled beside the live one, or no longer.
    Beside {
        /// The generation.
        generation: String,
    },
    /// A candidate was set, changed or withdrawn.
    Candidate {
        /// Its name.
        name: String,
    },
    /// A candidate became live.
    Promoted {
        /// Its name.
        name: String,
        /// The revision that was live before, to which a roll back leads.
        from: u64,
        /// The evaluation that spoke for it: the fingerprint of its report.
        #[serde(default)]
        evaluation: Option<String>,
    },
    /// An earlier revision became live again.
    RolledBack {
        /// That revision.
        to: u64,
    },
    /// Thresholds were calibrated.
    Calibrated {
        /// The fingerprint of the report.
        evaluation: String,
    },
}

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
    pub ordering: Ordering,
}

impl CatalogueState {
    /// Prompt sets whose statistics new rows of the generation `id` carry; none where this state
    /// knows no such generation.
    pub fn sets_of(&self, id: &str) -> Option<&[PromptSetRecord]> {
        if self.live.id == id {
            return Some(&self.prompt_sets);
        }
        let beside = self.beside.as_ref().filter(|beside| beside.generation.id == id);
        beside.map(|beside| beside.prompt_sets.as_slice())
    }

    /// Whether `generation` is the one that is filled beside the live one.
    pub fn is_beside(&self, generation: &Generation) -> bool {
        let beside = self.beside.as_ref().map(|beside| &beside.generation);
        self.live.id != generation.id && beside.is_some_and(|b| b.expect(generation).is_ok())
    }

    /// The generation `id`, where it is the live one or the one beside it.
    pub fn generation(&self, id: &str) -> Option<&Generation> {
        self.generations().find(|generation| generation.id == id)
    }

    /// The live generation, then the one beside it.
    pub fn generations(&self) -> impl Iterator<Item = &Generation> {
        let beside = self.beside.as_ref().map(|beside| &beside.generation);
        std::iter::once(&self.live).chain(beside)
    }

    /// The candidate, where it reads the generation beside the live one.
    pub fn candidate_beside(&self) -> Option<(&Candidate, &Beside)> {
        let (candidate, beside) = self.candidate.as_ref().zip(self.beside.as_ref())?;
        (candidate.generation == beside.generation.id).then_some((candidate, beside))
    }

    /// Makes the generation beside the live one live, and has the former live one filled beside it, so
    /// that going back loses nothing. `checkpoint` is that of the former live one. False where none
    /// stands beside.
    pub fn swap_generations(&mut self, checkpoint: &str) -> bool {
        let Some(beside) = self.beside.take() else { return false };
        self.beside = Some(Beside {
            generation: std::mem::replace(&mut self.live, beside.generation),
            checkpoint: checkpoint.to_owned(),
            prompt_sets: std::mem::replace(&mut self.prompt_sets, beside.prompt_sets),
            since: Utc::now(),
        });
        true
    }

    /// The live generation's prompt set of that key, name or name@version; the newest version of a
    /// name.
    pub fn prompt_set(&self, name: &str) -> Option<&PromptSetRecord> {
        PromptSetRecord::find(&self.prompt_sets, name)
    }
}

impl PromptSetRecord {
    /// That of `sets` with this key, name or name@version; the newest version of a name.
    pub fn find<'a>(sets: &'a [Self], name: &str) -> Option<&'a Self> {
        let fits = |set: &&Self| Self::is_named(name, &set.key, &set.name, set.version);
        sets.iter().filter(fits).max_by_key(|set| (set.version, set.since))
    }

    /// Whether `wanted` stands for the set of that key, name and version.
    pub fn is_named(wanted: &str, key: &StatisticsKey, name: &str, version: u32) -> bool {
        key.as_str() == wanted || name == wanted || format!("{name}@{version}") == wanted
    }
}

impl Generation {
    /// A generation for a model.
    pub fn new(
        model_name: &str,
        model_fingerprint: &str,
        dimension: usize,
        logit_scale: f32,
        ordering: Ordering,
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
    pub fn expect(&self, other: &Self) -> Result<(), TableError> {
        let check = |what, stored: &str, configured: &str, remedy| {
            if stored == configured {
                return Ok(());
            }
            let (stored, configured) = (stored.to_owned(), configured.to_owned());
            Err(TableError::Mismatch { what, stored, configured, remedy })
        };
        check(
            "model fingerprint",
            &self.model_fingerprint,
            &other.model_fingerprint,
            "Set model.checkpoint to the model that filled this catalogue, set up a generation for the new one (bsap reindex model), or start a new catalogue (table.url)",
        )?;
        check(
            "ordering",
            self.ordering.name(),
            other.ordering.name(),
            "Set source.ordering to what the catalogue was made with, or start a new catalogue (table.url)",
        )
    }
}

/// A prompt set as it was when its statistics were computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptSetRecord {
    /// The key of its statistics in the table.
    #[schemars(with = "String")]
    pub key: StatisticsKey,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// Language of the texts, as BCP 47 writes it.
    pub language: String,
    /// How many of the largest scores `topk_mean` averages.
    pub top_k: usize,
    /// The prompts.
    pub texts: Vec<String>,
    /// Since when new rows carry its statistics.
    pub since: DateTime<Utc>,
}

/// How queries are answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Serving {
    /// Which statistics.
    #[schemars(with = "String")]
    pub prompt_set: StatisticsKey,
    /// Which formula.
    pub normaliser: Normaliser,
    /// Weight of the balanced score, 0..=1.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// Constants of the hybrid score; none until they have been frozen.
    pub scale: Option<Scale>,
    /// Thresholds measured for exactly this configuration; none until they were.
    #[serde(default)]
    pub calibration: Option<Calibration>,
}

impl Serving {
    /// λ = 1, nothing frozen and nothing calibrated: how a catalogue begins.
    pub fn new(prompt_set: StatisticsKey, normaliser: Normaliser, weight: f32) -> Self {
        Self { prompt_set, normaliser, weight, lambda: 1.0, scale: None, calibration: None }
    }
}

/// Reads and writes the state of one catalogue.
#[derive(Debug, Clone)]
pub struct StateStore {
    store: Store,
}

impl StateStore {
    /// The state of the catalogue at `store`.
    pub fn new(store: &Store) -> Self {
        Self { store: store.child("state") }
    }

    /// The newest revision; `None` where there is no catalogue yet.
    pub async fn newest(&self) -> Result<Option<CatalogueState>, TableError> {
        let listed: Vec<_> = self
            .store
            .objects()
            .list(None)
            .map_ok(|object| object.location)
            .try_collect()
            .await
            .map_err(|e| self.store.error(e))?;
        let newest = listed
            .iter()
            .filter_map(|path| path.filename()?.strip_suffix(".json")?.parse::<u64>().ok())
            .max();
        match newest {
            None => Ok(None),
            Some(revision) => self.read(revision).await,
        }
    }

    /// The revision after `known`, if there is one: one request, cheap enough to poll.
    pub async fn after(&self, known: u64) -> Result<Option<CatalogueState>, TableError> {
        self.read(known + 1).await
    }

    /// Revision `revision`; `None` where there is none.
    pub async fn at(&self, revision: u64) -> Result<Option<CatalogueState>, TableError> {
        self.read(revision).await
    }

    /// Writes the newest revision as `change` makes it of the one before, and gives it; `None` from
    /// `change` leaves it as it is. `change` is asked again where somebody else was faster.
    pub async fn change<E: From<TableError>>(
        &self,
        by: &str,
        change: impl Fn(CatalogueState) -> Result<Option<CatalogueState>, E>,
    ) -> Result<CatalogueState, E> {
        loop {
            let newest = self.newest().await?;
            let newest = newest
                .ok_or_else(|| TableError::Missing { place: self.store.url().to_string() })?;
            let revision = newest.revision + 1;
            let Some(mut next) = change(newest.clone())? else { return Ok(newest) };
            next.format = FORMAT;
            next.revision = revision;
            next.at = Utc::now();
            by.clone_into(&mut next.by);
            if self.write(&next).await? {
                return Ok(next);
            }
        }
    }

    async fn read(&self, revision: u64) -> Result<Option<CatalogueState>, TableError> {
        let file = || format!("{}/{}", self.store.url(), path(revision));
        let bytes = match self.store.objects().get(&path(revision)).await {
            Ok(found) => found.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        }
        .map_err(|e| self.store.error(e))?;
        let corrupt = |reason| TableError::Corrupt { file: file(), reason };
        let of = |error: serde_json::Error| corrupt(error.to_string());
        let state: Value = serde_json::from_slice(&bytes).map_err(of)?;
        // Before anything else: a later format may have other fields.
        if let Some(format) = state["format"].as_u64().filter(|format| *format > FORMAT.into()) {
            let reason = format!("has format {format}, this program knows {FORMAT}; update bsap");
            return Err(corrupt(reason));
        }
        serde_json::from_value(state).map(Some).map_err(of)
    }

    /// Writes `state` as the next revision; false where somebody else wrote that revision first.
    pub async fn write(&self, state: &CatalogueState) -> Result<bool, TableError> {
        let bytes = serde_json::to_vec_pretty(state).map_err(|error| TableError::Corrupt {
            file: path(state.revision).to_string(),
            reason: error.to_string(),
        })?;
        let create = PutOptions::from(PutMode::Create);
        let put = self.store.objects().put_opts(&path(state.revision), bytes.into(), create).await;
        match put {
            Ok(_) => Ok(true),
            // It may be this one, written by an attempt whose answer was lost.
            Err(object_store::Error::AlreadyExists { .. }) => {
                Ok(self.read(state.revision).await?.as_ref() == Some(state))
            }
            Err(error) => Err(self.store.error(error).into()),
        }
    }

    /// The newest revision after it was made sure that the live generation is `generation` and
    /// that `prompt_sets` are known. Makes the first revision, serving as `first` says, where there
    /// is none. Safe to be called by any number of workers at once.
    pub async fn ensure(
        &self,
        generation: &Generation,
        prompt_sets: &[PromptSetRecord],
        first: &Serving,
        by: &str,
    ) -> Result<CatalogueState, TableError> {
        loop {
            let next = match self.newest().await? {
                None => CatalogueState {
                    format: FORMAT,
                    revision: 1,
                    at: Utc::now(),
                    by: by.to_owned(),
                    live: generation.clone(),
                    prompt_sets: prompt_sets.to_vec(),
                    serving: first.clone(),
                    name: first_name(),
                    change: Change::Created,
                    beside: None,
                    candidate: None,
                },
                Some(newest) => {
                    newest.live.expect(generation)?;
                    let known = |set: &&PromptSetRecord| {
                        newest.prompt_sets.iter().all(|k| k.key != set.key)
                    };
                    let added: Vec<_> = prompt_sets.iter().filter(known).cloned().collect();
                    if added.is_empty() {
                        return Ok(newest);
                    }
                    let mut next = newest;
                    next.revision += 1;
                    next.at = Utc::now();
                    by.clone_into(&mut next.by);
                    let keys = added.iter().map(|set| set.key.to_string()).collect();
                    next.change = Change::PromptSets { keys, generation: None };
                    next.prompt_sets.extend(added);
                    next
                }
            };
            if self.write(&next).await? {
                return Ok(next);
            }
        }
    }
}

/// Name of what a catalogue serves from its beginning.
fn first_name() -> String {
    "initial".into()
}

fn path(revision: u64) -> Path {
    Path::from(format!("{revision:020}.json"))
}
