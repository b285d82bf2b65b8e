//! Auxiliary prompt sets: shipped ones and the owner's own, loaded, fingerprinted, embedded once.

pub(crate) mod report;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use chrono::Utc;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::balance::calibration::Vocabulary;
use crate::clip::{ClipError, Encoders};
pub use report::{NEAR_DUPLICATE_COSINE, PromptSetReport, measure_prompt_set};

use crate::balance::statistics::{ScoreStatistics, StatisticsKey, score_prompts};
use crate::catalogue::PromptSetRecord;
use crate::record::{Embedding, to_hex};
use crate::validate;

/// Most prompts in a set: beyond that the statistics cost more than they tell.
pub const MAX_PROMPTS: usize = 4096;
/// Longest prompt in characters; a text tower reads 77 tokens at most.
pub const MAX_PROMPT_CHARS: usize = 1000;

/// Prompt sets that are part of the program.
const BUILTIN_SETS: [(&str, &str); 4] = [
    ("photographs", include_str!("../../models/prompts/photographs.toml")),
    ("ecommerce-en", include_str!("../../models/prompts/ecommerce-en.toml")),
    ("ecommerce-ja", include_str!("../../models/prompts/ecommerce-ja.toml")),
    ("demo", include_str!("../../models/prompts/demo.toml")),
];

/// Which prompt sets are used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PromptOptions {
    /// Prompt sets whose statistics every image gets, by shipped name (`photographs`,
    /// `ecommerce-en`, `ecommerce-ja`, `demo`) or path of a TOML file. The first serves queries
    /// that do not choose one.
    pub sets: Vec<String>,
    /// How many of an image's largest auxiliary scores `nnn` averages.
    pub top_k: usize,
}

impl Default for PromptOptions {
    fn default() -> Self {
        Self { sets: vec!["photographs".into()], top_k: 8 }
    }
}

impl PromptOptions {
    /// What is wrong with these options, a line each; reads the sets.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.sets.is_empty() || self.sets.len() > 8 {
            problems.push(format!("sets: {} sets; give 1 to 8", self.sets.len()));
        }
        validate::check_range(&mut problems, "top_k", self.top_k as u64, 1, MAX_PROMPTS as u64);
        let errors = self.sets.iter().filter_map(|set| PromptSet::load(set).err());
        problems.extend(errors.map(|e| format!("sets: {e}")));
        problems
    }
}

/// A prompt set that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// Neither a shipped name nor a readable file.
    #[error(
        "{name}: no shipped prompt set of that name and no readable file ({source}); shipped are {}",
        PromptSet::builtin_names().join(", ")
    )]
    NotFound {
        /// As given.
        name: String,
        /// Why the file cannot be read.
        source: std::io::Error,
    },
    /// The file is not a prompt set.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The prompts could not be embedded.
    #[error("prompt set {name}: {source}")]
    Embed {
        /// The set.
        name: String,
        /// Why.
        source: ClipError,
    },
}

/// A set of auxiliary prompts, as its TOML file has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptSet {
    /// Name, of letters, digits, `-` and `_`.
    pub name: String,
    /// Version; raise it when the texts change.
    pub version: u32,
    /// Language of the texts, as BCP 47 writes it.
    pub language: String,
    /// What the set is for and how it was chosen.
    pub notes: String,
    /// The prompts.
    pub texts: Vec<String>,
}

impl PromptSet {
    /// The first version of a set of English texts, without notes.
    pub fn new(name: &str, texts: Vec<String>) -> Self {
        let (name, language) = (name.to_owned(), "en".to_owned());
        Self { name, version: 1, language, notes: String::new(), texts }
    }

    /// Names of the shipped sets.
    pub fn builtin_names() -> [&'static str; BUILTIN_SETS.len()] {
        BUILTIN_SETS.map(|(name, _)| name)
    }

