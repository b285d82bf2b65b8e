//! Turns texts into token ids, as the tokenizer of the checkpoint does.

mod charsmap;
mod cleaning;
mod clip_tokenizer;
mod html_entities;
mod sentencepiece;
mod unread;

use std::borrow::Cow;
use std::panic::catch_unwind;

use serde_json::Value;
use tokenizers::{
    Encoding, PaddingDirection, PaddingParams, PaddingStrategy, Tokenizer, TruncationDirection,
    TruncationParams,
};

use super::checkpoint::{
    Architecture, ModelConfig, TextCleaning, TokenizerClass, TokenizerConfig, TokenizerFiles,
    Vocabulary, token_content,
};
use super::error::ClipError;
use super::unread_text::UnreadText;
use charsmap::Charsmap;
use cleaning::{OpenClipCleaning, collapse_spaces, is_python_space};
use clip_tokenizer::{define_clip_tokenizer, define_open_clip_tokenizer};
use sentencepiece::define_sentencepiece_tokenizer;
use unread::{find_unread, unknown_ids};

/// The tokenizer of a checkpoint, truncating to the context length.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    end_token_rule: EndTokenRule,
    /// Applied to a text first, as `open_clip` does; `None` for other layouts.
    cleaning: Option<OpenClipCleaning>,
    /// Applied to a text then, as in the training of SigLIP; `None` for CLIP, whose `tokenizer.json`
    /// has all rules.
    normalisation: Option<TextNormalisation>,
    /// Of the tokens that mean a character outside of the vocabulary.
    unknown_ids: Vec<u32>,
}

/// How the end-of-text token is found.
enum EndTokenRule {
    /// The largest id: configurations before transformers 4.31 named id 2 by mistake.
    LargestId,
    /// The first token with this id.
    FirstWithId(u32),
    /// SigLIP: the last token of the padded text, whatever it is.
    LastPosition,
}

/// Letters of a text that are checked for its script.
const MAX_SCRIPT_SAMPLE_LETTERS: usize = 32;
/// Tokens that a letter may need if the vocabulary was made for its script. Outside of Latin the
/// vocabulary of OpenAI's CLIP needs 1.0 (Thai) to 2.4 (Chinese), multilingual ones about half a
/// token; but some of these split Han characters one by one.
const MAX_TOKENS_PER_LETTER: f64 = 0.9;
const MAX_TOKENS_PER_HAN_CHARACTER: f64 = 1.2;

/// Token ids; the embedding is taken at the last one. For CLIP that is end-of-text: with causal
/// attention no later token changes the embedding. For SigLIP the text is padded to the full length.
pub type TokenIds = Vec<u32>;

/// Parses the definition of a tokenizer. The library panics on some invalid ones.
fn parse_tokenizer(definition: &Value) -> Result<Tokenizer, String> {
    let text = definition.to_string();
    // `from_bytes` is generic: the deserialisation of all tokenizers would be compiled again here.
    match catch_unwind(|| text.parse::<Tokenizer>()) {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(_) => Err("is no tokenizer: one of its parts does not match its type".into()),
    }
}

/// Returns the definition of the tokenizer, in the form of `tokenizer.json`, and what is done to a text
/// before it.
fn define_tokenizer(
    files: TokenizerFiles,
    model: &ModelConfig,
) -> Result<(Value, Option<TextNormalisation>), String> {
    let TokenizerFiles { vocabulary, config, .. } = files;
    if config.class == TokenizerClass::Clip {
        let define = match model.text_encoder.cleaning {
            TextCleaning::ByTokenizerClass => define_clip_tokenizer,
            TextCleaning::OpenClip => define_open_clip_tokenizer,
        };
        return Ok((define(&vocabulary, &config)?, None));
    }
    let mut definition = match vocabulary {
        Vocabulary::Json(definition) => definition,
        Vocabulary::SentencePiece(bytes) => {
            let end = token_content(&config.end_token).unwrap_or_default();
            define_sentencepiece_tokenizer(&bytes, end)?
        }
        Vocabulary::Merges { .. } => {
            return Err("is not enough for this tokenizer_class: tokenizer.json is missing".into());
        }
    };
    let normalisation = match (model.text_encoder.cleaning, config.class) {
        (_, TokenizerClass::Clip) => None,
        (_, TokenizerClass::Siglip) => {
            let rules = Charsmap::extract_from_tokenizer(&mut definition)?;
            Some(TextNormalisation::SiglipCanonical(rules))
        }
        _ if model.architecture == Architecture::Clip => None,
        // Its cleaning has done it.
        (TextCleaning::OpenClip, _) => None,
        (TextCleaning::ByTokenizerClass, TokenizerClass::Gemma | TokenizerClass::AsWritten) => {
            Some(TextNormalisation::Lowercase)
        }
    };
    Ok((definition, normalisation))
}

