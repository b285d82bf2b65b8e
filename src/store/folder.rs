//! Folders in object storage, as the program itself reads and writes them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use url::Url;

use crate::diagnosis::describe;
use crate::diagnosis::redact::redact;
use crate::retry::{Classify, Disposition};

/// Why object storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL is not valid, or of a kind that is not supported.
    #[error(
        "{}: {reason}; use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or a path",
        redact(.url)
    )]
    InvalidUrl {
        /// The URL as configured.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A local folder could not be created.
    #[error("folder {path}: {}; choose a folder that this user may write", describe(.source))]
    CreateFolder {
        /// Path of the folder.
        path: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A local folder or file could not be read.
    #[error("{path}: {}; let this user read it", describe(.source))]
    ReadFolder {
        /// Path of the folder or file.
        path: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The store returned an error, or could not be reached.
    #[error("{}: {}", redact(.url), describe(.source))]
    ObjectStore {
        /// URL of the store or object.
        url: String,
        /// Error of the store.
        source: object_store::Error,
    },
    /// The store did not answer in time.
    #[error(
        "{}: no answer within {seconds} s; check the address, the network and the credentials",
        redact(.url)
    )]
    Timeout {
        /// URL of the store.
        url: String,
        /// How long the answer was waited for.
        seconds: u64,
    },
    /// The store does not support conditional puts, on which safe commits depend.
    #[error(
        "{}: this store overwrote an object that a conditional put must not touch; use one with If-None-Match support (S3, R2, MinIO, GCS, Azure, a local folder)",
        redact(.url)
    )]
    NoConditionalPut {
        /// URL of the store.
        url: String,
    },
}

impl Classify for StoreError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::ObjectStore { source, .. } => classify_error(source),
            Self::Timeout { .. } => Disposition::Retry,
            Self::InvalidUrl { .. }
            | Self::CreateFolder { .. }
            | Self::ReadFolder { .. }
            | Self::NoConditionalPut { .. } => Disposition::Fatal,
        }
    }
}

/// Returns what to do about an error of the object store: all but errors of configuration may pass.
pub fn classify_error(error: &object_store::Error) -> Disposition {
    use object_store::Error as E;
    match error {
        E::InvalidPath { .. }
        | E::NotSupported { .. }
        | E::NotImplemented { .. }
        | E::PermissionDenied { .. }
        | E::Unauthenticated { .. }
        | E::UnknownConfigurationKey { .. } => Disposition::Fatal,
        _ => Disposition::Retry,
    }
}

/// A folder in object storage.
#[derive(Clone)]
pub struct Store {
    object_store: Arc<dyn ObjectStore>,
    url: Url,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", redact(self.url.as_str()))
    }
}

impl Store {
    /// Opens the folder that `url` names. A plain path is a local folder, which is created if there is
    /// none. Sends no request: a wrong bucket shows at the first use.
    pub fn open(url: &str, options: &BTreeMap<String, String>) -> Result<Self, StoreError> {
        let url = parse_url(url)?;
        if url.scheme() == "file" {
            return Self::open_local_folder(&url);
        }
        let (object_store, prefix) =
            object_store::parse_url_opts(&url, merge_environment(options)).map_err(|source| {
                StoreError::InvalidUrl { url: url.to_string(), reason: describe(&source) }
            })?;
        Ok(Self { object_store: Arc::new(PrefixStore::new(object_store, prefix)), url })
    }

    fn open_local_folder(url: &Url) -> Result<Self, StoreError> {
        let path = url.to_file_path().map_err(|()| StoreError::InvalidUrl {
            url: url.to_string(),
            reason: "names no local folder".into(),
        })?;
        let error = |source| StoreError::CreateFolder { path: path.display().to_string(), source };
        std::fs::create_dir_all(&path).map_err(error)?;
        let file_system = LocalFileSystem::new_with_prefix(&path)
            .map_err(|source| StoreError::ObjectStore { url: url.to_string(), source })?;
        Ok(Self { object_store: Arc::new(file_system), url: url.clone() })
    }

    /// Creates an empty store in memory, for tests.
    pub fn in_memory() -> Self {
        Self::from_object_store(Arc::new(InMemory::new()))
    }

    /// Wraps any store, for tests that inject faults.
    pub fn from_object_store(object_store: Arc<dyn ObjectStore>) -> Self {
        let url = Url::parse("memory:///").unwrap_or_else(|_| unreachable!("a constant URL"));
        Self { object_store, url }
    }