    /// Loads a shipped set by name, or a file by path.
    pub fn load(name: &str) -> Result<Self, PromptError> {
        if let Some((_, text)) = BUILTIN_SETS.iter().find(|(shipped, _)| *shipped == name) {
            return Self::parse(text, Path::new(name));
        }
        let text = std::fs::read_to_string(name)
            .map_err(|source| PromptError::NotFound { name: name.to_owned(), source })?;
        Self::parse(&text, Path::new(name))
    }

    fn parse(text: &str, file: &Path) -> Result<Self, PromptError> {
        let set: Result<Self, _> = toml::from_str(text);
        set.map_err(|e| e.to_string())
            .and_then(|set| set.validate().map(|()| set))
            .map_err(|reason| PromptError::Invalid { file: file.to_owned(), reason })
    }

    /// A shipped set by its name. Unlike [`PromptSet::load`] it reads no file: for names that come
    /// from elsewhere.
    pub fn load_builtin(name: &str) -> Option<Self> {
        let (_, text) = BUILTIN_SETS.iter().find(|(shipped, _)| *shipped == name)?;
        Self::parse(text, Path::new(name)).ok()
    }

    /// What is wrong with a set that was not read from a file.
    pub fn validate(&self) -> Result<(), String> {
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || !self.name.chars().all(legal) {
            return Err(format!(
                "name {:?} has characters other than letters, digits, - and _",
                self.name
            ));
        }
        if !(2..=MAX_PROMPTS).contains(&self.texts.len()) {
            return Err(format!("has {} texts; a set has 2 to {MAX_PROMPTS}", self.texts.len()));
        }
        for (i, text) in self.texts.iter().enumerate() {
            if text.trim().is_empty() || text.chars().count() > MAX_PROMPT_CHARS {
                return Err(format!(
                    "text {} is empty or longer than {MAX_PROMPT_CHARS} characters",
                    i + 1
                ));
            }
            if self.texts[..i].contains(text) {
                return Err(format!("text {} ({text:?}) stands twice", i + 1));
            }
        }
        Ok(())
    }

    /// SHA-256 over the texts in hexadecimal: what statistics depend on. Their order does not
    /// matter, nor do name and notes.
    pub fn fingerprint(&self) -> String {
        let mut sorted: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        let mut hasher = Sha256::new();
        for text in sorted {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        to_hex(&hasher.finalize())
    }

    /// What is wrong with this set for a model that knows no multilingual text; none where its
    /// vocabulary has the prompts' script.
    pub fn script_warning(&self, encoders: &dyn Encoders) -> Option<String> {
        let unknown_script_count =
            self.texts.iter().filter(|text| !encoders.supports_script(text)).count();
        (unknown_script_count > 0).then(|| {
            format!(
                "the text tower of {} is not multilingual: {unknown_script_count} of {} prompts of {} ({}) are in a script that its vocabulary does not have, so their scores mean nothing; use a multilingual model or another set",
                encoders.card().name,
                self.texts.len(),
                self.name,
                self.language,
            )
        })
    }

    /// Embeds the prompts with a model's text tower and fixes scale and top-k.
    pub fn embed(
        self,
        encoders: &dyn Encoders,
        top_k: usize,
    ) -> Result<EmbeddedPromptSet, PromptError> {
        let texts: Vec<&str> = self.texts.iter().map(String::as_str).collect();
        let embeddings = encoders
            .embed_texts_in_batches(&texts)
            .map_err(|source| PromptError::Embed { name: self.name.clone(), source })?;
        Ok(EmbeddedPromptSet::from_embeddings(self, embeddings, encoders.card().logit_scale, top_k))
    }
}

/// A prompt set with its embeddings, ready to measure images.
#[derive(Debug, Clone)]
pub struct EmbeddedPromptSet {
    /// The texts.
    pub prompt_set: PromptSet,
    /// The key of its statistics.
    pub statistics_key: StatisticsKey,
    /// One unit-length embedding a text.
    pub embeddings: Vec<Vec<f32>>,
    logit_scale: f32,
    top_k: usize,
    vocabulary: OnceLock<Vocabulary>,
}

impl EmbeddedPromptSet {
    /// A set whose prompts are embedded already, one unit-length embedding a text.
    pub fn from_embeddings(
        set: PromptSet,
        embeddings: Vec<Vec<f32>>,
        logit_scale: f32,
        top_k: usize,
    ) -> Self {
        let key =
            StatisticsKey::new(&set.name, set.version, &set.fingerprint(), logit_scale, top_k);
        Self {
            prompt_set: set,
            statistics_key: key,
            embeddings,
            logit_scale,
            top_k,
            vocabulary: OnceLock::new(),
        }
    }

