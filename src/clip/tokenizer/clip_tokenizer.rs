//! The tokenizer of CLIP from its vocabulary and merges alone. `CLIPTokenizer` of `transformers` 5 takes
//! only these two from `tokenizer.json` too, and splits, adds begin and end of text by itself.

use serde_json::{Map, Value, json};

use crate::clip::checkpoint::{TokenizerConfig, Vocabulary, token_content};

/// How a normalised text is split into words.
const WORD_PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The same for `open_clip`, which has other names for begin and end of text.
const OPEN_CLIP_WORD_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Returns the definition of the tokenizer, as `tokenizer.json` has it.
pub fn define_clip_tokenizer(
    vocabulary: &Vocabulary,
    config: &TokenizerConfig,
) -> Result<Value, String> {
    let (vocab, merges, added) = match vocabulary {
        Vocabulary::Json(tokenizer) => {
            let model = &tokenizer["model"];
            if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
                return Err(format!(
                    "model.type {} is not supported for CLIPTokenizer, only BPE",
                    model["type"]
                ));
            }
            let added = tokenizer["added_tokens"].as_array().cloned().unwrap_or_default();
            (model["vocab"].clone(), model["merges"].clone(), added)
        }
        Vocabulary::Merges { vocab, merges } => (vocab.clone(), parse_merges(merges)?, Vec::new()),
        Vocabulary::SentencePiece(_) => return Err("is no vocabulary of CLIPTokenizer".into()),
    };
    let ids = vocab.as_object().ok_or("has no model.vocab from token to id")?;
    let added = list_added_tokens(added, config, ids);
    let special = |token: &Value, key: &str| {
        let content = token_content(token).unwrap_or_default().to_owned();
        let written = added.iter().find(|known| known["content"] == content.as_str());
        match written.map_or_else(|| ids.get(&content), |known| known.get("id")) {
            Some(id) => Ok(json!([content, id])),
            None => Err(format!("has no token {content:?} ({key})")),
        }
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": special(&config.end_token, "eos_token")?,
            "cls": special(&config.begin_token, "bos_token")?,
            "trim_offsets": false,
            "add_prefix_space": false,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": config.unknown_token,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// Returns the definition of `SimpleTokenizer` of `open_clip`, which gets cleaned texts, and knows no
/// special tokens of `transformers` in them.
pub fn define_open_clip_tokenizer(
    vocabulary: &Vocabulary,
    config: &TokenizerConfig,
) -> Result<Value, String> {
    let mut definition = define_clip_tokenizer(vocabulary, config)?;
    definition["normalizer"] = Value::Null;
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] =
        OPEN_CLIP_WORD_PATTERN.into();
    Ok(definition)
}

/// Returns the tokens that are matched before a text is split: those of `tokenizer_config.json` if it
/// lists any, otherwise those of `tokenizer.json`; and begin and end of text.
fn list_added_tokens(
    written: Vec<Value>,
    config: &TokenizerConfig,
    ids: &Map<String, Value>,
) -> Vec<Value> {
    let flags = json!({
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    });
    let complete = |token: &Map<String, Value>, id: Value| {
        let mut complete = flags.clone();
        for key in ["content", "single_word", "lstrip", "rstrip", "normalized", "special"] {
            if let Some(value) = token.get(key) {
                complete[key] = value.clone();
            }
        }
        complete["id"] = id;
        complete
    };
    let mut added: Vec<Value> = match &config.added_tokens {
        Some(tokens) => tokens.iter().map(|(id, token)| complete(token, json!(id))).collect(),
        None => written,
    };
    for token in [&config.begin_token, &config.end_token] {
        let content = token_content(token).unwrap_or_default();
        let is_known = added.iter().any(|known| known["content"] == content);
        if let Some(id) = ids.get(content).filter(|_| !is_known) {
            let mut written = token.as_object().cloned().unwrap_or_default();
            written.insert("content".into(), content.into());
            added.push(complete(&written, id.clone()));
        }
    }
    added.sort_by_key(|token| token["id"].as_u64());
    added
}

/// Parses `merges.txt`: one pair per line, after a line with the version of the format.
fn parse_merges(text: &str) -> Result<Value, String> {
    let lines = text.lines().enumerate();
    let merges = lines.filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty());
    merges
        .map(|(number, line)| match line.trim_end().split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.contains(' ') => {
                Ok(json!([left, right]))
            }
            _ => Err(format!("merges.txt: line {} is no pair of tokens", number + 1)),
        })
        .collect::<Result<Vec<_>, _>>()
        .map(Value::Array)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_pairs_after_the_version() {
        let merges = parse_merges("#version: 0.2\ni n\r\nt h</w>\n\n# #\n").unwrap();
        assert_eq!(merges, json!([["i", "n"], ["t", "h</w>"], ["#", "#"]]));
        assert!(parse_merges("#version: 0.2\nabc\n").unwrap_err().contains("line 2"));
        assert!(parse_merges("a b c").is_err());
    }
}
