//! Which of the layouts of the wild a folder has, and which of its files are read.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::json_file::{convert, invalid, read_object};
use super::key_report::{KeyReport, show_value};
use super::key_tables;
use crate::clip::error::ClipError;

/// Most files that the weights of one checkpoint are divided into.
const MAX_SHARDS: usize = 1_000;

/// Whose layout a checkpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `config.json` and `model.safetensors`, as Hugging Face's `transformers` saves them.
    Transformers,
    /// `modules.json`, which names the folder of a checkpoint of `transformers`.
    SentenceTransformers,
    /// `open_clip_config.json` and `open_clip_model.safetensors`.
    OpenClip,
}

impl Layout {
    /// Returns the name of the layout: that of the library that saves it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transformers => "transformers",
            Self::SentenceTransformers => "sentence-transformers",
            Self::OpenClip => "open_clip",
        }
    }

    /// Returns the file that describes the architecture.
    pub fn model_config_file(self) -> &'static str {
        match self {
            Self::Transformers | Self::SentenceTransformers => "config.json",
            Self::OpenClip => "open_clip_config.json",
        }
    }

    /// Returns the names that the file of the weights may have, the usual one first. Weights in several
    /// files have an index of the same name and `.index.json`.
    pub fn weights_files(self) -> &'static [&'static str] {
        match self {
            Self::Transformers | Self::SentenceTransformers => &["model.safetensors"],
            // A repository with code of its own may have them under the name of transformers.
            Self::OpenClip => &["open_clip_model.safetensors", "model.safetensors"],
        }
    }
}

/// Returns the layout of `folder` and the folder that has its files.
pub fn find_layout(folder: &Path, keys: &mut KeyReport) -> Result<(Layout, PathBuf), ClipError> {
    let modules = folder.join("modules.json");
    if modules.is_file() {
        let inner = read_modules(&modules, keys)?;
        let inner = folder.join(inner);
        for (parent, name, table) in [
            (folder, "config_sentence_transformers.json", key_tables::SENTENCE_TRANSFORMERS),
            (&inner, "sentence_bert_config.json", key_tables::SENTENCE_BERT),
        ] {
            let file = parent.join(name);
            if file.is_file() {
                let (object, _) = read_object(&file)?;
                keys.check(name, "", &object, table).map_err(|reason| invalid(&file, reason))?;
            }
        }
        return Ok((Layout::SentenceTransformers, inner));
    }
    let layout = if !folder.join("open_clip_config.json").is_file() {
        Layout::Transformers
    } else if is_transformers_checkpoint(folder) {
        // Many repositories have both; this one has its preprocessing in full.
        Layout::Transformers
    } else {
        Layout::OpenClip
    };
    Ok((layout, folder.to_owned()))
}

/// Whether `transformers` itself reads the folder: without code of the repository's own, and with weights
/// that are no pickle.
fn is_transformers_checkpoint(folder: &Path) -> bool {
    let has_own_code = read_object(&folder.join("config.json"))
        .map_or(true, |(config, _)| config.get("auto_map").is_some_and(|code| !code.is_null()));
    let has_weights = ["model.safetensors", "model.safetensors.index.json"]
        .iter()
        .any(|file| folder.join(file).is_file());
    !has_own_code && has_weights
}

/// Reads `modules.json`; returns the folder of the CLIP model in it, relative to that of the file.
fn read_modules(file: &Path, keys: &mut KeyReport) -> Result<PathBuf, ClipError> {
    let refused = |reason: String| invalid(file, reason);
    let bytes = super::json_file::read_file(file)?;
    let modules: Vec<Map<String, Value>> =
        serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    let mut inner = None;
    for (index, module) in modules.iter().enumerate() {
        let path = index.to_string();
        keys.check("modules.json", &path, module, key_tables::SENTENCE_TRANSFORMERS_MODULE)
            .map_err(refused)?;
        let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
        match (index, kind.rsplit('.').next().unwrap_or_default()) {
            (0, "CLIPModel" | "Transformer") => {
                let path = module.get("path").and_then(Value::as_str).unwrap_or_default();
                inner = Some(PathBuf::from(path));
            }
            // Embeddings are always of unit length.
            (1.., "Normalize") => {}
            _ => {
                return Err(refused(format!(
                    "{index}.type is {}; only CLIPModel, and after it Normalize, is supported",
                    show_value(&Value::from(kind))
                )));
            }
        }
    }
    let inner = inner.ok_or_else(|| refused("names no module".into()))?;
    if !inner.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(refused(format!("0.path {} is outside of the folder", inner.display())));
    }
    Ok(inner)
}

/// Returns the files of the weights in `folder`, in the order of their names. The error says what there
/// is instead, and how to convert it.
pub fn find_weights(layout: Layout, folder: &Path) -> Result<Vec<PathBuf>, ClipError> {
    for name in layout.weights_files() {
        let single = folder.join(name);
        if single.is_file() {
            return Ok(vec![single]);
        }
        let index = folder.join(format!("{name}.index.json"));
        if index.is_file() {
            let (object, _) = read_object(&index)?;
            let shards = read_shard_names(object).map_err(|reason| invalid(&index, reason))?;
            return Ok(shards.iter().map(|name| folder.join(name)).collect());
        }
    }
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: BTreeSet<String> =
        names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let has_extension = |name: &str, extensions: &[&str]| {
        Path::new(name).extension().is_some_and(|found| extensions.iter().any(|e| found == *e))
    };
    let pickle = names.iter().find(|name| {
        has_extension(name, &["bin", "pt", "pth", "ckpt"]) && *name != "training_args.bin"
    });
    let other = names.iter().find(|name| has_extension(name, &["h5", "msgpack", "onnx", "gguf"]));
    let reason = match (pickle, other) {
        (Some(pickle), _) => format!(
            "is missing, and {pickle} is a pickle, which may run any code when it is read; {}",
            how_to_convert(layout, pickle)
        ),
        (None, Some(other)) => format!(
            "is missing, and {other} cannot be read; save the model in PyTorch with safetensors"
        ),
        (None, None) => "is missing; the weights are read from it alone".into(),
    };
    let usual = layout.weights_files().first().copied().unwrap_or_default();
    Err(invalid(&folder.join(usual), reason))
}

