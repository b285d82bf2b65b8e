//! The cache of the hub, as the tools of Hugging Face lay it out, so that all share one copy.
//!
//! A repository is the folder `models--organisation--name`: `blobs` has the bytes under their etag,
//! `snapshots/<commit>` has links to them under their names, `refs/<branch>` names a commit, and
//! `.no_exist/<commit>` has an empty file for each name that the commit does not have.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::checksum;
use super::error::HubError;

/// Longest name of a commit or a blob; a SHA-256 in hexadecimal has 64 digits.
const MAX_NAME_LENGTH: usize = 128;
/// Files up to this size are compared with their hash each time that they are found: all but the
/// weights, which would take seconds.
const MAX_CHECKED_BYTES: u64 = 64 << 20;
/// How often a process looks whether another one has finished its download.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// One repository in the cache.
pub struct RepoCache {
    /// `models--organisation--name`.
    pub folder: PathBuf,
    locks: PathBuf,
}

/// The exclusive right to download a blob, until it is dropped.
pub struct BlobLock {
    /// `None` on a file system without locks. The hash decides there which of two downloads is kept.
    _file: Option<File>,
}

impl RepoCache {
    pub fn new(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// Returns the commit that a branch, tag or commit had when it was downloaded last.
    pub fn find_commit(&self, revision: &str) -> Option<String> {
        let written = fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let commit = written.map_or_else(|| revision.to_owned(), |text| text.trim().to_owned());
        (is_plain_name(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Returns the folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Whether the commit has the file, undamaged.
    pub fn has_file(&self, commit: &str, file: &str) -> bool {
        let path = self.snapshot(commit).join(file);
        path.is_file() && !is_damaged(&path)
    }

    /// Whether it is known that the commit has no file of this name.
    pub fn lacks_file(&self, commit: &str, file: &str) -> bool {
        self.folder.join(".no_exist").join(commit).join(file).is_file()
    }

    /// Remembers that the commit has no file of this name.
    pub fn mark_absent(&self, commit: &str, file: &str) -> Result<(), HubError> {
        write_whole(&self.folder.join(".no_exist").join(commit).join(file), b"")
    }

    /// Remembers the commit of a branch or tag.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        write_whole(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// Gives a blob its name in the snapshot: by a link, or by a copy on file systems without links.
    pub fn link_blob(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        create_parent(&path)?;
        let temporary = temporary_name(&path);
        symlink(&target, &temporary)
            .or_else(|_| fs::copy(self.blob(etag), &temporary).map(|_| ()))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|e| HubError::cache_file(&path, &e))
    }

    /// Waits until no other process or thread downloads this blob. `on_wait` is called once if one
    /// does.
    pub async fn lock_blob(
        &self,
        etag: &str,
        on_wait: impl FnOnce(),
    ) -> Result<BlobLock, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let failed = |e: &io::Error| HubError::cache_file(&path, e);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| failed(&e))?;
        let mut on_wait = Some(on_wait);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(BlobLock { _file: Some(file) }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                    return Ok(BlobLock { _file: None });
                }
                Err(TryLockError::Error(e)) => return Err(failed(&e)),
            }
            if let Some(on_wait) = on_wait.take() {
                on_wait();
            }
            tokio::time::sleep(LOCK_POLL_INTERVAL).await;
        }
    }
}

/// Whether `name` can be part of a path in the cache.
pub fn is_plain_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=MAX_NAME_LENGTH).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(allowed)
}

/// Whether a branch, tag or commit can be part of a path in the cache.
pub fn is_plain_revision(revision: &str) -> bool {
    !revision.contains('\0')
        && Path::new(revision).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Whether a file in the cache has other bytes than its name says, or, if it is too large to be
/// hashed at each start, another size than its header describes.
fn is_damaged(path: &Path) -> bool {
    let Ok(metadata) = fs::metadata(path) else { return true };
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        return has_wrong_length(path, metadata.len()).unwrap_or(true);
    }
    let Ok(target) = fs::read_link(path) else { return false };
    let Some(etag) = target.file_name().and_then(|name| name.to_str()) else { return false };
    metadata.len() <= MAX_CHECKED_BYTES && !checksum::matches_etag(path, etag).unwrap_or(false)
}

/// Whether a safetensors file is shorter or longer than its header says.
fn has_wrong_length(path: &Path, length: u64) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix)?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > MAX_CHECKED_BYTES || header_length + 8 > length {
        return Ok(true);
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact(&mut header)?;
    let header: serde_json::Value = serde_json::from_slice(&header)?;
    let tensors = header.as_object().into_iter().flatten();
    let end = tensors.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64()).max();
    Ok(end.unwrap_or(0).checked_add(8 + header_length) != Some(length))
}

/// Creates the folder of `path`.
pub fn create_parent(path: &Path) -> Result<(), HubError> {
    let Some(folder) = path.parent() else { return Ok(()) };
    fs::create_dir_all(folder).map_err(|e| HubError::cache_file(folder, &e))
}

/// Writes a small file, so that nobody sees a part of it.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), HubError> {
    create_parent(path)?;
    let temporary = temporary_name(path);
    File::create(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|e| HubError::cache_file(path, &e))
}

/// Returns a name in the folder of `path` that no other process or thread uses.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    path.with_file_name(name)
}
