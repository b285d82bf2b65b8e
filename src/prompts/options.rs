//! The configured prompt sets.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedded::EmbeddedPromptSet;
use super::prompt_set::{MAX_PROMPTS, PromptError, PromptSet};
use crate::balance::proposal::PROPOSED_STATISTICS;
use crate::balance::statistics::StatisticsSettings;
use crate::clip::Encoders;
use crate::validate;

/// Options of the prompt sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PromptOptions {
    /// Prompt sets whose statistics are computed for every image: names of built-in sets
    /// (`photographs`, `everyday-nouns`, `ecommerce-en`, `ecommerce-ja`, `demo`) or paths of TOML
    /// files. The first one is served by default.
    pub sets: Vec<String>,
    /// How many of an image's largest auxiliary scores `nnn` averages.
    pub top_k: usize,
    /// Temperature of `softmax`, as a factor of the model's logit scale, from 0.01 to 10: below 1, more
    /// prompts than the nearest ones count. Like `top_k` it is part of the key of the statistics.
    pub temperature: f32,
}

impl Default for PromptOptions {
    fn default() -> Self {
        let StatisticsSettings { top_k, temperature } = PROPOSED_STATISTICS;
        Self { sets: vec!["photographs".into()], top_k, temperature }
    }
}

impl PromptOptions {
    /// Returns how statistics are computed.
    pub fn statistics_settings(&self) -> StatisticsSettings {
        StatisticsSettings { top_k: self.top_k, temperature: self.temperature }
    }

    /// Returns one line per invalid option. Reads the files of the sets.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.sets.is_empty() || self.sets.len() > 8 {
            problems.push(format!("sets: {} sets; give 1 to 8", self.sets.len()));
        }
        validate::check_range(&mut problems, "top_k", self.top_k as u64, 1, MAX_PROMPTS as u64);
        if !StatisticsSettings::is_valid_temperature(self.temperature) {
            let (min, max) =
                (StatisticsSettings::MIN_TEMPERATURE, StatisticsSettings::MAX_TEMPERATURE);
            problems
                .push(format!("temperature: {} is not between {min} and {max}", self.temperature));
        }
        let errors = self.sets.iter().filter_map(|set| PromptSet::load_builtin_or_file(set).err());
        problems.extend(errors.map(|e| format!("sets: {e}")));
        problems
    }
}

/// Loads and embeds the configured sets, in their order.
pub fn load_configured_sets(
    options: &PromptOptions,
    encoders: &dyn Encoders,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, PromptError> {
    options
        .sets
        .iter()
        .map(|name| {
            let set = PromptSet::load_builtin_or_file(name)?;
            set.embed(encoders, options.statistics_settings()).map(Arc::new)
        })
        .collect()
}
