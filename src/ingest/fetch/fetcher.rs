//! Fetches images, by the scheme of their URI.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{self, Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use object_store::Attribute;
use reqwest::header::CONTENT_ENCODING;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use url::Url;

use super::encoding::ContentEncoding;
use super::error::{
    FetchError, permanent_error, shorten_uri, transient_error, transient_error_after_response,
    uri_rejected_error,
};
use super::http::{HttpClients, normalise_prefixes};
use super::options::FetchOptions;
use crate::diagnosis::describe;
use crate::ingest::decode::{Recognised, decode_data_url, recognise};
use crate::record::ImageSource;
use crate::retry::{Backoff, Disposition, retry};
use crate::store::{ImageStore, StoreError, key_of_url, parse_object_url};
use crate::telemetry::event;

/// Maximum number of buckets with an open client; beyond it, all clients are closed.
const MAX_BUCKET_STORES: usize = 256;

/// Maximum number of hosts and buckets remembered as unresponsive; beyond it, all are forgotten.
const MAX_UNRESPONSIVE_HOSTS: usize = 10_000;

/// First bytes of a file from which its format is recognised.
const FORMAT_BYTES: usize = 64;
/// Files of at most this size are downloaded whole: the decoder says what is wrong with them.
const MAX_UNCHECKED_BYTES: u64 = 1 << 20;

