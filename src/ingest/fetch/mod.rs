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

use crate::record::Content;
use crate::retry::{Backoff, Decide, Verdict, retry};
use crate::store::{Store, StoreError};
use crate::telemetry::event;
use crate::validate;

/// Buckets for which a client is kept; more than that many sources of images are not expected.
const MAX_STORES: usize = 256;

/// Hosts and buckets that are remembered as silent; past it they are forgotten, and waited for again.
const MAX_SILENT: usize = 10_000;

/// How images are fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Folders below which `file://` images may lie. Empty: `file://` is refused.
    pub file_roots: Vec<PathBuf>,
    /// URL prefixes that may be fetched even though their host has a loopback, private or
    /// link-local address, for example `http://images.internal:8080/`. End them with a slash.
    pub allow_http: Vec<String>,
    /// Largest image in bytes, as downloaded.
    pub max_bytes: u64,
    /// Bytes of downloaded images held at one time, over all downloads, in MiB.
    pub budget_mib: u32,
    /// How long connecting, the answer's head, or any pause within the body may take, in
    /// milliseconds.
    pub timeout_ms: u64,
    /// How long the body of one image may take, in milliseconds, from when it has its share of
    /// `budget_mib`.
    pub total_timeout_ms: u64,
    /// Redirects followed for one image.
    pub max_redirects: u32,
    /// How often a fetch that fails in a way that may pass is tried in all, with growing pauses: 8
    /// attempts wait 6 s on average, 13 s at most. A host or bucket that failed through all of them
    /// is tried once per image until it answers again.
    pub attempts: u32,
    /// Requests to one http host at one time.
    pub per_host: usize,
    /// Options for image buckets (as for the table's store), for example `aws_region`.
    pub store_options: BTreeMap<String, String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            file_roots: Vec::new(),
            allow_http: Vec::new(),
            max_bytes: 32 << 20,
            budget_mib: 256,
            timeout_ms: 10_000,
            total_timeout_ms: 60_000,
            max_redirects: 5,
            attempts: 8,
            per_host: 32,
            store_options: BTreeMap::new(),
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::range(p, "max_bytes", self.max_bytes, 1024, 2 << 30);
        validate::range(p, "budget_mib", self.budget_mib.into(), 1, 1 << 20);
        validate::range(p, "timeout_ms", self.timeout_ms, 10, 600_000);
        validate::range(p, "total_timeout_ms", self.total_timeout_ms, 10, 3_600_000);
        validate::range(p, "max_redirects", self.max_redirects.into(), 0, 20);
        validate::range(p, "attempts", self.attempts.into(), 1, 20);
        validate::range(p, "per_host", self.per_host as u64, 1, 1000);
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
        for prefix in &self.allow_http {
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
    Refused {
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
    Gone {
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
        alive: bool,
    },
}

impl FetchError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "uri_refused",
            Self::TooLarge { .. } => "too_large",
            Self::Gone { .. } => "gone",
            Self::Permanent { .. } => "fetch_refused",
            Self::Transient { .. } => "fetch_failed",
        }
    }
}

impl Decide for FetchError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Transient { .. } => Verdict::Retry,
            _ => Verdict::DeadLetter,
        }
    }
}

