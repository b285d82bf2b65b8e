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
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::StatisticsKey;
use crate::store::Store;
use crate::table::{Generation, TableError};

/// Format of the state and of everything else in a catalogue. Any other format is refused.
pub const STATE_FORMAT_VERSION: u32 = 3;

/// One revision of the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogueState {
    /// Version of this schema.
    pub format: u32,
    /// Counts up by one with each change.
    pub revision: u64,
    /// When this revision was written.
    pub created_at: DateTime<Utc>,
    /// What wrote it, and why.
    pub actor: String,
    /// The generation that is served.
    pub live: Generation,
    /// Prompt sets whose statistics every new row carries.
    pub prompt_sets: Vec<PromptSetRecord>,
    /// How queries are answered unless a request says otherwise.
    pub serving: ServingConfig,
    /// Name of that configuration: that of the candidate that became it.
    #[serde(default = "initial_config_name")]
    pub configuration_name: String,
    /// What this revision did.
    #[serde(default)]
    pub change: StateChange,
    /// A generation that is filled beside the live one: by another model, or the former live one,
    /// kept up to date so that a roll back loses nothing.
    #[serde(default)]
    pub standby: Option<StandbyGeneration>,
    /// What may become live: compared, shadowed, served to a share of the queries.
    #[serde(default)]
    pub candidate: Option<RolloutCandidate>,
}

/// A generation beside the live one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StandbyGeneration {
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
pub struct RolloutCandidate {
    /// Name, for people and for requests that ask for it.
    pub name: String,
    /// Which generation it reads: the live one or the one beside it.
    pub generation: String,
    /// How it answers.
    pub serving: ServingConfig,
    /// Share of the queries that it answers, 0..=1; who gets it is decided by the caller's key.
    pub traffic_share: f32,
    /// Share of the queries that it answers in the shadow, unseen, differences being logged, 0..=1.
    pub shadow_share: f32,
    /// Only queries whose filter holds this attribute's value are served from it, `name=value`.
    #[serde(default)]
    pub traffic_filter: Option<String>,
    /// Since when.
    pub since: DateTime<Utc>,
    /// The evaluation that speaks for it: the fingerprint of its report.
    #[serde(default)]
    pub evaluation_fingerprint: Option<String>,
}

/// What a revision did, for `bsap history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StateChange {
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
    Standby {
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
        previous_revision: u64,
        /// The evaluation that spoke for it: the fingerprint of its report.
        #[serde(default)]
        evaluation_fingerprint: Option<String>,
    },
    /// An earlier revision became live again.
    RolledBack {
        /// That revision.
        restored_revision: u64,
    },
    /// Thresholds were calibrated.
    Calibrated {
        /// The fingerprint of the report.
        evaluation_fingerprint: String,
    },
}

impl CatalogueState {
    /// Prompt sets whose statistics new rows of the generation `id` carry; none where this state
    /// knows no such generation.
    pub fn prompt_sets_of_generation(&self, id: &str) -> Option<&[PromptSetRecord]> {
        if self.live.id == id {
            return Some(&self.prompt_sets);
        }
        let beside = self.standby.as_ref().filter(|beside| beside.generation.id == id);
        beside.map(|beside| beside.prompt_sets.as_slice())
    }

    /// Whether `generation` is the one that is filled beside the live one.
    pub fn is_standby(&self, generation: &Generation) -> bool {
        let beside = self.standby.as_ref().map(|beside| &beside.generation);
        self.live.id != generation.id
            && beside.is_some_and(|b| b.ensure_compatible(generation).is_ok())
    }

    /// The generation `id`, where it is the live one or the one beside it.
    pub fn find_generation(&self, id: &str) -> Option<&Generation> {
        self.generations().find(|generation| generation.id == id)
    }

    /// The live generation, then the one beside it.
    pub fn generations(&self) -> impl Iterator<Item = &Generation> {
        let beside = self.standby.as_ref().map(|beside| &beside.generation);
        std::iter::once(&self.live).chain(beside)
    }

