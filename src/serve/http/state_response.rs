//! What is served, as `/v1/state` tells it.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::ServerContext;
use super::worker_metrics::WorkersSummary;
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::ServingConfig;
use crate::clip::ModelCard;
use crate::record::AttributeType;
use crate::search::memory_required_bytes;
use crate::search::{
    AttributeFacet, Engine, EngineRoles, ServingSnapshot, Snapshot, TrafficCounts,
};

/// A part of a demo that stands in for a real one.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Substitute {
    /// What it is.
    pub component: String,
    /// What to set to use the real one.
    pub how_to_replace: String,
}

/// What is served.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StateResponse<'a> {
    ready: bool,
    version: &'static str,
    model: &'a ModelCard,
    generation: &'a str,
    /// Another model's generation in memory.
    standby: Option<StandbyInfo>,
    table_version: u64,
    images: usize,
    locally_computed_statistics: usize,
    memory: MemoryUsage,
    /// What filters may name, besides `event_time` and `embedded_at`.
    attributes: Vec<AttributeInfo<'a>>,
    prompt_sets: Vec<PromptSetInfo<'a>>,
    normalisers: [&'static str; Normaliser::ALL.len()],
    serving: ServingConfigInfo<'a>,
    /// Revision of the catalogue's state that is served.
    revision: u64,
    /// Name of the live configuration.
    configuration: &'a str,
    candidate: Option<CandidateInfo<'a>>,
    /// Answers of this query worker since it started, and what the shadow showed.
    traffic: TrafficCounts,
    example_queries: &'a [String],
    substitutes: &'a [Substitute],
    /// What the workers tell, where `http.workers` names them.
    workers: Option<WorkersSummary>,
    /// When the newest version of the table was taken in.
    updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct PromptSetInfo<'a> {
    name: &'a str,
    version: u32,
    key: &'a StatisticsKey,
    prompts: usize,
    language: &'a str,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ServingConfigInfo<'a> {
    prompt_set: &'a StatisticsKey,
    normaliser: Normaliser,
    weight: f32,
    lambda: f32,
}

/// Bytes in memory, and how many there may be.
#[derive(Debug, Serialize, JsonSchema)]
struct MemoryUsage {
    bytes: u64,
    /// Of these, ids, addresses and attributes.
    metadata_bytes: u64,
    limit_bytes: u64,
    /// What an image needs besides its id, address and attributes.
    bytes_per_image: u64,
    /// Older versions that cursors point to, besides.
    cursor_bytes: u64,
}

/// A generation in memory beside the live one.
#[derive(Debug, Serialize, JsonSchema)]
struct StandbyInfo {
    generation: String,
    model: ModelCard,
    /// Whether its whole table was read.
    ready: bool,
    table_version: u64,
    images: usize,
    bytes: u64,
}

impl StandbyInfo {
    fn new(engine: &Engine) -> Self {
        let snapshot = engine.snapshots().newest();
        Self {
            generation: snapshot.serving_snapshot.generation_id.clone(),
            model: engine.encoders().card().clone(),
            ready: engine.snapshots().is_ready(),
            table_version: snapshot.table_version,
            images: snapshot.len(),
            bytes: snapshot.memory_usage().total_bytes(),
        }
    }
}

/// A declared attribute.
#[derive(Debug, Serialize, JsonSchema)]
struct AttributeInfo<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: AttributeType,
    /// Images that have it.
    images: usize,
    /// Its values, the most frequent first, where it has at most 50 and is a text or boolean.
    values: Option<Vec<AttributeValueInfo<'a>>>,
}

/// A value of an attribute.
#[derive(Debug, Serialize, JsonSchema)]
struct AttributeValueInfo<'a> {
    value: &'a str,
    /// Images that have it.
    images: usize,
}

impl<'a> AttributeInfo<'a> {
    fn new(attribute: &'a AttributeFacet) -> Self {
        let value =
            |(value, images): &'a (String, usize)| AttributeValueInfo { value, images: *images };
        Self {
            name: &attribute.name,
            kind: attribute.attribute_type,
            images: attribute.image_count,
            values: attribute.value_counts.as_ref().map(|all| all.iter().map(value).collect()),
        }
    }
}

/// What may become live.
#[derive(Debug, Serialize, JsonSchema)]
struct CandidateInfo<'a> {
    name: &'a str,
    generation: &'a str,
    serving: ServingConfigInfo<'a>,
    traffic_share: f32,
    shadow_share: f32,
    since: DateTime<Utc>,
}

impl<'a> ServingConfigInfo<'a> {
    fn new(serving: &'a ServingConfig) -> Self {
        Self {
            prompt_set: &serving.prompt_set,
            normaliser: serving.normaliser,
            weight: serving.weight,
            lambda: serving.lambda,
        }
    }
}

impl<'a> StateResponse<'a> {
    /// The state at this moment.
    pub fn new(
        app: &'a ServerContext,
        roles: &'a EngineRoles,
        snapshot: &'a Snapshot,
        workers: Option<WorkersSummary>,
    ) -> Self {
        let engine = &roles.live;
        let served = &snapshot.serving_snapshot;
        let ServingSnapshot { prompt_sets: sets, serving, .. } = &**served;
        let memory = snapshot.memory_usage();
        let set = |set: &'a std::sync::Arc<crate::prompts::EmbeddedPromptSet>| PromptSetInfo {
            name: &set.prompt_set.name,
            version: set.prompt_set.version,
            key: &set.statistics_key,
            prompts: set.prompt_set.texts.len(),
            language: &set.prompt_set.language,
        };
        Self {
            ready: engine.snapshots().is_ready(),
            version: env!("CARGO_PKG_VERSION"),
            model: engine.encoders().card(),
            generation: &served.generation_id,
            standby: roles.standby.as_deref().map(StandbyInfo::new),
            table_version: snapshot.table_version,
            images: snapshot.len(),
            locally_computed_statistics: snapshot.computed_statistics,
            memory: MemoryUsage {
                bytes: memory.total_bytes(),
                metadata_bytes: memory.text_bytes as u64,
                limit_bytes: engine.snapshots().memory_limit_bytes(),
                bytes_per_image: memory_required_bytes(
                    1,
                    engine.encoders().card().dimension,
                    sets.len(),
                ),
                cursor_bytes: engine.pinned_snapshot_bytes(),
            },
            attributes: engine.facets(snapshot).iter().map(AttributeInfo::new).collect(),
            prompt_sets: sets.iter().map(set).collect(),
            normalisers: Normaliser::ALL.map(Normaliser::name),
            serving: ServingConfigInfo::new(serving),
            revision: served.state_revision,
            configuration: &served.configuration_name,
            candidate: roles.candidate.as_ref().or(served.candidate.as_ref()).map(|candidate| {
                CandidateInfo {
                    name: &candidate.name,
                    generation: &candidate.generation,
                    serving: ServingConfigInfo::new(&candidate.serving),
                    traffic_share: candidate.traffic_share,
                    shadow_share: candidate.shadow_share,
                    since: candidate.since,
                }
            }),
            traffic: engine.traffic_counts(),
            example_queries: &app.options.example_queries,
            substitutes: &app.substitutes,
            workers,
            updated_at: snapshot.applied_at,
        }
    }
}
