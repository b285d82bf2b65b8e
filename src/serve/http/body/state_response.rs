//! The response of `/v1/state`: what this query worker serves.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use crate::balance::bank::MeasuredBank;
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::ServingConfig;
use crate::clip::ModelCard;
use crate::diagnosis::redact::redact_addresses;
use crate::record::AttributeType;
use crate::search::memory_required_bytes;
use crate::search::{
    AttributeFacet, Engine, EngineRoles, ServingSnapshot, Snapshot, TrafficCounts,
};
use crate::serve::http::state::{ServerContext, Substitute};
use crate::serve::http::worker_metrics::WorkersSummary;

/// What a query worker serves.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StateResponse<'a> {
    /// Whether the whole table is in memory; queries are answered only then.
    ready: bool,
    /// Version of bsap.
    version: &'static str,
    model: &'a ModelCard,
    generation: &'a str,
    /// The generation of another model that is in memory too; null if there is none.
    standby: Option<StandbyInfo>,
    table_version: u64,
    /// Number of images in the catalogue.
    images: usize,
    /// Number of statistics that this query worker computed because the table does not have them
    /// yet.
    locally_computed_statistics: usize,
    memory: MemoryUsage,
    /// The attributes that filters may use, besides `event_time` and `embedded_at`.
    attributes: Vec<AttributeInfo<'a>>,
    prompt_sets: Vec<PromptSetInfo<'a>>,
    normalisers: [&'static str; Normaliser::ALL.len()],
    serving: ServingConfigInfo<'a>,
    /// Revision of the catalogue's state that is served.
    revision: u64,
    /// Name of the live configuration.
    configuration: &'a str,
    candidate: Option<CandidateInfo<'a>>,
    /// How many queries each configuration has answered since this query worker started, and how
    /// the shadow answers of the candidate compare.
    traffic: TrafficCounts,
    example_queries: &'a [String],
    substitutes: &'a [Substitute],
    /// What the metrics of the workers say; null if `http.worker_metrics_urls` is empty.
    workers: Option<WorkersSummary>,
    /// When this query worker applied the newest version of the table.
    updated_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct PromptSetInfo<'a> {
    name: &'a str,
    version: u32,
    key: &'a StatisticsKey,
    prompts: usize,
    language: &'a str,
    /// How well it fits the last distinct queries that this query worker answered, measured without
    /// judgements; null until it is measured, and if it is one of many stored sets that are not served.
    bank: Option<MeasuredBank>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ServingConfigInfo<'a> {
    prompt_set: &'a StatisticsKey,
    normaliser: Normaliser,
    weight: f32,
    lambda: f32,
}

/// Memory that the catalogue takes in this query worker, and its limit.
#[derive(Debug, Serialize, JsonSchema)]
struct MemoryUsage {
    bytes: u64,
    /// The part of `bytes` that ids, addresses and attributes take.
    metadata_bytes: u64,
    /// `search.memory_mib` in bytes.
    limit_bytes: u64,
    /// What an image takes in addition to its id, address and attributes.
    bytes_per_image: u64,
    /// What older versions that cursors refer to take in addition to `bytes`.
    cursor_bytes: u64,
}

/// The standby generation: another model's, in memory in addition to the live one.
#[derive(Debug, Serialize, JsonSchema)]
struct StandbyInfo {
    generation: String,
    model: ModelCard,
    /// Whether its whole table is in memory.
    ready: bool,
    table_version: u64,
    images: usize,
    bytes: u64,
    /// How well its prompt sets fit the queries that it ranked recently; empty until that is measured.
    banks: Vec<MeasuredBank>,
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
            banks: engine.measured_banks().to_vec(),
        }
    }
}

/// A declared attribute, for filters.
#[derive(Debug, Serialize, JsonSchema)]
struct AttributeInfo<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: AttributeType,
    /// Number of images that have the attribute.
    images: usize,
    /// Its values, the most frequent first, without addresses that have a secret; null if it has more than 50,
    /// and if it is neither text nor boolean.
    values: Option<Vec<AttributeValueInfo<'a>>>,
}

/// A value of an attribute.
#[derive(Debug, Serialize, JsonSchema)]
struct AttributeValueInfo<'a> {
    value: &'a str,
    /// Number of images that have this value.
    images: usize,
}

impl<'a> AttributeInfo<'a> {
    fn new(attribute: &'a AttributeFacet) -> Self {
        let value =
            |(value, images): &'a (String, usize)| AttributeValueInfo { value, images: *images };
        let has_no_secret = |(value, _): &&(String, usize)| redact_addresses(value) == *value;
        Self {
            name: &attribute.name,
            kind: attribute.attribute_type,
            images: attribute.image_count,
            values: attribute
                .value_counts
                .as_ref()
                .map(|all| all.iter().filter(has_no_secret).map(value).collect()),
        }
    }
}

/// The configuration that may become live.
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
    pub fn new(
        context: &'a ServerContext,
        roles: &'a EngineRoles,
        snapshot: &'a Snapshot,
        workers: Option<WorkersSummary>,
    ) -> Self {
        let engine = &roles.live;
        let served = &snapshot.serving_snapshot;
        let ServingSnapshot { prompt_sets, serving, .. } = &**served;
        let memory = snapshot.memory_usage();
        let banks = engine.measured_banks();
        let prompt_set_info =
            |set: &'a std::sync::Arc<crate::prompts::EmbeddedPromptSet>| PromptSetInfo {
                name: &set.prompt_set.name,
                version: set.prompt_set.version,
                key: &set.statistics_key,
                prompts: set.prompt_set.texts.len(),
                language: &set.prompt_set.language,
                bank: banks.iter().find(|bank| bank.prompt_set == set.statistics_key).cloned(),
            };
        Self {
            ready: engine.snapshots().is_ready(),
            version: env!("CARGO_PKG_VERSION"),
            model: engine.encoders().card(),
            generation: &served.generation_id,
            standby: roles.standby.as_deref().map(StandbyInfo::new),
            table_version: snapshot.table_version,
            images: snapshot.len(),
            locally_computed_statistics: snapshot.computed_statistics_count,
            memory: MemoryUsage {
                bytes: memory.total_bytes(),
                metadata_bytes: memory.text_bytes as u64,
                limit_bytes: engine.snapshots().memory_limit_bytes(),
                bytes_per_image: memory_required_bytes(
                    1,
                    engine.encoders().card().dimension,
                    prompt_sets.len(),
                ),
                cursor_bytes: engine.pinned_snapshot_bytes(),
            },
            attributes: engine.facets(snapshot).iter().map(AttributeInfo::new).collect(),
            prompt_sets: prompt_sets.iter().map(prompt_set_info).collect(),
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
            example_queries: &context.options.example_queries,
            substitutes: &context.substitutes,
            workers,
            updated_at: snapshot.applied_at,
        }
    }
}
