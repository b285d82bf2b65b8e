//! From an event's content to bytes.
//!
//! Images come from object storage (`s3://`, `gs://`, `az://`), local folders (`file://`, only
//! under configured roots), `http(s)://` (never from addresses inside the network, unless allowed)
//! and `data:` URLs. The size of every download is bounded, and so is the sum of all of them.

mod address;
mod http;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{self, Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use object_store::GetOptions;
use object_store::path::Path;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use url::Url;

use crate::record::ImageContent;
use crate::retry::{Backoff, Classify, Disposition, retry};
use crate::store::{Store, StoreError};
use crate::telemetry::event;
use crate::validate;

/// Buckets for which a client is kept; more than that many sources of images are not expected.
const MAX_STORES: usize = 256;

/// Hosts and buckets that are remembered as silent; past it they are forgotten, and waited for again.
const MAX_UNRESPONSIVE_HOSTS: usize = 10_000;

/// How images are fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FetchOptions {
    /// Folders below which `file://` images may lie. Empty: `file://` is refused.
    pub file_roots: Vec<PathBuf>,
    /// URL prefixes that may be fetched even though their host has a loopback, private or
    /// link-local address, for example `http://images.internal:8080/`. End them with a slash.
    pub allowed_private_url_prefixes: Vec<String>,
    /// Largest image in bytes, as downloaded.
    pub max_bytes: u64,
    /// Bytes of downloaded images held at one time, over all downloads, in MiB.
    pub budget_mib: u32,
    /// How long connecting, the answer's head, or any pause within the body may take, in
    /// milliseconds.
    pub idle_timeout_ms: u64,
    /// How long the body of one image may take, in milliseconds, from when it has its share of
    /// `budget_mib`.
    pub body_timeout_ms: u64,
    /// Redirects followed for one image.
    pub max_redirects: u32,
    /// How often a fetch that fails in a way that may pass is tried in all, with growing pauses: 8
    /// attempts wait 6 s on average, 13 s at most. A host or bucket that failed through all of them
    /// is tried once per image until it answers again.
    pub max_attempts: u32,
    /// Requests to one http host at one time.
    pub max_requests_per_host: usize,
    /// Options for image buckets (as for the table's store), for example `aws_region`.
    pub store_options: BTreeMap<String, String>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            file_roots: Vec::new(),
            allowed_private_url_prefixes: Vec::new(),
            max_bytes: 32 << 20,
            budget_mib: 256,
            idle_timeout_ms: 10_000,
            body_timeout_ms: 60_000,
            max_redirects: 5,
            max_attempts: 8,
            max_requests_per_host: 32,
            store_options: BTreeMap::new(),
        }
    }
}

impl FetchOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(p, "max_bytes", self.max_bytes, 1024, 2 << 30);
        validate::check_range(p, "budget_mib", self.budget_mib.into(), 1, 1 << 20);
        validate::check_range(p, "idle_timeout_ms", self.idle_timeout_ms, 10, 600_000);
        validate::check_range(p, "body_timeout_ms", self.body_timeout_ms, 10, 3_600_000);
        validate::check_range(p, "max_redirects", self.max_redirects.into(), 0, 20);
        validate::check_range(p, "max_attempts", self.max_attempts.into(), 1, 20);
        validate::check_range(
            p,
            "max_requests_per_host",
            self.max_requests_per_host as u64,
            1,
            1000,
        );
        if u64::from(self.budget_mib) << 20 < self.max_bytes {
            problems.push(format!(
                "budget_mib: {} MiB is less than one image of max_bytes ({} bytes)",
                self.budget_mib, self.max_bytes
            ));
        }
        for root in &self.file_roots {
            if !root.is_dir() {
                problems.push(format!(
                    "file_roots: {} is not a folder; create it or remove it",
                    root.display()
                ));
            }
        }
        for prefix in &self.allowed_private_url_prefixes {
            if !prefix.starts_with("http") || !prefix.ends_with('/') || Url::parse(prefix).is_err()
            {
                problems.push(format!(
                    "allow_http: {prefix:?} is not a URL prefix such as http://images.internal:8080/"
                ));
            }
        }
        problems
    }
}