/// Downloaded bytes. They hold their share of the byte budget until this is dropped.
#[derive(Debug)]
pub struct FetchedBytes {
    /// The encoded image.
    pub bytes: Bytes,
    _budget_permit: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for FetchedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Fetches images from all kinds of sources, within the limits of [`FetchOptions`].
pub struct Fetcher {
    options: FetchOptions,
    allowed_file_roots: Vec<PathBuf>,
    /// `fetch.missing_if_forbidden`, as the parser writes URLs.
    missing_if_forbidden: Vec<String>,
    http_clients: HttpClients,
    bucket_stores: Mutex<HashMap<String, ImageStore>>,
    /// Hosts and buckets that failed in all attempts and have not answered since.
    unresponsive_hosts: sync::Mutex<HashSet<String>>,
    /// One permit per KiB of downloaded bytes.
    download_budget_kib: Arc<Semaphore>,
}

impl Fetcher {
    /// Creates the clients; sends no request yet.
    pub fn new(options: &FetchOptions) -> Result<Self, FetchError> {
        let roots = options
            .file_roots
            .iter()
            .map(|root| {
                root.canonicalize().map_err(|error| FetchError::UriRejected {
                    uri: root.display().to_string(),
                    reason: error.to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            allowed_file_roots: roots,
            missing_if_forbidden: normalise_prefixes(&options.missing_if_forbidden),
            http_clients: HttpClients::new(options)?,
            bucket_stores: Mutex::new(HashMap::new()),
            unresponsive_hosts: sync::Mutex::new(HashSet::new()),
            download_budget_kib: Arc::new(Semaphore::new(options.budget_mib as usize * 1024)),
            options: options.clone(),
        })
    }

    /// Fetches the bytes of an image. Retries transient errors up to `fetch.max_attempts`, but not if the
    /// host or bucket is known to be unresponsive: its outage must not delay images from others.
    pub async fn fetch(
        &self,
        content: &ImageSource,
        token: &CancellationToken,
    ) -> Result<FetchedBytes, FetchError> {
        let (uri, version) = match content {
            ImageSource::Inline(bytes) => {
                return Ok(FetchedBytes { bytes: bytes.clone(), _budget_permit: None });
            }
            ImageSource::Uri { uri, version } => (uri, version.as_deref()),
        };
        let url =
            Url::parse(uri).map_err(|e| uri_rejected_error(uri, format!("is not a URI: {e}")))?;
        let host_or_bucket = url[..url::Position::BeforePath].to_owned();
        let stop_retrying = token.child_token();
        let mut failed_attempts = 0;
        let on_retry = |attempt: u32, error: &FetchError| {
            debug!(event = event::RETRY, stage = "fetch", attempt, error = %error, "the fetch failed; retrying");
            failed_attempts = attempt;
            // Another image has exhausted its attempts at this host already.
            if self.lock_unresponsive_hosts().contains(&host_or_bucket) {
                stop_retrying.cancel();
            }
        };
        let max_attempts = self.options.max_attempts;
        let fetched =
            retry(Backoff::with_max_attempts(max_attempts), &stop_retrying, on_retry, || async {
                self.fetch_once(uri, version, &url).await
            })
            .await;
        let fetched = fetched.map_err(|error| self.apply_forbidden_rule(&url, error));
        match &fetched {
            Err(FetchError::Transient { host_responded: false, .. })
                if failed_attempts + 1 >= max_attempts =>
            {
                let mut unresponsive = self.lock_unresponsive_hosts();
                if unresponsive.len() >= MAX_UNRESPONSIVE_HOSTS {
                    unresponsive.clear();
                }
                unresponsive.insert(host_or_bucket);
            }
            Err(FetchError::Transient { host_responded: false, .. }) => {}
            _ => {
                self.lock_unresponsive_hosts().remove(&host_or_bucket);
            }
        }
        fetched
    }

    /// Takes "forbidden" for "there is no such image" below the prefixes for which the options say so.
    fn apply_forbidden_rule(&self, url: &Url, error: FetchError) -> FetchError {
        let means_missing =
            || self.missing_if_forbidden.iter().any(|p| url.as_str().starts_with(p));
        match error {
            FetchError::Forbidden { uri, .. } if means_missing() => FetchError::NotFound { uri },
            error => error,
        }
    }

    fn lock_unresponsive_hosts(&self) -> sync::MutexGuard<'_, HashSet<String>> {
        self.unresponsive_hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches once, by the scheme of the URI.
    async fn fetch_once(
        &self,
        uri: &str,
        version: Option<&str>,
        url: &Url,
    ) -> Result<FetchedBytes, FetchError> {
        match url.scheme() {
            "data" => self.fetch_data_url(uri),
            "file" => self.fetch_file(uri, url).await,
            "http" | "https" => {
                let (response, _host_permit) =
                    self.http_clients.get_following_redirects(url).await?;
                let encoding = response.headers().get(CONTENT_ENCODING);
                let encoding = encoding.and_then(|name| name.to_str().ok());
                let encoding = encoding.and_then(ContentEncoding::from_name);
                let size = response.content_length();
                let body = response.bytes_stream().map(|chunk| {
                    chunk.map_err(|e| transient_error(uri, describe(&e.without_url())))
                });
                self.read_body_within_budget(uri, size, encoding, body).await
            }
            "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" => {
                self.fetch_object(uri, version).await
            }
            other => Err(uri_rejected_error(
                uri,
                format!("scheme {other} is not one of s3, gs, az, http, https, file, data"),
            )),
        }
    }

    fn fetch_data_url(&self, uri: &str) -> Result<FetchedBytes, FetchError> {
        let bytes = decode_data_url(uri).map_err(|reason| uri_rejected_error(uri, reason))?;
        if bytes.len() as u64 > self.options.max_bytes {
            return Err(self.too_large_error(uri));
        }
        Ok(FetchedBytes { bytes: bytes.into(), _budget_permit: None })
    }

    async fn fetch_file(&self, uri: &str, url: &Url) -> Result<FetchedBytes, FetchError> {
        let path = url
            .to_file_path()
            .map_err(|()| uri_rejected_error(uri, "names no local file".into()))?;
        let to_fetch_error = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => FetchError::NotFound { uri: shorten_uri(uri) },
            std::io::ErrorKind::PermissionDenied => {
                FetchError::Forbidden { uri: shorten_uri(uri), reason: error.to_string() }
            }
            _ => transient_error_after_response(uri, error.to_string()),
        };
        // Resolve links before the check, so that none leads out of the allowed roots.
        let resolved = self.with_timeout(uri, tokio::fs::canonicalize(&path)).await?;
        let is_allowed =
            |p: &std::path::Path| self.allowed_file_roots.iter().any(|root| p.starts_with(root));
        // A missing file has no resolved path: check the path as it is given.
        let is_below_root = || self.options.file_roots.iter().any(|root| path.starts_with(root));
        let outside = || uri_rejected_error(uri, "lies outside of fetch.file_roots".into());
        let resolved = match resolved {
            Ok(resolved) if is_allowed(&resolved) => resolved,
            Err(error) if is_allowed(&path) || is_below_root() => {
                return Err(to_fetch_error(error));
            }
            _ => return Err(outside()),
        };
        let opened = async {
            let file = tokio::fs::File::open(&resolved).await?;
            let metadata = file.metadata().await?;
            Ok((file, metadata))
        };
        // Opening may block: on a network file system, or on a pipe without a writer.
        let (file, metadata) = self.with_timeout(uri, opened).await?.map_err(to_fetch_error)?;
        if !metadata.is_file() {
            return Err(uri_rejected_error(uri, "is not a regular file".into()));
        }
        let size = metadata.len();
        let body =
            tokio_util::io::ReaderStream::new(file).map(|chunk| chunk.map_err(to_fetch_error));
        self.read_body_within_budget(uri, Some(size), None, body).await
    }

    async fn fetch_object(
        &self,
        uri: &str,
        version: Option<&str>,
    ) -> Result<FetchedBytes, FetchError> {
        let url = parse_object_url(uri).map_err(|reason| uri_rejected_error(uri, reason))?;
        let key = key_of_url(&url)
            .ok_or_else(|| uri_rejected_error(uri, "the key is not UTF-8".into()))?;
        let bucket =
            url.host_str().ok_or_else(|| uri_rejected_error(uri, "names no bucket".into()))?;
        // abfss://container@account.dfs.core.windows.net/key
        let container = Some(url.username()).filter(|name| !name.is_empty());
        let container = container.map_or(String::new(), |name| format!("{name}@"));
        let store =
            self.open_bucket(uri, &format!("{}://{container}{bucket}", url.scheme())).await?;
        let to_fetch_error = |error: object_store::Error| match error {
            object_store::Error::NotFound { .. } => FetchError::NotFound { uri: shorten_uri(uri) },
            object_store::Error::PermissionDenied { .. } => {
                FetchError::Forbidden { uri: shorten_uri(uri), reason: describe(&error) }
            }
            error if crate::store::classify_error(&error) == Disposition::Retry => {
                transient_error(uri, describe(&error))
            }
            error => permanent_error(uri, describe(&error)),
        };
        let object =
            self.with_timeout(uri, store.get(&key, version)).await?.map_err(to_fetch_error)?;
        let encoding = object.attributes.get(&Attribute::ContentEncoding);
        let encoding = encoding.and_then(|name| ContentEncoding::from_name(name));
        let size = object.meta.size;
        let body = object.into_stream().map(|chunk| chunk.map_err(to_fetch_error));
        self.read_body_within_budget(uri, Some(size), encoding, body).await
    }

    /// Returns the client of a bucket; opens it if necessary.
    async fn open_bucket(&self, uri: &str, bucket: &str) -> Result<ImageStore, FetchError> {
        let mut stores = self.bucket_stores.lock().await;
        if let Some(store) = stores.get(bucket) {
            return Ok(store.clone());
        }
        if stores.len() >= MAX_BUCKET_STORES {
            stores.clear();
        }
        let store = ImageStore::open(bucket, &self.options.store_options)
            .map_err(|error: StoreError| uri_rejected_error(uri, error.to_string()))?;
        stores.insert(bucket.to_owned(), store.clone());
        Ok(store)
    }

    /// Waits for a share of the byte budget, then reads a body, whose size may be unknown.
    async fn read_body_within_budget(
        &self,
        uri: &str,
        size: Option<u64>,
        encoding: Option<ContentEncoding>,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<FetchedBytes, FetchError> {
        let limit = self.options.max_bytes;
        if size.is_some_and(|size| size > limit) {
            return Err(self.too_large_error(uri));
        }
        // How large a compressed image becomes is not known.
        let expected = size.filter(|_| encoding.is_none()).unwrap_or(limit);
        let mut budget_permit = self
            .download_budget_kib
            .clone()
            .acquire_many_owned((expected.div_ceil(1024)) as u32)
            .await
            .map_err(|_| transient_error(uri, "shutting down"))?;
        // Waiting for the budget does not count towards the timeout.
        let is_plain = encoding.is_none();
        let mut bytes = self.with_timeout(uri, self.read_body(uri, size, is_plain, body)).await??;
        if let Some(encoding) = encoding {
            bytes = self.decompress(uri, encoding, bytes).await?;
        }
        // An unknown size reserved `max_bytes`: release what the image does not need.
        drop(budget_permit.split(expected.div_ceil(1024) as usize - bytes.len().div_ceil(1024)));
        Ok(FetchedBytes { bytes, _budget_permit: Some(budget_permit) })
    }

    /// Decompresses a body that the host compressed although nobody asked for it.
    async fn decompress(
        &self,
        uri: &str,
        encoding: ContentEncoding,
        bytes: Bytes,
    ) -> Result<Bytes, FetchError> {
        let limit = self.options.max_bytes;
        let decompressed =
            tokio::task::spawn_blocking(move || encoding.decompress(&bytes, limit)).await;
        match decompressed {
            Ok(Ok(Some(bytes))) => Ok(bytes),
            Ok(Ok(None)) => Err(self.too_large_error(uri)),
            Ok(Err(error)) => Err(permanent_error(
                uri,
                format!("its Content-Encoding is {encoding:?}, but: {error}"),
            )),
            Err(error) => Err(permanent_error(uri, error.to_string())),
        }
    }

    /// Reads a body; fails if it stalls, exceeds `max_bytes` or does not have the expected size. A large one that
    /// is not compressed (`is_plain`) is refused once its first bytes are those of no picture.
    async fn read_body(
        &self,
        uri: &str,
        size: Option<u64>,
        is_plain: bool,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::with_capacity(size.unwrap_or(64 << 10) as usize);
        let mut body = std::pin::pin!(body);
        let idle_timeout = Duration::from_millis(self.options.idle_timeout_ms);
        let changed = || transient_error_after_response(uri, "changed while it was read");
        while let Some(chunk) =
            tokio::time::timeout(idle_timeout, body.next()).await.map_err(|_| {
                transient_error(uri, "the body stalled for longer than fetch.idle_timeout_ms")
            })?
        {
            let chunk = chunk?;
            let read_bytes = bytes.len() as u64 + chunk.len() as u64;
            if read_bytes > self.options.max_bytes {
                return Err(self.too_large_error(uri));
            }
            if size.is_some_and(|size| read_bytes > size) {
                return Err(changed());
            }
            let had_first_bytes = bytes.len() >= FORMAT_BYTES;
            bytes.extend_from_slice(&chunk);
            let is_large = size.is_none_or(|size| size > MAX_UNCHECKED_BYTES);
            if is_plain
                && is_large
                && !had_first_bytes
                && bytes.len() >= FORMAT_BYTES
                && recognise(&bytes) == Recognised::Unknown
            {
                return Err(FetchError::NotAnImage { uri: shorten_uri(uri) });
            }
        }
        if size.is_some_and(|size| size != bytes.len() as u64) {
            return Err(changed());
        }
        Ok(bytes.freeze())
    }

    /// Limits `work` to `fetch.body_timeout_ms`.
    async fn with_timeout<T>(
        &self,
        uri: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, FetchError> {
        let limit = Duration::from_millis(self.options.body_timeout_ms);
        let result = tokio::time::timeout(limit, work).await;
        result.map_err(|_| transient_error(uri, "took longer than fetch.body_timeout_ms"))
    }

    fn too_large_error(&self, uri: &str) -> FetchError {
        FetchError::TooLarge { uri: shorten_uri(uri), limit: self.options.max_bytes }
    }
}