/// Checks that `tokenizer` has the tokens that `tokenizer_config.json` adds.
fn check_added_tokens(tokenizer: &Tokenizer, config: &TokenizerConfig) -> Result<(), String> {
    for (id, token) in config.added_tokens.iter().flatten() {
        let content = token.get("content").and_then(Value::as_str).unwrap_or_default();
        if tokenizer.token_to_id(content) != Some(*id) {
            return Err(format!(
                "has no token {content:?} with the id {id}, which added_tokens_decoder in tokenizer_config.json lists"
            ));
        }
    }
    Ok(())
}

impl TextTokenizer {
    /// Creates the tokenizer and checks that it fits the text encoder.
    pub fn new(files: TokenizerFiles, model: &ModelConfig) -> Result<Self, ClipError> {
        let (file, config) = (files.file.clone(), files.config.clone());
        let invalid = |reason: String| ClipError::InvalidCheckpoint { file: file.clone(), reason };
        let text = &model.text_encoder;
        let (definition, normalisation) = define_tokenizer(files, model).map_err(invalid)?;
        let mut tokenizer = parse_tokenizer(&definition).map_err(invalid)?;
        let cleaning = (text.cleaning == TextCleaning::OpenClip)
            .then(|| OpenClipCleaning::for_architecture(model.architecture));
        // For `open_clip` the names of tokens in a text are words.
        tokenizer.set_encode_special_tokens(cleaning == Some(OpenClipCleaning::Lower));
        let size = tokenizer.get_vocab_size(true);
        // The vocabulary of the encoder may be padded a little; if it is much larger, the model was
        // trained with another tokenizer.
        if size > text.vocabulary_size || size < text.vocabulary_size - text.vocabulary_size / 8 {
            return Err(invalid(format!(
                "has {size} tokens, but the text encoder knows {} (vocab_size)",
                text.vocabulary_size
            )));
        }
        check_added_tokens(&tokenizer, &config).map_err(invalid)?;
        let truncation = TruncationParams {
            max_length: text.context_length,
            direction: if config.truncates_left {
                TruncationDirection::Left
            } else {
                TruncationDirection::Right
            },
            ..TruncationParams::default()
        };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| invalid(e.to_string()))?;
        let padding = config.pad_token.as_deref().map(|token| {
            define_padding(token, &config, &tokenizer, text.context_length).map_err(|reason| {
                ClipError::InvalidCheckpoint {
                    file: file.with_file_name("tokenizer_config.json"),
                    reason,
                }
            })
        });
        tokenizer.with_padding(padding.transpose()?);
        let end_token = match model.architecture {
            Architecture::Clip if text.end_of_text_id == 2 => EndTokenRule::LargestId,
            Architecture::Clip => EndTokenRule::FirstWithId(text.end_of_text_id),
            Architecture::Siglip => EndTokenRule::LastPosition,
        };
        let tokenizer = Self {
            unknown_ids: unknown_ids(&tokenizer),
            tokenizer,
            end_token_rule: end_token,
            cleaning,
            normalisation,
        };
        if tokenizer.tokenise("a").is_err() {
            return Err(invalid(format!(
                "adds no end-of-text token {} (text_config.eos_token_id)",
                text.end_of_text_id
            )));
        }
        Ok(tokenizer)
    }

    /// Returns the token ids of `text`, end-of-text last, at most as many as the context length.
    pub fn tokenise(&self, text: &str) -> Result<TokenIds, ClipError> {
        let (encoding, end) = self.encode(&self.normalise(text))?;
        Ok(encoding.get_ids()[..=end].to_vec())
    }

    /// Applies what is done to a text before the rules of `tokenizer.json`.
    fn normalise<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let cleaned = match self.cleaning {
            Some(cleaning) => cleaning.apply(text).into(),
            None => Cow::Borrowed(text),
        };
        match &self.normalisation {
            Some(normalisation) => normalisation.apply(&cleaned).into(),
            None => cleaned,
        }
    }

    /// Splits a normalised text; returns its tokens and the index of the one that ends it.
    fn encode(&self, text: &str) -> Result<(Encoding, usize), ClipError> {
        let encoding = self
            .tokenizer
            .encode(text, true)
            .map_err(|e| ClipError::InvalidInput(format!("the text cannot be tokenized: {e}")))?;
        let ids = encoding.get_ids();
        let end = match self.end_token_rule {
            EndTokenRule::FirstWithId(id) => ids.iter().position(|i| *i == id),
            EndTokenRule::LastPosition => ids.len().checked_sub(1),
            // The first token with the largest id, as argmax returns it.
            EndTokenRule::LargestId => {
                ids.iter().max().and_then(|max| ids.iter().position(|i| i == max))
            }
        };
        let end =
            end.ok_or_else(|| ClipError::InvalidInput("the text has no end-of-text token".into()))?;
        Ok((encoding, end))
    }

    /// Returns what is not read of `text`: what comes after the context length, and characters that the
    /// vocabulary does not have.
    pub fn find_unread(&self, text: &str) -> UnreadText {
        let text = self.normalise(text);
        match self.encode(&text) {
            Ok((encoding, end)) => {
                find_unread(&text, &encoding, end, &self.tokenizer, &self.unknown_ids)
            }
            Err(_) => UnreadText { tail: text.into_owned(), ..UnreadText::default() },
        }
    }

    /// Whether the vocabulary has the script of `text`, judged by how many tokens its non-Latin
    /// letters need. Cheap; every supported model knows Latin letters.
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

