//! A prompt set embedded by a model.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use chrono::Utc;

use super::prompt_set::{PromptError, PromptSet};
use crate::balance::calibration::Vocabulary;
use crate::balance::statistics::{
    ScoreStatistics, StatisticsKey, StatisticsSettings, score_prompts,
};
use crate::catalogue::PromptSetRecord;
use crate::clip::Encoders;
use crate::record::Embedding;

/// A prompt set with the embeddings of its texts; computes the statistics of images.
#[derive(Debug, Clone)]
pub struct EmbeddedPromptSet {
    /// The set as it was defined.
    pub prompt_set: PromptSet,
    /// Key under which rows store the statistics of this set.
    pub statistics_key: StatisticsKey,
    /// One unit-length embedding per text.
    pub prompt_embeddings: Vec<Vec<f32>>,
    /// The model's logit scale L.
    logit_scale: f32,
    /// k of `nnn` and temperature of `softmax`.
    settings: StatisticsSettings,
    vocabulary: OnceLock<Vocabulary>,
}

impl EmbeddedPromptSet {
    /// Creates it from embeddings that were computed already, one of unit length per text.
    pub fn from_embeddings(
        prompt_set: PromptSet,
        embeddings: Vec<Vec<f32>>,
        logit_scale: f32,
        settings: StatisticsSettings,
    ) -> Self {
        let fingerprint = prompt_set.fingerprint();
        let (name, version) = (&prompt_set.name, prompt_set.version);
        let statistics_key = StatisticsKey::new(name, version, &fingerprint, logit_scale, settings);
        Self {
            prompt_set,
            statistics_key,
            prompt_embeddings: embeddings,
            logit_scale,
            settings,
            vocabulary: OnceLock::new(),
        }
    }

    /// Returns how its statistics are computed.
    pub fn settings(&self) -> StatisticsSettings {
        self.settings
    }

    /// Returns the scale at which the log-sum-exp of its statistics is computed.
    pub fn softmax_scale(&self) -> f32 {
        self.settings.softmax_scale(self.logit_scale)
    }

    /// Returns the words of the texts.
    pub fn vocabulary(&self) -> &Vocabulary {
        let texts = || Vocabulary::from_texts(self.prompt_set.texts.iter().map(String::as_str));
        self.vocabulary.get_or_init(texts)
    }

    /// Returns the raw score of each prompt for an image, from its embedding as stored.
    pub(super) fn score_prompts(&self, image: &Embedding) -> Vec<f32> {
        score_prompts(image.values(), &self.prompt_embeddings)
    }

    /// Returns the statistics of an image, from the values of its embedding as stored.
    pub fn compute_statistics_of_values(&self, embedding: &[f32]) -> Option<ScoreStatistics> {
        self.statistics_from_scores(&score_prompts(embedding, &self.prompt_embeddings))
    }

    /// Returns the statistics of an image, from its embedding as stored.
    pub fn compute_statistics(&self, image: &Embedding) -> Option<ScoreStatistics> {
        self.statistics_from_scores(&self.score_prompts(image))
    }

    /// Returns the statistics of an image, from the raw scores of all prompts.
    pub(super) fn statistics_from_scores(&self, scores: &[f32]) -> Option<ScoreStatistics> {
        ScoreStatistics::from_scores(scores, self.softmax_scale(), self.settings.top_k)
    }

    /// Returns the prompts with their raw scores for an image, highest score first.
    pub fn rank_prompts(&self, image: &Embedding) -> Vec<(&str, f32)> {
        let texts = self.prompt_set.texts.iter().map(String::as_str);
        let mut pairs: Vec<(&str, f32)> = texts.zip(self.score_prompts(image)).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
        pairs
    }

    /// Returns the prompts at `indices` as a set with another name, without embedding them again.
    pub fn subset(&self, name: &str, indices: &[usize]) -> Self {
        let texts: Vec<String> =
            indices.iter().map(|i| self.prompt_set.texts[*i].clone()).collect();
        let set = PromptSet { name: name.to_owned(), texts, ..self.prompt_set.clone() };
        let embeddings = indices.iter().map(|i| self.prompt_embeddings[*i].clone()).collect();
        Self::from_embeddings(set, embeddings, self.logit_scale, self.settings)
    }