    /// The words of its texts.
    pub fn vocabulary(&self) -> &Vocabulary {
        let texts = || Vocabulary::from_texts(self.prompt_set.texts.iter().map(String::as_str));
        self.vocabulary.get_or_init(texts)
    }

    /// The score that an image gives each prompt, from its embedding as it is stored.
    fn score_prompts(&self, image: &Embedding) -> Vec<f32> {
        score_prompts(image.values(), &self.embeddings)
    }

    /// The statistics of an image, from the values of its embedding as they are stored.
    pub fn statistics_of_values(&self, stored: &[f32]) -> Option<ScoreStatistics> {
        self.statistics_from_scores(&score_prompts(stored, &self.embeddings))
    }

    /// The statistics of an image, from its embedding as it is stored.
    pub fn statistics(&self, image: &Embedding) -> Option<ScoreStatistics> {
        self.statistics_from_scores(&self.score_prompts(image))
    }

    fn statistics_from_scores(&self, scores: &[f32]) -> Option<ScoreStatistics> {
        ScoreStatistics::from_scores(scores, self.logit_scale, self.top_k)
    }

    /// The prompts with the scores that an image gives them, strongest first.
    pub fn rank_prompts(&self, image: &Embedding) -> Vec<(&str, f32)> {
        let texts = self.prompt_set.texts.iter().map(String::as_str);
        let mut pairs: Vec<(&str, f32)> = texts.zip(self.score_prompts(image)).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
        pairs
    }

    /// A part of this set under another name, without embedding it anew. `places` are within it.
    pub fn subset(&self, name: &str, indices: &[usize]) -> Self {
        let texts: Vec<String> =
            indices.iter().map(|i| self.prompt_set.texts[*i].clone()).collect();
        let set = PromptSet { name: name.to_owned(), texts, ..self.prompt_set.clone() };
        let embeddings = indices.iter().map(|i| self.embeddings[*i].clone()).collect();
        Self::from_embeddings(set, embeddings, self.logit_scale, self.top_k)
    }

    /// The set as the catalogue's state keeps it, embedded anew.
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
        set.embed(encoders, record.top_k)
    }

    /// What the catalogue's state keeps of this set.
    pub fn to_record(&self) -> PromptSetRecord {
        PromptSetRecord {
            key: self.statistics_key.clone(),
            name: self.prompt_set.name.clone(),
            version: self.prompt_set.version,
            language: self.prompt_set.language.clone(),
            top_k: self.top_k,
            texts: self.prompt_set.texts.clone(),
            since: Utc::now(),
        }
    }

    /// That of `sets` with this key, name or name@version, as [`PromptSetRecord::find`] has it: the newest
    /// version of a name; of one version the one that stands last, as later ones are added there.
    pub fn find<'a>(sets: &'a [Arc<Self>], name: &str) -> Option<&'a Arc<Self>> {
        let fits = |one: &&Arc<Self>| {
            PromptSetRecord::matches_name(
                name,
                &one.statistics_key,
                &one.prompt_set.name,
                one.prompt_set.version,
            )
        };
        sets.iter().filter(fits).max_by_key(|one| one.prompt_set.version)
    }
}

/// The sets that are in use, shared by those who use them and those who follow the state.
#[derive(Debug, Clone, Default)]
pub struct ActivePromptSets(Arc<ArcSwap<Vec<Arc<EmbeddedPromptSet>>>>);

