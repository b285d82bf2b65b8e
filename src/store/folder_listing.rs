//! Lists the files below a local folder, whatever their names are.

use std::fs::{self, Metadata, ReadDir};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::sync::mpsc;
use url::Url;

use super::folder::StoreError;
use super::listed_object::ListedObject;
use super::object_keys::object_url;

/// Files that are listed before somebody asks for them.
const QUEUED_FILES: usize = 1_024;

/// A folder whose entries are being read.
struct OpenFolder {
    entries: ReadDir,
    /// Without links, to notice a link to one of the folders around it.
    canonical_path: PathBuf,
}

/// Lists the files below `root`, whose URL is `url`. Follows links; leaves out those that lead nowhere or back to
/// a folder around them, and files that are removed in the meantime.
pub(super) fn list_files(
    root: PathBuf,
    url: Url,
) -> BoxStream<'static, Result<ListedObject, StoreError>> {
    let (sender, mut receiver) = mpsc::channel(QUEUED_FILES);
    tokio::task::spawn_blocking(move || {
        let walked = walk(&root, &mut |path, metadata| {
            let file = describe_file(&root, &url, path, metadata);
            sender.blocking_send(Ok(file)).is_ok()
        });
        if let Err((path, source)) = walked {
            let path = path.display().to_string();
            // Fails only if nobody listens any longer.
            let _ = sender.blocking_send(Err(StoreError::ReadFolder { path, source }));
        }
    });
    stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
}

/// Calls `on_file` for each file below `root` until it returns false. An error names the path that cannot be
/// read.
fn walk(
    root: &Path,
    on_file: &mut impl FnMut(&Path, &Metadata) -> bool,
) -> Result<(), (PathBuf, io::Error)> {
    let root_folder = open_folder(root, &[])?;
    let missing = || (root.to_owned(), io::Error::from(io::ErrorKind::NotFound));
    let mut open_folders = vec![root_folder.ok_or_else(missing)?];
    while let Some(folder) = open_folders.last_mut() {
        let Some(entry) = folder.entries.next() else {
            open_folders.pop();
            continue;
        };
        let path = entry.map_err(|error| (folder.canonical_path.clone(), error))?.path();
        let Some(metadata) = unless_missing(fs::metadata(&path), &path)? else { continue };
        if metadata.is_dir() {
            let inner = open_folder(&path, &open_folders)?;
            open_folders.extend(inner);
        } else if metadata.is_file() && !on_file(&path, &metadata) {
            break;
        }
    }
    Ok(())
}

/// Opens a folder; `None` if it is gone, or one of the `open_folders` around it.
fn open_folder(
    path: &Path,
    open_folders: &[OpenFolder],
) -> Result<Option<OpenFolder>, (PathBuf, io::Error)> {
    let Some(canonical_path) = unless_missing(path.canonicalize(), path)? else { return Ok(None) };
    if open_folders.iter().any(|folder| folder.canonical_path == canonical_path) {
        return Ok(None);
    }
    let entries = unless_missing(fs::read_dir(path), path)?;
    Ok(entries.map(|entries| OpenFolder { entries, canonical_path }))
}

/// Returns `None` if there is nothing at `path`: if it was removed, or is a link that leads nowhere or to itself.
fn unless_missing<T>(
    result: io::Result<T>,
    path: &Path,
) -> Result<Option<T>, (PathBuf, io::Error)> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied && path.is_symlink() => {
            Ok(None)
        }
        Err(error) => Err((path.to_owned(), error)),
    }
}

/// Describes the file at `path` as an object of the folder `root`.
fn describe_file(root: &Path, url: &Url, path: &Path, metadata: &Metadata) -> ListedObject {
    let key = path.strip_prefix(root).unwrap_or(path).as_os_str().as_bytes();
    let uri = match std::str::from_utf8(key) {
        Ok(key) => object_url(url, key),
        Err(_) => Err("its name is not UTF-8; rename the file".into()),
    };
    ListedObject {
        key: key.to_vec(),
        uri,
        last_modified: metadata.modified().map_or(DateTime::UNIX_EPOCH, DateTime::<Utc>::from),
        size_bytes: metadata.len(),
    }
}
