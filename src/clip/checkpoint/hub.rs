//! Finding a checkpoint: a folder, or a model of the Hugging Face hub, kept in the hub's cache.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use crate::clip::{ClipError, ModelOptions};

/// The files of a checkpoint, small ones first, so that a wrong name shows before gigabytes come.
const CHECKPOINT_FILES: [&str; 4] =
    ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"];
/// SigLIP's padding stands in it; other checkpoints may lack it.
const OPTIONAL_CHECKPOINT_FILE: &str = "tokenizer_config.json";
/// Longest wait for a whole checkpoint: the largest are about 5 GB.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// How often a broken download is taken up again.
const MAX_DOWNLOAD_RETRIES: usize = 5;

/// Where a checkpoint is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointLocation {
    /// A folder on this machine.
    Folder(PathBuf),
    /// `organisation/name` on the hub.
    Hub(String),
}

impl CheckpointLocation {
    /// What people call the model: its name on the hub, or that of its folder.
    fn model_name(&self) -> String {
        match self {
            Self::Hub(id) => id.clone(),
            Self::Folder(folder) => {
                let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                folder.file_name().map_or_else(|| "clip".into(), |n| n.to_string_lossy().into())
            }
        }
    }

    /// A folder where there is one of this name, else a model of the hub if it is written like one.
    pub fn parse(checkpoint: &str) -> Result<Self, String> {
        let folder = Path::new(checkpoint);
        if folder.is_dir() {
            return Ok(Self::Folder(folder.to_owned()));
        }
        let legal = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
        };
        match checkpoint.split_once('/') {
            Some((organisation, name)) if legal(organisation) && legal(name) => {
                Ok(Self::Hub(checkpoint.to_owned()))
            }
            _ => Err(format!(
                "{checkpoint:?} is neither a folder nor a model of the hub such as openai/clip-vit-base-patch32"
            )),
        }
    }
}

/// The name and the folder of a checkpoint, downloaded first where it is on the hub and not in the cache.
/// `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` hold as for Hugging Face's own tools.
pub fn locate_checkpoint(options: &ModelOptions) -> Result<(String, PathBuf), ClipError> {
    let missing = |reason: String| ClipError::CheckpointUnavailable {
        checkpoint: options.checkpoint.clone(),
        reason,
    };
    let location = CheckpointLocation::parse(&options.checkpoint).map_err(missing)?;
    let name = location.model_name();
    let folder = match location {
        CheckpointLocation::Folder(folder) => Ok(folder),
        CheckpointLocation::Hub(id) => fetch_from_hub(id, options),
    };
    Ok((name, folder.map_err(missing)?))
}

fn fetch_from_hub(id: String, options: &ModelOptions) -> Result<PathBuf, String> {
    let repo = Repo::with_revision(id, RepoType::Model, options.revision.clone());
    if options.offline {
        return find_in_cache(&repo);
    }
    // A thread of its own: the hub's client has no deadline.
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens any more after the deadline.
        let _ = done.send(download_checkpoint(&repo));
    });
    let late = |_| format!("the download took more than {} s", DOWNLOAD_TIMEOUT.as_secs());
    result.recv_timeout(DOWNLOAD_TIMEOUT).map_err(late)?
}

fn find_in_cache(repo: &Repo) -> Result<PathBuf, String> {
    let cache = Cache::from_env().repo(repo.clone());
    let paths = CHECKPOINT_FILES.map(|file| {
        cache.get(file).ok_or_else(|| {
            format!(
                "{file} of revision {} is not in the cache, and model.offline is on",
                repo.revision()
            )
        })
    });
    common_folder(&paths.into_iter().collect::<Result<Vec<_>, _>>()?)
}

fn download_checkpoint(repo: &Repo) -> Result<PathBuf, String> {
    let api = ApiBuilder::from_env().with_progress(true).with_retries(MAX_DOWNLOAD_RETRIES).build();
    let api = api.map_err(|e| e.to_string())?.repo(repo.clone());
    let get = |file: &str| {
        let explain = |e| {
            format!(
                "there is no such folder, and of the hub's model {file} of revision {} is not to be had: {e}",
                repo.revision()
            )
        };
        api.get(file).map_err(explain)
    };
    let paths = CHECKPOINT_FILES.into_iter().map(get).collect::<Result<Vec<_>, _>>()?;
    // Whoever needs it says that it is missing.
    let _ = api.get(OPTIONAL_CHECKPOINT_FILE);
    common_folder(&paths)
}

/// All files of one revision lie in one folder.
fn common_folder(paths: &[PathBuf]) -> Result<PathBuf, String> {
    let mut folders = paths.iter().filter_map(|path| path.parent());
    match folders.next() {
        Some(first) if folders.all(|folder| folder == first) => Ok(first.to_owned()),
        _ => {
            Err("the cache has its files from different revisions; name one in model.revision"
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_hub_models_are_distinguished() {
        let here = "src/clip";
        assert_eq!(CheckpointLocation::parse(here), Ok(CheckpointLocation::Folder(here.into())));
        let id = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K";
        assert_eq!(CheckpointLocation::parse(id), Ok(CheckpointLocation::Hub(id.into())));
        for wrong in ["", "clip", "/nowhere/clip", "../clip", "a/b/c", "a/", "a b/c"] {
            assert!(CheckpointLocation::parse(wrong).is_err(), "{wrong}");
        }
    }
}
