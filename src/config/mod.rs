//! The configuration: one TOML file plus environment variables, with one section of options per
//! module.
//!
//! All problems are reported at once: unknown keys, wrong types, values out of range. Each problem
//! names the key, what is wrong and what would be accepted.

pub(crate) mod load;
mod reference;
mod secrets;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use load::{ConfigError, load_valid_config, load_valid_part};
pub use reference::{
    ConfigSection, ConfigSetting, config_json_schema, describe_sections, example_toml,
    render_config_reference, section_help_text,
};

use crate::ingest::{self, dead_letter, decode, fetch, metadata, source};
use crate::record::AttributeTypes;
use crate::serve::http;
use crate::telemetry::{self, admin};
use crate::{clip, kafka, prompts, search, table};

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How to reach Kafka.
    pub kafka: kafka::KafkaOptions,
    /// Where events come from and how they are decoded.
    pub source: source::SourceOptions,
    /// Where messages go that can never be used (dead letters).
    pub dead_letter: dead_letter::DeadLetterOptions,
    /// Declared attributes of images, name to type (`text`, `integer`, `number`, `boolean`,
    /// `time`): only these are stored. For example `colour = "text"`.
    pub attributes: AttributeTypes,
    /// How images are fetched.
    pub fetch: fetch::FetchOptions,
    /// Limits of image decoding, and which metadata of images become attributes.
    pub decode: decode::DecodeOptions,
    /// Which CLIP model is used, and where it runs.
    pub model: clip::ModelOptions,
    /// Which auxiliary prompt sets are used.
    pub prompts: prompts::PromptOptions,
    /// Where the catalogue is stored.
    pub table: table::TableOptions,
    /// How workers maintain the table.
    pub maintenance: table::MaintenanceOptions,
    /// How a worker batches and limits its work.
    pub ingest: ingest::IngestOptions,
    /// How queries are answered and the table is followed.
    pub search: search::SearchOptions,
    /// Where and how queries are served.
    pub http: http::HttpOptions,
    /// How logs are written.
    pub log: telemetry::LogOptions,
    /// Where traces and metrics are sent.
    pub otlp: telemetry::otlp::OtlpOptions,
    /// Where a worker and a query worker serve their metrics and probes.
    pub metrics: admin::MetricsOptions,
}

impl Config {
    /// Returns one line per invalid value, starting with its key.
    pub fn validate(&self) -> Vec<String> {
        let sections = [
            ("kafka", self.kafka.validate()),
            ("source", self.source.validate()),
            ("dead_letter", self.dead_letter.validate()),
            ("fetch", self.fetch.validate()),
            ("decode", self.decode.validate()),
            ("model", self.model.validate()),
            ("prompts", self.prompts.validate()),
            ("table", self.table.validate()),
            ("maintenance", self.maintenance.validate()),
            ("ingest", self.ingest.validate()),
            ("search", self.search.validate()),
            ("http", self.http.validate()),
            ("log", self.log.validate()),
            ("otlp", self.otlp.validate()),
        ];
        let named = |(name, problems): (&str, Vec<String>)| {
            let name = name.to_owned();
            problems.into_iter().map(move |problem| format!("{name}.{problem}"))
        };
        let metadata = metadata::check_declarations(&self.decode.metadata, &self.attributes);
        let sections = sections.into_iter().chain([("decode", metadata)]);
        sections.flat_map(named).chain(self.validate_distinct_topics()).collect()
    }

    /// Returns one line per topic with two uses. Dead letters in a topic of events, for example, would be
    /// consumed forever.
    fn validate_distinct_topics(&self) -> Vec<String> {
        let uses = [
            ("source.topic", &self.source.topic),
            ("source.reindex_topic", &self.source.reindex_topic),
            ("source.control_topic", &self.source.control_topic),
            ("dead_letter.topic", &self.dead_letter.topic),
        ];
        let mut problems = Vec::new();
        for (i, (key, topic)) in uses.into_iter().enumerate() {
            let same_topic =
                uses[..i].iter().find(|(_, other)| *other == topic && !topic.is_empty());
            if let Some((other, _)) = same_topic {
                problems.push(format!(
                    "{key}: {topic:?} is {other} too; each needs a topic of its own"
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests;