    /// Returns a folder within this one.
    pub fn subfolder(&self, folder: &str) -> Self {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push(folder);
        }
        Self {
            object_store: Arc::new(PrefixStore::new(self.object_store.clone(), Path::from(folder))),
            url,
        }
    }

    /// Returns the underlying store. Its paths are relative to this folder.
    pub fn object_store(&self) -> &Arc<dyn ObjectStore> {
        &self.object_store
    }

    /// Returns the URL of this folder.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Adds the URL of this folder to an error of the underlying store.
    pub fn wrap_error(&self, source: object_store::Error) -> StoreError {
        StoreError::ObjectStore { url: self.url.to_string(), source }
    }

    /// Checks that the store answers within `timeout`, whatever it contains.
    pub async fn check_reachable(&self, timeout: Duration) -> Result<(), StoreError> {
        let mut listing = self.object_store.list(None);
        match tokio::time::timeout(timeout, listing.next()).await {
            Ok(None | Some(Ok(_))) => Ok(()),
            Ok(Some(Err(source))) => Err(self.wrap_error(source)),
            Err(_) => {
                Err(StoreError::Timeout { url: self.url.to_string(), seconds: timeout.as_secs() })
            }
        }
    }

    /// Checks that objects can be written, listed, read, removed, and put conditionally. Writes a probe
    /// object and removes it.
    pub async fn check_capabilities(&self) -> Result<(), StoreError> {
        let probe = Path::from(format!("_bsap_probe_{:016x}", rand::random::<u64>()));
        let create = PutOptions::from(PutMode::Create);
        let wrap = |source| self.wrap_error(source);
        self.object_store
            .put_opts(&probe, PutPayload::from_static(b"1"), create.clone())
            .await
            .map_err(wrap)?;
        let second_put =
            self.object_store.put_opts(&probe, PutPayload::from_static(b"2"), create).await;
        let read = async { self.object_store.get(&probe).await?.bytes().await };
        let read = read.await.map_err(wrap);
        let listed = self.object_store.list(None).next().await.transpose().map_err(wrap);
        self.object_store.delete(&probe).await.map_err(wrap)?;
        match second_put {
            Err(object_store::Error::AlreadyExists { .. }) => read.and(listed).map(|_| ()),
            Err(source) => Err(wrap(source)),
            Ok(_) => Err(StoreError::NoConditionalPut { url: self.url.to_string() }),
        }
    }
}

/// Returns the options of the providers' environment variables, then `options`, which override them. The names
/// are in lower case.
pub(super) fn merge_environment(
    options: &BTreeMap<String, String>,
) -> impl Iterator<Item = (String, String)> {
    let environment = std::env::vars()
        .filter(|(k, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|p| k.starts_with(p)));
    let configured = options.iter().map(|(k, v)| (k.clone(), v.clone()));
    environment.chain(configured).map(|(key, value)| (key.to_ascii_lowercase(), value))
}

/// Whether a kind of store has the option `name`.
pub fn is_known_option(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.parse::<AmazonS3ConfigKey>().is_ok()
        || name.parse::<GoogleConfigKey>().is_ok()
        || name.parse::<AzureConfigKey>().is_ok()
}

/// Returns one line per option of `store_options` that no kind of store has.
pub fn validate_options(store_options: &BTreeMap<String, String>) -> Vec<String> {
    let unknown = store_options.keys().filter(|name| !is_known_option(name));
    let problem = |name: &String| {
        format!(
            "store_options.{name}: is not an option of S3, Google Cloud Storage or Azure; correct or remove it"
        )
    };
    unknown.map(problem).collect()
}

/// Parses the URL of a folder. A plain path becomes an absolute file URL.
pub fn parse_url(url: &str) -> Result<Url, StoreError> {
    let error = |reason: &str| StoreError::InvalidUrl { url: url.into(), reason: reason.into() };
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
            // Parsed again, because that turns `a/../b` into `b`: URLs are compared as texts.
            Url::parse(url.as_str()).map_err(|_| error("is not a path"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_and_folders_have_all_capabilities() {
        Store::in_memory().check_capabilities().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let store = Store::open(path.to_str().unwrap(), &BTreeMap::new()).unwrap();
        store.check_capabilities().await.unwrap();
        store.subfolder("generations").check_capabilities().await.unwrap();
    }

    #[test]
    fn invalid_urls_suggest_valid_ones() {
        for url in ["", "ftp://host/x", "s3:///nobucket", "http//x://y"] {
            let message = Store::open(url, &BTreeMap::new()).unwrap_err().to_string();
            assert!(message.contains("s3://bucket"), "{message}");
        }
    }

    #[test]
    fn equivalent_paths_give_one_url() {
        assert_eq!(parse_url("/a/b/../c").unwrap().as_str(), "file:///a/c/");
        assert_eq!(parse_url("/a/./c").unwrap().as_str(), "file:///a/c/");
    }

    #[test]
    fn a_subfolder_keeps_the_prefix_of_its_parent() {
        let store =
            Store::open("s3://bucket/a/", &BTreeMap::from([("aws_region".into(), "x".into())]))
                .unwrap();
        assert_eq!(store.subfolder("b").url().as_str(), "s3://bucket/a/b");
    }
}
