//! The normalisation rules inside a SentencePiece model.
//!
//! `tokenizer.json` has them as `precompiled_charsmap`. SentencePiece replaces the longest match at
//! each position; the `tokenizers` library matches whole grapheme clusters instead, and so composes
//! unusual sequences of combining characters differently.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Rules from byte sequences to their replacements.
///
/// The format is SentencePiece's: the length of a trie in bytes, the trie (a double array as the
/// `darts-clone` library lays it out, 32-bit little-endian units) and the replacements, each ended
/// by a zero byte, to which the trie's values point.
pub struct Charsmap {
    trie: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// Removes the rules from the `normalizer` of a `tokenizer.json`, so that they are not applied
    /// twice, and returns them; `None` if there are none.
    pub fn extract_from_tokenizer(tokenizer: &mut Value) -> Result<Option<Self>, String> {
        let Some(normalizer) = tokenizer.get_mut("normalizer") else { return Ok(None) };
        let found = if normalizer["type"] == "Precompiled" {
            Some(normalizer.take())
        } else {
            normalizer.get_mut("normalizers").and_then(Value::as_array_mut).and_then(|steps| {
                let at = steps.iter().position(|step| step["type"] == "Precompiled")?;
                Some(steps.remove(at))
            })
        };
        let Some(found) = found else { return Ok(None) };
        let unreadable = || "normalizer.precompiled_charsmap cannot be read".to_owned();
        let written = found["precompiled_charsmap"].as_str().ok_or_else(unreadable)?;
        let bytes = STANDARD.decode(written).map_err(|_| unreadable())?;
        Self::parse(&bytes).map(Some).ok_or_else(unreadable)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (trie, replacements) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let (units, []) = trie.as_chunks::<4>() else { return None };
        let trie = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = String::from_utf8(replacements.to_vec()).ok()?;
        Some(Self { trie, replacements })
    }

    /// Returns `text` with the longest matching rule applied at each position.
    pub fn normalise(&self, text: &str) -> String {
        let mut normalised = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let matched = self.longest_match(rest.as_bytes());
            // Only a broken file has a rule that ends within a character.
            match matched.filter(|(length, _)| rest.is_char_boundary(*length)) {
                Some((length, replacement)) => {
                    normalised.push_str(replacement);
                    rest = &rest[length..];
                }
                None => {
                    normalised.push(first);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        normalised
    }

    /// Returns the length in bytes and the replacement of the longest rule that `bytes` starts with.
    fn longest_match(&self, bytes: &[u8]) -> Option<(usize, &str)> {
        let unit = |at: usize| self.trie.get(at).copied();
        let mut at = unit_offset(unit(0)?);
        let mut found = None;
        for (index, byte) in bytes.iter().enumerate() {
            at ^= usize::from(*byte);
            let Some(node) = unit(at).filter(|node| unit_label(*node) == u32::from(*byte)) else {
                break;
            };
            at ^= unit_offset(node);
            if has_leaf(node) {
                found = unit(at).map(|leaf| (index + 1, (leaf & 0x7fff_ffff) as usize));
            }
        }
        let (length, start) = found?;
        let replacement = self.replacements.get(start..)?;
        Some((length, replacement.split('\0').next()?))
    }
}

const fn has_leaf(unit: u32) -> bool {
    (unit >> 8) & 1 == 1
}

/// Returns the byte that leads to a unit; the top bit marks leaves, which no byte leads to.
const fn unit_label(unit: u32) -> u32 {
    unit & 0x8000_00ff
}

const fn unit_offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_rule_wins_and_broken_rules_are_rejected() {
        let text = std::fs::read("tests/fixtures/siglip/tokenizer.json").unwrap();
        let mut tokenizer: Value = serde_json::from_slice(&text).unwrap();
        let rules = Charsmap::extract_from_tokenizer(&mut tokenizer).unwrap().unwrap();
        assert!(
            Charsmap::extract_from_tokenizer(&mut tokenizer).unwrap().is_none(),
            "the rules were removed"
        );
        // As nmt_nfkc of SentencePiece: composed characters, compatibility forms, spaces.
        for (text, expected) in [
            ("e\u{301}", "é"),
            ("ﬁ ①", "fi 1"),
            ("a\u{3000}b", "a b"),
            // Two marks: the first composes, although both are in one grapheme cluster.
            ("e\u{301}\u{323}", "é\u{323}"),
            ("日本", "日本"),
            ("", ""),
        ] {
            assert_eq!(rules.normalise(text), expected, "{text:?}");
        }
        let mut broken = serde_json::json!({"normalizer": {
            "type": "Precompiled", "precompiled_charsmap": "/////w=="
        }});
        assert!(Charsmap::extract_from_tokenizer(&mut broken).is_err());
        let empty = Charsmap { trie: vec![], replacements: String::new() };
        assert_eq!(empty.normalise("é"), "é");
    }
}
