//! Resolves typed configurations against a catalogue.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::corpus::Corpus;
use super::spec::{BaseConfiguration, ConfigurationSpec};
use crate::balance::bank::BankReport;
use crate::balance::calibration::{Calibration, Vocabulary};
use crate::balance::normalise::{AffineTransform, BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey, StatisticsSettings};
use crate::catalogue::{CatalogueState, PromptSetRecord, ServingConfig};
use crate::clip::Encoders;
use crate::prompts::{EmbeddedPromptSet, PromptError, PromptSet};

/// A way to rank, ready to use.
#[derive(Clone)]
pub struct RankingConfiguration {
    /// Name in reports.
    pub name: String,
    /// Index into [`Corpus::tables`].
    pub table_index: usize,
    /// The prompt set whose statistics balance the scores; `None` for plain CLIP.
    pub prompt_set: Option<Arc<EmbeddedPromptSet>>,
    /// Formula, weight and constants.
    pub balance: BalanceParameters,
    /// Results with a lower score are not shown.
    pub min_score: Option<f32>,
    /// Thresholds that are stored with it; only an unmodified base has them.
    pub calibration: Option<Calibration>,
    /// Words of the prompt set, from which no-match signals are computed.
    pub vocabulary: Arc<Vocabulary>,
}

/// A configuration as a report describes it, with everything needed to serve it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReportedConfiguration {
    /// Id of the generation that it ranks.
    pub generation: String,
    /// Fingerprint of the generation's model.
    pub model: String,
    /// Key of the prompt set; `None` for plain CLIP.
    pub prompt_set: Option<StatisticsKey>,
    /// Formula, weight and constants.
    #[serde(flatten)]
    pub balance: BalanceParameters,
    /// Results with a lower score are not shown.
    pub min_score: Option<f32>,
}

/// A configuration whose rankings are compared.
#[derive(Debug, Clone)]
pub struct ComparedConfiguration {
    /// Name in reports.
    pub name: String,
    /// The settings that it ranks with.
    pub setting: ReportedConfiguration,
    /// Number of images that it ranks.
    pub image_count: usize,
    /// How its prompt set fits the queries; `None` for plain CLIP.
    pub bank: Option<BankReport>,
}

impl RankingConfiguration {
    /// Describes it for a comparison of its rankings; `bank` is how its prompt set fits the queries.
    pub fn to_compared(&self, corpus: &Corpus, bank: Option<BankReport>) -> ComparedConfiguration {
        let table = &corpus.tables[self.table_index];
        let setting = ReportedConfiguration {
            generation: table.model_info.generation.clone(),
            model: table.model_info.fingerprint.clone(),
            prompt_set: self.prompt_set.as_ref().map(|set| set.statistics_key.clone()),
            balance: self.balance,
            min_score: self.min_score,
        };
        let image_count = table.image_positions().len();
        ComparedConfiguration { name: self.name.clone(), setting, image_count, bank }
    }
}

/// Why a typed configuration cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub enum RankingConfigurationError {
    /// The text names something that the catalogue does not have.
    #[error("--configuration {text:?}: {reason}")]
    NotFound {
        /// The configuration as typed.
        text: String,
        /// What is missing.
        reason: String,
    },
    /// The prompt set cannot be used.
    #[error("--configuration {text:?}: {source}")]
    InvalidPromptSet {
        /// The configuration as typed.
        text: String,
        /// Why it cannot be used.
        source: PromptError,
    },
}

/// Resolves typed configurations against a catalogue; caches what it embeds and computes.
pub struct ConfigurationResolver<'a> {
    /// The images and embeddings: the live table first, then the standby table if there is one.
    pub corpus: &'a Corpus,
    /// The catalogue's state; `None` for a synthetic catalogue.
    pub state: Option<&'a CatalogueState>,
    /// The configuration that stands in for `live` in a synthetic catalogue.
    pub default_serving: ServingConfig,
    /// Prompt sets whose statistics the live rows carry.
    pub stored_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// How the statistics of prompt sets that are not stored are computed.
    pub default_settings: StatisticsSettings,
    /// Statistics of all rows, by table index and prompt set.
    statistics_cache: BTreeMap<(usize, StatisticsKey), Arc<Vec<ScoreStatistics>>>,
    /// Prompt sets embedded by the model of a table, by table index.
    embedded_sets: BTreeMap<(usize, StatisticsKey), Arc<EmbeddedPromptSet>>,
}

impl<'a> ConfigurationResolver<'a> {
    /// Creates a resolver with empty caches.
    pub fn new(
        corpus: &'a Corpus,
        state: Option<&'a CatalogueState>,
        default_serving: ServingConfig,
        stored_sets: Vec<Arc<EmbeddedPromptSet>>,
        default_settings: StatisticsSettings,
    ) -> Self {
        Self {
            corpus,
            state,
            default_serving,
            stored_sets,
            default_settings,
            statistics_cache: BTreeMap::new(),
            embedded_sets: BTreeMap::new(),
        }
    }

