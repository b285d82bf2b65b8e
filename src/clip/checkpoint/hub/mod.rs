//! Downloading a checkpoint from the Hugging Face hub, or finding it in the cache of the hub.

mod cache;
mod checksum;
mod client;
mod download;
mod environment;
mod error;
mod progress;
#[cfg(test)]
mod test_hub;
#[cfg(test)]
mod tests;
mod wanted_files;

use std::path::PathBuf;
use std::time::Duration;

use super::location::CheckpointLocation;
use crate::clip::error::ClipError;
use cache::{RepoCache, is_plain_revision};
use client::{FileLookup, HubClient, shorten};
use download::Downloader;
use environment::HubEnvironment;
use error::HubError;
use wanted_files::{
    CONFIG_FILES, MODULES_FILE, PICKLED_WEIGHTS, SENTENCE_TRANSFORMERS_FILES, SMALL_FILES,
    SnapshotState, inspect_snapshot, join_name, read_module_folder, read_shards, weight_files,
    weight_index,
};

/// Longest wait for all files of a checkpoint: 5 GB, the largest, at 4 Mbit/s. What is there by then is
/// kept, and the next start continues.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(3 * 60 * 60);

/// Returns the name and the folder of a checkpoint. A model of the hub that is not in the cache is
/// downloaded first, unless `offline` or `HF_HUB_OFFLINE` forbids it. The variables of Hugging Face
/// apply as for its own tools (`environment`).
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
    let id = match location {
        CheckpointLocation::Folder(folder) => return Ok((name, folder)),
        CheckpointLocation::Hub(id) => id,
    };
    let environment = HubEnvironment::from_process().map_err(unavailable)?;
    match find_or_download(&environment, &id, revision, offline) {
        Ok(folder) => Ok((name, folder)),
        Err(HubError::NoWeights { file, reason }) => {
            Err(ClipError::InvalidCheckpoint { file: file.into(), reason })
        }
        Err(error) => Err(unavailable(error.to_string())),
    }
}

/// Where a checkpoint is before it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointOrigin {
    /// A folder on this machine.
    Folder(PathBuf),
    /// A model of the hub that is in the cache already; the folder is that of the cache.
    Cached(PathBuf),
    /// A model of the hub that is not in the cache, or not completely.
    Hub(PathBuf),
}

/// Says where a checkpoint is, without any request.
pub fn locate_checkpoint(checkpoint: &str, revision: &str) -> Result<CheckpointOrigin, String> {
    let id = match CheckpointLocation::parse(checkpoint)? {
        CheckpointLocation::Folder(folder) => return Ok(CheckpointOrigin::Folder(folder)),
        CheckpointLocation::Hub(id) => id,
    };
    let folder = HubEnvironment::from_process()?.cache;
    let cache = RepoCache::new(&folder, &id);
    let is_complete = |commit: String| {
        matches!(inspect_snapshot(&cache, &commit), SnapshotState::Complete | SnapshotState::Usable)
    };
    let is_cached =
        is_plain_revision(revision) && cache.find_commit(revision).is_some_and(is_complete);
    Ok(if is_cached { CheckpointOrigin::Cached(folder) } else { CheckpointOrigin::Hub(folder) })
}

/// Returns the folder of a revision of a model in the cache, after what is missing was downloaded.
fn find_or_download(
    environment: &HubEnvironment,
    id: &str,
    revision: &str,
    offline: bool,
) -> Result<PathBuf, HubError> {
    let refused = |reason: String| Err(HubError::Refused(reason));
    if !is_plain_revision(revision) {
        return refused(format!("revision {revision:?} is no branch, tag or commit"));
    }
    let cache = RepoCache::new(&environment.cache, id);
    let cached = cache.find_commit(revision).map(|commit| {
        let state = inspect_snapshot(&cache, &commit);
        (cache.snapshot(&commit), state)
    });
    if let Some((folder, SnapshotState::Complete)) = cached {
        return Ok(folder);
    }
    let forbidden = if offline { Some("model.offline is on") } else { None };
    let variable = environment.offline_variable.map(|name| format!("{name} is set"));
    if let Some(forbidden) = forbidden.map(str::to_owned).or(variable) {
        return match cached {
            Some((folder, SnapshotState::Usable)) => Ok(folder),
            Some((folder, SnapshotState::Lacks(file))) => refused(format!(
                "{file} is missing or damaged in {}, and {forbidden}",
                folder.display()
            )),
            _ => refused(format!(
                "config.json of revision {revision} is not in the cache {}, and {forbidden}",
                cache.folder.display()
            )),
        };
    }
    match (download_on_thread(environment, &cache, id, revision), cached) {
        (Ok(folder), _) => Ok(folder),
        // As the tools of Hugging Face do: what is in the cache works without the hub.
        (Err(error), Some((folder, SnapshotState::Usable)))
            if !matches!(error, HubError::WrongBytes(_)) =>
        {
            Ok(folder)
        }
        (Err(error @ HubError::NoWeights { .. }), _) => Err(error),
        (Err(error), _) => refused(format!(
            "there is no folder of this name, and revision {revision} of the model of that name on the hub cannot be downloaded: {error}"
        )),
    }
}

/// Downloads on a thread of its own: the caller may be in an async runtime already.
fn download_on_thread(
    environment: &HubEnvironment,
    cache: &RepoCache,
    id: &str,
    revision: &str,
) -> Result<PathBuf, HubError> {
    let download = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| HubError::Refused(e.to_string()))?;
        let seconds = DOWNLOAD_TIMEOUT.as_secs();
        runtime
            .block_on(async {
                let work = download_checkpoint(environment, cache, id, revision);
                tokio::time::timeout(DOWNLOAD_TIMEOUT, work).await
            })
            .unwrap_or_else(|_| {
                Err(HubError::transient(format!("the download took more than {seconds} s")))
            })
    };
    std::thread::scope(|scope| scope.spawn(download).join())
        .unwrap_or_else(|_| Err(HubError::Refused("the download panicked".into())))
}