fn how_to_convert(layout: Layout, pickle: &str) -> String {
    match layout {
        Layout::Transformers | Layout::SentenceTransformers => "convert it in Python: transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)".into(),
        Layout::OpenClip => format!(
            "convert it in Python: safetensors.torch.save_file(torch.load(\"{pickle}\", weights_only=True), \"open_clip_model.safetensors\")"
        ),
    }
}

/// Returns the names of the files that an index names, all in the same folder.
fn read_shard_names(mut index: Map<String, Value>) -> Result<BTreeSet<String>, String> {
    let map = index.remove("weight_map").ok_or("has no weight_map")?;
    let map: std::collections::HashMap<String, String> = convert("weight_map", map)?;
    let names: BTreeSet<String> = map.into_values().collect();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(format!("weight_map names {} files, not 1 to {MAX_SHARDS}", names.len()));
    }
    match names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        Some(outside) => Err(format!("weight_map: {outside:?} is no name of a file")),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, content).unwrap();
        }
        folder
    }

    fn layout_of(files: &[(&str, &str)]) -> Result<(Layout, PathBuf), String> {
        let folder = folder_with(files);
        let found = find_layout(folder.path(), &mut KeyReport::default());
        found
            .map(|(layout, inner)| (layout, inner.strip_prefix(folder.path()).unwrap().to_owned()))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn layouts_are_recognised_by_their_files() {
        let module = |path: &str, kind: &str| {
            format!(r#"[{{"idx": 0, "path": "{path}", "type": "{kind}"}}]"#)
        };
        let found = layout_of(&[(
            "modules.json",
            &module("0_CLIPModel", "sentence_transformers.models.CLIPModel"),
        )]);
        assert_eq!(found, Ok((Layout::SentenceTransformers, "0_CLIPModel".into())));
        let found = layout_of(&[("config.json", "{}")]);
        assert_eq!(found, Ok((Layout::Transformers, "".into())));
        let both = [("open_clip_config.json", "{}"), ("config.json", "{}")];
        assert_eq!(layout_of(&both), Ok((Layout::OpenClip, "".into())), "no other weights");
        let weights = ("model.safetensors", "x");
        let found = layout_of(&[both[0], both[1], weights]);
        assert_eq!(found, Ok((Layout::Transformers, "".into())));
        let own_code = ("config.json", r#"{"auto_map": {"AutoModel": "a.B"}}"#);
        assert_eq!(layout_of(&[both[0], own_code, weights]), Ok((Layout::OpenClip, "".into())));

        for (path, kind, word) in [
            ("../other", "models.CLIPModel", "0.path"),
            ("/etc", "models.CLIPModel", "0.path"),
            ("0_Pooling", "sentence_transformers.models.Pooling", "0.type"),
        ] {
            let error = layout_of(&[("modules.json", &module(path, kind))]).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let dense = r#"[{"path": "0", "type": "m.CLIPModel"}, {"path": "1", "type": "m.Dense"}]"#;
        assert!(layout_of(&[("modules.json", dense)]).unwrap_err().contains("1.type"));
        let clip = module("", "m.CLIPModel");
        let prompt = ("config_sentence_transformers.json", r#"{"default_prompt_name": "query"}"#);
        let error = layout_of(&[("modules.json", &clip), prompt]).unwrap_err();
        assert!(error.contains("default_prompt_name"), "{error}");
    }

    #[test]
    fn weights_are_found_or_it_is_said_what_is_there_instead() {
        let weights = |files: &[(&str, &str)]| {
            let folder = folder_with(files);
            find_weights(Layout::Transformers, folder.path())
                .map(|files| files.len())
                .map_err(|e| e.to_string())
        };
        assert_eq!(weights(&[("model.safetensors", "x")]), Ok(1));
        let index = |a: &str| format!(r#"{{"weight_map": {{"a": "{a}", "b": "2.safetensors"}}}}"#);
        assert_eq!(weights(&[("model.safetensors.index.json", &index("1.safetensors"))]), Ok(2));
        for outside in ["../x", "/etc/passwd", "a/b", ".."] {
            let error = weights(&[("model.safetensors.index.json", &index(outside))]).unwrap_err();
            assert!(error.contains("weight_map"), "{error}");
        }
        let error = weights(&[("pytorch_model.bin", "x"), ("training_args.bin", "x")]);
        let error = error.unwrap_err();
        assert!(error.contains("pytorch_model.bin is a pickle"), "{error}");
        assert!(error.contains("save_pretrained"), "{error}");
        assert!(weights(&[("tf_model.h5", "x")]).unwrap_err().contains("tf_model.h5"));
        assert!(weights(&[]).unwrap_err().contains("model.safetensors: is missing"));
    }
}
