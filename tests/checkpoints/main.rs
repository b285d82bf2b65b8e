//! Checkpoints in the layouts of the wild: each gives the embeddings of the reference, or is refused by
//! the name of what is not supported. `tests/parity/matrix.py` computes what is expected.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod weights;

use std::path::Path;
use std::process::Command;

use bsap::clip::{ClipModel, Encoders, ModelOptions};
use bsap::ingest::decode::{DecodeOptions, decode_image};
use checkpoint::{fixture, read_matrix, write_checkpoint};
use serde_json::Value;

/// Largest difference of a value of an embedding from the reference.
const TOLERANCE: f64 = 1e-5;

fn load(folder: &Path) -> Result<ClipModel, String> {
    let checkpoint = folder.display().to_string();
    ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() })
        .map_err(|error| error.to_string())
}

fn max_difference(embeddings: &[Vec<f32>], expected: &Value) -> f64 {
    let expected: Vec<Vec<f64>> = serde_json::from_value(expected.clone()).unwrap();
    assert_eq!(embeddings.len(), expected.len());
    let pairs = embeddings.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// Returns what is wrong with a row that should equal the reference.
fn compare(clip: &ClipModel, matrix: &Value, expected: &Value) -> Result<(), String> {
    let texts: Vec<&str> =
        matrix["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let pictures = matrix["pictures"].as_array().unwrap().iter().map(|name| {
        let file = fixture("checkpoints").join(name.as_str().unwrap());
        let picture = decode_image(&std::fs::read(file).unwrap(), &DecodeOptions::default());
        clip.preprocess_image(&picture.unwrap()).unwrap()
    });
    let images = clip.embed_images(&pictures.collect::<Vec<_>>()).map_err(|e| e.to_string())?;
    let texts = clip.embed_texts(&texts).map_err(|e| e.to_string())?;
    let differences =
        [max_difference(&texts, &expected["texts"]), max_difference(&images, &expected["images"])];
    if differences.iter().all(|difference| *difference < TOLERANCE) {
        return Ok(());
    }
    let each = images.iter().zip(expected["images"].as_array().unwrap());
    let each: Vec<String> = each
        .map(|(image, expected)| {
            let one = Value::Array(vec![expected.clone()]);
            format!("{:.1e}", max_difference(std::slice::from_ref(image), &one))
        })
        .collect();
    Err(format!("texts differ by {:.1e}, pictures by {}", differences[0], each.join(", ")))
}

#[test]
fn every_row_equals_the_reference_or_is_refused_by_name() {
    let matrix = read_matrix();
    let (mut wrong, mut equal, mut refused) = (Vec::new(), 0, 0);
    for row in matrix["rows"].as_array().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &matrix, row);
        let words = row["refused"].as_array();
        let result = match (load(folder.path()), words) {
            (Ok(clip), None) => compare(&clip, &matrix, &row["expected"]).map(|()| equal += 1),
            (Ok(_), Some(words)) => Err(format!("it was accepted, without a word of {words:?}")),
            (Err(error), None) => Err(error),
            (Err(error), Some(words)) => {
                // Without the path of the temporary folder, which may contain anything.
                let text = error.replace(&folder.path().display().to_string(), "");
                match words.iter().find(|word| !text.contains(word.as_str().unwrap())) {
                    Some(word) => Err(format!("{text}: does not name {word}")),
                    None => {
                        assert!(!text.contains('\n'), "{text}");
                        refused += 1;
                        Ok(())
                    }
                }
            }
        };
        if let Err(reason) = result {
            wrong.push(format!("{}: {reason}", row["name"].as_str().unwrap()));
        }
    }
    println!("{equal} equal, {refused} refused, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// Runs `bsap model inspect` on a row of the matrix.
fn inspect(name: &str, arguments: &[&str]) -> std::process::Output {
    let matrix = read_matrix();
    let row = matrix["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &matrix, row);
    let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
    command.args(["model", "inspect"]).arg(folder.path()).args(arguments).output().unwrap()
}

#[test]
fn inspect_lists_every_key_as_obeyed_or_ignored() {
    let output = inspect("pictures: unknown key", &["--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["layout"], &report["architecture"]),
        (&"transformers".into(), &"clip".into())
    );
    assert_eq!(report["self_test"]["passed"], true);
    let has =
        |list: &str, key: &str| report[list].as_array().unwrap().iter().any(|listed| listed == key);
    for key in [
        "config.json:text_config.hidden_act",
        "config.json:projection_dim",
        "preprocessor_config.json:resample",
        "preprocessor_config.json:do_rescale",
        "tokenizer_config.json:tokenizer_class",
    ] {
        assert!(has("obeyed", key) && !has("ignored", key), "{key}");
    }
    for key in ["config.json:torch_dtype", "preprocessor_config.json:favourite_colour"] {
        assert!(has("ignored", key) && !has("obeyed", key), "{key}");
    }
    assert!(has("unknown", "preprocessor_config.json:favourite_colour"));
    assert!(!has("unknown", "config.json:torch_dtype"));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let output = inspect("open_clip", &["--json", file.to_str().unwrap()]);
    let written: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(written["layout"], "open_clip");
    assert!(String::from_utf8_lossy(&output.stdout).contains("self-test"));
    let output = inspect("layout: sentence-transformers", &["--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["layout"], "sentence-transformers");
}

#[test]
fn a_refused_checkpoint_ends_with_2_and_one_line_that_names_file_and_key() {
    for (name, words) in [
        ("pictures: do_resize false", ["preprocessor_config.json", "do_resize"]),
        ("config: quantization_config", ["config.json", "quantization_config"]),
        ("weights: NaN", ["model.safetensors", "visual_projection.weight"]),
    ] {
        let output = inspect(name, &["--json"]);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{name}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        for word in words {
            assert!(text.contains(word), "{text}");
        }
    }
}

#[test]
fn a_model_whose_numbers_overflow_fails_its_self_test() {
    let matrix = read_matrix();
    let row = serde_json::json!({"base": "clip", "weights": {"values": {"vision_model.post_layernorm.weight": "3e38"}}});
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &matrix, &row);
    // Every weight is finite, but not the length of an embedding.
    let clip = load(folder.path()).unwrap();
    let error = bsap::clip::run_self_test(&clip).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
}
