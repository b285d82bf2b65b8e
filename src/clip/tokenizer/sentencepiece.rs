//! `spiece.model`: the pieces of a SentencePiece model and its rules of normalisation.
//!
//! The file is a message of Protocol Buffers (`sentencepiece_model.proto`). Only a few of its fields
//! matter here, so that its wire format is read directly.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// Kinds of pieces of `ModelProto.SentencePiece.Type` that the unigram model treats otherwise than all
/// others.
const USER_DEFINED_PIECE: u64 = 4;
const UNUSED_PIECE: u64 = 5;
/// `TrainerSpec.ModelType` of unigram models.
const UNIGRAM_MODEL: u64 = 1;

/// What is read of a SentencePiece model.
struct SentencePieceModel {
    pieces: Vec<(String, f32)>,
    unknown_id: u64,
    byte_fallback: bool,
    charsmap: Vec<u8>,
}

/// The value of one field of a message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Iterates over the fields of a message; `None` in the place of a field means that the rest cannot be
/// read.
struct Message<'a>(&'a [u8]);

impl<'a> Iterator for Message<'a> {
    type Item = Option<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.read_field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Message<'a> {
    fn read_field(&mut self) -> Option<(u64, Field<'a>)> {
        let tag = self.read_varint()?;
        let field = match tag & 7 {
            0 => Field::Number(self.read_varint()?),
            1 => Field::Bytes(self.take(8)?),
            2 => {
                let length = self.read_varint()?;
                Field::Bytes(self.take(usize::try_from(length).ok()?)?)
            }
            5 => Field::Bytes(self.take(4)?),
            _ => return None,
        };
        Some((tag >> 3, field))
    }

    fn read_varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

impl SentencePieceModel {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let unreadable = || "is no SentencePiece model".to_owned();
        let mut model =
            Self { pieces: Vec::new(), unknown_id: 0, byte_fallback: false, charsmap: Vec::new() };
        for field in Message(bytes) {
            match field.ok_or_else(unreadable)? {
                (1, Field::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
                (2, Field::Bytes(trainer)) => {
                    for field in Message(trainer) {
                        match field.ok_or_else(unreadable)? {
                            (3, Field::Number(kind)) if kind != UNIGRAM_MODEL => {
                                return Err(format!(
                                    "has model_type {kind}, which is not supported, only unigram; save the tokenizer as tokenizer.json"
                                ));
                            }
                            (35, Field::Number(fallback)) => model.byte_fallback = fallback != 0,
                            (40, Field::Number(id)) => model.unknown_id = id,
                            _ => {}
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    for field in Message(normalizer) {
                        if let (2, Field::Bytes(rules)) = field.ok_or_else(unreadable)? {
                            model.charsmap = rules.to_vec();
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err(unreadable());
        }
        Ok(model)
    }
}

fn parse_piece(bytes: &[u8]) -> Result<(String, f32), String> {
    let unreadable = || "has a piece that cannot be read".to_owned();
    let (mut piece, mut score) = (String::new(), 0.0);
    for field in Message(bytes) {
        match field.ok_or_else(unreadable)? {
            (1, Field::Bytes(text)) => {
                piece = String::from_utf8(text.to_vec()).map_err(|_| unreadable())?;
            }
            (2, Field::Bytes(&[a, b, c, d])) => score = f32::from_le_bytes([a, b, c, d]),
            (3, Field::Number(kind @ (USER_DEFINED_PIECE | UNUSED_PIECE))) => {
                return Err(format!(
                    "has the piece {piece:?} of type {kind}, which is not supported; save the tokenizer as tokenizer.json"
                ));
            }
            _ => {}
        }
    }
    if score.is_finite() { Ok((piece, score)) } else { Err(unreadable()) }
}

/// Returns the definition of the tokenizer in `spiece.model`, as `tokenizer.json` has it. Every text ends
/// with `end_token`.
pub fn define_sentencepiece_tokenizer(bytes: &[u8], end_token: &str) -> Result<Value, String> {
    let model = SentencePieceModel::parse(bytes)?;
    let end = model.pieces.iter().position(|(piece, _)| piece == end_token);
    let end = end.ok_or_else(|| format!("has no piece {end_token:?} (eos_token)"))?;
    let mut normalizers = Vec::new();
    if !model.charsmap.is_empty() {
        normalizers.push(
            json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&model.charsmap)}),
        );
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": end_token, "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                (end_token): {"id": end_token, "ids": [end], "tokens": [end_token]},
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": model.unknown_id,
            "vocab": model.pieces,
            "byte_fallback": model.byte_fallback,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_files_are_refused() {
        for bytes in
            [&b""[..], b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x07"]
        {
            assert!(SentencePieceModel::parse(bytes).is_err(), "{bytes:?}");
        }
        // One piece "a" with the score 1, and a trainer of byte-pair encoding.
        let piece = b"\x0a\x08\x0a\x01a\x15\0\0\x80\x3f";
        let model = SentencePieceModel::parse(piece).unwrap();
        assert_eq!(model.pieces, [("a".to_owned(), 1.0)]);
        let byte_pairs = [&piece[..], b"\x12\x02\x18\x02"].concat();
        let error = SentencePieceModel::parse(&byte_pairs).err().unwrap();
        assert!(error.contains("model_type 2"), "{error}");
        let user_defined = b"\x0a\x0a\x0a\x01a\x15\0\0\x80\x3f\x18\x04";
        assert!(SentencePieceModel::parse(user_defined).is_err());
        assert!(define_sentencepiece_tokenizer(piece, "</s>").unwrap_err().contains("</s>"));
    }
}
