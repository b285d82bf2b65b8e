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

/// Letters of a text that are looked at for its script.
const SCRIPT_SAMPLE: usize = 32;
/// Tokens that a letter may need where the vocabulary was made for its script. OpenAI CLIP's needs
/// 1.0 (Thai) to 2.4 (Chinese) outside of Latin, multilingual ones about half a token; but some of
/// these split Han one by one.
const TOKENS_PER_LETTER: f64 = 0.9;
const TOKENS_PER_HAN: f64 = 1.2;

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

    /// Whether the vocabulary has the script of `text`, told by how many tokens its letters beyond
    /// the Latin ones need. Cheap; a text in Latin letters alone is known to every model here.
    pub fn knows_script(&self, text: &str) -> bool {
        let latin = |c: char| matches!(c, '\0'..='\u{24f}' | '\u{1e00}'..='\u{1eff}');
        let foreign = |c: &char| c.is_alphabetic() && !latin(*c);
        let letters: String = text.chars().filter(foreign).take(SCRIPT_SAMPLE).collect();
        let han = letters.chars().filter(|c| matches!(c, '\u{3400}'..='\u{9fff}')).count();
        let others = letters.chars().count() - han;
        if han + others == 0 {
            return true;
        }
        let Ok(encoding) = self.tokenizer.encode(letters, false) else { return false };
        let unknown = ["<unk>", "[UNK]"].map(|token| self.tokenizer.token_to_id(token));
        encoding.get_ids().iter().all(|id| !unknown.contains(&Some(*id)))
            && encoding.len() as f64
                <= others as f64 * TOKENS_PER_LETTER + han as f64 * TOKENS_PER_HAN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_that_the_vocabulary_lacks_is_told() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config: super::super::checkpoint::Config = serde_json::from_str(&config).unwrap();
        let tokenizer = TextTokenizer::load(&folder, &config.text_config).unwrap();
        for known in ["a red mug", "café, naïve, Ærø, phở", "", "42 %", "mug 🍵"] {
            assert!(tokenizer.knows_script(known), "{known}");
        }
        for strange in ["赤いマグカップ", "a red кружка", "κούπα", "كوب"] {
            assert!(!tokenizer.knows_script(strange), "{strange}");
        }
    }
}
