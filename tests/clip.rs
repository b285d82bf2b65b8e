//! Small checkpoints with random weights, compared with the results of Hugging Face transformers and
//! PIL (`tests/parity/fixtures.py`), and checkpoints that must be rejected.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use bsap::clip::{
    ClipError, ClipModel, DeviceChoice, Encoders, ModelOptions, Pixels, Precision, run_self_test,
};
use bsap::ingest::decode::{self, decode_image};
use serde_json::Value;

/// A tensor that every fixture has.
const SAMPLE_TENSOR: &str = "vision_model.encoder.layers.1.mlp.fc1.weight";
const FIXTURE_MODELS: [&str; 3] = ["clip-quick-gelu", "clip-gelu", "siglip"];

fn fixture_folder() -> PathBuf {
    PathBuf::from("tests/fixtures")
}

fn load_checkpoint(checkpoint: &Path) -> Result<ClipModel, ClipError> {
    let checkpoint = checkpoint.display().to_string();
    ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() })
}

fn load_expected_outputs(model: &str) -> Value {
    let text = std::fs::read_to_string(fixture_folder().join(model).join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Returns the largest difference of a value between an embedding and that of the reference.
fn max_difference(embedding: &[f32], reference: &Value) -> f64 {
    let reference = reference.as_array().unwrap();
    assert_eq!(embedding.len(), reference.len());
    let pairs = embedding.iter().zip(reference);
    pairs.map(|(a, b)| (f64::from(*a) - b.as_f64().unwrap()).abs()).fold(0.0, f64::max)
}

fn preprocess_file(file: &Path, clip: &ClipModel) -> Pixels {
    let picture =
        decode_image(&std::fs::read(file).unwrap(), &decode::DecodeOptions::default()).unwrap();
    clip.preprocess_image(&picture).unwrap()
}

#[test]
fn texts_have_the_tokens_and_embeddings_of_the_reference() {
    for model in FIXTURE_MODELS {
        let clip = load_checkpoint(&fixture_folder().join(model)).unwrap();
        for case in load_expected_outputs(model)["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            assert_eq!(clip.tokenise(text).unwrap(), tokens, "{model}: {text:?}");
            let embedding = &clip.embed_texts(&[text]).unwrap()[0];
            let difference = max_difference(embedding, &case["embedding"]);
            assert!(difference < 1e-5, "{model}: {text:?} differs by {difference}");
        }
    }
}

#[test]
fn pictures_have_the_pixels_and_embeddings_of_the_reference() {
    for model in FIXTURE_MODELS {
        let clip = load_checkpoint(&fixture_folder().join(model)).unwrap();
        for case in load_expected_outputs(model)["images"].as_array().unwrap() {
            let file = case["file"].as_str().unwrap();
            let ours = preprocess_file(&fixture_folder().join("pictures").join(file), &clip);
            let square = fixture_folder().join(model).join(case["pixels"].as_str().unwrap());
            let theirs =
                decode_image(&std::fs::read(square).unwrap(), &decode::DecodeOptions::default());
            let theirs = theirs.unwrap().into_raw();
            let worst = ours.0.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert_eq!(ours.0.len(), theirs.len());
            assert!(worst <= 1, "{model}: {file}: a pixel differs by {worst}");
            // The encoders are compared on the pixels of the reference.
            let embedding = &clip.embed_images(&[Pixels(theirs)]).unwrap()[0];
            let difference = max_difference(embedding, &case["embedding"]);
            assert!(difference < 1e-5, "{model}: {file} differs by {difference}");
        }
    }
}

#[test]
fn bf16_on_the_cpu_stays_close_to_f32() {
    let dot_product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    for model in FIXTURE_MODELS
        .map(|model| fixture_folder().join(model))
        .into_iter()
        .chain(["models/demo".into()])
    {
        let checkpoint = model.display().to_string();
        let options =
            ModelOptions { checkpoint, device: DeviceChoice::Cpu, ..ModelOptions::default() };
        let whole = ClipModel::load(&options).unwrap();
        let reduced = ClipModel::load(&ModelOptions { dtype: Precision::Bf16, ..options }).unwrap();
        let folder = std::fs::read_dir(fixture_folder().join("pictures")).unwrap();
        let pictures: Vec<Pixels> =
            folder.map(|f| preprocess_file(&f.unwrap().path(), &whole)).collect();
        let texts = ["a red mug on a table", "a", "blue shoes, side view", "an old map of a city"];
        let [a, b] = [&whole, &reduced].map(|clip| {
            let mut all = clip.embed_images(&pictures).unwrap();
            all.extend(clip.embed_texts(&texts).unwrap());
            all
        });
        for (a, b) in a.iter().zip(&b) {
            let cosine = dot_product(a, b);
            assert!(cosine > 0.999, "{}: {cosine}", model.display());
        }
        assert_ne!(a, b, "the precisions differ");
        let single = reduced.embed_images(&pictures[..1]).unwrap();
        let worst = single[0].iter().zip(&b[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{}: a batch differs by {worst}", model.display());
    }
}

#[test]
fn a_batch_gives_what_single_inputs_give() {
    for model in FIXTURE_MODELS {
        let clip = load_checkpoint(&fixture_folder().join(model)).unwrap();
        assert!(run_self_test(&clip).unwrap().max_batch_difference < 1e-6, "{model}");
    }
}

/// Returns the error of loading a copy of a fixture in which one file was changed or removed.
#[track_caller]
fn load_error_with_changed_file(
    model: &str,
    file: &str,
    change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>,
) -> String {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture_folder().join(model)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join(file);
    match change(std::fs::read(&path).unwrap()) {
        Some(bytes) => std::fs::write(&path, bytes).unwrap(),
        None => std::fs::remove_file(&path).unwrap(),
    }
    let error = load_checkpoint(copy.path()).map(|_| ()).expect_err("it was accepted");
    let text = error.to_string();
    assert!(text.contains(file), "{text} does not name {file}");
    text
}

/// Returns a change that replaces the first `from` by `to`.
fn replace_text(from: &str, to: &str) -> impl FnOnce(Vec<u8>) -> Option<Vec<u8>> {
    move |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(from), "{from}");
        Some(text.replacen(from, to, 1).into_bytes())
    }
}

/// Returns a change of the header of a safetensors file, which is its length followed by JSON.
fn edit_weights_header(change: impl FnOnce(&mut Value)) -> impl FnOnce(Vec<u8>) -> Option<Vec<u8>> {
    move |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let mut text = header.to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let mut changed = (text.len() as u64).to_le_bytes().to_vec();
        changed.extend_from_slice(text.as_bytes());
        changed.extend_from_slice(&bytes[8 + length..]);
        Some(changed)
    }
}

#[test]
fn an_unsuitable_checkpoint_is_rejected_by_file_tensor_and_shapes() {
    let config =
        |from, to| load_error_with_changed_file("clip-gelu", "config.json", replace_text(from, to));
    let text = config("\"model_type\": \"clip\"", "\"model_type\": \"blip\"");
    assert!(text.contains("blip") && text.contains("clip and siglip"), "{text}");
    let text = config("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"");
    assert!(text.contains("relu"), "{text}");

    let shape = |header: &mut Value| {
        header[SAMPLE_TENSOR]["shape"] = serde_json::json!([32, 48]);
    };
    let text =
        load_error_with_changed_file("clip-gelu", "model.safetensors", edit_weights_header(shape));
    for word in [SAMPLE_TENSOR, "[48, 32]", "[32, 48]"] {
        assert!(text.contains(word), "{text}");
    }
    let rename = |header: &mut Value| {
        let tensor = header.as_object_mut().unwrap().shift_remove(SAMPLE_TENSOR).unwrap();
        header["renamed"] = tensor;
    };
    let text =
        load_error_with_changed_file("clip-gelu", "model.safetensors", edit_weights_header(rename));
    assert!(text.contains(SAMPLE_TENSOR), "{text}");
    load_error_with_changed_file("siglip", "model.safetensors", |bytes| {
        Some(bytes[..100].to_vec())
    });
    load_error_with_changed_file("siglip", "tokenizer_config.json", |_| None);
    load_error_with_changed_file(
        "siglip",
        "tokenizer_config.json",
        replace_text("\"pad_token\": \"</s>\"", "\"pad_token\": \"<no>\""),
    );
    load_error_with_changed_file(
        "clip-gelu",
        "preprocessor_config.json",
        replace_text("\"height\": 32", "\"height\": 31"),
    );

    load_error_with_changed_file("siglip", "tokenizer.json", |_| Some(b"6".into()));
    load_error_with_changed_file(
        "siglip",
        "tokenizer.json",
        replace_text("\"normalizer\"", "\"other\""),
    );
    // The library would panic at the following two.
    load_error_with_changed_file("clip-gelu", "tokenizer.json", |_| {
        Some(b"{\"version\": \"1.0\", \"decoder\": {\"a\"}}".into())
    });
    load_error_with_changed_file("siglip", "tokenizer.json", |bytes| {
        let mut written: Value = serde_json::from_slice(&bytes).unwrap();
        written["decoder"] = 5.into();
        Some(written.to_string().into())
    });
    let other = std::fs::read(fixture_folder().join("siglip/tokenizer.json")).unwrap();
    let text = load_error_with_changed_file("clip-gelu", "tokenizer.json", |_| Some(other));
    assert!(text.contains("Unigram"), "{text}");
    let text = load_error_with_changed_file("clip-gelu", "tokenizer.json", |bytes| {
        let mut written: Value = serde_json::from_slice(&bytes).unwrap();
        let vocab = written["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|_, id| id.as_u64() < Some(100));
        written["model"]["merges"] = Value::Array(Vec::new());
        Some(written.to_string().into())
    });
    assert!(text.contains("514"), "{text}");
}

#[path = "clip/hub.rs"]
mod hub;
