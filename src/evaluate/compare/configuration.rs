//! Ways to rank, as typed and as resolved.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::corpus::{Corpus, CorpusTable};
use super::spec::{BaseConfiguration, ConfigurationSpec};
use crate::balance::calibration::{Calibration, Vocabulary};
use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::catalogue::{CatalogueState, PromptSetRecord, ServingConfig};
use crate::clip::Encoders;
use crate::prompts::{EmbeddedPromptSet, PromptError, PromptSet};

/// A way to rank.
#[derive(Clone)]
pub struct RankingConfiguration {
    /// Name in reports.
    pub name: String,
    /// Which of the world's tables.
    pub table_index: usize,
    /// Whose statistics; none for plain CLIP.
    pub prompt_set: Option<Arc<EmbeddedPromptSet>>,
    /// Formula, weight and constants.
    pub balance: BalanceParameters,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
    /// Thresholds that are stored with it.
    pub calibration: Option<Calibration>,
    /// Words of the prompt set that is served with it.
    pub vocabulary: Arc<Vocabulary>,
}

/// A configuration in a report: enough to serve it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReportedConfiguration {
    /// The generation it reads.
    pub generation: String,
    /// Fingerprint of the model.
    pub model: String,
    /// Key of the prompt set; none for plain CLIP.
    pub prompt_set: Option<StatisticsKey>,
    /// Formula, weight and constants.
    #[serde(flatten)]
    pub balance: BalanceParameters,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
}

impl RankingConfiguration {
    /// As a report has it.
    pub fn to_reported(&self, corpus: &Corpus) -> ReportedConfiguration {
        let model_info = &corpus.tables[self.table_index].model_info;
        ReportedConfiguration {
            generation: model_info.generation.clone(),
            model: model_info.fingerprint.clone(),
            prompt_set: self.prompt_set.as_ref().map(|set| set.statistics_key.clone()),
            balance: self.balance,
            min_score: self.min_score,
        }
    }
}

/// What cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum RankingConfigurationError {
    /// The text names something that is not there.
    #[error("--configuration {text:?}: {reason}")]
    NotFound {
        /// As typed.
        text: String,
        /// What is not there.
        reason: String,
    },
    /// The prompt set cannot be used.
    #[error("--configuration {text:?}: {source}")]
    InvalidPromptSet {
        /// As typed.
        text: String,
        /// Why.
        source: PromptError,
    },
}

/// Resolves what is typed against a catalogue.
pub struct ConfigurationResolver<'a> {
    /// The tables: the live one first, then the one beside it.
    pub corpus: &'a Corpus,
    /// How the catalogue is served; none for a drawn one.
    pub state: Option<&'a CatalogueState>,
    /// What a drawn catalogue is served with.
    pub default_serving: ServingConfig,
    /// Prompt sets that the rows carry.
    pub stored_sets: Vec<Arc<EmbeddedPromptSet>>,
    /// k of `nnn` for prompt sets that are not stored.
    pub top_k: usize,
    /// Statistics of the sets that were used, by table and key.
    statistics_cache: BTreeMap<(usize, StatisticsKey), Arc<Vec<ScoreStatistics>>>,
    embedded_sets: BTreeMap<(usize, StatisticsKey), Arc<EmbeddedPromptSet>>,
}

impl<'a> ConfigurationResolver<'a> {
    /// For a world; `stored` are the prompt sets whose statistics its rows carry.
    pub fn new(
        world: &'a Corpus,
        state: Option<&'a CatalogueState>,
        fallback: ServingConfig,
        stored: Vec<Arc<EmbeddedPromptSet>>,
        top_k: usize,
    ) -> Self {
        let (statistics, embedded) = (BTreeMap::new(), BTreeMap::new());
        Self {
            corpus: world,
            state,
            default_serving: fallback,
            stored_sets: stored,
            top_k,
            statistics_cache: statistics,
            embedded_sets: embedded,
        }
    }

