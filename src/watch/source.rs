//! What a path or an address given by a user is, and how it is listed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::bucket::list_bucket;
use super::error::WatchError;
use super::file_kind::{check_local_file, no_picture};
use super::folder::{FolderListing, picture_from_file};
use super::item::{FoundItem, FoundPicture, ItemVersion};
use super::list::{AddressList, ListFormat};
use crate::ingest::decode::describe_readable_formats;
use crate::record::AttributeTypes;
use crate::store::{ImageStore, parse_url};

/// Most parts of a path that are put before the names in a folder to tell it from another one.
const MAX_PREFIX_PARTS: usize = 16;

/// A folder, a bucket, a list, or a single picture.
#[derive(Debug, Clone)]
pub struct WatchedSource {
    /// As the user gave it.
    pub target: String,
    /// Prefix of the ids of its pictures, with a slash at its end; empty if it has none.
    pub id_prefix: String,
    /// What it is.
    pub kind: SourceKind,
}

/// What a source is.
#[derive(Debug, Clone)]
pub enum SourceKind {
    /// A local folder, absolute and without links.
    Folder(PathBuf),
    /// A local picture, absolute.
    Picture(PathBuf),
    /// A list of addresses.
    List(PathBuf, ListFormat),
    /// A bucket, or a prefix of one.
    Bucket(ImageStore),
    /// A single picture on a web server.
    Address(Url),
}

/// Opens the sources that a user named, and gives each a prefix of its own. Fails if one does not exist,
/// cannot be read, or lies inside another one.
pub fn open_sources(
    targets: &[String],
    store_options: &BTreeMap<String, String>,
) -> Result<Vec<WatchedSource>, WatchError> {
    let mut sources: Vec<WatchedSource> = Vec::new();
    for target in targets {
        let kind = open_target(target, store_options)?;
        if sources.iter().any(|known| known.kind.address() == kind.address()) {
            continue;
        }
        sources.push(WatchedSource { target: target.clone(), id_prefix: String::new(), kind });
    }
    for inner in &sources {
        let outer = sources.iter().find(|outer| inner.kind.lies_inside(&outer.kind));
        if let Some(outer) = outer {
            return Err(WatchError::InvalidTarget {
                target: inner.target.clone(),
                reason: format!(
                    "lies inside {}, which is named too; leave one of them out",
                    outer.target
                ),
            });
        }
    }
    assign_prefixes(&mut sources);
    Ok(sources)
}

fn open_target(
    target: &str,
    store_options: &BTreeMap<String, String>,
) -> Result<SourceKind, WatchError> {
    let invalid = |reason: String| WatchError::InvalidTarget { target: target.to_owned(), reason };
    let url = parse_url(target)?;
    match url.scheme() {
        "http" | "https" => return Ok(SourceKind::Address(url)),
        "file" => {}
        _ => return Ok(SourceKind::Bucket(ImageStore::open(target, store_options)?)),
    }
    let path = if target.contains("://") {
        url.to_file_path().map_err(|()| invalid("is no local path".into()))?
    } else {
        PathBuf::from(target)
    };
    let failed = |error: &io::Error| {
        invalid(match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no such folder or file; check the spelling and the current folder".into()
            }
            io::ErrorKind::PermissionDenied => {
                "this user may not read it; give the user the right to read it, or name another folder".into()
            }
            _ => format!("cannot be read: {error}"),
        })
    };
    let path = path.canonicalize().map_err(|e| failed(&e))?;
    let metadata = fs::metadata(&path).map_err(|e| failed(&e))?;
    if metadata.is_dir() {
        fs::read_dir(&path).map_err(|e| failed(&e))?;
        return Ok(SourceKind::Folder(path));
    }
    if let Some(format) = ListFormat::from_path(&path) {
        AddressList::read(&path, format).map_err(|e| failed(&e))?;
        return Ok(SourceKind::List(path, format));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match check_local_file(&path, &name) {
        Ok(()) => Ok(SourceKind::Picture(path)),
        Err(skipped) if skipped.is_failure => Err(invalid(skipped.reason)),
        Err(_) => Err(invalid(format!(
            "is neither a folder, nor a picture ({}), nor a list (.csv, .jsonl)",
            describe_readable_formats()
        ))),
    }
}

impl SourceKind {
    /// Returns the address, the same for the same source however it was written.
    pub fn address(&self) -> String {
        match self {
            Self::Folder(path) | Self::Picture(path) | Self::List(path, _) => {
                path.display().to_string()
            }
            Self::Bucket(store) => store.url().as_str().trim_end_matches('/').to_owned(),
            Self::Address(url) => url.to_string(),
        }
    }

    fn lies_inside(&self, outer: &Self) -> bool {
        match (self, outer) {
            (Self::Folder(inner) | Self::Picture(inner), Self::Folder(outer)) => {
                inner != outer && inner.starts_with(outer)
            }
            (Self::Bucket(_), Self::Bucket(_)) => {
                self.address().starts_with(&format!("{}/", outer.address()))
            }
            _ => false,
        }
    }

    /// Returns the parts of the path of a source whose pictures have a prefix.
    fn path_parts(&self) -> Option<Vec<String>> {
        match self {
            Self::Folder(path) => {
                let parts = path.iter().filter(|part| *part != "/");
                Some(parts.map(|part| part.to_string_lossy().into_owned()).collect())
            }
            Self::Bucket(store) => {
                let url = store.url();
                let path =
                    url.path_segments().into_iter().flatten().filter(|part| !part.is_empty());
                Some(url.host_str().into_iter().chain(path).map(str::to_owned).collect())
            }
            _ => None,
        }
    }
}