/// Returns how texts of SigLIP are padded.
fn define_padding(
    token: &str,
    config: &TokenizerConfig,
    tokenizer: &Tokenizer,
    length: usize,
) -> Result<PaddingParams, String> {
    let id = tokenizer
        .token_to_id(token)
        .ok_or_else(|| format!("pad_token {token:?} is not in the vocabulary"))?;
    Ok(PaddingParams {
        strategy: PaddingStrategy::Fixed(length),
        direction: if config.pads_left { PaddingDirection::Left } else { PaddingDirection::Right },
        pad_id: id,
        pad_token: token.to_owned(),
        ..PaddingParams::default()
    })
}

/// How a text is normalised before it is split into tokens.
enum TextNormalisation {
    /// SigLIP 1, as its tokenizer in Python and SentencePiece do it: lower case, without ASCII
    /// punctuation, normalised by these rules, single spaces.
    SiglipCanonical(Option<Charsmap>),
    /// SigLIP 2: lower case only. It was trained so, but Gemma's tokenizer does not do it; the
    /// `Siglip2Tokenizer` of Hugging Face does the same, character by character.
    Lowercase,
}

impl TextNormalisation {
    fn apply(&self, text: &str) -> String {
        let rules = match self {
            Self::SiglipCanonical(rules) => rules,
            Self::Lowercase => return text.chars().flat_map(char::to_lowercase).collect(),
        };
        let lower = text.to_lowercase();
        // `▁` is how SentencePiece writes a space.
        let kept = lower.replace(|c: char| c.is_ascii_punctuation(), "").replace('▁', " ");
        let spaced = collapse_spaces(&kept, is_python_space);
        let Some(rules) = rules else { return spaced };
        // The rules turn further characters into spaces, such as U+200B.
        collapse_spaces(&rules.normalise(&spaced), |c| c == ' ')
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::clip::checkpoint::Checkpoint;

    #[test]
    fn a_script_that_the_vocabulary_lacks_is_detected() {
        let tokenizer = load_tokenizer("models/demo");
        for known in ["a red mug", "café, naïve, Ærø, phở", "", "42 %", "mug 🍵"] {
            assert!(tokenizer.supports_script(known), "{known}");
        }
        for strange in ["赤いマグカップ", "a red кружка", "κούπα", "كوب"] {
            assert!(!tokenizer.supports_script(strange), "{strange}");
        }
    }

    fn load(folder: &str) -> Checkpoint {
        Checkpoint::read(Path::new(folder)).unwrap()
    }

    fn load_tokenizer(folder: &str) -> TextTokenizer {
        let checkpoint = load(folder);
        TextTokenizer::new(checkpoint.tokenizer, &checkpoint.model_config).unwrap()
    }

    /// Loads the tokenizer of a fixture as if the checkpoint were in the layout of `open_clip`.
    fn load_as_open_clip(folder: &str) -> TextTokenizer {
        let mut checkpoint = load(folder);
        checkpoint.model_config.text_encoder.cleaning = TextCleaning::OpenClip;
        TextTokenizer::new(checkpoint.tokenizer, &checkpoint.model_config).unwrap()
    }

    #[test]
    fn texts_are_cleaned_in_the_layout_of_open_clip_alone() {
        let plain = load_tokenizer("models/demo");
        let open_clip = load_as_open_clip("models/demo");
        let tokens = |tokenizer: &TextTokenizer, text: &str| tokenizer.tokenise(text).unwrap();
        for (odd, cleaned) in [
            ("A&amp;B  mug", "a&b mug"),
            ("the “red” mug", "the \"red\" mug"),
            ("ｒｅｄ ﬁsh", "red fish"),
            ("red\u{200b} mug", "red\u{200b} mug"),
        ] {
            assert_eq!(tokens(&open_clip, odd), tokens(&plain, cleaned), "{odd}");
        }
        assert_ne!(tokens(&plain, "the “red” mug"), tokens(&plain, "the \"red\" mug"));
        let words = tokens(&open_clip, "mug <|endoftext|> hat");
        assert_eq!(words.last(), tokens(&plain, "a").last());
        assert!(words.len() > tokens(&plain, "mug <|endoftext|> hat").len(), "{words:?}");
        let siglip = load_as_open_clip("tests/fixtures/siglip");
        assert_eq!(tokens(&siglip, "A &quot;red&quot; MUG."), tokens(&siglip, "a red mug"));
    }

    #[test]
    fn what_is_not_read_of_a_text_is_found() {
        let clip = load_tokenizer("models/demo");
        let siglip = load_tokenizer("tests/fixtures/siglip");
        for tokenizer in [&clip, &siglip] {
            for read in ["a red mug", "  A Red MUG ", ""] {
                assert_eq!(tokenizer.find_unread(read), UnreadText::default(), "{read:?}");
            }
            let long = format!("{}the end", "red mug ".repeat(200));
            let unread = tokenizer.find_unread(&long);
            assert!(unread.tail.ends_with("the end") && !unread.is_after_end_token, "{unread:?}");
            assert!(unread.tail.len() < long.len() && unread.unknown_characters.is_empty());
            let read = long.strip_suffix(&unread.tail).unwrap();
            assert_eq!(tokenizer.tokenise(read).unwrap(), tokenizer.tokenise(&long).unwrap());
        }
        let mut left = load_tokenizer("models/demo");
        let truncation = left.tokenizer.get_truncation().cloned().map(|truncation| {
            TruncationParams { direction: TruncationDirection::Left, ..truncation }
        });
        left.tokenizer.with_truncation(truncation).unwrap();
        let unread = left.find_unread(&format!("the start {}", "red mug ".repeat(200)));
        assert!(unread.head.starts_with("the start") && unread.tail.is_empty(), "{unread:?}");
        let unread = clip.find_unread("mug <|endoftext|> red hat");
        assert_eq!((unread.tail.as_str(), unread.is_after_end_token), ("red hat", true));
        // This vocabulary has no comma, and its token for the unknown is that for the end.
        let unread = clip.find_unread("a red mug, cheap");
        assert_eq!((unread.tail.as_str(), unread.unknown_characters.as_str()), ("cheap", ","));
        for read in ["a red mug, cheap!", "red\u{200b} mug\u{fe0f}"] {
            assert_eq!(siglip.find_unread(read), UnreadText::default(), "{read:?}");
        }
        let unread = siglip.find_unread("a red 字 mug 字");
        assert_eq!((unread.tail.as_str(), unread.unknown_characters.as_str()), ("", "字"));
    }

    #[test]
    fn texts_of_siglip_2_are_lower_case_and_keep_their_punctuation() {
        let (fixture, copy) = (Path::new("tests/fixtures/siglip"), tempfile::tempdir().unwrap());
        for file in
            ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
        {
            std::fs::copy(fixture.join(file), copy.path().join(file)).unwrap();
        }
        for class in ["GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"] {
            let written = format!(
                r#"{{"tokenizer_class": "{class}", "pad_token": "</s>", "padding_side": "right"}}"#
            );
            std::fs::write(copy.path().join("tokenizer_config.json"), written).unwrap();
            let checkpoint = Checkpoint::read(copy.path()).unwrap();
            let tokenizer =
                TextTokenizer::new(checkpoint.tokenizer, &checkpoint.model_config).unwrap();
            let tokens = |text: &str| tokenizer.tokenise(text).unwrap();
            assert_eq!(tokens("A Red MUG."), tokens("a red mug."), "{class}");
            assert_ne!(tokens("a red mug."), tokens("a red mug"), "{class}");
        }
    }
}
