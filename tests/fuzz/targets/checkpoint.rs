//! A checkpoint of which one file is any bytes: loaded, or refused by name.
//!
//! The first byte says which file, and of which model; the rest is its content. Of the weights it is
//! the header, before the fixture's numbers.

#![no_main]

#[path = "../caught.rs"]
mod caught;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bsap::clip::{Clip, Options};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const FILES: [&str; 5] =
    ["config.json", "preprocessor_config.json", "tokenizer.json", WEIGHTS, "tokenizer_config.json"];

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let shared = Path::new("/dev/shm");
    let place = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(place).expect("a folder")
});

fn good(model: &str, file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures")).join(model).join(file)
}

/// The numbers of a file of weights, without its header.
fn numbers(weights: &[u8]) -> &[u8] {
    let (length, rest) = weights.split_first_chunk::<8>().expect("a length");
    &rest[u64::from_le_bytes(*length) as usize..]
}

// At a tokenizer.json that is none.
fuzz_target!(init: caught::pass_over("tokenizers"), |data: &[u8]| {
    let Some((which, content)) = data.split_first() else { return };
    let chosen = FILES[usize::from(*which & 7) % FILES.len()];
    let model = if which & 8 == 0 { "clip-gelu" } else { "siglip" };
    for file in FILES {
        let (from, to) = (good(model, file), FOLDER.path().join(file));
        if file == chosen {
            let mut content = content.to_vec();
            if file == WEIGHTS {
                content.extend_from_slice(numbers(&std::fs::read(from).expect("the fixture")));
            }
            std::fs::write(to, content).expect("written");
        } else if from.exists() {
            std::fs::copy(from, to).expect("copied");
        } else {
            let _ = std::fs::remove_file(to);
        }
    }
    let checkpoint = FOLDER.path().display().to_string();
    if let Err(error) = Clip::load(&Options { checkpoint, ..Options::default() }) {
        assert!(!error.to_string().is_empty());
    }
});