/// Downloads what the cache lacks of a revision: the small files first, so that a wrong name fails
/// before gigabytes are there.
async fn download_checkpoint(
    environment: &HubEnvironment,
    cache: &RepoCache,
    id: &str,
    revision: &str,
) -> Result<PathBuf, HubError> {
    let downloader = Downloader {
        client: HubClient::new(environment, id)?,
        cache,
        stall_timeout: environment.stall_timeout,
        shows_progress: environment.shows_progress,
    };
    let mut snapshot = Snapshot { downloader, id, revision, commit: None, unmarked: Vec::new() };
    let mut folder = String::new();
    if snapshot.fetch(MODULES_FILE).await? {
        let modules = snapshot.folder()?.join(MODULES_FILE);
        folder = read_module_folder(&modules).map_err(HubError::Refused)?;
        for file in SENTENCE_TRANSFORMERS_FILES {
            snapshot.fetch(file).await?;
        }
    }
    let mut has_config = false;
    for file in CONFIG_FILES {
        has_config |= snapshot.fetch(&join_name(&folder, file)).await?;
    }
    if !has_config {
        let [config, open_clip_config] = CONFIG_FILES.map(|file| join_name(&folder, file));
        return Err(HubError::Refused(format!(
            "{}/{id} has neither {config} nor {open_clip_config} in revision {revision} (404)",
            shorten(&environment.endpoint)
        )));
    }
    for file in SMALL_FILES {
        snapshot.fetch(&join_name(&folder, file)).await?;
    }
    snapshot.fetch_weights(&folder).await?;
    let commit = snapshot.commit.clone().unwrap_or_default();
    for file in &snapshot.unmarked {
        cache.mark_absent(&commit, file)?;
    }
    cache.write_ref(revision, &commit)?;
    snapshot.folder()
}

/// A revision that is being downloaded. The first answer names its commit, and all further files are of
/// that commit, even if the branch moves.
struct Snapshot<'a> {
    downloader: Downloader<'a>,
    /// `organisation/name`.
    id: &'a str,
    revision: &'a str,
    commit: Option<String>,
    /// Files that the revision does not have, found out before the commit was known.
    unmarked: Vec<String>,
}

impl Snapshot<'_> {
    /// Returns the folder of the commit.
    fn folder(&self) -> Result<PathBuf, HubError> {
        let commit = self.commit.as_ref();
        let commit = commit.ok_or_else(|| HubError::Refused("the hub names no commit".into()))?;
        Ok(self.downloader.cache.snapshot(commit))
    }

    /// Downloads a file that the cache lacks. Returns whether the revision has it.
    async fn fetch(&mut self, file: &str) -> Result<bool, HubError> {
        let cache = self.downloader.cache;
        if let Some(commit) = &self.commit {
            if cache.has_file(commit, file) {
                return Ok(true);
            }
            if cache.lacks_file(commit, file) {
                return Ok(false);
            }
        }
        let revision = self.commit.as_deref().unwrap_or(self.revision).to_owned();
        match self.downloader.look_up(&revision, file).await? {
            FileLookup::Found(metadata) => {
                if *self.commit.get_or_insert_with(|| metadata.commit.clone()) != metadata.commit {
                    return Err(HubError::WrongBytes(format!(
                        "{file} is of another commit than the files before it"
                    )));
                }
                self.downloader.fetch(file, &metadata).await?;
                Ok(true)
            }
            FileLookup::Absent(commit) => {
                if self.commit.is_none() {
                    self.commit = commit;
                }
                match &self.commit {
                    Some(commit) => cache.mark_absent(commit, file)?,
                    None => self.unmarked.push(file.to_owned()),
                }
                Ok(false)
            }
        }
    }

    /// Downloads the weights, in one file or in several.
    async fn fetch_weights(&mut self, folder: &str) -> Result<(), HubError> {
        for weights in weight_files(&self.folder()?.join(folder)) {
            if self.fetch(&join_name(folder, weights)).await? {
                return Ok(());
            }
            let index = join_name(folder, &weight_index(weights));
            if self.fetch(&index).await? {
                return self.fetch_shards(folder, &index).await;
            }
        }
        for pickle in PICKLED_WEIGHTS {
            let revision = self.commit.as_deref().unwrap_or(self.revision);
            let name = join_name(folder, pickle);
            if let FileLookup::Found(_) = self.downloader.look_up(revision, &name).await? {
                return Err(HubError::NoWeights {
                    file: format!("{}/{name}", self.id),
                    reason: "is a pickle, which can run code, and the model has no weights as safetensors; convert it with save_pretrained of transformers, or name a revision that has them".into(),
                });
            }
        }
        Err(HubError::NoWeights {
            file: format!("{}/{}", self.id, join_name(folder, "model.safetensors")),
            reason: "is missing, and so are weights under other names".into(),
        })
    }

    /// Downloads the files that an index names.
    async fn fetch_shards(&mut self, folder: &str, index: &str) -> Result<(), HubError> {
        for shard in read_shards(&self.folder()?.join(index)).map_err(HubError::Refused)? {
            if !self.fetch(&join_name(folder, &shard)).await? {
                return Err(HubError::Refused(format!(
                    "{index} names {shard}, which the repository does not have"
                )));
            }
        }
        Ok(())
    }
}
