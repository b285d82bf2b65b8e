//! Text to token ids.

use std::path::Path;

use tokenizers::{Tokenizer, TruncationParams};

use super::ClipError;
use super::checkpoint::TextConfig;

/// The checkpoint's tokenizer, truncating to the context length.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    end: End,
}

/// How the end-of-text token is found.
enum End {
    /// The largest id: configurations before transformers 4.31 named id 2 by mistake.
    Largest,
    /// The first of this id.
    First(u32),
}

/// Token ids up to the end-of-text token, which is the last: with causal attention nothing behind
/// it changes the embedding.
pub type Tokens = Vec<u32>;

impl TextTokenizer {
    /// Loads `tokenizer.json` and checks that it fits the text tower.
    pub fn load(folder: &Path, config: &TextConfig) -> Result<Self, ClipError> {
        let file = folder.join("tokenizer.json");
        let wrong = |reason: String| ClipError::Checkpoint { file: file.clone(), reason };
        let mut tokenizer = Tokenizer::from_file(&file).map_err(|e| wrong(e.to_string()))?;
        let size = tokenizer.get_vocab_size(true);
        if size > config.vocab_size {
            return Err(wrong(format!(
                "has {size} tokens, but the text tower knows {} (text_config.vocab_size)",
                config.vocab_size
            )));
        }
        let truncation = TruncationParams {
            max_length: config.max_position_embeddings,
            ..TruncationParams::default()
        };
        tokenizer.with_padding(None);
        tokenizer.with_truncation(Some(truncation)).map_err(|e| wrong(e.to_string()))?;
        let end = match config.eos_token_id {
            2 => End::Largest,
            id => End::First(id),
        };
        let tokenizer = Self { tokenizer, end };
        if tokenizer.tokens("a").is_err() {
            return Err(wrong(format!(
                "adds no end-of-text token {} (text_config.eos_token_id)",
                config.eos_token_id
            )));
        }
        Ok(tokenizer)
    }

    /// The token ids of `text`, end-of-text last, at most the context length.
    pub fn tokens(&self, text: &str) -> Result<Tokens, ClipError> {
        let encoding = self
            .tokenizer
            .encode(text, true)
            .map_err(|e| ClipError::Input(format!("the text cannot be tokenized: {e}")))?;
        let ids = encoding.get_ids();
        let end = match self.end {
            End::First(id) => ids.iter().position(|i| *i == id),
            // The first of the largest, as argmax finds it.
            End::Largest => ids.iter().max().and_then(|max| ids.iter().position(|i| i == max)),
        };
        let end =
            end.ok_or_else(|| ClipError::Input("the text has no end-of-text token".into()))?;
        Ok(ids[..=end].to_vec())
    }
}
