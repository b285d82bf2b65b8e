//! Writes the checkpoints that `tests/fixtures/checkpoints/matrix.json` describes.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::weights::write_weights;

/// Returns the path of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures").join(name)
}

/// Reads a fixture that is JSON.
pub fn read_fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// Merges objects; unlike in RFC 7396, `null` is a value.
fn merge(into: &mut Value, patch: &Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, part) in patch {
                merge(into.entry(key.clone()).or_insert(Value::Null), part);
            }
        }
        (into, patch) => *into = patch.clone(),
    }
}

fn remove_key(value: &mut Value, path: &str) {
    let (parent, key) = match path.rsplit_once('.') {
        Some((parent, key)) => {
            (value.pointer_mut(&format!("/{}", parent.replace('.', "/"))).unwrap(), key)
        }
        None => (value, path),
    };
    parent.as_object_mut().unwrap().remove(key);
}

/// Writes the files of `row` into `folder`.
pub fn write_checkpoint(folder: &Path, matrix: &Value, row: &Value) {
    let mut files: Map<String, Value> =
        matrix["bases"][row["base"].as_str().unwrap()].as_object().unwrap().clone();
    for (name, content) in row["files"].as_object().into_iter().flatten() {
        files.insert(name.clone(), content.clone());
    }
    for (name, content) in files.into_iter().filter(|(_, content)| !content.is_null()) {
        let file = folder.join(&name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        write_file(&file, &name, content, matrix, row);
    }
}

fn write_file(file: &Path, name: &str, mut content: Value, matrix: &Value, row: &Value) {
    let source = |content: &Value, key: &str| content[key].as_str().map(read_fixture);
    if let Some(spec) = content.get_mut("$weights") {
        if !row["weights"].is_null() {
            merge(spec, &row["weights"]);
        }
        return write_weights(file, &matrix["weights"], spec);
    }
    let text = if let Some(text) = content["$text"].as_str() {
        text.to_owned()
    } else if let Some(tokenizer) = source(&content, "$vocab") {
        tokenizer["model"]["vocab"].to_string()
    } else if let Some(tokenizer) = source(&content, "$merges") {
        let merges = tokenizer["model"]["merges"].as_array().unwrap();
        let line =
            |pair: &Value| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        "#version: 0.2\n".to_owned() + &merges.iter().map(line).collect::<String>()
    } else if let Some(tokenizer) = source(&content, "$sentencepiece") {
        return std::fs::write(file, encode_sentencepiece(&tokenizer)).unwrap();
    } else {
        if let Some(copied) = source(&content, "$copy") {
            content = copied;
        } else if let Some(inner) = content.get("$json") {
            content = inner.clone();
        }
        if let Some(patch) = row["patch"].get(name) {
            merge(&mut content, patch);
        }
        for path in row["remove"][name].as_array().into_iter().flatten() {
            remove_key(&mut content, path.as_str().unwrap());
        }
        content.to_string()
    };
    std::fs::write(file, text).unwrap();
}

/// Returns the unigram model of a `tokenizer.json` in the format of SentencePiece.
fn encode_sentencepiece(tokenizer: &Value) -> Vec<u8> {
    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 0x80 {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    }
    let number = |field: u64, value: u64| [varint(field << 3), varint(value)].concat();
    let bytes = |field: u64, value: &[u8]| {
        [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
    };
    let mut model = Vec::new();
    for entry in tokenizer["model"]["vocab"].as_array().unwrap() {
        let (piece, score) = (entry[0].as_str().unwrap(), entry[1].as_f64().unwrap() as f32);
        let kind = match piece {
            "<unk>" => 2,
            "</s>" | "<pad>" => 3,
            _ => 1,
        };
        let fields = [
            bytes(1, piece.as_bytes()),
            [varint(2 << 3 | 5), score.to_le_bytes().to_vec()].concat(),
            number(3, kind),
        ];
        model.extend(bytes(1, &fields.concat()));
    }
    // The kind of model, and the ids of unknown, begin (none), end and padding.
    let minus_one = u64::MAX;
    let trainer = [(3, 1), (40, 2), (41, minus_one), (42, 1), (43, 0)];
    model.extend(bytes(2, &trainer.map(|(field, value)| number(field, value)).concat()));
    let rules = tokenizer["normalizer"]["normalizers"][0]["precompiled_charsmap"].as_str();
    model.extend(bytes(3, &bytes(2, &STANDARD.decode(rules.unwrap()).unwrap())));
    model
}

/// Returns the description of the matrix.
pub fn read_matrix() -> Value {
    let matrix = read_fixture("checkpoints/matrix.json");
    assert_ne!(matrix["rows"], json!([]));
    matrix
}
