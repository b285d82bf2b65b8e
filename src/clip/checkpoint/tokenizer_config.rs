//! `tokenizer_config.json`: which class tokenises, its special tokens, and on which side texts are cut
//! and padded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::encoder_config::{Architecture, ModelConfig, TextCleaning};
use super::json_file::{convert, invalid, read_file, read_object};
use super::key_report::{KeyReport, show_value};
use super::key_tables;
use crate::clip::error::ClipError;

const FILE: &str = "tokenizer_config.json";

/// The tokenizer of a checkpoint: its vocabulary and how it is used.
pub struct TokenizerFiles {
    /// The file that errors of the vocabulary are about.
    pub file: PathBuf,
    pub vocabulary: Vocabulary,
    pub config: TokenizerConfig,
    /// The content of all files that change tokens, for the fingerprint.
    pub contents: Vec<Vec<u8>>,
}

/// The vocabulary, as one of the files of the wild has it.
pub enum Vocabulary {
    /// `tokenizer.json`.
    Json(Value),
    /// `vocab.json` and `merges.txt`.
    Merges {
        /// From token to id.
        vocab: Value,
        /// Pairs of tokens, in the order in which they are merged.
        merges: String,
    },
    /// `spiece.model`.
    SentencePiece(Vec<u8>),
}

/// The class that tokenises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerClass {
    /// `CLIPTokenizer`: begin and end of text, lower case.
    Clip,
    /// `SiglipTokenizer`: SentencePiece, without punctuation.
    Siglip,
    /// `GemmaTokenizer` and `Siglip2Tokenizer`: of SigLIP 2.
    Gemma,
    /// `tokenizer.json` as it is.
    AsWritten,
}

/// `tokenizer_config.json`, with the defaults of its class for missing keys.
#[derive(Debug, Clone)]
pub struct TokenizerConfig {
    pub class: TokenizerClass,
    pub begin_token: Value,
    pub end_token: Value,
    pub unknown_token: String,
    /// `None` for CLIP, which is not padded.
    pub pad_token: Option<String>,
    pub truncates_left: bool,
    pub pads_left: bool,
    /// By id, as objects with `content` and how it is matched.
    pub added_tokens: Option<BTreeMap<u32, Map<String, Value>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfigJson {
    tokenizer_class: Option<String>,
    bos_token: Option<Value>,
    eos_token: Option<Value>,
    unk_token: Option<Value>,
    pad_token: Option<Value>,
    model_max_length: Option<f64>,
    truncation_side: Option<Side>,
    padding_side: Option<Side>,
    added_tokens_decoder: Option<BTreeMap<u32, Map<String, Value>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    #[serde(alias = "Left")]
    Left,
    #[serde(alias = "Right")]
    Right,
}

/// Returns the text of a special token, which is written alone or in an object.
pub fn token_content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

impl TokenizerFiles {
    /// Reads the tokenizer in `folder`.
    pub fn read(
        folder: &Path,
        model: &ModelConfig,
        keys: &mut KeyReport,
    ) -> Result<Self, ClipError> {
        let path = folder.join(FILE);
        let needs_config = model.architecture == Architecture::Siglip;
        let (object, bytes) = if needs_config || path.is_file() {
            let (object, bytes) = read_object(&path)?;
            (object, Some(bytes))
        } else {
            (Map::new(), None)
        };
        let (file, vocabulary, mut contents) = read_vocabulary(folder, model.architecture)?;
        let tokenizer = match &vocabulary {
            Vocabulary::Json(tokenizer) => tokenizer,
            _ => &Value::Null,
        };
        let config = TokenizerConfig::parse(&object, tokenizer, model, keys)
            .map_err(|reason| invalid(&path, reason))?;
        if config.class != TokenizerClass::Clip || config.differs_from_clip() {
            contents.extend(bytes);
        }
        Ok(Self { file, vocabulary, config, contents })
    }
}

fn read_vocabulary(
    folder: &Path,
    architecture: Architecture,
) -> Result<(PathBuf, Vocabulary, Vec<Vec<u8>>), ClipError> {
    let json = folder.join("tokenizer.json");
    let alternative = match architecture {
        Architecture::Clip => folder.join("vocab.json"),
        Architecture::Siglip => folder.join("spiece.model"),
    };
    if json.is_file() || !alternative.is_file() {
        let (object, bytes) = read_object(&json)?;
        return Ok((json, Vocabulary::Json(Value::Object(object)), vec![bytes]));
    }
    match architecture {
        Architecture::Clip => {
            let (vocab, vocab_bytes) = read_object(&alternative)?;
            let file = folder.join("merges.txt");
            let merges_bytes = read_file(&file)?;
            let merges = String::from_utf8(merges_bytes.clone())
                .map_err(|error| invalid(&file, format!("is not UTF-8: {error}")))?;
            let vocabulary = Vocabulary::Merges { vocab: Value::Object(vocab), merges };
            Ok((alternative, vocabulary, vec![vocab_bytes, merges_bytes]))
        }
        Architecture::Siglip => {
            let bytes = read_file(&alternative)?;
            Ok((alternative, Vocabulary::SentencePiece(bytes.clone()), vec![bytes]))
        }
    }
}

impl TokenizerConfig {
    fn parse(
        object: &Map<String, Value>,
        tokenizer: &Value,
        model: &ModelConfig,
        keys: &mut KeyReport,
    ) -> Result<Self, String> {
        let table = match model.architecture {
            Architecture::Clip => key_tables::CLIP_TOKENIZER,
            Architecture::Siglip => key_tables::SIGLIP_TOKENIZER,
        };
        keys.check(FILE, "", object, table)?;
        let json: TokenizerConfigJson = convert("", Value::Object(object.clone()))?;
        let class = read_class(json.tokenizer_class.as_deref(), model)?;
        let context = model.text_encoder.context_length;
        if let Some(length) = json.model_max_length.filter(|length| *length < context as f64) {
            return Err(format!(
                "model_max_length {length} is less than the {context} tokens that the text encoder reads; set it to {context} if texts may be so long"
            ));
        }
        let side = |written: Option<Side>, part: &str| match written {
            Some(side) => Ok(Some(side)),
            None => match &tokenizer[part]["direction"] {
                Value::Null => Ok(None),
                direction => {
                    convert(&format!("tokenizer.json: {part}.direction"), direction.clone())
                        .map(Some)
                }
            },
        };
        let truncates_left = side(json.truncation_side, "truncation")? == Some(Side::Left);
        let padding = side(json.padding_side, "padding")?;
        let pads_left = match (class, model.text_encoder.cleaning) {
            // open_clip pads on the right whatever the file says.
            (_, TextCleaning::OpenClip) => false,
            (TokenizerClass::Gemma, _) => padding != Some(Side::Right),
            _ => padding == Some(Side::Left),
        };
        if pads_left && model.architecture == Architecture::Clip {
            return Err(
                "padding_side left, here or as padding.direction in tokenizer.json, is not supported for CLIP: the embedding would be taken at the padding; set it to right"
                    .into(),
            );
        }
        let token = |written: Option<Value>, key: &str, default: &str| match written {
            None => Ok(json!(default)),
            Some(token) if token_content(&token).is_some() => Ok(token),
            Some(other) => Err(format!("{key} {} is no token", show_value(&other))),
        };
        let (begin, end, unknown) = match class {
            TokenizerClass::Siglip => ("", "</s>", "<unk>"),
            TokenizerClass::Gemma => ("<bos>", "<eos>", "<unk>"),
            TokenizerClass::Clip | TokenizerClass::AsWritten => {
                ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")
            }
        };
        let unknown_token = token(json.unk_token, "unk_token", unknown)?;
        let pad_token = match (model.architecture, class) {
            (Architecture::Clip, _) => None,
            (Architecture::Siglip, TokenizerClass::Siglip) => {
                Some(token(json.pad_token, "pad_token", "</s>")?)
            }
            (Architecture::Siglip, _) => match json.pad_token {
                None => return Err("names no pad_token".into()),
                written => Some(token(written, "pad_token", "")?),
            },
        };
        let content = |token: Value| token_content(&token).unwrap_or_default().to_owned();
        Ok(Self {
            class,
            begin_token: token(json.bos_token, "bos_token", begin)?,
            end_token: token(json.eos_token, "eos_token", end)?,
            unknown_token: content(unknown_token),
            pad_token: pad_token.map(content),
            truncates_left,
            pads_left,
            added_tokens: json.added_tokens_decoder,
        })
    }