/// Downloaded bytes; their share of the byte budget is free again when this is dropped.
#[derive(Debug)]
pub struct Fetched {
    /// The bytes.
    pub bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Fetched {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Fetches images.
pub struct Fetcher {
    options: Options,
    roots: Vec<PathBuf>,
    http: http::Http,
    stores: Mutex<HashMap<String, Store>>,
    /// Hosts and buckets that failed through all attempts, and have not answered since.
    silent: sync::Mutex<HashSet<String>>,
    /// One permit a KiB.
    budget: Arc<Semaphore>,
}

impl Fetcher {
    /// Prepares clients; nothing is fetched yet.
    pub fn new(options: &Options) -> Result<Self, FetchError> {
        let roots = options
            .file_roots
            .iter()
            .map(|root| {
                root.canonicalize().map_err(|error| FetchError::Refused {
                    uri: root.display().to_string(),
                    reason: error.to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            roots,
            http: http::Http::new(options)?,
            stores: Mutex::new(HashMap::new()),
            silent: sync::Mutex::new(HashSet::new()),
            budget: Arc::new(Semaphore::new(options.budget_mib as usize * 1024)),
            options: options.clone(),
        })
    }

    /// The bytes of an image. Tries again what may pass, as often as configured, unless its host
    /// or bucket is known not to answer: a long outage must not hold up the images of others.
    pub async fn fetch(
        &self,
        content: &Content,
        token: &CancellationToken,
    ) -> Result<Fetched, FetchError> {
        let (uri, version) = match content {
            Content::Inline(bytes) => {
                return Ok(Fetched { bytes: bytes.clone(), _share: None });
            }
            Content::Uri { uri, version } => (uri, version.as_deref()),
        };
        let url = Url::parse(uri).map_err(|e| refused(uri, format!("is not a URI: {e}")))?;
        let source = url[..url::Position::BeforePath].to_owned();
        let enough = token.child_token();
        let mut failed = 0;
        let on_retry = |attempt: u32, error: &FetchError| {
            debug!(event = event::RETRY, stage = "fetch", attempt, error = %error, "trying again");
            failed = attempt;
            // Another image has waited for this host in vain already.
            if self.silent().contains(&source) {
                enough.cancel();
            }
        };
        let attempts = self.options.attempts;
        let fetched = retry(Backoff::times(attempts), &enough, on_retry, || async {
            self.once(uri, version, &url).await
        })
        .await;
        match &fetched {
            Err(FetchError::Transient { alive: false, .. }) if failed + 1 >= attempts => {
                let mut silent = self.silent();
                if silent.len() >= MAX_SILENT {
                    silent.clear();
                }
                silent.insert(source);
            }
            Err(FetchError::Transient { alive: false, .. }) => {}
            _ => {
                self.silent().remove(&source);
            }
        }
        fetched
    }

    fn silent(&self) -> sync::MutexGuard<'_, HashSet<String>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn once(
        &self,
        uri: &str,
        version: Option<&str>,
        url: &Url,
    ) -> Result<Fetched, FetchError> {
        match url.scheme() {
            "data" => self.data(uri),
            "file" => self.file(uri, url).await,
            "http" | "https" => {
                let (response, _turn) = self.http.get(url).await?;
                let size = response.content_length();
                let body = response
                    .bytes_stream()
                    .map(|chunk| chunk.map_err(|e| transient(uri, e.without_url().to_string())));
                self.collect(uri, size, body).await
            }
            "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" => {
                self.object(uri, version, url).await
            }
            other => Err(refused(
                uri,
                format!("scheme {other} is not one of s3, gs, az, http, https, file, data"),
            )),
        }
    }

    fn data(&self, uri: &str) -> Result<Fetched, FetchError> {
        let parsed = data_url::DataUrl::process(uri)
            .map_err(|e| refused(uri, format!("is not a data URL: {e:?}")))?;
        let (bytes, _) = parsed
            .decode_to_vec()
            .map_err(|e| refused(uri, format!("is not a data URL: {e:?}")))?;
        if bytes.len() as u64 > self.options.max_bytes {
            return Err(self.too_large(uri));
        }
        Ok(Fetched { bytes: bytes.into(), _share: None })
    }

    async fn file(&self, uri: &str, url: &Url) -> Result<Fetched, FetchError> {
        let path = url.to_file_path().map_err(|()| refused(uri, "names no local file".into()))?;
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => FetchError::Gone { uri: shorten(uri) },
            std::io::ErrorKind::PermissionDenied => permanent(uri, error.to_string()),
            _ => passing(uri, error.to_string()),
        };
        // Links are resolved first, so that none leads out of the roots.
        let real = self.in_time(uri, tokio::fs::canonicalize(&path)).await?;
        let inside = |p: &std::path::Path| self.roots.iter().any(|root| p.starts_with(root));
        // What is not there cannot be resolved: it lies where its name says.
        let named_inside = || self.options.file_roots.iter().any(|root| path.starts_with(root));
        let outside = || refused(uri, "lies outside of fetch.file_roots".into());
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
        let (file, metadata) = self.in_time(uri, opened).await?.map_err(failed)?;
        if !metadata.is_file() {
            return Err(refused(uri, "is no file".into()));
        }
        let size = metadata.len();
        let body = tokio_util::io::ReaderStream::new(file).map(|chunk| chunk.map_err(failed));
        self.collect(uri, Some(size), body).await
    }

    async fn object(
        &self,
        uri: &str,
        version: Option<&str>,
        url: &Url,
    ) -> Result<Fetched, FetchError> {
        let bucket = url.host_str().ok_or_else(|| refused(uri, "names no bucket".into()))?;
        // abfss://container@account.dfs.core.windows.net/key
        let container = Some(url.username()).filter(|name| !name.is_empty());
        let container = container.map_or(String::new(), |name| format!("{name}@"));
        let store = self.bucket(uri, &format!("{}://{container}{bucket}", url.scheme())).await?;
        let key = Path::from_url_path(url.path()).map_err(|e| refused(uri, e.to_string()))?;
        let failed = |error: object_store::Error| match error {
            object_store::Error::NotFound { .. } => FetchError::Gone { uri: shorten(uri) },
            error if crate::store::verdict(&error) == Verdict::Retry => {
                transient(uri, error.to_string())
            }
            error => permanent(uri, error.to_string()),
        };
        let options =
            GetOptions { version: version.map(ToOwned::to_owned), ..GetOptions::default() };
        let objects = store.objects();
        let answer = self.in_time(uri, objects.get_opts(&key, options)).await?.map_err(failed)?;
        let size = answer.meta.size;
        let body = answer.into_stream().map(|chunk| chunk.map_err(failed));
        self.collect(uri, Some(size), body).await
    }

    async fn bucket(&self, uri: &str, bucket: &str) -> Result<Store, FetchError> {
        let mut stores = self.stores.lock().await;
        if let Some(store) = stores.get(bucket) {
            return Ok(store.clone());
        }
        if stores.len() >= MAX_STORES {
            stores.clear();
        }
        let store = Store::open(bucket, &self.options.store_options)
            .map_err(|error: StoreError| refused(uri, error.to_string()))?;
        stores.insert(bucket.to_owned(), store.clone());
        Ok(store)
    }

    /// Reads a body of a size known or not, within the limits.
    async fn collect(
        &self,
        uri: &str,
        size: Option<u64>,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<Fetched, FetchError> {
        let limit = self.options.max_bytes;
        if size.is_some_and(|size| size > limit) {
            return Err(self.too_large(uri));
        }
        let expected = size.unwrap_or(limit);
        let mut share = self
            .budget
            .clone()
            .acquire_many_owned((expected.div_ceil(1024)) as u32)
            .await
            .map_err(|_| transient(uri, "shutting down"))?;
        // The clock starts where this download has its turn: others are not its fault.
        let bytes = self.in_time(uri, self.body(uri, size, body)).await??;
        // Of what was kept for a size that was not told, no more than it has.
        drop(share.split(expected.div_ceil(1024) as usize - bytes.len().div_ceil(1024)));
        Ok(Fetched { bytes, _share: Some(share) })
    }

    async fn body(
        &self,
        uri: &str,
        size: Option<u64>,
        body: impl Stream<Item = Result<Bytes, FetchError>>,
    ) -> Result<Bytes, FetchError> {
        let mut bytes = BytesMut::with_capacity(size.unwrap_or(64 << 10) as usize);
        let mut body = std::pin::pin!(body);
        let pause = Duration::from_millis(self.options.timeout_ms);
        let changed = || passing(uri, "changed while it was read");
        while let Some(chunk) = tokio::time::timeout(pause, body.next())
            .await
            .map_err(|_| transient(uri, "the body stalled for fetch.timeout_ms"))?
        {
            let chunk = chunk?;
            let read = bytes.len() as u64 + chunk.len() as u64;
            if read > self.options.max_bytes {
                return Err(self.too_large(uri));
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

    async fn in_time<T>(&self, uri: &str, work: impl Future<Output = T>) -> Result<T, FetchError> {
        let limit = Duration::from_millis(self.options.total_timeout_ms);
        let done = tokio::time::timeout(limit, work).await;
        done.map_err(|_| transient(uri, "fetch.total_timeout_ms is over"))
    }

    fn too_large(&self, uri: &str) -> FetchError {
        FetchError::TooLarge { uri: shorten(uri), limit: self.options.max_bytes }
    }
}

fn refused(uri: &str, reason: String) -> FetchError {
    FetchError::Refused { uri: shorten(uri), reason }
}

fn permanent(uri: &str, reason: String) -> FetchError {
    FetchError::Permanent { uri: shorten(uri), reason }
}

fn transient(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten(uri), reason: reason.into(), alive: false }
}

/// The same, where the host or bucket works and this image or this moment does not.
fn passing(uri: &str, reason: impl Into<String>) -> FetchError {
    FetchError::Transient { uri: shorten(uri), reason: reason.into(), alive: true }
}

/// A URI fit for a message: without its query, which may hold a signature, and not endless.
pub fn shorten(uri: &str) -> String {
    const LONGEST: usize = 200;
    let plain = uri.split(['?', '#']).next().unwrap_or_default();
    if plain.chars().count() <= LONGEST {
        return plain.to_owned();
    }
    plain.chars().take(LONGEST).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests;
