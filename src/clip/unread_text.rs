//! What a text encoder does not read of a text.

use serde::Serialize;

use super::model_card::ModelCard;
use crate::diagnosis::redact::redact_addresses;

/// Characters of a part of a text that a message repeats.
const MAX_QUOTED_CHARS: usize = 80;

/// What a text encoder does not read of a text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UnreadText {
    /// What comes before the first token that is read; empty unless the checkpoint cuts texts there.
    pub head: String,
    /// What comes after the last token that is read; empty if all is read.
    pub tail: String,
    /// Whether the tail is not read because a token for the end of a text is before it in the text;
    /// otherwise the text has more tokens than the context length.
    pub is_after_end_token: bool,
    /// Each character that the vocabulary does not have, once.
    pub unknown_characters: String,
}

impl UnreadText {
    /// Says what was not read and why; `None` if all was read.
    pub fn describe(&self, card: &ModelCard) -> Option<String> {
        let mut parts = Vec::new();
        if !self.head.is_empty() {
            let head = quote(&self.head);
            parts.push(format!(
                "it reads {} tokens and not {head}, which comes before them",
                card.context_length
            ));
        }
        if !self.tail.is_empty() {
            let tail = quote(&self.tail);
            parts.push(if self.is_after_end_token {
                format!("it takes a token in the text for its end and does not read {tail}")
            } else {
                format!(
                    "it reads {} tokens and not {tail}, which comes after them",
                    card.context_length
                )
            });
        }
        if !self.unknown_characters.is_empty() {
            let unknown = quote(&self.unknown_characters);
            parts.push(format!("its vocabulary does not have {unknown}"));
        }
        (!parts.is_empty()).then(|| {
            format!("the text encoder of {} did not read all: {}", card.name, parts.join("; "))
        })
    }
}

/// Quotes a text without the secrets of addresses: it is part of answers.
fn quote(text: &str) -> String {
    let text = redact_addresses(text);
    let shortened: String = text.chars().take(MAX_QUOTED_CHARS).collect();
    let dots = if shortened.len() < text.len() { "…" } else { "" };
    format!("“{shortened}{dots}”")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_names_the_parts_and_is_bounded() {
        let card = ModelCard::without_checkpoint("m", 4);
        assert_eq!(UnreadText::default().describe(&card), None);
        let unread = UnreadText { tail: "x".repeat(1_000), ..UnreadText::default() };
        let text = unread.describe(&card).unwrap();
        assert!(text.contains("77 tokens") && text.contains("xx…”") && text.len() < 250, "{text}");
        let unread = UnreadText {
            head: "the".into(),
            tail: "hat".into(),
            is_after_end_token: true,
            unknown_characters: "字".into(),
        };
        let text = unread.describe(&card).unwrap();
        assert!(
            text.contains("“the”") && text.contains("“hat”") && text.contains("“字”"),
            "{text}"
        );
    }
}