/// Why an image's bytes cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The URI is malformed, of an unknown scheme, or not allowed.
    #[error("{uri}: {reason}")]
    UriRejected {
        /// The URI, shortened.
        uri: String,
        /// Why.
        reason: String,
    },
    /// More bytes than allowed.
    #[error("{uri}: larger than fetch.max_bytes = {limit} bytes")]
    TooLarge {
        /// The URI, shortened.
        uri: String,
        /// The limit.
        limit: u64,
    },
    /// There is nothing at that place (any more).
    #[error("{uri}: not there")]
    NotFound {
        /// The URI, shortened.
        uri: String,
    },
    /// The server refuses for good.
    #[error("{uri}: {reason}")]
    Permanent {
        /// The URI, shortened.
        uri: String,
        /// What it said.
        reason: String,
    },
    /// It may work later.
    #[error("{uri}: {reason}")]
    Transient {
        /// The URI, shortened.
        uri: String,
        /// What went wrong.
        reason: String,
        /// Whether the host or bucket has answered all the same.
        host_responded: bool,
    },
}

impl FetchError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UriRejected { .. } => "uri_not_allowed",
            Self::TooLarge { .. } => "file_too_large",
            Self::NotFound { .. } => "image_not_found",
            Self::Permanent { .. } => "fetch_refused",
            Self::Transient { .. } => "fetch_failed",
        }
    }
}

impl Classify for FetchError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Transient { .. } => Disposition::Retry,
            _ => Disposition::DeadLetter,
        }
    }
}