    /// Whether tokens of CLIP depend on this file.
    fn differs_from_clip(&self) -> bool {
        let special = [&self.begin_token, &self.end_token].map(token_content);
        let adds_others = self
            .added_tokens
            .iter()
            .flatten()
            .any(|(_, token)| !special.contains(&token.get("content").and_then(Value::as_str)));
        self.truncates_left
            || adds_others
            || special != [Some("<|startoftext|>"), Some("<|endoftext|>")]
            || self.unknown_token != "<|endoftext|>"
    }
}

fn read_class(written: Option<&str>, model: &ModelConfig) -> Result<TokenizerClass, String> {
    let class = written.map(|class| class.strip_suffix("Fast").unwrap_or(class));
    match (model.architecture, model.text_encoder.cleaning, class) {
        (Architecture::Clip, _, None | Some("CLIPTokenizer")) => Ok(TokenizerClass::Clip),
        (Architecture::Siglip, TextCleaning::OpenClip, Some("T5Tokenizer")) => {
            Ok(TokenizerClass::AsWritten)
        }
        (Architecture::Siglip, _, None | Some("SiglipTokenizer")) => Ok(TokenizerClass::Siglip),
        (Architecture::Siglip, _, Some("GemmaTokenizer" | "Siglip2Tokenizer")) => {
            Ok(TokenizerClass::Gemma)
        }
        (_, _, Some("PreTrainedTokenizer" | "TokenizersBackend")) => Ok(TokenizerClass::AsWritten),
        (_, _, Some(_)) => Err(format!(
            "tokenizer_class {:?} is not supported, only CLIPTokenizer for CLIP, SiglipTokenizer, Siglip2Tokenizer and GemmaTokenizer for SigLIP, and PreTrainedTokenizerFast",
            written.unwrap_or_default()
        )),
    }
}