    /// The configuration that `spec` names.
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
                let beside = self.state.is_some_and(|state| candidate.generation != state.live.id);
                (candidate.serving.clone(), beside)
            }
            (BaseConfiguration::Live | BaseConfiguration::Raw, _) => (live, false),
        };
        let own_table = usize::from(standby);
        standby |= spec.standby;
        let table = usize::from(standby);
        if table >= self.corpus.tables.len() {
            return Err(missing("the catalogue has no generation beside the live one"));
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
        let wanted = spec.prompt_set.as_deref().unwrap_or(serving.prompt_set.as_str());
        let served = self.find_prompt_set(wanted, table, spec)?;
        let vocabulary = Vocabulary::from_texts(served.prompt_set.texts.iter().map(String::as_str));
        let set = (normaliser != Normaliser::Raw).then_some(served);
        if let Some(set) = &set {
            // Another model's scores lie elsewhere, though its statistics may go by the same key.
            let unchanged = table == own_table
                && serving.prompt_set == set.statistics_key
                && serving.normaliser == normaliser;
            let frozen = unchanged.then_some(serving.scale).flatten();
            balance.scale = match frozen {
                Some(scale) => scale,
                None => ScaleConstants::from_catalogue(
                    normaliser,
                    self.statistics(table, set).iter().copied(),
                ),
            };
        }
        let calibration = serving.calibration.filter(|_| spec.is_unmodified_base());
        let stored = calibration.as_ref().and_then(|calibration| calibration.min_score);
        Ok(RankingConfiguration {
            name: spec.label().to_owned(),
            table_index: table,
            prompt_set: set,
            balance,
            min_score: spec.min_score.or(stored),
            calibration,
            vocabulary: Arc::new(vocabulary),
        })
    }

    /// Statistics of a set over a table, computed once.
    pub fn statistics(
        &mut self,
        table: usize,
        set: &EmbeddedPromptSet,
    ) -> Arc<Vec<ScoreStatistics>> {
        let world = self.corpus;
        let of = || Arc::new(world.tables[table].statistics(set));
        self.statistics_cache.entry((table, set.statistics_key.clone())).or_insert_with(of).clone()
    }

    fn find_prompt_set(
        &mut self,
        name: &str,
        table: usize,
        spec: &ConfigurationSpec,
    ) -> Result<Arc<EmbeddedPromptSet>, RankingConfigurationError> {
        let prompts = |source| RankingConfigurationError::InvalidPromptSet {
            text: spec.typed_text.clone(),
            source,
        };
        let stored = EmbeddedPromptSet::find(&self.stored_sets, name).cloned();
        let encoders: &dyn Encoders = &**self.corpus.tables[table].encoders();
        // The generation beside the live one has sets and keys of its own.
        let beside = self.state.and_then(|state| state.standby.as_ref()).filter(|_| table > 0);
        let record = beside.and_then(|b| PromptSetRecord::find(&b.prompt_sets, name));
        if let Some(record) = record {
            let set = EmbeddedPromptSet::from_record(record, encoders).map_err(prompts)?.prompt_set;
            let top_k = spec.top_k.unwrap_or(record.top_k);
            return self.embed_cached(set, table, encoders, top_k).map_err(prompts);
        }
        match stored {
            Some(set) if table == 0 && spec.top_k.is_none() => Ok(set),
            // Another model gives the prompts other embeddings, another k other statistics.
            Some(set) => {
                let top_k = spec.top_k.unwrap_or_else(|| set.to_record().top_k);
                self.embed_cached(set.prompt_set.clone(), table, encoders, top_k).map_err(prompts)
            }
            None => {
                let set = PromptSet::load(name).map_err(prompts)?;
                self.embed_cached(set, table, encoders, spec.top_k.unwrap_or(self.top_k))
                    .map_err(prompts)
            }
        }
    }

    fn embed_cached(
        &mut self,
        set: PromptSet,
        table: usize,
        encoders: &dyn Encoders,
        top_k: usize,
    ) -> Result<Arc<EmbeddedPromptSet>, PromptError> {
        let scale = encoders.card().logit_scale;
        let key = StatisticsKey::new(&set.name, set.version, &set.fingerprint(), scale, top_k);
        if let Some(known) = self.embedded_sets.get(&(table, key.clone())) {
            return Ok(known.clone());
        }
        let embedded = Arc::new(set.embed(encoders, top_k)?);
        self.embedded_sets.insert((table, key), embedded.clone());
        Ok(embedded)
    }
}

/// α and β of every row of a table under a configuration.
pub(crate) fn compute_affines(
    table: &CorpusTable,
    configuration: &RankingConfiguration,
    statistics: &[ScoreStatistics],
) -> Vec<crate::balance::normalise::AffineTransform> {
    let scale = table.model_info.logit_scale;
    statistics.iter().map(|s| configuration.balance.affine_transform(s, scale)).collect()
}
