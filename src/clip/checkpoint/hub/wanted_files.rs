//! Which files of a repository a checkpoint may need, and whether a snapshot has enough of them.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::cache::{RepoCache, is_plain_name};

/// Lists the folders of a model of sentence-transformers.
pub const MODULES_FILE: &str = "modules.json";
/// Further files of a model of sentence-transformers that can change a number.
pub const SENTENCE_TRANSFORMERS_FILES: [&str; 2] =
    ["config_sentence_transformers.json", "sentence_bert_config.json"];
/// Describe the architecture; a checkpoint has at least one of them.
pub const CONFIG_FILES: [&str; 2] = ["config.json", "open_clip_config.json"];
/// Further files besides the weights that can change a number.
pub const SMALL_FILES: [&str; 10] = [
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
];
/// The weights of the layouts of `transformers` and of `open_clip`.
const WEIGHT_FILES: [&str; 2] = ["model.safetensors", "open_clip_model.safetensors"];
/// Weights that are refused, to be named in the message: code can hide in them.
pub const PICKLED_WEIGHTS: [&str; 2] = ["pytorch_model.bin", "open_clip_pytorch_model.bin"];
/// Most files that weights may be divided into.
const MAX_SHARDS: usize = 1000;

/// Returns the path of a file below a folder of the repository; its root is "".
pub fn join_name(folder: &str, file: &str) -> String {
    if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") }
}

/// Reads `modules.json` of sentence-transformers: the folder of the model, the root being "". The error
/// says what is wrong with it.
pub fn read_module_folder(file: &Path) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Module {
        path: String,
    }
    let invalid = |e: String| format!("{}: {e}", file.display());
    let bytes = fs::read(file).map_err(|e| invalid(e.to_string()))?;
    let modules: Vec<Module> =
        serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
    let folder = modules.first().map(|module| module.path.clone()).unwrap_or_default();
    if folder.is_empty() || is_plain_name(&folder) {
        return Ok(folder);
    }
    Err(invalid(format!("path {folder:?} is no folder of the repository")))
}

/// Reads the names of the weights from their index. The error says what is wrong with it.
pub fn read_shards(index: &Path) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: serde_json::Map<String, Value>,
    }
    let invalid = |e: String| format!("{}: {e}", index.display());
    let bytes = fs::read(index).map_err(|e| invalid(e.to_string()))?;
    let read: Index = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
    let mut shards = Vec::new();
    for name in read.weight_map.values() {
        let name = name.as_str().filter(|name| is_plain_name(name));
        let name = name.ok_or_else(|| invalid("weight_map names no files".into()))?;
        if !shards.iter().any(|shard| shard == name) {
            shards.push(name.to_owned());
        }
        if shards.len() > MAX_SHARDS {
            return Err(invalid(format!("weight_map has more than {MAX_SHARDS} files")));
        }
    }
    Ok(shards)
}

/// Returns the names that the weights of a checkpoint may have, in the order in which they are looked for.
/// Many repositories have both layouts; that of `open_clip` counts if `transformers` does not read the
/// checkpoint without code of the repository's own.
pub fn weight_files(folder: &Path) -> [&'static str; 2] {
    let config = fs::read(folder.join(CONFIG_FILES[0])).ok();
    let config = config.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let has_own_code = config.is_none_or(|config| !config["auto_map"].is_null());
    let [transformers, open_clip] = WEIGHT_FILES;
    if has_own_code && folder.join(CONFIG_FILES[1]).is_file() {
        [open_clip, transformers]
    } else {
        [transformers, open_clip]
    }
}

/// Returns the name of the file that lists weights that are divided into several files.
pub fn weight_index(weights: &str) -> String {
    format!("{weights}.index.json")
}

/// What a snapshot in the cache has of a checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub enum SnapshotState {
    /// All that the repository has of what a checkpoint may need.
    Complete,
    /// Enough for most checkpoints, but not every name was asked for. Caches of other tools are so.
    Usable,
    /// This file is missing or damaged.
    Lacks(String),
}

/// Compares a snapshot with what a checkpoint may need.
pub fn inspect_snapshot(cache: &RepoCache, commit: &str) -> SnapshotState {
    let has = |name: &str| cache.has_file(commit, name);
    let snapshot = cache.snapshot(commit);
    let folder = if has(MODULES_FILE) {
        match read_module_folder(&snapshot.join(MODULES_FILE)) {
            Ok(folder) => folder,
            Err(_) => return SnapshotState::Lacks(MODULES_FILE.into()),
        }
    } else {
        String::new()
    };
    let in_folder = |name: &str| join_name(&folder, name);
    let has_any = |names: &[&str]| names.iter().any(|name| has(&in_folder(name)));
    let [config, open_clip_config] = CONFIG_FILES;
    if !has_any(&CONFIG_FILES) {
        return SnapshotState::Lacks(in_folder(config));
    }
    if !has_any(&["preprocessor_config.json", "processor_config.json", open_clip_config]) {
        return SnapshotState::Lacks(in_folder("preprocessor_config.json"));
    }
    if !has_any(&["tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model"]) {
        return SnapshotState::Lacks(in_folder("tokenizer.json"));
    }
    let weights = weight_files(&snapshot.join(&folder));
    let lacking = weights.map(|weights| {
        let index = in_folder(&weight_index(weights));
        if has(&in_folder(weights)) {
            return None;
        }
        if !has(&index) {
            return Some(in_folder(weights));
        }
        match read_shards(&snapshot.join(&index)) {
            Ok(shards) => shards.iter().map(|s| in_folder(s)).find(|shard| !has(shard)),
            Err(_) => Some(index),
        }
    });
    if let [Some(missing), Some(_)] = lacking {
        return SnapshotState::Lacks(missing);
    }
    let known = |name: &String| has(name) || cache.lacks_file(commit, name);
    let small = CONFIG_FILES.iter().chain(&SMALL_FILES).map(|name| in_folder(name));
    if small.chain([MODULES_FILE.to_owned()]).all(|name| known(&name)) {
        SnapshotState::Complete
    } else {
        SnapshotState::Usable
    }
}
