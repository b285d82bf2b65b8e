//! Downloading a checkpoint from the Hugging Face hub, or finding it in the cache of the hub.

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use super::location::CheckpointLocation;
use crate::clip::error::ClipError;

/// The files of a checkpoint, the small ones first: a misspelt name then fails before
/// gigabytes are downloaded.
const CHECKPOINT_FILES: [&str; 4] =
    ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"];

/// Only SigLIP needs it, for its padding token; other checkpoints may lack it.
const OPTIONAL_CHECKPOINT_FILE: &str = "tokenizer_config.json";

/// Longest wait for all files of a checkpoint; the largest checkpoints are about 5 GB.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);

/// How often the download of a file is resumed after it broke off.
const MAX_DOWNLOAD_RETRIES: usize = 5;

/// Returns the name and the folder of a checkpoint. A model of the hub that is not in the cache is
/// downloaded first, unless `offline` forbids it. The variables `HF_HOME`, `HF_ENDPOINT` and
/// `HF_TOKEN` apply as for the tools of Hugging Face.
pub fn find_or_download_checkpoint(
    checkpoint: &str,
    revision: &str,
    offline: bool,
) -> Result<(String, PathBuf), ClipError> {
    let unavailable = |reason: String| ClipError::CheckpointUnavailable {
        checkpoint: checkpoint.to_owned(),
        reason,
    };
    let location = CheckpointLocation::parse(checkpoint).map_err(unavailable)?;
    let name = location.model_name();
    let folder = match location {
        CheckpointLocation::Folder(folder) => Ok(folder),
        CheckpointLocation::Hub(id) => {
            let repo = Repo::with_revision(id, RepoType::Model, revision.to_owned());
            if offline { find_in_cache(&repo) } else { download_within_timeout(repo) }
        }
    };
    Ok((name, folder.map_err(unavailable)?))
}

/// Downloads on a thread of its own, because the client of the hub has no timeout.
fn download_within_timeout(repo: Repo) -> Result<PathBuf, String> {
    let (sender, result) = mpsc::channel();
    std::thread::spawn(move || {
        // After the timeout nothing receives the result.
        let _ = sender.send(download_checkpoint(&repo));
    });
    let timed_out = |_| format!("the download took more than {} s", DOWNLOAD_TIMEOUT.as_secs());
    result.recv_timeout(DOWNLOAD_TIMEOUT).map_err(timed_out)?
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
                "there is no such folder, and {file} of revision {} of the model of that name on the hub cannot be downloaded: {e}",
                repo.revision()
            )
        };
        api.get(file).map_err(explain)
    };
    let paths = CHECKPOINT_FILES.into_iter().map(get).collect::<Result<Vec<_>, _>>()?;
    // `Checkpoint::read` reports it as missing if the architecture needs it.
    let _ = api.get(OPTIONAL_CHECKPOINT_FILE);
    common_folder(&paths)
}

/// Returns the folder of all `paths`: the cache has one folder per revision.
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