impl ActivePromptSets {
    /// These sets.
    pub fn new(sets: Vec<Arc<EmbeddedPromptSet>>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(sets)))
    }

    /// The sets at this moment.
    pub fn current(&self) -> Arc<Vec<Arc<EmbeddedPromptSet>>> {
        self.0.load_full()
    }

    /// Uses these sets from now on.
    pub fn replace(&self, sets: Vec<Arc<EmbeddedPromptSet>>) {
        self.0.store(Arc::new(sets));
    }

    /// The sets of `records`: those in use as they are, the others embedded. Computes: may block.
    pub fn resolve_records(
        &self,
        records: &[PromptSetRecord],
        encoders: &dyn Encoders,
    ) -> Result<Vec<Arc<EmbeddedPromptSet>>, PromptError> {
        let known = self.current();
        records
            .iter()
            .map(|record| match known.iter().find(|set| set.statistics_key == record.key) {
                Some(set) => Ok(set.clone()),
                None => EmbeddedPromptSet::from_record(record, encoders).map(Arc::new),
            })
            .collect()
    }
}

/// Loads and embeds the configured sets; the first is the default.
pub fn load_configured_sets(
    options: &PromptOptions,
    encoders: &dyn Encoders,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, PromptError> {
    options
        .sets
        .iter()
        .map(|name| PromptSet::load(name)?.embed(encoders, options.top_k).map(Arc::new))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_sets_are_valid_and_named_as_they_are_found() {
        for (name, _) in BUILTIN_SETS {
            let set = PromptSet::load(name).unwrap();
            assert_eq!(set.name, name);
            assert!(set.texts.len() >= 24 && !set.notes.is_empty());
        }
    }

    #[test]
    fn a_name_stands_for_its_newest_version() {
        let embedded_set = |name: &str, version, texts: [&str; 2]| {
            let set = PromptSet { version, ..PromptSet::new(name, texts.map(String::from).into()) };
            Arc::new(EmbeddedPromptSet::from_embeddings(
                set,
                vec![vec![1.0, 0.0], vec![0.0, 1.0]],
                100.0,
                1,
            ))
        };
        let sets = [
            embedded_set("mine", 1, ["a", "b"]),
            embedded_set("mine", 2, ["a", "c"]),
            embedded_set("other", 9, ["a", "d"]),
            embedded_set("mine", 1, ["a", "e"]),
        ];
        let found =
            |name: &str| EmbeddedPromptSet::find(&sets, name).map(|set| set.statistics_key.clone());
        assert_eq!(found("mine"), Some(sets[1].statistics_key.clone()));
        assert_eq!(found("mine@2"), Some(sets[1].statistics_key.clone()));
        assert_eq!(found("mine@1"), Some(sets[3].statistics_key.clone()), "added last");
        assert_eq!(found(sets[0].statistics_key.as_str()), Some(sets[0].statistics_key.clone()));
        assert_eq!((found("mine@3"), found("min")), (None, None));
        let records: Vec<PromptSetRecord> = sets.iter().map(|set| set.to_record()).collect();
        let kept = PromptSetRecord::find(&records, "mine").map(|record| record.key.clone());
        assert_eq!(kept, found("mine"), "as the catalogue's state has it");
    }

    #[test]
    fn the_fingerprint_follows_the_texts_alone() {
        let set = PromptSet::load("photographs").unwrap();
        let mut other = set.clone();
        other.notes = "other".into();
        other.texts.reverse();
        assert_eq!(set.fingerprint(), other.fingerprint());
        other.texts.pop();
        assert_ne!(set.fingerprint(), other.fingerprint());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let head = "name='x'\nversion=1\nlanguage='en'\nnotes='n'\n";
        for (texts, named) in [
            ("texts=['a']", "1 texts"),
            ("texts=['a','a']", "stands twice"),
            ("texts=['a',' ']", "text 2"),
            ("texts=['a','b']\nextra=1", "extra"),
        ] {
            let error =
                PromptSet::parse(&format!("{head}{texts}"), Path::new("f.toml")).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
        let missing = PromptSet::load("nowhere.toml").unwrap_err().to_string();
        assert!(missing.contains("photographs"), "{missing}");
    }
}