/// Gives each folder and bucket its last name as prefix, and more of its path if another one has the same.
fn assign_prefixes(sources: &mut [WatchedSource]) {
    let parts: Vec<Option<Vec<String>>> = sources.iter().map(|s| s.kind.path_parts()).collect();
    let prefix = |parts: &[String], length: usize| {
        let start = parts.len().saturating_sub(length);
        let name = parts[start..].join("/");
        if name.is_empty() { name } else { format!("{name}/") }
    };
    for (index, own) in parts.iter().enumerate() {
        let Some(own) = own else { continue };
        let others = || {
            parts.iter().enumerate().filter(|(i, _)| *i != index).filter_map(|(_, p)| p.as_ref())
        };
        let is_unique =
            |length: &usize| !others().any(|other| prefix(other, *length) == prefix(own, *length));
        let length = (1..=MAX_PREFIX_PARTS).find(is_unique).unwrap_or(MAX_PREFIX_PARTS);
        sources[index].id_prefix = prefix(own, length);
    }
}

impl WatchedSource {
    /// Checks that a bucket answers within `timeout`; everything else was checked when it was opened.
    pub async fn check_reachable(&self, timeout: Duration) -> Result<(), WatchError> {
        match &self.kind {
            SourceKind::Bucket(store) => Ok(store.check_reachable(timeout).await?),
            _ => Ok(()),
        }
    }

    /// Returns the attributes of the source with their types; only lists have some.
    pub fn attribute_types(&self) -> Result<AttributeTypes, WatchError> {
        Ok(self.read_list()?.map_or_else(AttributeTypes::new, |list| list.infer_attribute_types()))
    }

    /// Returns the folders that workers must be allowed to read.
    pub fn local_roots(&self) -> Result<Vec<PathBuf>, WatchError> {
        Ok(match &self.kind {
            SourceKind::Folder(path) => vec![path.clone()],
            SourceKind::Picture(path) => path.parent().map(Path::to_owned).into_iter().collect(),
            SourceKind::List(..) => {
                self.read_list()?.map_or_else(Vec::new, |list| list.local_roots())
            }
            SourceKind::Bucket(_) | SourceKind::Address(_) => Vec::new(),
        })
    }

    fn read_list(&self) -> Result<Option<AddressList>, WatchError> {
        let SourceKind::List(path, format) = &self.kind else { return Ok(None) };
        AddressList::read(path, *format).map(Some).map_err(|e| self.unreadable(e))
    }

    fn unreadable(&self, source: io::Error) -> WatchError {
        WatchError::Unreadable { target: self.target.clone(), source }
    }

    /// Lists the source once from beginning to end; calls `on_item` for what is found, until it returns
    /// false. `roots` are the folders that workers may read, `excluded` those that are left out, and `types`
    /// the declared attributes.
    pub async fn list(
        &self,
        roots: &[PathBuf],
        excluded: &[PathBuf],
        types: &AttributeTypes,
        mut on_item: impl FnMut(FoundItem) -> bool + Send + 'static,
    ) -> Result<(), WatchError> {
        if let SourceKind::Bucket(store) = &self.kind {
            return list_bucket(store, &self.id_prefix, &mut on_item).await;
        }
        let (source, roots, excluded) = (self.clone(), roots.to_owned(), excluded.to_owned());
        let types = types.clone();
        let listed = tokio::task::spawn_blocking(move || {
            source.list_blocking(&roots, &excluded, &types, &mut on_item)
        });
        listed.await.map_err(|panic| WatchError::Internal(panic.to_string()))?
    }

    fn list_blocking(
        &self,
        roots: &[PathBuf],
        excluded: &[PathBuf],
        types: &AttributeTypes,
        on_item: &mut dyn FnMut(FoundItem) -> bool,
    ) -> Result<(), WatchError> {
        match &self.kind {
            SourceKind::Folder(root) => {
                let id_prefix = &self.id_prefix;
                let folder = FolderListing { root, allowed_roots: roots, excluded, id_prefix };
                folder.list(on_item).map_err(|e| self.unreadable(e))?;
            }
            SourceKind::Picture(path) => {
                let metadata = match fs::metadata(path) {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    Err(error) => return Err(self.unreadable(error)),
                };
                let content = if metadata.is_file() {
                    let name = path.file_name().map_or(path.as_path(), Path::new);
                    picture_from_file(path, &metadata, "", name)
                } else {
                    Err(no_picture())
                };
                on_item(FoundItem { path: path.display().to_string(), content });
            }
            SourceKind::List(..) => {
                if let Some(list) = self.read_list()? {
                    list.list(types, on_item);
                }
            }
            SourceKind::Address(url) => {
                let content =
                    super::item::image_id_from_key("", url.as_str()).map(|image_id| FoundPicture {
                        image_id,
                        uri: url.to_string(),
                        version: ItemVersion::default(),
                        attributes: BTreeMap::new(),
                    });
                on_item(FoundItem { path: url.to_string(), content });
            }
            SourceKind::Bucket(_) => {}
        }
        Ok(())
    }
}
