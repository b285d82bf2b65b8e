//! The catalogue's state: which generation is live, which prompt sets are known, how queries are answered.
//!
//! Each revision is a small JSON object, `state/<revision>.json`, which is created and never changed. A
//! writer that creates revision n+1 has read revision n, and only one writer can create it. This works
//! on every store that can create an object conditionally, and it keeps the history.

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::balance::calibration::Calibration;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::{StatisticsKey, StatisticsSettings};
use crate::store::Store;
use crate::table::{Generation, TableError};

/// Format of the state and of everything else in a catalogue. Any other format is refused.
pub const STATE_FORMAT_VERSION: u32 = 3;

/// One revision of the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogueState {
    /// Version of this schema.
    pub format: u32,
    /// Number of the revision. Grows by one with each change, from 1.
    pub revision: u64,
    /// When this revision was written.
    pub created_at: DateTime<Utc>,
    /// Who wrote it, and by which command.
    pub actor: String,
    /// The generation from which queries are answered.
    pub live: Generation,
    /// Prompt sets whose statistics every new row of the live generation carries.
    pub prompt_sets: Vec<PromptSetRecord>,
    /// How queries are answered, unless a request says otherwise.
    pub serving: ServingConfig,
    /// Name of that configuration: the name of the candidate that was promoted.
    #[serde(default = "initial_config_name")]
    pub configuration_name: String,
    /// What this revision changed.
    #[serde(default)]
    pub change: StateChange,
    /// A generation that is filled in addition to the live one: that of another model, or the former live
    /// one, which is kept up to date so that a roll back loses nothing.
    #[serde(default)]
    pub standby: Option<StandbyGeneration>,
    /// A configuration that may become live. It can be evaluated, run in the shadow, and answer a share
    /// of the queries.
    #[serde(default)]
    pub candidate: Option<RolloutCandidate>,
}

/// A generation that is filled in addition to the live one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StandbyGeneration {
    /// The generation.
    pub generation: Generation,
    /// Checkpoint of its model, as configured for the workers that fill it.
    pub checkpoint: String,
    /// Prompt sets whose statistics its new rows carry.
    pub prompt_sets: Vec<PromptSetRecord>,
    /// When live events began to fill it.
    pub since: DateTime<Utc>,
}

/// A configuration that may become live.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutCandidate {
    /// Name, for display and for requests that select it.
    pub name: String,
    /// Id of the generation that it reads: the live or the standby one.
    pub generation: String,
    /// How it answers queries.
    pub serving: ServingConfig,
    /// Share of the queries that it answers, 0..=1. The traffic key of a query decides whether it is one.
    pub traffic_share: f32,
    /// Share of the queries that it answers in the shadow, 0..=1: its answer is compared with the one that
    /// is returned, and differences are logged.
    pub shadow_share: f32,
    /// Limits it to queries whose filter has this attribute value, `name=value`.
    #[serde(default)]
    pub traffic_filter: Option<String>,
    /// When it was set or last changed.
    pub since: DateTime<Utc>,
    /// Fingerprint of the evaluation report that supports it.
    #[serde(default)]
    pub evaluation_fingerprint: Option<String>,
}

/// What a revision changed, for `bsap history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StateChange {
    /// The catalogue was created, or the change is not known.
    #[default]
    Created,
    /// Prompt sets were added or retired.
    PromptSets {
        /// Keys of the sets that were added or retired.
        keys: Vec<String>,
        /// Id of the standby generation if the sets are its own; `None` for the live one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        generation: Option<String>,
    },
    /// A standby generation was set up or withdrawn.
    Standby {
        /// Its id.
        generation: String,
    },
    /// A candidate was set, changed or withdrawn.
    Candidate {
        /// Name of the candidate.
        name: String,
    },
    /// A candidate became live.
    Promoted {
        /// Name of the candidate.
        name: String,
        /// The revision before, to which a roll back returns.
        previous_revision: u64,
        /// Fingerprint of the evaluation report that supported it.
        #[serde(default)]
        evaluation_fingerprint: Option<String>,
    },
    /// An earlier revision became live again.
    RolledBack {
        /// The earlier revision.
        restored_revision: u64,
    },
    /// Thresholds were calibrated.
    Calibrated {
        /// Fingerprint of the evaluation report.
        evaluation_fingerprint: String,
    },
}

