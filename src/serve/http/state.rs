//! What is served, as `/v1/state` tells it.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::App;
use super::workers::WorkersAnswer;
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::Serving;
use crate::clip::ModelCard;
use crate::record::AttributeType;
use crate::search::memory_needed;
use crate::search::{Attribute, Engine, Roles, Served, Snapshot, TrafficCounts};

/// A part of a demo that stands in for a real one.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct StandIn {
    /// What it is.
    pub what: String,
    /// What to set to use the real one.
    pub real: String,
}

/// What is served.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StateAnswer<'a> {
    ready: bool,
    version: &'static str,
    model: &'a ModelCard,
    generation: &'a str,
    /// Another model's generation in memory.
    beside: Option<BesideAnswer>,
    table_version: u64,
    images: usize,
    computed_statistics: usize,
    memory: MemoryAnswer,
    /// What filters may name, besides `event_time` and `embedded_at`.
    attributes: Vec<AttributeAnswer<'a>>,
    prompt_sets: Vec<PromptSetAnswer<'a>>,
    normalisers: [&'static str; Normaliser::ALL.len()],
    serving: ServingAnswer<'a>,
    /// Revision of the catalogue's state that is served.
    revision: u64,
    /// Name of the live configuration.
    configuration: &'a str,
    candidate: Option<CandidateAnswer<'a>>,
    /// Answers of this query worker since it started, and what the shadow showed.
    traffic: TrafficCounts,
    examples: &'a [String],
    stand_ins: &'a [StandIn],
    /// What the workers tell, where `http.workers` names them.
    workers: Option<WorkersAnswer>,
    /// When the newest version of the table was taken in.
    updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct PromptSetAnswer<'a> {
    name: &'a str,
    version: u32,
    key: &'a StatisticsKey,
    prompts: usize,
    language: &'a str,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ServingAnswer<'a> {
    prompt_set: &'a StatisticsKey,
    normaliser: Normaliser,
    weight: f32,
    lambda: f32,
}

/// Bytes in memory, and how many there may be.
#[derive(Debug, Serialize, JsonSchema)]
struct MemoryAnswer {
    bytes: u64,
    /// Of these, ids, addresses and attributes.
    named_bytes: u64,
    limit_bytes: u64,
    /// What an image needs besides its id, address and attributes.
    row_bytes: u64,
    /// Older versions that cursors point to, besides.
    cursor_bytes: u64,
}

/// A generation in memory beside the live one.
#[derive(Debug, Serialize, JsonSchema)]
struct BesideAnswer {
    generation: String,
    model: ModelCard,
    /// Whether its whole table was read.
    ready: bool,
    table_version: u64,
    images: usize,
    bytes: u64,
}

impl BesideAnswer {
    fn new(engine: &Engine) -> Self {
        let snapshot = engine.snapshots().newest();
        Self {
            generation: snapshot.served.generation.clone(),
            model: engine.towers().card().clone(),
            ready: engine.snapshots().ready(),
            table_version: snapshot.version,
            images: snapshot.len(),
            bytes: snapshot.memory().bytes(),
        }
    }
}

/// A declared attribute.
#[derive(Debug, Serialize, JsonSchema)]
struct AttributeAnswer<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: AttributeType,
    /// Images that have it.
    images: usize,
    /// Its values, the most frequent first, where it has at most 50 and is a text or boolean.
    values: Option<Vec<ValueAnswer<'a>>>,
}

/// A value of an attribute.
#[derive(Debug, Serialize, JsonSchema)]
struct ValueAnswer<'a> {
    value: &'a str,
    /// Images that have it.
    images: usize,
}

impl<'a> AttributeAnswer<'a> {
    fn new(attribute: &'a Attribute) -> Self {
        let value = |(value, images): &'a (String, usize)| ValueAnswer { value, images: *images };
        Self {
            name: &attribute.name,
            kind: attribute.kind,
            images: attribute.images,
            values: attribute.values.as_ref().map(|all| all.iter().map(value).collect()),
        }
    }
}

/// What may become live.
#[derive(Debug, Serialize, JsonSchema)]
struct CandidateAnswer<'a> {
    name: &'a str,
    generation: &'a str,
    serving: ServingAnswer<'a>,
    share: f32,
    shadow: f32,
    since: DateTime<Utc>,
}

impl<'a> ServingAnswer<'a> {
    fn new(serving: &'a Serving) -> Self {
        Self {
            prompt_set: &serving.prompt_set,
            normaliser: serving.normaliser,
            weight: serving.weight,
            lambda: serving.lambda,
        }
    }
}

impl<'a> StateAnswer<'a> {
    /// The state at this moment.
    pub fn new(
        app: &'a App,
        roles: &'a Roles,
        snapshot: &'a Snapshot,
        workers: Option<WorkersAnswer>,
    ) -> Self {
        let engine = &roles.live;
        let served = &snapshot.served;
        let Served { sets, serving, .. } = &**served;
        let memory = snapshot.memory();
        let set = |set: &'a std::sync::Arc<crate::prompts::EmbeddedSet>| PromptSetAnswer {
            name: &set.set.name,
            version: set.set.version,
            key: &set.key,
            prompts: set.set.texts.len(),
            language: &set.set.language,
        };
        Self {
            ready: engine.snapshots().ready(),
            version: env!("CARGO_PKG_VERSION"),
            model: engine.towers().card(),
            generation: &served.generation,
            beside: roles.beside.as_deref().map(BesideAnswer::new),
            table_version: snapshot.version,
            images: snapshot.len(),
            computed_statistics: snapshot.computed,
            memory: MemoryAnswer {
                bytes: memory.bytes(),
                named_bytes: memory.named as u64,
                limit_bytes: engine.snapshots().limit(),
                row_bytes: memory_needed(1, engine.towers().card().dimension, sets.len()),
                cursor_bytes: engine.pinned_bytes(),
            },
            attributes: engine.attributes(snapshot).iter().map(AttributeAnswer::new).collect(),
            prompt_sets: sets.iter().map(set).collect(),
            normalisers: Normaliser::ALL.map(Normaliser::name),
            serving: ServingAnswer::new(serving),
            revision: served.revision,
            configuration: &served.name,
            candidate: roles.candidate.as_ref().or(served.candidate.as_ref()).map(|candidate| {
                CandidateAnswer {
                    name: &candidate.name,
                    generation: &candidate.generation,
                    serving: ServingAnswer::new(&candidate.serving),
                    share: candidate.share,
                    shadow: candidate.shadow,
                    since: candidate.since,
                }
            }),
            traffic: engine.traffic(),
            examples: &app.options.examples,
            stand_ins: &app.stand_ins,
            workers,
            updated_at: snapshot.at,
        }
    }
}