    /// The candidate, where it reads the generation beside the live one.
    pub fn standby_candidate(&self) -> Option<(&RolloutCandidate, &StandbyGeneration)> {
        let (candidate, beside) = self.candidate.as_ref().zip(self.standby.as_ref())?;
        (candidate.generation == beside.generation.id).then_some((candidate, beside))
    }

    /// Makes the generation beside the live one live, and has the former live one filled beside it, so
    /// that going back loses nothing. `checkpoint` is that of the former live one. False where none
    /// stands beside.
    pub fn swap_live_and_standby(&mut self, checkpoint: &str) -> bool {
        let Some(beside) = self.standby.take() else { return false };
        self.standby = Some(StandbyGeneration {
            generation: std::mem::replace(&mut self.live, beside.generation),
            checkpoint: checkpoint.to_owned(),
            prompt_sets: std::mem::replace(&mut self.prompt_sets, beside.prompt_sets),
            since: Utc::now(),
        });
        true
    }

    /// The live generation's prompt set of that key, name or name@version; the newest version of a
    /// name.
    pub fn find_prompt_set(&self, name: &str) -> Option<&PromptSetRecord> {
        PromptSetRecord::find(&self.prompt_sets, name)
    }
}

impl PromptSetRecord {
    /// That of `sets` with this key, name or name@version; the newest version of a name.
    pub fn find<'a>(sets: &'a [Self], name: &str) -> Option<&'a Self> {
        let fits = |set: &&Self| Self::matches_name(name, &set.key, &set.name, set.version);
        sets.iter().filter(fits).max_by_key(|set| (set.version, set.since))
    }

    /// Whether `wanted` stands for the set of that key, name and version.
    pub fn matches_name(wanted: &str, key: &StatisticsKey, name: &str, version: u32) -> bool {
        key.as_str() == wanted || name == wanted || format!("{name}@{version}") == wanted
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
pub struct ServingConfig {
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
    pub scale: Option<ScaleConstants>,
    /// Thresholds measured for exactly this configuration; none until they were.
    #[serde(default)]
    pub calibration: Option<Calibration>,
}

impl ServingConfig {
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
        Self { store: store.subfolder("state") }
    }

    /// The newest revision; `None` where there is no catalogue yet.
    pub async fn read_newest(&self) -> Result<Option<CatalogueState>, TableError> {
        let listed: Vec<_> = self
            .store
            .object_store()
            .list(None)
            .map_ok(|object| object.location)
            .try_collect()
            .await
            .map_err(|e| self.store.wrap_error(e))?;
        let newest = listed
            .iter()
            .filter_map(|path| path.filename()?.strip_suffix(".json")?.parse::<u64>().ok())
            .max();
        match newest {
            None => Ok(None),
            Some(revision) => self.read_object(revision).await,
        }
    }

    /// The revision after `known`, if there is one: one request, cheap enough to poll.
    pub async fn read_next(
        &self,
        known_revision: u64,
    ) -> Result<Option<CatalogueState>, TableError> {
        self.read_object(known_revision + 1).await
    }

    /// Revision `revision`; `None` where there is none.
    pub async fn read_revision(&self, revision: u64) -> Result<Option<CatalogueState>, TableError> {
        self.read_object(revision).await
    }

    /// Writes the newest revision as `change` makes it of the one before, and gives it; `None` from
    /// `change` leaves it as it is. `change` is asked again where somebody else was faster.
    pub async fn update<E: From<TableError>>(
        &self,
        author: &str,
        change: impl Fn(CatalogueState) -> Result<Option<CatalogueState>, E>,
    ) -> Result<CatalogueState, E> {
        loop {
            let newest = self.read_newest().await?;
            let newest = newest
                .ok_or_else(|| TableError::NotFound { location: self.store.url().to_string() })?;
            let revision = newest.revision + 1;
            let Some(mut next) = change(newest.clone())? else { return Ok(newest) };
            next.format = STATE_FORMAT_VERSION;
            next.revision = revision;
            next.created_at = Utc::now();
            author.clone_into(&mut next.actor);
            if self.try_write(&next).await? {
                return Ok(next);
            }
        }
    }

    async fn read_object(&self, revision: u64) -> Result<Option<CatalogueState>, TableError> {
        let file = || format!("{}/{}", self.store.url(), revision_path(revision));
        let bytes = match self.store.object_store().get(&revision_path(revision)).await {
            Ok(found) => found.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        }
        .map_err(|e| self.store.wrap_error(e))?;
        let corrupt = |reason| TableError::Corrupt { file: file(), reason };
        let of = |error: serde_json::Error| corrupt(error.to_string());
        let state: Value = serde_json::from_slice(&bytes).map_err(of)?;
        // Before anything else: another format has other fields.
        if let Some(stored) = state["format"].as_u64()
            && stored != u64::from(STATE_FORMAT_VERSION)
        {
            let remedy = if stored < u64::from(STATE_FORMAT_VERSION) {
                "it was written before bsap 0.1.0: set table.url to an empty place and publish the images again (`bsap publish`), or go on with the program that wrote it"
            } else {
                "update bsap"
            };
            return Err(TableError::UnsupportedFormat {
                file: file(),
                stored,
                supported: STATE_FORMAT_VERSION,
                remedy,
            });
        }
        serde_json::from_value(state).map(Some).map_err(of)
    }

    /// Writes `state` as the next revision; false where somebody else wrote that revision first.
    pub async fn try_write(&self, state: &CatalogueState) -> Result<bool, TableError> {
        let bytes = serde_json::to_vec_pretty(state).map_err(|error| TableError::Corrupt {
            file: revision_path(state.revision).to_string(),
            reason: error.to_string(),
        })?;
        let create = PutOptions::from(PutMode::Create);
        let put = self
            .store
            .object_store()
            .put_opts(&revision_path(state.revision), bytes.into(), create)
            .await;
        match put {
            Ok(_) => Ok(true),
            // It may be this one, written by an attempt whose answer was lost.
            Err(object_store::Error::AlreadyExists { .. }) => {
                Ok(self.read_object(state.revision).await?.as_ref() == Some(state))
            }
            Err(error) => Err(self.store.wrap_error(error).into()),
        }
    }

    /// The newest revision after it was made sure that the live generation is `generation` and
    /// that `prompt_sets` are known. Makes the first revision, serving as `first` says, where there
    /// is none. Safe to be called by any number of workers at once.
    pub async fn initialise_or_extend(
        &self,
        generation: &Generation,
        prompt_sets: &[PromptSetRecord],
        initial_serving: &ServingConfig,
        author: &str,
    ) -> Result<CatalogueState, TableError> {
        loop {
            let next = match self.read_newest().await? {
                None => CatalogueState {
                    format: STATE_FORMAT_VERSION,
                    revision: 1,
                    created_at: Utc::now(),
                    actor: author.to_owned(),
                    live: generation.clone(),
                    prompt_sets: prompt_sets.to_vec(),
                    serving: initial_serving.clone(),
                    configuration_name: initial_config_name(),
                    change: StateChange::Created,
                    standby: None,
                    candidate: None,
                },
                Some(newest) => {
                    newest.live.ensure_compatible(generation)?;
                    let known = |set: &&PromptSetRecord| {
                        newest.prompt_sets.iter().all(|k| k.key != set.key)
                    };
                    let added: Vec<_> = prompt_sets.iter().filter(known).cloned().collect();
                    if added.is_empty() {
                        return Ok(newest);
                    }
                    let mut next = newest;
                    next.revision += 1;
                    next.created_at = Utc::now();
                    author.clone_into(&mut next.actor);
                    let keys = added.iter().map(|set| set.key.to_string()).collect();
                    next.change = StateChange::PromptSets { keys, generation: None };
                    next.prompt_sets.extend(added);
                    next
                }
            };
            if self.try_write(&next).await? {
                return Ok(next);
            }
        }
    }
}

/// Name of what a catalogue serves from its beginning.
fn initial_config_name() -> String {
    "initial".into()
}

fn revision_path(revision: u64) -> Path {
    Path::from(format!("{revision:020}.json"))
}