impl CatalogueState {
    /// Returns the prompt sets whose statistics new rows of the generation `id` carry. Returns `None` if
    /// the generation is neither live nor standby.
    pub fn prompt_sets_of_generation(&self, id: &str) -> Option<&[PromptSetRecord]> {
        if self.live.id == id {
            return Some(&self.prompt_sets);
        }
        let standby = self.standby.as_ref().filter(|standby| standby.generation.id == id);
        standby.map(|standby| standby.prompt_sets.as_slice())
    }

    /// Whether `generation` is the standby one.
    pub fn is_standby(&self, generation: &Generation) -> bool {
        let standby = self.standby.as_ref().map(|standby| &standby.generation);
        self.live.id != generation.id
            && standby.is_some_and(|standby| standby.ensure_compatible(generation).is_ok())
    }

    /// Returns the generation `id` if it is live or standby.
    pub fn find_generation(&self, id: &str) -> Option<&Generation> {
        self.generations().find(|generation| generation.id == id)
    }

    /// Returns the live generation, then the standby one if there is one.
    pub fn generations(&self) -> impl Iterator<Item = &Generation> {
        let standby = self.standby.as_ref().map(|standby| &standby.generation);
        std::iter::once(&self.live).chain(standby)
    }

    /// Returns the candidate and the standby generation if the candidate reads that generation.
    pub fn standby_candidate(&self) -> Option<(&RolloutCandidate, &StandbyGeneration)> {
        let (candidate, standby) = self.candidate.as_ref().zip(self.standby.as_ref())?;
        (candidate.generation == standby.generation.id).then_some((candidate, standby))
    }

    /// Makes the standby generation live, and the former live one standby, so that a roll back loses
    /// nothing. `checkpoint` is the checkpoint of the former live model. Returns false if there is no
    /// standby generation.
    pub fn swap_live_and_standby(&mut self, checkpoint: &str) -> bool {
        let Some(standby) = self.standby.take() else { return false };
        self.standby = Some(StandbyGeneration {
            generation: std::mem::replace(&mut self.live, standby.generation),
            checkpoint: checkpoint.to_owned(),
            prompt_sets: std::mem::replace(&mut self.prompt_sets, standby.prompt_sets),
            since: Utc::now(),
        });
        true
    }

    /// Returns the prompt set of the live generation with this key, name or name@version; for a name, its
    /// newest version.
    pub fn find_prompt_set(&self, name: &str) -> Option<&PromptSetRecord> {
        PromptSetRecord::find_by_selector(&self.prompt_sets, name)
    }
}

/// The temperature of records that were written before there was another one.
fn temperature_of_model() -> f32 {
    1.0
}

impl PromptSetRecord {
    /// Returns how its statistics are computed.
    pub fn statistics_settings(&self) -> StatisticsSettings {
        StatisticsSettings { top_k: self.top_k, temperature: self.temperature }
    }

    /// Returns the set with this key, name or name@version; for a name, its newest version.
    pub fn find_by_selector<'a>(sets: &'a [Self], name: &str) -> Option<&'a Self> {
        let matches = |set: &&Self| Self::matches_selector(name, &set.key, &set.name, set.version);
        sets.iter().filter(matches).max_by_key(|set| (set.version, set.since))
    }

    /// Whether `selector` is the key, the name or the name@version of a set.
    pub fn matches_selector(selector: &str, key: &StatisticsKey, name: &str, version: u32) -> bool {
        key.as_str() == selector || name == selector || format!("{name}@{version}") == selector
    }
}

