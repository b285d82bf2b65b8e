//! Built-in texts that match no image: unrelated sentences and gibberish.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

/// Texts about things that no picture shows, one per line.
const UNRELATED_TEXTS: &str = include_str!("../../../models/no-match/unrelated.txt");
/// Number of gibberish texts.
const GIBBERISH_COUNT: usize = 200;

/// A text that matches no image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoMatchProbe {
    /// The text.
    pub text: String,
    /// Why it matches no image.
    pub kind: NoMatchKind,
}

/// Kinds of texts that match no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NoMatchKind {
    /// Whole sentences about things that no picture shows.
    Unrelated,
    /// Text in no language.
    Gibberish,
    /// Queries that were judged to match nothing. They are worded like the catalogue and are
    /// therefore the hardest to detect.
    Absent,
}

impl NoMatchKind {
    /// All kinds, in the order of reports.
    pub const ALL: [Self; 3] = [Self::Unrelated, Self::Gibberish, Self::Absent];

    /// Returns the name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unrelated => "unrelated",
            Self::Gibberish => "gibberish",
            Self::Absent => "absent",
        }
    }
}

/// Returns the built-in probes, which are the same every time.
pub fn builtin_no_match_probes() -> Vec<NoMatchProbe> {
    let unrelated = UNRELATED_TEXTS.lines().map(str::trim).filter(|line| !line.is_empty());
    let unrelated =
        unrelated.map(|text| NoMatchProbe { text: text.to_owned(), kind: NoMatchKind::Unrelated });
    let rng = &mut ChaCha8Rng::seed_from_u64(20);
    let gibberish = (0..GIBBERISH_COUNT).map(|index| NoMatchProbe {
        text: generate_gibberish(index, rng),
        kind: NoMatchKind::Gibberish,
    });
    unrelated.chain(gibberish.collect::<Vec<_>>()).collect()
}

/// Generates, in turn by `index`, words of random letters, words of made-up syllables, keys of the
/// home row, signs and digits, or words of one or two letters.
fn generate_gibberish(index: usize, rng: &mut ChaCha8Rng) -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz";
    const CONSONANTS: &[u8] = b"bcdfghjklmnprstvwz";
    const VOWELS: &[u8] = b"aeiou";
    const HOME_ROW_KEYS: &[u8] = b"asdfghjkl";
    const SIGNS: &[u8] = b"0123456789#?!%$-_/";
    fn random_string(
        rng: &mut ChaCha8Rng,
        characters: &[u8],
        min_length: usize,
        max_length: usize,
    ) -> String {
        let length = rng.random_range(min_length..=max_length);
        let random_char = |_| char::from(characters[rng.random_range(0..characters.len())]);
        (0..length).map(random_char).collect()
    }
    fn random_words(
        rng: &mut ChaCha8Rng,
        max_words: usize,
        word: fn(&mut ChaCha8Rng) -> String,
    ) -> String {
        let count = rng.random_range(1..=max_words);
        (0..count).map(|_| word(rng)).collect::<Vec<_>>().join(" ")
    }
    match index % 5 {
        0 => random_words(rng, 4, |rng| random_string(rng, LETTERS, 3, 9)),
        1 => random_words(rng, 4, |rng| {
            let syllables = rng.random_range(2..=4);
            let syllable =
                |_| random_string(rng, CONSONANTS, 1, 1) + &random_string(rng, VOWELS, 1, 1);
            (0..syllables).map(syllable).collect()
        }),
        2 => random_words(rng, 2, |rng| random_string(rng, HOME_ROW_KEYS, 4, 10)),
        3 => random_string(rng, SIGNS, 5, 14),
        _ => random_words(rng, 9, |rng| random_string(rng, LETTERS, 1, 2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn probes_are_many_distinct_and_the_same_every_time() {
        let all = builtin_no_match_probes();
        assert_eq!(all, builtin_no_match_probes());
        let texts: BTreeSet<&str> = all.iter().map(|probe| probe.text.as_str()).collect();
        assert_eq!(texts.len(), all.len());
        assert!(all.len() >= 300, "{}", all.len());
    }
}
