//! How `open_clip` cleans a text before it is split into tokens: `ftfy`, character references of HTML,
//! white space, lower case.
//!
//! All steps of `ftfy` are here but one: text that was decoded by a wrong encoding (`cafÃ©`) is not
//! repaired. That step is a heuristic of hundreds of rules, and guesses.

use icu_normalizer::ComposingNormalizerBorrowed;

use super::html_entities::{WINDOWS_1252, unescape, unescape_strict};
use crate::clip::checkpoint::Architecture;

/// Rounds after which a segment counts as stable. Each round decodes one level of character references.
const MAX_ROUNDS: usize = 64;

/// What happens to a text after it was cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenClipCleaning {
    /// `lower`: single spaces, lower case. CLIP's own tokenizer does the same.
    Lower,
    /// `canonicalize`: without ASCII punctuation, lower case, single spaces; for SigLIP.
    Canonicalize,
}

impl OpenClipCleaning {
    /// Returns the cleaning of the tokenizers that `open_clip` has for an architecture.
    pub fn for_architecture(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Clip => Self::Lower,
            Architecture::Siglip => Self::Canonicalize,
        }
    }

    /// Cleans a text.
    pub fn apply(self, text: &str) -> String {
        let cleaned = unescape(&unescape(&fix_text(text)));
        match self {
            Self::Lower => collapse_spaces(&cleaned, is_python_space).to_lowercase(),
            Self::Canonicalize => {
                let kept =
                    cleaned.replace('_', " ").replace(|c: char| c.is_ascii_punctuation(), "");
                collapse_spaces(&kept.to_lowercase(), is_python_space)
            }
        }
    }
}

/// Joins words by single spaces.
pub fn collapse_spaces(text: &str, is_space: impl Fn(char) -> bool) -> String {
    text.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Whether Python's `str.split` splits at this character.
pub fn is_python_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// Fixes each line as `ftfy.fix_text` does, wrong encodings excepted.
fn fix_text(text: &str) -> String {
    let mut fixed = String::with_capacity(text.len());
    // A `<` says that this is HTML, whose references are meant; also in all lines after it.
    let mut is_html = false;
    for line in text.split_inclusive('\n') {
        is_html |= line.contains('<');
        fixed.push_str(&fix_segment(line, is_html));
    }
    fixed
}

fn fix_segment(segment: &str, is_html: bool) -> String {
    let mut segment = segment.to_owned();
    for _ in 0..MAX_ROUNDS {
        let unescaped = if is_html { segment.clone() } else { unescape_strict(&segment) };
        let characters: String = unescaped.chars().map(decode_control).collect();
        let mut fixed = String::with_capacity(characters.len());
        characters.chars().for_each(|c| push_standard_form(c, &mut fixed));
        let fixed = fixed.replace("\r\n", "\n");
        let fixed = fixed.replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        let kept: String =
            remove_terminal_escapes(&fixed).chars().filter(|c| !is_unwanted(*c)).collect();
        let fixed = ComposingNormalizerBorrowed::new_nfc().normalize(&kept);
        if fixed == segment {
            break;
        }
        segment = fixed.into_owned();
    }
    segment
}

/// Returns the character that Windows has in the place of a control character of Latin-1.
fn decode_control(c: char) -> char {
    match c {
        '\u{80}'..='\u{9f}' => WINDOWS_1252[c as usize - 0x80],
        _ => c,
    }
}

/// Takes ligatures of Latin letters apart, gives characters their usual width, straightens quotes.
fn push_standard_form(c: char, text: &mut String) {
    let replacement = match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        // Its apostrophe is straightened like others.
        'ŉ' => "'n",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => "'",
        '\u{201c}'..='\u{201f}' => "\"",
        '\u{3000}' => " ",
        '\u{ff01}'..='\u{ffef}' => {
            let form = ComposingNormalizerBorrowed::new_nfkc();
            return text.push_str(&form.normalize(c.encode_utf8(&mut [0; 4])));
        }
        _ => return text.push(c),
    };
    text.push_str(replacement);
}

/// Removes the sequences that colour a terminal: ESC, `[`, digits and semicolons, a letter.
fn remove_terminal_escapes(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        let code = rest[at + 2..].trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        if code.starts_with(|c: char| c.is_ascii_alphabetic()) {
            kept.push_str(&rest[..at]);
            rest = &code[1..];
        } else {
            kept.push_str(&rest[..at + 2]);
            rest = &rest[at + 2..];
        }
    }
    kept.push_str(rest);
    kept
}

/// Whether `ftfy` removes a control character.
fn is_unwanted(c: char) -> bool {
    matches!(c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}'
        | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        text: String,
        lower: String,
        canonicalize: String,
    }

    /// `tests/parity/cleaning.py` makes the file with ftfy and Python's html module.
    #[test]
    fn texts_are_cleaned_as_in_python() {
        let cases = std::env::var("BSAP_CLEANING_CASES")
            .unwrap_or_else(|_| "tests/fixtures/open-clip-cleaning.json".into());
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(cases).unwrap()).unwrap();
        assert!(cases.len() >= 50);
        for Case { text, lower, canonicalize } in cases {
            assert_eq!(OpenClipCleaning::Lower.apply(&text), lower, "{text:?}");
            assert_eq!(OpenClipCleaning::Canonicalize.apply(&text), canonicalize, "{text:?}");
        }
    }
}