/// A prompt set as it was when its statistics were computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptSetRecord {
    /// Key of its statistics in the table.
    #[schemars(with = "String")]
    pub key: StatisticsKey,
    /// Name of the set.
    pub name: String,
    /// Version of the set.
    pub version: u32,
    /// Language of the texts, as a BCP 47 tag.
    pub language: String,
    /// Number of the largest scores that `topk_mean` averages.
    pub top_k: usize,
    /// Factor of the model's logit scale at which the log-sum-exp is computed.
    #[serde(default = "temperature_of_model")]
    pub temperature: f32,
    /// The prompts, in order.
    pub texts: Vec<String>,
    /// When new rows began to carry its statistics.
    pub since: DateTime<Utc>,
}

/// How queries are answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServingConfig {
    /// Key of the prompt set whose statistics are used.
    #[schemars(with = "String")]
    pub prompt_set: StatisticsKey,
    /// Formula of the normalised score.
    pub normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score, 0..=1.
    pub weight: f32,
    /// λ of the normaliser `nnn`.
    pub lambda: f32,
    /// Scale constants of the balanced score; `None` until they are frozen.
    pub scale: Option<ScaleConstants>,
    /// Thresholds that were measured for exactly this configuration; `None` before that.
    #[serde(default)]
    pub calibration: Option<Calibration>,
}

impl ServingConfig {
    /// Creates the configuration of a new catalogue: λ = 1, nothing frozen and nothing calibrated.
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
    /// Opens the state of the catalogue in the folder `store`.
    pub fn new(store: &Store) -> Self {
        Self { store: store.subfolder("state") }
    }

    /// Reads the newest revision. Returns `None` if there is no catalogue yet.
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

    /// Reads the revision after `known_revision`. Returns `None` if there is none yet. Costs one request, so
    /// that it can be polled.
    pub async fn read_next(
        &self,
        known_revision: u64,
    ) -> Result<Option<CatalogueState>, TableError> {
        self.read_object(known_revision + 1).await
    }

    /// Reads `revision`. Returns `None` if there is no such revision.
    pub async fn read_revision(&self, revision: u64) -> Result<Option<CatalogueState>, TableError> {
        self.read_object(revision).await
    }

    /// Writes and returns the next revision, which `change` computes from the newest one. If `change`
    /// returns `None`, returns the newest one unchanged. Calls `change` again if another writer was first.
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
            Ok(object) => object.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        }
        .map_err(|e| self.store.wrap_error(e))?;
        let corrupt = |reason| TableError::Corrupt { file: file(), reason };
        let invalid_json = |error: serde_json::Error| corrupt(error.to_string());
        let state: Value = serde_json::from_slice(&bytes).map_err(invalid_json)?;
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
        serde_json::from_value(state).map(Some).map_err(invalid_json)
    }

    /// Writes `state` as the revision that it names. Returns false if another writer was first.
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
            // An earlier attempt whose answer was lost may have written this very state.
            Err(object_store::Error::AlreadyExists { .. }) => {
                Ok(self.read_object(state.revision).await?.as_ref() == Some(state))
            }
            Err(error) => Err(self.store.wrap_error(error).into()),
        }
    }

    /// Returns the newest revision, with `prompt_sets` added to it. Creates the first revision, with
    /// `initial_serving`, if there is none. Fails if the live generation is incompatible with `generation`.
    /// Any number of workers may call this at the same time.
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
                    let is_new = |set: &&PromptSetRecord| {
                        newest.prompt_sets.iter().all(|known| known.key != set.key)
                    };
                    let added: Vec<_> = prompt_sets.iter().filter(is_new).cloned().collect();
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

/// Returns the name of the configuration of a new catalogue.
fn initial_config_name() -> String {
    "initial".into()
}

fn revision_path(revision: u64) -> Path {
    Path::from(format!("{revision:020}.json"))
}