    /// Embeds a set that the catalogue's state records.
    pub fn from_record(
        record: &PromptSetRecord,
        encoders: &dyn Encoders,
    ) -> Result<Self, PromptError> {
        let set = PromptSet {
            name: record.name.clone(),
            version: record.version,
            language: record.language.clone(),
            notes: String::new(),
            texts: record.texts.clone(),
        };
        set.embed(encoders, record.statistics_settings())
    }

    /// Returns what the catalogue's state records of this set.
    pub fn to_record(&self) -> PromptSetRecord {
        PromptSetRecord {
            key: self.statistics_key.clone(),
            name: self.prompt_set.name.clone(),
            version: self.prompt_set.version,
            language: self.prompt_set.language.clone(),
            top_k: self.settings.top_k,
            temperature: self.settings.temperature,
            texts: self.prompt_set.texts.clone(),
            since: Utc::now(),
        }
    }

    /// Finds a set by key, name or name@version, by the same rules as [`PromptSetRecord::find_by_selector`]: a
    /// name means its newest version, and among sets of one version the last, which was added
    /// latest.
    pub fn find_by_name<'a>(sets: &'a [Arc<Self>], name: &str) -> Option<&'a Arc<Self>> {
        let matches = |set: &&Arc<Self>| {
            PromptSetRecord::matches_selector(
                name,
                &set.statistics_key,
                &set.prompt_set.name,
                set.prompt_set.version,
            )
        };
        sets.iter().filter(matches).max_by_key(|set| set.prompt_set.version)
    }
}

/// Returns the statistics of an image by each of `sets`, from its embedding as stored. The error is the key of a
/// set by which they are not finite.
pub fn compute_all_statistics(
    sets: &[Arc<EmbeddedPromptSet>],
    image: &Embedding,
) -> Result<BTreeMap<StatisticsKey, ScoreStatistics>, StatisticsKey> {
    let mut statistics = BTreeMap::new();
    for set in sets {
        let Some(computed) = set.compute_statistics(image) else { continue };
        if !computed.is_finite() {
            return Err(set.statistics_key.clone());
        }
        statistics.insert(set.statistics_key.clone(), computed);
    }
    Ok(statistics)
}

impl PromptSet {
    /// Embeds the prompts with a model's text encoder.
    pub fn embed(
        self,
        encoders: &dyn Encoders,
        settings: StatisticsSettings,
    ) -> Result<EmbeddedPromptSet, PromptError> {
        let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        let embeddings = encoders
            .embed_texts_in_batches(&texts)
            .map_err(|source| PromptError::Embed { name: self.name.clone(), source })?;
        let logit_scale = encoders.card().logit_scale;
        Ok(EmbeddedPromptSet::from_embeddings(self, embeddings, logit_scale, settings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_resolves_to_its_newest_version() {
        let embedded_set = |name: &str, version, texts: [&str; 2]| {
            let set = PromptSet { version, ..PromptSet::new(name, texts.map(String::from).into()) };
            Arc::new(EmbeddedPromptSet::from_embeddings(
                set,
                vec![vec![1.0, 0.0], vec![0.0, 1.0]],
                100.0,
                StatisticsSettings::with_top_k(1),
            ))
        };
        let sets = [
            embedded_set("mine", 1, ["a", "b"]),
            embedded_set("mine", 2, ["a", "c"]),
            embedded_set("other", 9, ["a", "d"]),
            embedded_set("mine", 1, ["a", "e"]),
        ];
        let found = |name: &str| {
            EmbeddedPromptSet::find_by_name(&sets, name).map(|set| set.statistics_key.clone())
        };
        assert_eq!(found("mine"), Some(sets[1].statistics_key.clone()));
        assert_eq!(found("mine@2"), Some(sets[1].statistics_key.clone()));
        assert_eq!(found("mine@1"), Some(sets[3].statistics_key.clone()), "added last");
        assert_eq!(found(sets[0].statistics_key.as_str()), Some(sets[0].statistics_key.clone()));
        assert_eq!((found("mine@3"), found("min")), (None, None));
        let records: Vec<PromptSetRecord> = sets.iter().map(|set| set.to_record()).collect();
        let record =
            PromptSetRecord::find_by_selector(&records, "mine").map(|record| record.key.clone());
        assert_eq!(record, found("mine"), "records are found by the same rules");
    }
}