    /// Returns the configuration that `spec` describes.
    pub fn resolve(
        &mut self,
        spec: &ConfigurationSpec,
    ) -> Result<RankingConfiguration, RankingConfigurationError> {
        let missing = |reason: &str| RankingConfigurationError::NotFound {
            text: spec.typed_text.clone(),
            reason: reason.to_owned(),
        };
        let base = spec.base.unwrap_or(BaseConfiguration::Live);
        let candidate = self.state.and_then(|state| state.candidate.as_ref());
        let live = self.state.map_or(&self.default_serving, |state| &state.serving).clone();
        let (serving, mut standby) = match (base, candidate) {
            (BaseConfiguration::Candidate, None) => {
                return Err(missing("the catalogue has no candidate"));
            }
            (BaseConfiguration::Candidate, Some(candidate)) => {
                let is_standby =
                    self.state.is_some_and(|state| candidate.generation != state.live.id);
                (candidate.serving.clone(), is_standby)
            }
            (BaseConfiguration::Live | BaseConfiguration::Raw, _) => (live, false),
        };
        let table_of_base = usize::from(standby);
        standby |= spec.standby;
        let table = usize::from(standby);
        if table >= self.corpus.tables.len() {
            return Err(missing("the catalogue has no standby generation"));
        }
        let normaliser = if base == BaseConfiguration::Raw && spec.normaliser.is_none() {
            Normaliser::Raw
        } else {
            spec.normaliser.unwrap_or(serving.normaliser)
        };
        let mut balance = BalanceParameters {
            normaliser,
            weight: spec.weight.unwrap_or(serving.weight),
            lambda: spec.lambda.unwrap_or(serving.lambda),
            scale: ScaleConstants::default(),
        };
        if normaliser == Normaliser::Raw {
            balance = BalanceParameters::RAW;
        }
        let set_name = spec.prompt_set.as_deref().unwrap_or(serving.prompt_set.as_str());
        let set = self.find_prompt_set(set_name, table, spec)?;
        let vocabulary = Vocabulary::from_texts(set.prompt_set.texts.iter().map(String::as_str));
        let set = (normaliser != Normaliser::Raw).then_some(set);
        if let Some(set) = &set {
            // Scores of another model have another distribution, though its statistics may have the
            // same key: frozen constants hold for the model that they were computed for.
            let unchanged = table == table_of_base
                && serving.prompt_set == set.statistics_key
                && serving.normaliser == normaliser;
            let frozen = unchanged.then_some(serving.scale).flatten();
            balance.scale = match frozen {
                Some(scale) => scale,
                None => ScaleConstants::from_catalogue(
                    normaliser,
                    self.cached_statistics(table, set).iter().copied(),
                ),
            };
        }
        let calibration = serving.calibration.filter(|_| spec.is_unmodified_base());
        let calibrated_min_score = calibration.as_ref().and_then(|c| c.min_score);
        Ok(RankingConfiguration {
            name: spec.label().to_owned(),
            table_index: table,
            prompt_set: set,
            balance,
            min_score: spec.min_score.or(calibrated_min_score),
            calibration,
            vocabulary: Arc::new(vocabulary),
        })
    }

    /// Returns the statistics of every row of a table for a prompt set. They are computed once.
    pub fn cached_statistics(
        &mut self,
        table: usize,
        set: &EmbeddedPromptSet,
    ) -> Arc<Vec<ScoreStatistics>> {
        let key = (table, set.statistics_key.clone());
        let compute = || Arc::new(self.corpus.tables[table].statistics_of_set(set));
        self.statistics_cache.entry(key).or_insert_with(compute).clone()
    }

    fn find_prompt_set(
        &mut self,
        name: &str,
        table: usize,
        spec: &ConfigurationSpec,
    ) -> Result<Arc<EmbeddedPromptSet>, RankingConfigurationError> {
        let invalid = |source| RankingConfigurationError::InvalidPromptSet {
            text: spec.typed_text.clone(),
            source,
        };
        let stored = EmbeddedPromptSet::find_by_name(&self.stored_sets, name).cloned();
        let encoders: &dyn Encoders = &**self.corpus.tables[table].encoders();
        // The standby generation has prompt sets and keys of its own.
        let standby = self.state.and_then(|state| state.standby.as_ref()).filter(|_| table > 0);
        let record = standby
            .and_then(|standby| PromptSetRecord::find_by_selector(&standby.prompt_sets, name));
        if let Some(record) = record {
            let set = EmbeddedPromptSet::from_record(record, encoders).map_err(invalid)?.prompt_set;
            let settings = spec.settings_over(record.statistics_settings());
            return self.embed_cached(set, table, encoders, settings).map_err(invalid);
        }
        match stored {
            Some(set) if table == 0 && spec.settings_over(set.settings()) == set.settings() => {
                Ok(set)
            }
            // Another model embeds the prompts differently, and other settings change the statistics.
            Some(set) => {
                let settings = spec.settings_over(set.settings());
                let set = set.prompt_set.clone();
                self.embed_cached(set, table, encoders, settings).map_err(invalid)
            }
            None => {
                let set = PromptSet::load_builtin_or_file(name).map_err(invalid)?;
                let settings = spec.settings_over(self.default_settings);
                self.embed_cached(set, table, encoders, settings).map_err(invalid)
            }
        }
    }

    fn embed_cached(
        &mut self,
        set: PromptSet,
        table: usize,
        encoders: &dyn Encoders,
        settings: StatisticsSettings,
    ) -> Result<Arc<EmbeddedPromptSet>, PromptError> {
        let scale = encoders.card().logit_scale;
        let key = StatisticsKey::new(&set.name, set.version, &set.fingerprint(), scale, settings);
        if let Some(known) = self.embedded_sets.get(&(table, key.clone())) {
            return Ok(known.clone());
        }
        let embedded = Arc::new(set.embed(encoders, settings)?);
        self.embedded_sets.insert((table, key), embedded.clone());
        Ok(embedded)
    }
}

/// Returns α and β of every row of a table under a configuration with this prompt set.
pub(crate) fn compute_affines(
    configuration: &RankingConfiguration,
    set: &EmbeddedPromptSet,
    statistics: &[ScoreStatistics],
) -> Vec<AffineTransform> {
    let scale = set.softmax_scale();
    statistics.iter().map(|s| configuration.balance.affine_transform(s, scale)).collect()
}
