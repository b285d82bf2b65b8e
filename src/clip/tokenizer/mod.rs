//! Text to token ids.

mod charsmap;

use std::borrow::Cow;
use std::panic::catch_unwind;
use std::path::Path;

use serde::de::IgnoredAny;
use tokenizers::{PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

use super::ClipError;
use super::checkpoint::{Architecture, ModelConfig, read_json};
use charsmap::Charsmap;

/// The checkpoint's tokenizer, truncating to the context length.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    end_token: EndToken,
    /// What becomes of a text first, as SigLIP was trained; CLIP's tokenizer does all by itself.
    normalisation: Option<TextNormalisation>,
}

/// How the end-of-text token is found.
enum EndToken {
    /// The largest id: configurations before transformers 4.31 named id 2 by mistake.
    LargestId,
    /// The first of this id.
    FirstWithId(u32),
    /// SigLIP reads the last of the full length, whatever it is.
    LastPosition,
}

/// Letters of a text that are looked at for its script.
const MAX_SCRIPT_SAMPLE_LETTERS: usize = 32;
/// Tokens that a letter may need where the vocabulary was made for its script. OpenAI CLIP's needs
/// 1.0 (Thai) to 2.4 (Chinese) outside of Latin, multilingual ones about half a token; but some of
/// these split Han one by one.
const MAX_TOKENS_PER_LETTER: f64 = 0.9;
const MAX_TOKENS_PER_HAN_CHARACTER: f64 = 1.2;

/// Token ids, the last being the one that is read. CLIP's end there: with causal attention nothing
/// behind end-of-text changes the embedding. SigLIP's are padded to the full length.
pub type TokenIds = Vec<u32>;

/// Reads a tokenizer. The library panics on some files that are none.
fn parse_tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    match catch_unwind(|| Tokenizer::from_bytes(bytes)) {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(_) => Err("is no tokenizer: one of its parts is not as its type has it".into()),
    }
}

impl TextTokenizer {
    /// Loads `tokenizer.json` and checks that it fits the text tower.
    pub fn load(folder: &Path, config: &ModelConfig) -> Result<Self, ClipError> {
        let file = folder.join("tokenizer.json");
        let wrong = |reason: String| ClipError::InvalidCheckpoint { file: file.clone(), reason };
        let text = &config.text;
        let (tokenizer, plain) = match config.architecture {
            Architecture::Siglip if is_siglip_v1_tokenizer(folder)? => {
                let (mut written, _): (serde_json::Value, _) = read_json(&file)?;
                let rules = Charsmap::extract_from_tokenizer(&mut written).map_err(wrong)?;
                (
                    parse_tokenizer(written.to_string().as_bytes()),
                    Some(TextNormalisation::SiglipCanonical(rules)),
                )
            }
            architecture => {
                let (_, bytes): (IgnoredAny, _) = read_json(&file)?;
                let lower = architecture == Architecture::Siglip;
                (parse_tokenizer(&bytes), lower.then_some(TextNormalisation::Lowercase))
            }
        };
        let mut tokenizer = tokenizer.map_err(wrong)?;
        let size = tokenizer.get_vocab_size(true);
        // Towers are at most padded a little; one with many more tokens had another tokenizer.
        if size > text.vocabulary_size || size < text.vocabulary_size - text.vocabulary_size / 8 {
            return Err(wrong(format!(
                "has {size} tokens, but the text tower knows {} (text_config.vocab_size)",
                text.vocabulary_size
            )));
        }
        let truncation =
            TruncationParams { max_length: text.context_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| wrong(e.to_string()))?;
        let (padding, end) = match config.architecture {
            Architecture::Clip if text.end_of_text_id == 2 => (None, EndToken::LargestId),
            Architecture::Clip => (None, EndToken::FirstWithId(text.end_of_text_id)),
            Architecture::Siglip => (
                Some(read_padding(folder, &tokenizer, text.context_length)?),
                EndToken::LastPosition,
            ),
        };
        tokenizer.with_padding(padding);
        let tokenizer = Self { tokenizer, end_token: end, normalisation: plain };
        if tokenizer.tokenise("a").is_err() {
            return Err(wrong(format!(
                "adds no end-of-text token {} (text_config.eos_token_id)",
                text.end_of_text_id
            )));
        }
        Ok(tokenizer)
    }

    /// The token ids of `text`, end-of-text last, at most the context length.
    pub fn tokenise(&self, text: &str) -> Result<TokenIds, ClipError> {
        let text = match &self.normalisation {
            Some(plain) => plain.apply(text).into(),
            None => Cow::Borrowed(text),
        };
        let encoding = self
            .tokenizer
            .encode(text, true)
            .map_err(|e| ClipError::InvalidInput(format!("the text cannot be tokenized: {e}")))?;
        let ids = encoding.get_ids();
        let end = match self.end_token {
            EndToken::FirstWithId(id) => ids.iter().position(|i| *i == id),
            EndToken::LastPosition => ids.len().checked_sub(1),
            // The first of the largest, as argmax finds it.
            EndToken::LargestId => {
                ids.iter().max().and_then(|max| ids.iter().position(|i| i == max))
            }
        };
        let end =
            end.ok_or_else(|| ClipError::InvalidInput("the text has no end-of-text token".into()))?;
        Ok(ids[..=end].to_vec())
    }

