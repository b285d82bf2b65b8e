//! One TOML file plus environment variables, to each module's own options.
//!
//! Everything that is wrong is found at once: unknown keys, wrong types, values out of range. Each
//! problem names the key, what is wrong and what would be right.

pub(crate) mod load;
mod reference;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use load::{ConfigError, load, load_with_problems};
pub use reference::{Section, Setting, example, help, markdown, schema, sections};

use crate::ingest::{self, dead_letter, decode, fetch, source};
use crate::record::AttributeTypes;
use crate::serve::http;
use crate::telemetry::{self, watch};
use crate::{clip, kafka, prompts, search, table};

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How to reach Kafka.
    pub kafka: kafka::Options,
    /// Where events come from and how they are read.
    pub source: source::Options,
    /// Where messages go that can never be used.
    pub dead_letter: dead_letter::Options,
    /// Declared attributes of images, name to type (`text`, `integer`, `number`, `boolean`,
    /// `time`): only these are stored. For example `colour = "text"`.
    pub attributes: AttributeTypes,
    /// How images are fetched.
    pub fetch: fetch::Options,
    /// Limits of image decoding.
    pub decode: decode::Options,
    /// Which CLIP model, and where it runs.
    pub model: clip::Options,
    /// Which auxiliary prompt sets are used.
    pub prompts: prompts::Options,
    /// Where the catalogue is stored.
    pub table: table::Options,
    /// How workers tidy the table.
    pub upkeep: table::maintenance::upkeep::Options,
    /// How a worker batches and bounds its work.
    pub ingest: ingest::Options,
    /// How queries are answered and the table is followed.
    pub search: search::Options,
    /// Where and how queries are served.
    pub http: http::Options,
    /// How logs are written.
    pub log: telemetry::Options,
    /// Where traces and metrics are sent.
    pub otlp: telemetry::otlp::Options,
    /// Where a worker and a query worker tell how they are doing.
    pub metrics: watch::Options,
}

impl Config {
    /// What is wrong with the values, each line beginning with its key.
    pub fn problems(&self) -> Vec<String> {
        let sections = [
            ("kafka", self.kafka.problems()),
            ("source", self.source.problems()),
            ("dead_letter", self.dead_letter.problems()),
            ("fetch", self.fetch.problems()),
            ("decode", self.decode.problems()),
            ("model", self.model.problems()),
            ("prompts", self.prompts.problems()),
            ("table", self.table.problems()),
            ("upkeep", self.upkeep.problems()),
            ("ingest", self.ingest.problems()),
            ("search", self.search.problems()),
            ("http", self.http.problems()),
            ("log", self.log.problems()),
            ("otlp", self.otlp.problems()),
        ];
        let named = |(name, problems): (&str, Vec<String>)| {
            let name = name.to_owned();
            problems.into_iter().map(move |problem| format!("{name}.{problem}"))
        };
        sections.into_iter().flat_map(named).chain(self.shared_topics()).collect()
    }

    /// Topics that have two uses: dead letters that are events too would be consumed for ever.
    fn shared_topics(&self) -> Vec<String> {
        let uses = [
            ("source.topic", &self.source.topic),
            ("source.reindex_topic", &self.source.reindex_topic),
            ("source.control_topic", &self.source.control_topic),
            ("dead_letter.topic", &self.dead_letter.topic),
        ];
        let mut problems = Vec::new();
        for (i, (key, topic)) in uses.into_iter().enumerate() {
            let taken = uses[..i].iter().find(|(_, other)| *other == topic && !topic.is_empty());
            if let Some((other, _)) = taken {
                problems.push(format!(
                    "{key}: {topic:?} is {other} too; each needs a topic of its own"
                ));
            }
        }
        problems
    }

    /// The configuration as TOML, with secrets hidden.
    pub fn shown(&self) -> String {
        let mut shown = self.clone();
        hide(&mut shown.kafka.properties);
        hide(&mut shown.table.store_options);
        hide(&mut shown.fetch.store_options);
        toml::to_string(&shown).unwrap_or_else(|error| format!("# cannot be shown: {error}\n"))
    }
}

/// Hides values whose key says that they are secret.
fn hide(options: &mut BTreeMap<String, String>) {
    const SECRET: [&str; 6] = ["password", "secret", "token", "key", "credential", "sas"];
    for (key, value) in options {
        let key = key.to_ascii_lowercase();
        if SECRET.iter().any(|word| key.contains(word)) && !value.is_empty() {
            *value = "(hidden)".into();
        }
    }
}

#[cfg(test)]
mod tests;
