//! A checkpoint of which one file is any bytes: loaded, or refused by name.
//!
//! The first byte says which file; the rest is its content.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bsap::clip::{Clip, Options};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const FILES: [&str; 4] =
    ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"];

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let shared = Path::new("/dev/shm");
    let place = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(place).expect("a folder")
});

fn good(file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/clip-gelu")).join(file)
}

fuzz_target!(|data: &[u8]| {
    let Some((which, content)) = data.split_first() else { return };
    let chosen = FILES[usize::from(*which) % FILES.len()];
    for file in FILES {
        let to = FOLDER.path().join(file);
        if file == chosen {
            std::fs::write(to, content).expect("written");
        } else {
            std::fs::copy(good(file), to).expect("copied");
        }
    }
    let checkpoint = FOLDER.path().display().to_string();
    if let Err(error) = Clip::load(&Options { checkpoint, ..Options::default() }) {
        assert!(!error.to_string().is_empty());
    }
});
