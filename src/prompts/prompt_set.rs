//! A set of auxiliary prompts as its TOML file defines it, and the built-in sets.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clip::{ClipError, Encoders};
use crate::record::to_hex;

/// Maximum number of prompts in a set. With more, statistics cost more and hardly change.
pub const MAX_PROMPTS: usize = 4096;
/// Maximum length of a prompt in characters; a text encoder reads at most 77 tokens.
pub const MAX_PROMPT_CHARS: usize = 1000;

/// Names and TOML files of the built-in sets.
const BUILTIN_SETS: [(&str, &str); 5] = [
    ("photographs", include_str!("../../models/prompts/photographs.toml")),
    ("everyday-nouns", include_str!("../../models/prompts/everyday-nouns.toml")),
    ("ecommerce-en", include_str!("../../models/prompts/ecommerce-en.toml")),
    ("ecommerce-ja", include_str!("../../models/prompts/ecommerce-ja.toml")),
    ("demo", include_str!("../../models/prompts/demo.toml")),
];

/// Why a prompt set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The name is neither that of a built-in set nor the path of a readable file.
    #[error(
        "{name}: no built-in prompt set of that name and no readable file ({source}); the built-in sets are {}",
        PromptSet::builtin_names().join(", ")
    )]
    NotFound {
        /// The name as given.
        name: String,
        /// Why the file cannot be read.
        source: std::io::Error,
    },
    /// The file is not a prompt set.
    #[error("{file}: {reason}")]
    Invalid {
        /// Path of the file.
        file: PathBuf,
        /// What is wrong with its content.
        reason: String,
    },
    /// The prompts could not be embedded.
    #[error("prompt set {name}: {source}")]
    Embed {
        /// Name of the set.
        name: String,
        /// Why the model failed.
        source: ClipError,
    },
}

/// A set of auxiliary prompts, with the fields of its TOML file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptSet {
    /// Name of ASCII letters, digits, `-` and `_`.
    pub name: String,
    /// Version, to be raised when the texts change.
    pub version: u32,
    /// Language of the texts as a BCP 47 tag.
    pub language: String,
    /// What the set is for and how the prompts were chosen.
    pub notes: String,
    /// The prompts, 2 to 4096, each once.
    pub texts: Vec<String>,
}

impl PromptSet {
    /// Creates version 1 of a set of English texts, without notes.
    pub fn new(name: &str, texts: Vec<String>) -> Self {
        let (name, language) = (name.to_owned(), "en".to_owned());
        Self { name, version: 1, language, notes: String::new(), texts }
    }

    /// Returns the names of the built-in sets.
    pub fn builtin_names() -> [&'static str; BUILTIN_SETS.len()] {
        BUILTIN_SETS.map(|(name, _)| name)
    }

    /// Loads a built-in set by name, or a file by path.
    pub fn load_builtin_or_file(name: &str) -> Result<Self, PromptError> {
        if let Some((_, text)) = BUILTIN_SETS.iter().find(|(builtin, _)| *builtin == name) {
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

    /// Loads a built-in set by name. Unlike [`PromptSet::load_builtin_or_file`], it never reads a
    /// file, so that it is safe for names from untrusted sources.
    pub fn load_builtin(name: &str) -> Option<Self> {
        let (_, text) = BUILTIN_SETS.iter().find(|(builtin, _)| *builtin == name)?;
        Self::parse(text, Path::new(name)).ok()
    }

    /// Checks name and texts; the error says what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        let is_legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || !self.name.chars().all(is_legal) {
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
                return Err(format!("text {} ({text:?}) is a duplicate", i + 1));
            }
        }
        Ok(())
    }

    /// Returns the SHA-256 over the texts in hexadecimal. Statistics depend on the texts alone:
    /// their order, the name and the notes do not change the fingerprint.
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

    /// Returns a warning if some prompts are in a script that the model's vocabulary does not have.
    pub fn script_warning(&self, encoders: &dyn Encoders) -> Option<String> {
        let unknown_script_count =
            self.texts.iter().filter(|text| !encoders.supports_script(text)).count();
        (unknown_script_count > 0).then(|| {
            format!(
                "the text encoder of {} is not multilingual: {unknown_script_count} of {} prompts of {} ({}) are in a script that its vocabulary does not have, so their scores mean nothing; use a multilingual model or another set",
                encoders.card().name,
                self.texts.len(),
                self.name,
                self.language,
            )
        })
    }

    /// Returns the prompts that the text encoder does not read to their end or in part.
    pub fn find_unread(&self, encoders: &dyn Encoders) -> Vec<UnreadPrompt> {
        let unread = |text: &String| {
            let reason = encoders.find_unread(text).describe(encoders.card())?;
            Some(UnreadPrompt { text: text.clone(), reason })
        };
        self.texts.iter().filter_map(unread).collect()
    }
}

/// A prompt that the text encoder does not read to its end or in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnreadPrompt {
    /// The prompt.
    pub text: String,
    /// What of it is not read, and why.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::{ClipModel, ModelOptions};

    #[test]
    fn built_in_sets_are_valid_and_have_the_names_by_which_they_are_loaded() {
        for (name, _) in BUILTIN_SETS {
            let set = PromptSet::load_builtin_or_file(name).unwrap();
            assert_eq!(set.name, name);
            assert!(set.texts.len() >= 24 && !set.notes.is_empty());
        }
    }

    #[test]
    fn the_general_bank_has_a_thousand_different_nouns() {
        let set = PromptSet::load_builtin_or_file("everyday-nouns").unwrap();
        let noun = |text: &String| {
            let phrase = text.strip_prefix("a photo of ").unwrap().to_lowercase();
            let article = ["a ", "an ", "the "].iter().find_map(|a| phrase.strip_prefix(a));
            article.unwrap_or(&phrase).to_owned()
        };
        let nouns: std::collections::BTreeSet<String> = set.texts.iter().map(noun).collect();
        assert_eq!((set.texts.len(), nouns.len()), (1_000, 1_000));
    }

    #[test]
    fn the_fingerprint_depends_on_the_texts_alone() {
        let set = PromptSet::load_builtin_or_file("photographs").unwrap();
        let mut other = set.clone();
        other.notes = "other".into();
        other.texts.reverse();
        assert_eq!(set.fingerprint(), other.fingerprint());
        other.texts.pop();
        assert_ne!(set.fingerprint(), other.fingerprint());
    }

    #[test]
    fn prompts_that_are_not_read_in_full_are_listed() {
        let checkpoint = "models/demo".to_owned();
        let clip = ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() });
        let long = format!("{}the end", "a red mug ".repeat(50));
        let set = PromptSet::new("t", vec!["a red mug".into(), long.clone()]);
        let unread = set.find_unread(&clip.unwrap());
        assert_eq!(unread.len(), 1);
        assert_eq!(unread[0].text, long);
        assert!(unread[0].reason.contains("tokens"), "{}", unread[0].reason);
    }

    #[test]
    fn errors_say_what_is_wrong_with_a_file() {
        let head = "name='x'\nversion=1\nlanguage='en'\nnotes='n'\n";
        for (texts, expected) in [
            ("texts=['a']", "1 texts"),
            ("texts=['a','a']", "is a duplicate"),
            ("texts=['a',' ']", "text 2"),
            ("texts=['a','b']\nextra=1", "extra"),
        ] {
            let error =
                PromptSet::parse(&format!("{head}{texts}"), Path::new("f.toml")).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let missing = PromptSet::load_builtin_or_file("nowhere.toml").unwrap_err().to_string();
        assert!(missing.contains("photographs"), "{missing}");
    }
}
