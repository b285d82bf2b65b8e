//! Object storage by URL: S3 and compatible, GCS, Azure, a local folder, memory.
//!
//! Credentials come from the standard environment variables of each provider (`AWS_*`, `GOOGLE_*`,
//! `AZURE_*`); options given in the configuration win over them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use url::Url;

use crate::retry::{Decide, Verdict};

/// Why object storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL is not one.
    #[error(
        "{url}: {reason}; use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or a path"
    )]
    Url {
        /// The URL as given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A local folder could not be made.
    #[error("folder {path}: {source}; choose a folder that this user may write")]
    Folder {
        /// The folder.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The store answered with an error, or not at all.
    #[error("{url}: {source}")]
    Store {
        /// The store or object.
        url: String,
        /// Why.
        source: object_store::Error,
    },
    /// The store did not answer in time.
    #[error(
        "{url}: no answer within {seconds} s; check the address, the network and the credentials"
    )]
    Silent {
        /// The store.
        url: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The store cannot put an object conditionally, on which safe commits depend.
    #[error(
        "{url}: this store overwrote an object that a conditional put must not touch; use one with If-None-Match support (S3, R2, MinIO, GCS, Azure, a local folder)"
    )]
    NoConditionalPut {
        /// The store.
        url: String,
    },
}

impl Decide for StoreError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Store { source, .. } => verdict(source),
            Self::Silent { .. } => Verdict::Retry,
            Self::Url { .. } | Self::Folder { .. } | Self::NoConditionalPut { .. } => {
                Verdict::Fatal
            }
        }
    }
}

/// The decision for an error of the object store: what can pass is tried again, what cannot stops.
pub fn verdict(error: &object_store::Error) -> Verdict {
    use object_store::Error as E;
    match error {
        E::InvalidPath { .. }
        | E::NotSupported { .. }
        | E::NotImplemented { .. }
        | E::PermissionDenied { .. }
        | E::Unauthenticated { .. }
        | E::UnknownConfigurationKey { .. } => Verdict::Fatal,
        _ => Verdict::Retry,
    }
}

/// A place in object storage: a store and a URL that names its root.
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    url: Url,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.url)
    }
}

impl Store {
    /// Opens the place that `url` names; a plain path is a local folder, made where it is missing.
    /// No request is sent: a wrong bucket shows at the first use.
    pub fn open(url: &str, options: &BTreeMap<String, String>) -> Result<Self, StoreError> {
        let url = parse(url)?;
        if url.scheme() == "file" {
            return Self::folder(&url);
        }
        let environment = std::env::vars()
            .filter(|(k, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|p| k.starts_with(p)));
        let given = options.iter().map(|(k, v)| (k.clone(), v.clone()));
        let all = environment.chain(given).map(|(key, value)| (key.to_ascii_lowercase(), value));
        let (objects, prefix) = object_store::parse_url_opts(&url, all).map_err(|source| {
            StoreError::Url { url: url.to_string(), reason: source.to_string() }
        })?;
        Ok(Self { objects: Arc::new(PrefixStore::new(objects, prefix)), url })
    }

    fn folder(url: &Url) -> Result<Self, StoreError> {
        let path = url.to_file_path().map_err(|()| StoreError::Url {
            url: url.to_string(),
            reason: "names no local folder".into(),
        })?;
        let error = |source| StoreError::Folder { path: path.display().to_string(), source };
        std::fs::create_dir_all(&path).map_err(error)?;
        let objects = LocalFileSystem::new_with_prefix(&path)
            .map_err(|source| StoreError::Store { url: url.to_string(), source })?;
        Ok(Self { objects: Arc::new(objects), url: url.clone() })
    }

    /// A store in memory, for tests.
    pub fn memory() -> Self {
        Self::wrap(Arc::new(InMemory::new()))
    }

    /// Any store, for tests that inject faults.
    pub fn wrap(objects: Arc<dyn ObjectStore>) -> Self {
        let url = Url::parse("memory:///").unwrap_or_else(|_| unreachable!("a constant URL"));
        Self { objects, url }
    }

