//! An embedding in JSON, as requests and events carry it.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use half::f16;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// An embedding that somebody else computed. Its length does not matter, but must not be 0.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum JsonEmbedding {
    /// Base64 of floats of 16 or 32 bits, little-endian; the number of bytes says which.
    Base64(String),
    /// The values.
    Numbers(Vec<f32>),
}

impl JsonEmbedding {
    /// Returns the embedding at unit length. The error says what is wrong, as the end of a sentence.
    pub fn to_unit_vector(&self, dimension: usize) -> Result<Vec<f32>, String> {
        let values = match self {
            Self::Numbers(values) if values.len() == dimension => Cow::Borrowed(values),
            Self::Numbers(values) => {
                return Err(format!(
                    "has {} numbers; an embedding of this model has {dimension}",
                    values.len()
                ));
            }
            Self::Base64(text) => Cow::Owned(decode_base64(text, dimension)?),
        };
        if let Some(i) = values.iter().position(|value| !value.is_finite()) {
            return Err(format!("value {i} is not a finite number"));
        }
        let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        if squares == 0.0 {
            return Err("has length 0 and therefore no direction".into());
        }
        let length = squares.sqrt();
        Ok(values.iter().map(|value| (f64::from(*value) / length) as f32).collect())
    }
}

fn decode_base64(text: &str, dimension: usize) -> Result<Vec<f32>, String> {
    let bytes = STANDARD.decode(text).map_err(|error| format!("is not base64: {error}"))?;
    if bytes.len() == 2 * dimension {
        let (halves, _) = bytes.as_chunks();
        Ok(halves.iter().map(|half| f16::from_le_bytes(*half).to_f32()).collect())
    } else if bytes.len() == 4 * dimension {
        let (floats, _) = bytes.as_chunks();
        Ok(floats.iter().map(|float| f32::from_le_bytes(*float)).collect())
    } else {
        Err(format!(
            "has {} bytes; {dimension} values have {} (f16) or {} (f32)",
            bytes.len(),
            2 * dimension,
            4 * dimension
        ))
    }
}

impl<'de> Deserialize<'de> for JsonEmbedding {
    /// Reads either form without a copy of each number, of which a request may have millions.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EmbeddingVisitor;
        impl<'de> Visitor<'de> for EmbeddingVisitor {
            type Value = JsonEmbedding;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("numbers, or base64 of floats of 16 or 32 bits")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<JsonEmbedding, E> {
                Ok(JsonEmbedding::Base64(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<JsonEmbedding, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = seq.next_element()? {
                    values.push(value);
                }
                Ok(JsonEmbedding::Numbers(values))
            }
        }
        deserializer.deserialize_any(EmbeddingVisitor)
    }
}

impl JsonSchema for JsonEmbedding {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Embedding".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string", "contentEncoding": "base64" },
                { "type": "array", "items": { "type": "number" } },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: serde_json::Value) -> Result<Vec<f32>, String> {
        let embedding: JsonEmbedding =
            serde_json::from_value(json).map_err(|error| error.to_string())?;
        embedding.to_unit_vector(2)
    }

    #[test]
    fn all_forms_of_an_embedding_are_read_at_unit_length() {
        let halves = [3.0, -4.0].map(|value| f16::from_f32(value).to_le_bytes()).concat();
        let floats = [3f32, -4.0].map(f32::to_le_bytes).concat();
        for json in
            [json!([3, -4.0]), json!(STANDARD.encode(halves)), json!(STANDARD.encode(floats))]
        {
            assert_eq!(read(json).unwrap(), [0.6, -0.8]);
        }
    }

    #[test]
    fn what_is_no_embedding_is_refused_with_the_reason() {
        let nan = STANDARD.encode([f32::NAN, 1.0].map(f32::to_le_bytes).concat());
        for (json, reason) in [
            (json!([1]), "has 1 numbers; an embedding of this model has 2"),
            (json!("AAA="), "has 2 bytes; 2 values have 4 (f16) or 8 (f32)"),
            (json!("A?"), "is not base64"),
            (json!(nan), "value 0 is not a finite number"),
            (json!([0, 1e39]), "value 1 is not a finite number"),
            (json!([0, 0]), "has length 0"),
            (json!([1, "2"]), "expected f32"),
            (json!(7), "expected numbers, or base64"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
