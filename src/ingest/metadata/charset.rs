//! Texts in the character sets of old programs.

use encoding_rs::{Encoding, MACINTOSH, UTF_8, UTF_16BE, UTF_16LE, WINDOWS_1252};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How texts are read that neither say what their character set is nor are UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetadataCharset {
    /// As Latin-1 or MacRoman, whichever gives more letters where words have letters.
    #[default]
    Detect,
    /// As Latin-1, with the additions of Windows (code page 1252).
    Latin1,
    /// As MacRoman, which programs on a Macintosh wrote until about 2003.
    MacRoman,
}

impl MetadataCharset {
    /// Returns the encoding of `texts`, which one program wrote: UTF-8 if all are valid in it.
    pub fn encoding_of(self, texts: &[&[u8]]) -> &'static Encoding {
        if texts.iter().all(|text| std::str::from_utf8(text).is_ok()) {
            return UTF_8;
        }
        match self {
            Self::Latin1 => WINDOWS_1252,
            Self::MacRoman => MACINTOSH,
            Self::Detect => {
                let plausibility = |encoding: &'static Encoding| -> i64 {
                    texts.iter().map(|text| text_plausibility(&decode(text, encoding))).sum()
                };
                // Latin-1 if nothing decides: it is by far the more common.
                if plausibility(MACINTOSH) > plausibility(WINDOWS_1252) {
                    MACINTOSH
                } else {
                    WINDOWS_1252
                }
            }
        }
    }

    /// Reads one text by itself.
    pub fn decode(self, text: &[u8]) -> String {
        decode(text, self.encoding_of(&[text]))
    }
}

/// Maximum length of a text that is read, in bytes: several times what an attribute may have.
pub const MAX_TEXT_BYTES: usize = 256 << 10;

/// Cuts a text at [`MAX_TEXT_BYTES`], not inside of a character of UTF-8.
pub fn cut(text: &[u8]) -> &[u8] {
    if text.len() <= MAX_TEXT_BYTES {
        return text;
    }
    let is_start = |at: &usize| text[*at] & 0xc0 != 0x80;
    let end = (MAX_TEXT_BYTES - 3..=MAX_TEXT_BYTES).rev().find(is_start);
    &text[..end.unwrap_or(MAX_TEXT_BYTES)]
}

/// Decodes a text, with replacement characters for what is invalid.
pub fn decode(text: &[u8], encoding: &'static Encoding) -> String {
    encoding.decode_without_bom_handling(text).0.into_owned()
}

/// Decodes UTF-8 or, as a byte order mark or zeros in its first character say, UTF-16.
pub fn decode_unicode(text: &[u8]) -> Option<String> {
    if let Some((encoding, bom_bytes)) = Encoding::for_bom(text) {
        return Some(decode(&text[bom_bytes..], encoding));
    }
    match text {
        [0, _, ..] => Some(decode(text, UTF_16BE)),
        [_, 0, ..] => Some(decode(text, UTF_16LE)),
        _ => std::str::from_utf8(text).ok().map(str::to_owned),
    }
}

/// Decodes UTF-16 in little-endian order, as Windows writes it into EXIF.
pub fn decode_utf16_le(text: &[u8]) -> String {
    decode(text, UTF_16LE)
}

/// Letters that are common in the languages of Western and Northern Europe.
const COMMON_LETTERS: &str = "äöüßéèêàâçñáíóúåøæãõîïôûù";
/// Those of them that rarely begin a word.
const RARELY_INITIAL: &str = "çêûôùñï";
/// Letters that are words by themselves.
const ONE_LETTER_WORDS: &str = "àèéòóáíåöæ";
/// Signs and letters that one set has where the other has a common letter.
const RARE_SIGNS: &str = "ƒˆ˜ıﬁﬂŸΩπµªº";
const QUOTES_AND_DASHES: &str = "’‘“”„–—…«»\u{a0}";
/// Signs of prices, rights and measures.
const FREE_SIGNS: &str = "©®°£€§·•½™";

