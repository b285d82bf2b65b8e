//! A checkpoint of which one file has arbitrary bytes: it is loaded, or rejected with an error.
//!
//! The first byte chooses the file and the model; the rest is the file's content. Of the weights it
//! is only the header, which is followed by the fixture's tensor data.

#![no_main]

#[path = "../panic_filter.rs"]
mod panic_filter;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bsap::clip::{ClipModel, ModelOptions};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const WEIGHTS_FILE: &str = "model.safetensors";
const CHECKPOINT_FILES: [&str; 5] = [
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    WEIGHTS_FILE,
    "tokenizer_config.json",
];

static TEMP_FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    // In memory if possible, because the files are written for every input.
    let shared = Path::new("/dev/shm");
    let parent = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(parent).expect("a folder")
});

fn fixture_file(model: &str, file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures")).join(model).join(file)
}

/// Returns the tensor data of a file of weights, without its header.
fn tensor_data(weights: &[u8]) -> &[u8] {
    let (length, rest) = weights.split_first_chunk::<8>().expect("a length");
    &rest[u64::from_le_bytes(*length) as usize..]
}

// The library panics at some files that are no tokenizer.json; bsap catches these panics.
fuzz_target!(init: panic_filter::ignore_panics_of("tokenizers"), |data: &[u8]| {
    let Some((selector, content)) = data.split_first() else { return };
    let fuzzed_file = CHECKPOINT_FILES[usize::from(*selector & 7) % CHECKPOINT_FILES.len()];
    let model = if selector & 8 == 0 { "clip-gelu" } else { "siglip" };
    for file in CHECKPOINT_FILES {
        let (from, to) = (fixture_file(model, file), TEMP_FOLDER.path().join(file));
        if file == fuzzed_file {
            let mut content = content.to_vec();
            if file == WEIGHTS_FILE {
                content.extend_from_slice(tensor_data(&std::fs::read(from).expect("the fixture")));
            }
            std::fs::write(to, content).expect("written");
        } else if from.exists() {
            std::fs::copy(from, to).expect("copied");
        } else {
            let _ = std::fs::remove_file(to);
        }
    }
    let checkpoint = TEMP_FOLDER.path().display().to_string();
    if let Err(error) =
        ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() })
    {
        assert!(!error.to_string().is_empty());
    }
});