    /// A folder within this place.
    pub fn child(&self, folder: &str) -> Self {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push(folder);
        }
        Self { objects: Arc::new(PrefixStore::new(self.objects.clone(), Path::from(folder))), url }
    }

    /// The objects, rooted at this place.
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }

    /// The URL of this place.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Wraps an error of the underlying store with this place's name.
    pub fn error(&self, source: object_store::Error) -> StoreError {
        StoreError::Store { url: self.url.to_string(), source }
    }

    /// Makes sure that the store answers within `timeout`, whatever is stored there.
    pub async fn reach(&self, timeout: Duration) -> Result<(), StoreError> {
        let mut listed = self.objects.list(None);
        match tokio::time::timeout(timeout, listed.next()).await {
            Ok(None | Some(Ok(_))) => Ok(()),
            Ok(Some(Err(source))) => Err(self.error(source)),
            Err(_) => {
                Err(StoreError::Silent { url: self.url.to_string(), seconds: timeout.as_secs() })
            }
        }
    }

    /// Proves that objects can be written, listed, read, removed, and put conditionally.
    pub async fn check(&self) -> Result<(), StoreError> {
        let probe = Path::from(format!("_bsap_probe_{:016x}", rand::random::<u64>()));
        let create = PutOptions::from(PutMode::Create);
        let wrap = |source| self.error(source);
        self.objects
            .put_opts(&probe, PutPayload::from_static(b"1"), create.clone())
            .await
            .map_err(wrap)?;
        let second = self.objects.put_opts(&probe, PutPayload::from_static(b"2"), create).await;
        let read = async { self.objects.get(&probe).await?.bytes().await };
        let read = read.await.map_err(wrap);
        let listed = self.objects.list(None).next().await.transpose().map_err(wrap);
        self.objects.delete(&probe).await.map_err(wrap)?;
        match second {
            Err(object_store::Error::AlreadyExists { .. }) => read.and(listed).map(|_| ()),
            Err(source) => Err(wrap(source)),
            Ok(_) => Err(StoreError::NoConditionalPut { url: self.url.to_string() }),
        }
    }
}

/// The URL of a place: as given, or the absolute file URL of a path.
pub fn parse(url: &str) -> Result<Url, StoreError> {
    let error = |reason: &str| StoreError::Url { url: url.into(), reason: reason.into() };
    if url.trim().is_empty() {
        return Err(error("is empty"));
    }
    match Url::parse(url) {
        // A one-letter scheme is a Windows drive.
        Ok(parsed) if parsed.scheme().len() > 1 => Ok(parsed),
        _ if url.contains("://") => Err(error("is not a URL")),
        _ => {
            let absolute =
                std::path::absolute(FilePath::new(url)).map_err(|_| error("is not a path"))?;
            let url = Url::from_directory_path(absolute).map_err(|()| error("is not a path"))?;
            // Read again, by which `a/../b` becomes `b`: addresses are compared as texts.
            Url::parse(url.as_str()).map_err(|_| error("is not a path"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_and_folders_pass_the_check() {
        Store::memory().check().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let store = Store::open(path.to_str().unwrap(), &BTreeMap::new()).unwrap();
        store.check().await.unwrap();
        store.child("generations").check().await.unwrap();
    }

    #[test]
    fn wrong_urls_name_what_is_right() {
        for url in ["", "ftp://host/x", "s3:///nobucket", "http//x://y"] {
            let message = Store::open(url, &BTreeMap::new()).unwrap_err().to_string();
            assert!(message.contains("s3://bucket"), "{message}");
        }
    }

    #[test]
    fn paths_have_one_address() {
        assert_eq!(parse("/a/b/../c").unwrap().as_str(), "file:///a/c/");
        assert_eq!(parse("/a/./c").unwrap().as_str(), "file:///a/c/");
    }

    #[test]
    fn a_child_keeps_the_parents_prefix() {
        let store =
            Store::open("s3://bucket/a/", &BTreeMap::from([("aws_region".into(), "x".into())]))
                .unwrap();
        assert_eq!(store.child("b").url().as_str(), "s3://bucket/a/b");
    }
}