    /// Whether the vocabulary has the script of `text`, told by how many tokens its letters beyond
    /// the Latin ones need. Cheap; a text in Latin letters alone is known to every model here.
    pub fn supports_script(&self, text: &str) -> bool {
        let latin = |c: char| matches!(c, '\0'..='\u{24f}' | '\u{1e00}'..='\u{1eff}');
        let foreign = |c: &char| c.is_alphabetic() && !latin(*c);
        let letters: String =
            text.chars().filter(foreign).take(MAX_SCRIPT_SAMPLE_LETTERS).collect();
        let han = letters.chars().filter(|c| matches!(c, '\u{3400}'..='\u{9fff}')).count();
        let others = letters.chars().count() - han;
        if han + others == 0 {
            return true;
        }
        let Ok(encoding) = self.tokenizer.encode(letters, false) else { return false };
        let used = encoding.get_attention_mask().iter().filter(|used| **used == 1).count();
        let unknown = ["<unk>", "[UNK]"].map(|token| self.tokenizer.token_to_id(token));
        encoding.get_ids().iter().all(|id| !unknown.contains(&Some(*id)))
            && used as f64
                <= others as f64 * MAX_TOKENS_PER_LETTER + han as f64 * MAX_TOKENS_PER_HAN_CHARACTER
    }
}

/// Whether the tokenizer is the first SigLIP's. SigLIP 2 comes with Gemma's.
fn is_siglip_v1_tokenizer(folder: &Path) -> Result<bool, ClipError> {
    let (config, _): (serde_json::Value, _) = read_json(&folder.join("tokenizer_config.json"))?;
    Ok(config["tokenizer_class"].as_str().unwrap_or_default().starts_with("SiglipTokenizer"))
}

/// How SigLIP's texts are filled up, by `tokenizer_config.json`.
fn read_padding(
    folder: &Path,
    tokenizer: &Tokenizer,
    length: usize,
) -> Result<PaddingParams, ClipError> {
    let file = folder.join("tokenizer_config.json");
    let (config, _): (serde_json::Value, _) = read_json(&file)?;
    let wrong = |reason: String| ClipError::InvalidCheckpoint { file: file.clone(), reason };
    let written = &config["pad_token"];
    // Either the token itself or an object that describes it.
    let token = written.as_str().or_else(|| written["content"].as_str());
    let token = token.ok_or_else(|| wrong("names no pad_token".into()))?;
    let id = tokenizer
        .token_to_id(token)
        .ok_or_else(|| wrong(format!("pad_token {token:?} is not in tokenizer.json")))?;
    Ok(PaddingParams {
        strategy: PaddingStrategy::Fixed(length),
        pad_id: id,
        pad_token: token.to_owned(),
        ..PaddingParams::default()
    })
}

/// What is done with a text before its tokens are looked for.
enum TextNormalisation {
    /// As SigLIP's tokenizer does it in Python, and SentencePiece with its characters: lower case,
    /// without ASCII punctuation, normalised by these rules, single spaces.
    SiglipCanonical(Option<Charsmap>),
    /// Lower case alone. SigLIP 2 was trained so, which Gemma's tokenizer does not know of; the
    /// `Siglip2Tokenizer` of Hugging Face does the same, character by character.
    Lowercase,
}

impl TextNormalisation {
    fn apply(&self, text: &str) -> String {
        let Self::SiglipCanonical(rules) = self else {
            return text.chars().flat_map(char::to_lowercase).collect();
        };
        // Python takes these for spaces, too; `▁` is how SentencePiece writes one.
        let space = |c: char| c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}' | '\u{2581}');
        let lower = text.to_lowercase();
        let kept: String = lower.chars().filter(|c| !c.is_ascii_punctuation()).collect();
        let spaced = collapse_spaces(&kept, space);
        let Some(rules) = rules else { return spaced };
        // The rules make spaces of more, such as U+200B.
        collapse_spaces(&rules.normalise(&spaced), |c| c == ' ')
    }
}

fn collapse_spaces(text: &str, space: impl Fn(char) -> bool) -> String {
    text.split(space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_that_the_vocabulary_lacks_is_detected() {
        let folder = Path::new("models/demo");
        let config = std::fs::read(folder.join("config.json")).unwrap();
        let tokenizer = TextTokenizer::load(folder, &ModelConfig::parse(&config).unwrap()).unwrap();
        for known in ["a red mug", "café, naïve, Ærø, phở", "", "42 %", "mug 🍵"] {
            assert!(tokenizer.supports_script(known), "{known}");
        }
        for strange in ["赤いマグカップ", "a red кружка", "κούπα", "كوب"] {
            assert!(!tokenizer.supports_script(strange), "{strange}");
        }
    }

    #[test]
    fn texts_of_siglip_2_are_lower_case_and_keep_their_punctuation() {
        let (fixture, copy) = (Path::new("tests/fixtures/siglip"), tempfile::tempdir().unwrap());
        let config = std::fs::read(fixture.join("config.json")).unwrap();
        let config = ModelConfig::parse(&config).unwrap();
        let written = copy.path().join("tokenizer.json");
        std::fs::copy(fixture.join("tokenizer.json"), written).unwrap();
        for class in ["GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"] {
            let written = format!(r#"{{"tokenizer_class": "{class}", "pad_token": "</s>"}}"#);
            std::fs::write(copy.path().join("tokenizer_config.json"), written).unwrap();
            let tokenizer = TextTokenizer::load(copy.path(), &config).unwrap();
            let tokens = |text: &str| tokenizer.tokenise(text).unwrap();
            assert_eq!(tokens("A Red MUG."), tokens("a red mug."), "{class}");
            assert_ne!(tokens("a red mug."), tokens("a red mug"), "{class}");
        }
    }
}