/// Downloaded bytes; their share of the byte budget is free again when this is dropped.
#[derive(Debug)]
pub struct FetchedBytes {
    /// The bytes.
    pub bytes: Bytes,
    _budget_permit: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for FetchedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Fetches images.
pub struct Fetcher {
    options: FetchOptions,
    allowed_roots: Vec<PathBuf>,
    http: http::HttpClients,
    stores: Mutex<HashMap<String, Store>>,
    /// Hosts and buckets that failed through all attempts, and have not answered since.
    unresponsive_hosts: sync::Mutex<HashSet<String>>,
    /// One permit a KiB.
    byte_budget: Arc<Semaphore>,
}

impl Fetcher {
    /// Prepares clients; nothing is fetched yet.
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
            allowed_roots: roots,
            http: http::HttpClients::new(options)?,
            stores: Mutex::new(HashMap::new()),
            unresponsive_hosts: sync::Mutex::new(HashSet::new()),
            byte_budget: Arc::new(Semaphore::new(options.budget_mib as usize * 1024)),
            options: options.clone(),
        })
    }

    /// The bytes of an image. Tries again what may pass, as often as configured, unless its host
    /// or bucket is known not to answer: a long outage must not hold up the images of others.
    pub async fn fetch(
        &self,
        content: &ImageContent,
        token: &CancellationToken,
    ) -> Result<FetchedBytes, FetchError> {
        let (uri, version) = match content {
            ImageContent::Inline(bytes) => {
                return Ok(FetchedBytes { bytes: bytes.clone(), _budget_permit: None });
            }
            ImageContent::Uri { uri, version } => (uri, version.as_deref()),
        };
        let url =
            Url::parse(uri).map_err(|e| uri_rejected_error(uri, format!("is not a URI: {e}")))?;
        let host_or_bucket = url[..url::Position::BeforePath].to_owned();
        let stop_retrying = token.child_token();
        let mut failed = 0;
        let on_retry = |attempt: u32, error: &FetchError| {
            debug!(event = event::RETRY, stage = "fetch", attempt, error = %error, "trying again");
            failed = attempt;
            // Another image has waited for this host in vain already.
            if self.lock_unresponsive_hosts().contains(&host_or_bucket) {
                stop_retrying.cancel();
            }
        };
        let attempts = self.options.max_attempts;
        let fetched =
            retry(Backoff::with_max_attempts(attempts), &stop_retrying, on_retry, || async {
                self.fetch_once(uri, version, &url).await
            })
            .await;
        match &fetched {
            Err(FetchError::Transient { host_responded: false, .. }) if failed + 1 >= attempts => {
                let mut silent = self.lock_unresponsive_hosts();
                if silent.len() >= MAX_UNRESPONSIVE_HOSTS {
                    silent.clear();
                }
                silent.insert(host_or_bucket);
            }
            Err(FetchError::Transient { host_responded: false, .. }) => {}
            _ => {
                self.lock_unresponsive_hosts().remove(&host_or_bucket);
            }
        }
        fetched
    }

    fn lock_unresponsive_hosts(&self) -> sync::MutexGuard<'_, HashSet<String>> {
        self.unresponsive_hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
                let (response, _host_permit) = self.http.get(url).await?;
                let size = response.content_length();
                let body = response.bytes_stream().map(|chunk| {
                    chunk.map_err(|e| transient_error(uri, e.without_url().to_string()))
                });
                self.read_body_within_budget(uri, size, body).await
            }
            "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" => {
                self.fetch_object(uri, version, url).await
            }
            other => Err(uri_rejected_error(
                uri,
                format!("scheme {other} is not one of s3, gs, az, http, https, file, data"),
            )),
        }
    }

    fn fetch_data_url(&self, uri: &str) -> Result<FetchedBytes, FetchError> {
        let parsed = data_url::DataUrl::process(uri)
            .map_err(|e| uri_rejected_error(uri, format!("is not a data URL: {e:?}")))?;
        let (bytes, _) = parsed
            .decode_to_vec()
            .map_err(|e| uri_rejected_error(uri, format!("is not a data URL: {e:?}")))?;
        if bytes.len() as u64 > self.options.max_bytes {
            return Err(self.too_large_error(uri));
        }
        Ok(FetchedBytes { bytes: bytes.into(), _budget_permit: None })
    }

    async fn fetch_file(&self, uri: &str, url: &Url) -> Result<FetchedBytes, FetchError> {
        let path = url
            .to_file_path()
            .map_err(|()| uri_rejected_error(uri, "names no local file".into()))?;
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => FetchError::NotFound { uri: shorten_uri(uri) },
            std::io::ErrorKind::PermissionDenied => permanent_error(uri, error.to_string()),
            _ => transient_error_after_response(uri, error.to_string()),
        };
        // Links are resolved first, so that none leads out of the roots.
        let real = self.with_timeout(uri, tokio::fs::canonicalize(&path)).await?;
        let inside =
            |p: &std::path::Path| self.allowed_roots.iter().any(|root| p.starts_with(root));
        // What is not there cannot be resolved: it lies where its name says.
        let named_inside = || self.options.file_roots.iter().any(|root| path.starts_with(root));
        let outside = || uri_rejected_error(uri, "lies outside of fetch.file_roots".into());
        let real = match real {
            Ok(real) if inside(&real) => real,
            Err(error) if inside(&path) || named_inside() => return Err(failed(error)),
            _ => return Err(outside()),
        };
        let opened = async {
            let file = tokio::fs::File::open(&real).await?;
            let metadata = file.metadata().await?;
            Ok((file, metadata))
        };
        // A share of the network may hang, and a pipe waits for its writer.
        let (file, metadata) = self.with_timeout(uri, opened).await?.map_err(failed)?;
        if !metadata.is_file() {
            return Err(uri_rejected_error(uri, "is no file".into()));
        }
        let size = metadata.len();
        let body = tokio_util::io::ReaderStream::new(file).map(|chunk| chunk.map_err(failed));
        self.read_body_within_budget(uri, Some(size), body).await
    }

    async fn fetch_object(
        &self,
        uri: &str,
        version: Option<&str>,
        url: &Url,
    ) -> Result<FetchedBytes, FetchError> {
        let bucket =
            url.host_str().ok_or_else(|| uri_rejected_error(uri, "names no bucket".into()))?;
        // abfss://container@account.dfs.core.windows.net/key
        let container = Some(url.username()).filter(|name| !name.is_empty());
        let container = container.map_or(String::new(), |name| format!("{name}@"));
        let store =
            self.open_bucket(uri, &format!("{}://{container}{bucket}", url.scheme())).await?;
        let key =
            Path::from_url_path(url.path()).map_err(|e| uri_rejected_error(uri, e.to_string()))?;
        let failed = |error: object_store::Error| match error {
            object_store::Error::NotFound { .. } => FetchError::NotFound { uri: shorten_uri(uri) },
            error if crate::store::classify_error(&error) == Disposition::Retry => {
                transient_error(uri, error.to_string())
            }
            error => permanent_error(uri, error.to_string()),
        };
        let options =
            GetOptions { version: version.map(ToOwned::to_owned), ..GetOptions::default() };
        let objects = store.object_store();
        let answer =
            self.with_timeout(uri, objects.get_opts(&key, options)).await?.map_err(failed)?;
        let size = answer.meta.size;
        let body = answer.into_stream().map(|chunk| chunk.map_err(failed));
        self.read_body_within_budget(uri, Some(size), body).await
    }

    async fn open_bucket(&self, uri: &str, bucket: &str) -> Result<Store, FetchError> {
        let mut stores = self.stores.lock().await;
        if let Some(store) = stores.get(bucket) {
            return Ok(store.clone());
        }
        if stores.len() >= MAX_STORES {
            stores.clear();
        }
        let store = Store::open(bucket, &self.options.store_options)
            .map_err(|error: StoreError| uri_rejected_error(uri, error.to_string()))?;
        stores.insert(bucket.to_owned(), store.clone());
        Ok(store)
    }

    /// Reads a body of a size known or not, within the limits.
    async fn read_body_within_budget(
        &self,
        uri: &str,
        size: Option<u64>,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<FetchedBytes, FetchError> {
        let limit = self.options.max_bytes;
        if size.is_some_and(|size| size > limit) {
            return Err(self.too_large_error(uri));
        }
        let expected = size.unwrap_or(limit);
        let mut budget_permit = self
            .byte_budget
            .clone()
            .acquire_many_owned((expected.div_ceil(1024)) as u32)
            .await
            .map_err(|_| transient_error(uri, "shutting down"))?;
        // The clock starts where this download has its turn: others are not its fault.
        let bytes = self.with_timeout(uri, self.read_body(uri, size, body)).await??;
        // Of what was kept for a size that was not told, no more than it has.
        drop(budget_permit.split(expected.div_ceil(1024) as usize - bytes.len().div_ceil(1024)));
        Ok(FetchedBytes { bytes, _budget_permit: Some(budget_permit) })
    }

    async fn read_body(
        &self,
        uri: &str,
        size: Option<u64>,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::with_capacity(size.unwrap_or(64 << 10) as usize);
        let mut body = std::pin::pin!(body);
        let pause = Duration::from_millis(self.options.idle_timeout_ms);
        let changed = || transient_error_after_response(uri, "changed while it was read");
        while let Some(chunk) = tokio::time::timeout(pause, body.next())
            .await
            .map_err(|_| transient_error(uri, "the body stalled for fetch.idle_timeout_ms"))?
        {
            let chunk = chunk?;
            let read = bytes.len() as u64 + chunk.len() as u64;
            if read > self.options.max_bytes {
                return Err(self.too_large_error(uri));
            }
            if size.is_some_and(|size| read > size) {
                return Err(changed());
            }
            bytes.extend_from_slice(&chunk);
        }
        if size.is_some_and(|size| size != bytes.len() as u64) {
            return Err(changed());
        }
        Ok(bytes.freeze())
    }

    async fn with_timeout<T>(
        &self,
        uri: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, FetchError> {
        let limit = Duration::from_millis(self.options.body_timeout_ms);
        let done = tokio::time::timeout(limit, work).await;
        done.map_err(|_| transient_error(uri, "fetch.body_timeout_ms is over"))
    }

    fn too_large_error(&self, uri: &str) -> FetchError {
        FetchError::TooLarge { uri: shorten_uri(uri), limit: self.options.max_bytes }
    }
}

fn uri_rejected_error(uri: &str, reason: String) -> FetchError {
    FetchError::UriRejected { uri: shorten_uri(uri), reason }
}

fn permanent_error(uri: &str, reason: String) -> FetchError {
    FetchError::Permanent { uri: shorten_uri(uri), reason }
}

fn transient_error(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten_uri(uri), reason: reason.into(), host_responded: false }
}

/// The same, where the host or bucket works and this image or this moment does not.
fn transient_error_after_response(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten_uri(uri), reason: reason.into(), host_responded: true }
}

/// A URI fit for a message: without its query, which may hold a signature, and not endless.
pub fn shorten_uri(uri: &str) -> String {
    const MAX_CHARS: usize = 200;
    let plain = uri.split(['?', '#']).next().unwrap_or_default();
    if plain.chars().count() <= MAX_CHARS {
        return plain.to_owned();
    }
    plain.chars().take(MAX_CHARS).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests;