/// Sums up how likely the characters beyond ASCII are where they are.
///
/// In MacRoman the accented letters of Latin languages are bytes that Latin-1 has as punctuation, signs
/// and letters of other languages, and the other way round: read in the wrong set, words have signs in
/// them, and capitals behind small letters.
fn text_plausibility(text: &str) -> i64 {
    let characters: Vec<char> = text.chars().collect();
    let neighbour = |at: Option<usize>| at.and_then(|at| characters.get(at)).copied();
    let mut sum = 0;
    for (at, c) in characters.iter().copied().enumerate().filter(|(_, c)| !c.is_ascii()) {
        let (before, after) = (neighbour(at.checked_sub(1)), neighbour(Some(at + 1)));
        let follows_letter = before.is_some_and(char::is_alphabetic);
        let touches_letter = follows_letter || after.is_some_and(char::is_alphabetic);
        let is_inside_word = follows_letter && after.is_some_and(char::is_alphabetic);
        let small = c.to_lowercase().next().unwrap_or(c);
        sum += if c == '’' && is_inside_word {
            if is_elision(&characters[..at], &characters[at + 1..]) { 2 } else { 1 }
        } else if QUOTES_AND_DASHES.contains(c) {
            i64::from(!is_inside_word || c == '\u{a0}')
        } else if FREE_SIGNS.contains(c) {
            if is_inside_word { -2 } else { 1 }
        } else if RARE_SIGNS.contains(c) {
            -1
        } else if "¿¡".contains(c) {
            if touches_letter && !follows_letter { 2 } else { -2 }
        } else if c.is_uppercase() && before.is_some_and(char::is_lowercase) {
            -2
        } else if c.is_alphabetic() && touches_letter {
            let is_likely_here = follows_letter || !RARELY_INITIAL.contains(small);
            if COMMON_LETTERS.contains(small) && is_likely_here { 2 } else { 1 }
        } else if c.is_alphabetic() {
            if ONE_LETTER_WORDS.contains(small) { 1 } else { -1 }
        } else if touches_letter {
            -2
        } else {
            -1
        };
    }
    sum
}

/// Whether an apostrophe between these is one that words have inside: `l’été`, `qu’il`, `Foto’s`.
fn is_elision(before: &[char], after: &[char]) -> bool {
    let head = before.iter().rev().take_while(|c| c.is_alphabetic()).count();
    let tail: Vec<char> = after.iter().copied().take_while(|c| c.is_alphabetic()).collect();
    let begins_with_vowel = tail.first().is_some_and(|c| !"bcdfgjklmnpqrstvwxyz".contains(*c));
    let is_french =
        (head == 1 || before.ends_with(&['q', 'u'])) && begins_with_vowel && tail.len() > 1;
    is_french || matches!(tail[..], ['s' | 't'])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts as archives have them, in the languages that both character sets were made for.
    const TEXTS: [&str; 16] = [
        "Zürich, Münster und Straße bei Nacht",
        "Ärzte in Österreich",
        "Café à la plage, été 1998",
        "L’équipe gagne la première manche à Évry",
        "Niños en el jardín, España",
        "¿Qué pasa?",
        "São Paulo, avenida às 18 horas",
        "Über uns",
        "Rødgrød med fløde på Åland",
        "Øresund",
        "Perché è così",
        "© 2001 Jürgen Müller",
        "Naïve façade",
        "Ein „schönes“ Fest – überall",
        "Mère et garçon",
        "Malmö",
    ];

    #[test]
    fn latin_1_and_mac_roman_are_distinguished() {
        for encoding in [WINDOWS_1252, MACINTOSH] {
            for text in TEXTS {
                let (bytes, _, lossy) = encoding.encode(text);
                assert!(!lossy, "{text}");
                assert_eq!(MetadataCharset::Detect.decode(&bytes), text, "{}", encoding.name());
            }
        }
        for text in TEXTS {
            assert_eq!(MetadataCharset::Detect.decode(text.as_bytes()), text);
        }
    }

    #[test]
    fn a_configured_charset_is_used_unless_the_text_is_utf_8() {
        let bytes = [b'c', b'a', b'f', 0x8e];
        assert_eq!(MetadataCharset::MacRoman.decode(&bytes), "café");
        assert_eq!(MetadataCharset::Latin1.decode(&bytes), "cafŽ");
        assert_eq!(MetadataCharset::MacRoman.decode("café".as_bytes()), "café");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = format!("{}ü", "a".repeat(MAX_TEXT_BYTES - 1));
        assert_eq!(cut(long.as_bytes()).len(), MAX_TEXT_BYTES - 1);
        assert_eq!(cut(&vec![0xff; MAX_TEXT_BYTES + 9]).len(), MAX_TEXT_BYTES);
        assert_eq!(cut(b"short"), b"short");
    }

    #[test]
    fn texts_of_one_program_share_a_character_set() {
        // By itself, the second could be either.
        let texts: [&[u8]; 2] = [&[b'c', b'a', b'f', 0x8e, b's'], &[0xc7, b' ', 0xc8]];
        assert_eq!(MetadataCharset::Detect.encoding_of(&texts), MACINTOSH);
    }
}
