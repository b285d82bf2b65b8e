//! Lists a local folder with its subfolders.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use chrono::DateTime;
use url::Url;

use super::file_kind::{check_local_file, unreadable_file};
use super::item::{FoundItem, FoundPicture, ItemVersion, SkipReason, image_id_from_key};

/// A folder to list.
#[derive(Debug, Clone)]
pub struct FolderListing<'a> {
    /// The folder, absolute and without links.
    pub root: &'a Path,
    /// Folders to which links of files may lead.
    pub allowed_roots: &'a [PathBuf],
    /// Folders that are left out.
    pub excluded: &'a [PathBuf],
    /// Prefix of the ids.
    pub id_prefix: &'a str,
}

impl FolderListing<'_> {
    /// Calls `on_item` for every file below the folder, each folder in the order of its names, until it
    /// returns false. Links to files are followed, links to folders are not, so that there are no circles.
    /// Fails only if the folder itself cannot be listed.
    pub fn list(&self, on_item: &mut dyn FnMut(FoundItem) -> bool) -> io::Result<()> {
        let mut folders = vec![self.root.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = match read_sorted(&folder) {
                Ok(entries) => entries,
                Err(error) if folder == self.root => return Err(error),
                // It was removed after its parent was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let reason = format!(
                        "the folder cannot be listed: {error}; give this user the right to read it"
                    );
                    let skipped = SkipReason::failure("a folder that cannot be listed", reason);
                    if !on_item(Self::item(&folder, Err(skipped))) {
                        return Ok(());
                    }
                    continue;
                }
            };
            let mut subfolders = Vec::new();
            for entry in entries {
                let path = entry.path();
                let Ok(file_type) = entry.file_type() else { continue };
                if file_type.is_dir() {
                    if !self.excluded.contains(&path) {
                        subfolders.push(path);
                    }
                    continue;
                }
                let Some(content) = self.check_file(&path, &entry.file_name()) else { continue };
                if !on_item(Self::item(&path, content)) {
                    return Ok(());
                }
            }
            folders.extend(subfolders.into_iter().rev());
        }
        Ok(())
    }

    fn item(path: &Path, content: Result<FoundPicture, SkipReason>) -> FoundItem {
        FoundItem { path: path.display().to_string(), content }
    }

    /// Returns the picture in a file, or why it is skipped; `None` if the file was removed in the meantime.
    fn check_file(&self, path: &Path, name: &OsStr) -> Option<Result<FoundPicture, SkipReason>> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A link that leads nowhere is still there.
                let is_link = fs::symlink_metadata(path).is_ok_and(|link| link.is_symlink());
                return is_link
                    .then(|| Err(SkipReason::not_a_picture("a link that leads nowhere")));
            }
            Err(error) => return Some(Err(unreadable_file(&error))),
        };
        if metadata.is_dir() {
            return Some(Err(SkipReason::not_a_picture(
                "a link to a folder, which is not followed",
            )));
        }
        if !metadata.is_file() {
            return Some(Err(SkipReason::not_a_picture("no regular file")));
        }
        if let Err(skipped) = check_local_file(path, &name.to_string_lossy()) {
            return Some(Err(skipped));
        }
        if let Err(skipped) = self.check_link_target(path) {
            return Some(Err(skipped));
        }
        let key = path.strip_prefix(self.root).unwrap_or(path);
        Some(picture_from_file(path, &metadata, self.id_prefix, key))
    }

    /// Workers read nothing outside of the folders that were named.
    fn check_link_target(&self, path: &Path) -> Result<(), SkipReason> {
        if !fs::symlink_metadata(path).is_ok_and(|link| link.is_symlink()) {
            return Ok(());
        }
        let Ok(target) = path.canonicalize() else { return Ok(()) };
        if self.allowed_roots.iter().any(|root| target.starts_with(root)) {
            return Ok(());
        }
        Err(SkipReason::failure(
            "a link to a file outside of the folders that were named",
            format!("is a link to {}; name that folder too", target.display()),
        ))
    }
}

fn read_sorted(folder: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

/// Returns a local picture; `key` is its path below what was named.
pub fn picture_from_file(
    path: &Path,
    metadata: &Metadata,
    id_prefix: &str,
    key: &Path,
) -> Result<FoundPicture, SkipReason> {
    let unusable =
        || SkipReason::failure("not accepted", "its path cannot be written as an address");
    let uri = Url::from_file_path(path).map_err(|()| unusable())?;
    let key = match key.to_str() {
        Some(key) => key.to_owned(),
        // Bytes that are no UTF-8 as they are in the address, so that two names stay different.
        None => percent_encoding::percent_encode(
            key.as_os_str().as_encoded_bytes(),
            percent_encoding::CONTROLS,
        )
        .to_string(),
    };
    Ok(FoundPicture {
        image_id: image_id_from_key(id_prefix, &key)?,
        uri: uri.into(),
        version: version_of_file(metadata),
        attributes: std::collections::BTreeMap::new(),
    })
}

/// Returns the version of a local file.
pub fn version_of_file(metadata: &Metadata) -> ItemVersion {
    use std::os::unix::fs::MetadataExt as _;
    let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    ItemVersion::new(DateTime::from_timestamp(metadata.mtime(), nanoseconds), metadata.len())
}
