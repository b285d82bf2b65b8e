//! Finds what a tokenizer leaves out of a text.

use std::ops::Range;

use tokenizers::{Encoding, ModelWrapper, Tokenizer, TruncationDirection};

use crate::clip::unread_text::UnreadText;

/// Most unknown characters that are listed.
const MAX_UNKNOWN_CHARACTERS: usize = 20;

/// Compares a text with its tokens, which end at index `end`.
pub fn find_unread(
    text: &str,
    encoding: &Encoding,
    end: usize,
    tokenizer: &Tokenizer,
    unknown_ids: &[u32],
) -> UnreadText {
    let offsets = encoding.get_offsets();
    let read = offsets[..=end].iter().filter(|(start, end)| end > start);
    let read_start = read.clone().map(|(start, _)| *start).min().unwrap_or(0);
    let read_end = read.map(|(_, end)| *end).max().unwrap_or(0);
    let is_after_end_token = offsets[end + 1..].iter().any(|(start, end)| end > start);
    let is_too_long = !encoding.get_overflowing().is_empty();
    let cuts_left = is_too_long
        && tokenizer.get_truncation().is_some_and(|t| t.direction == TruncationDirection::Left);
    let cuts_right = is_after_end_token || (is_too_long && !cuts_left);
    let checked_start = if cuts_left { read_start } else { 0 };
    let checked_end = if cuts_right { read_end } else { text.len() };
    let part = |range: Range<usize>| text.get(range).unwrap_or_default();
    let mut is_known = vec![false; text.len()];
    for (id, (start, end)) in encoding.get_ids().iter().zip(offsets).take(end + 1) {
        let Some(word) = text.get(*start..*end) else { continue };
        // A text may have the name of the token itself.
        let is_named = || tokenizer.id_to_token(*id).as_deref() == Some(word);
        if !unknown_ids.contains(id) || is_named() {
            is_known[*start..*end].fill(true);
        }
    }
    let mut unknown = String::new();
    for (at, c) in part(checked_start..checked_end).char_indices() {
        if !is_known[checked_start + at] && is_visible(c) && !unknown.contains(c) {
            unknown.push(c);
        }
        if unknown.chars().count() >= MAX_UNKNOWN_CHARACTERS {
            break;
        }
    }
    UnreadText {
        head: part(0..checked_start).trim().to_owned(),
        tail: part(checked_end..text.len()).trim().to_owned(),
        is_after_end_token,
        unknown_characters: unknown,
    }
}

/// Returns the ids of the tokens that mean a character outside of the vocabulary.
pub fn unknown_ids(tokenizer: &Tokenizer) -> Vec<u32> {
    let of_model = match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.unk_token.as_deref(),
        _ => None,
    };
    let names = of_model.into_iter().chain(["<unk>", "[UNK]"]);
    names.filter_map(|name| tokenizer.token_to_id(name)).collect()
}

/// Whether a reader would miss a character: not for spaces, and for marks that only join or select the
/// characters around them.
fn is_visible(c: char) -> bool {
    let joins = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{e0000}'..='\u{e0fff}');
    !c.is_whitespace() && !c.is_control() && !joins
}
