//! The options of the HTTP server: section `[http]` of the configuration.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use super::base_path::validate_base_path;
use super::credentials::api_keys::{self, ApiKey};
use super::worker_metrics::MAX_POLLED_WORKERS;
use crate::validate;

/// Maximum of `http.preview_cache_mib`: a cache of more entries would slow down its own lookups.
const MAX_PREVIEW_CACHE_MIB: u64 = 1 << 16;

/// Options of the HTTP server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpOptions {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// Path under which a proxy serves the page and the interface, such as `/search`. Requests are
    /// answered with it and without it, so the proxy may remove it or not. Empty: none.
    pub base_path: String,
    /// Accepted API keys, each `{ name, hash, scopes }` as `bsap keys new` prints it. If there is
    /// none, requests need no key.
    pub keys: Vec<ApiKey>,
    /// Whether other machines are answered although `keys` is empty: for use behind a proxy that
    /// authenticates.
    pub allow_unauthenticated: bool,
    /// How long a session of the page lasts, in minutes.
    pub session_minutes: u64,
    /// Maximum number of sessions of the page; one more signs the oldest out.
    pub max_sessions: usize,
    /// PEM file of the certificate, followed by its chain. Empty: no TLS.
    pub tls_cert: PathBuf,
    /// PEM file of the certificate's private key.
    pub tls_key: PathBuf,
    /// Origins of other sites whose pages may send requests with a key (CORS), such as
    /// `https://shop.example`.
    pub cors_origins: Vec<String>,
    /// Maximum number of open connections; further ones are answered with 429.
    pub max_connections: usize,
    /// How long a client may take to send the head of a request, in milliseconds.
    pub header_timeout_ms: u64,
    /// How long a connection may stay idle between requests, in milliseconds: longer than proxies in
    /// front keep idle connections (60 s in nginx), or they send requests on connections that close.
    pub idle_timeout_ms: u64,
    /// How long a client may read nothing of a response, in milliseconds; then its connection is
    /// closed.
    pub write_timeout_ms: u64,
    /// Maximum number of requests computed at one time; further ones are answered with 429.
    pub max_concurrent_requests: usize,
    /// How long a request may take, in milliseconds.
    pub timeout_ms: u64,
    /// Maximum size of a request body on routes that take no picture, in bytes.
    pub max_body_bytes: usize,
    /// Maximum size of the body of a search or an explanation, in bytes: it may contain a picture
    /// in base64, four thirds of the size of its file.
    pub max_search_body_bytes: usize,
    /// Maximum size of the body of `/v1/rerank`, in bytes: 5,000 embeddings of 768 values have 10 MB in base64 of
    /// 16-bit floats, and up to 46 MB as numbers.
    pub max_rerank_body_bytes: usize,
    /// Maximum number of listeners of the change feed (`/v1/events`).
    pub max_event_listeners: usize,
    /// Whether pictures are fetched and shown (`/v1/images/picture`), within the limits of
    /// `fetch`.
    pub serve_pictures: bool,
    /// Memory for the previews that were requested last (`/v1/images/picture?id=…&side=256`), in MiB.
    /// Some 100 previews of the size that the page shows fit one MiB. 0: none is kept.
    pub preview_cache_mib: usize,
    /// Example queries that the page offers.
    pub example_queries: Vec<String>,
    /// Addresses of the workers' metrics, such as `http://worker:9464`: the backlog and the dead
    /// letters in `/v1/state` and on the page are read from them. A name may resolve to several
    /// workers. Empty: both are reported as unknown.
    #[schemars(with = "Vec<String>")]
    pub worker_metrics_urls: Vec<Url>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            base_path: String::new(),
            keys: Vec::new(),
            allow_unauthenticated: false,
            session_minutes: 12 * 60,
            max_sessions: 1024,
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            cors_origins: Vec::new(),
            max_connections: 1024,
            header_timeout_ms: 10_000,
            idle_timeout_ms: 75_000,
            write_timeout_ms: 30_000,
            max_concurrent_requests: 64,
            timeout_ms: 10_000,
            max_body_bytes: 64 << 10,
            max_search_body_bytes: 12 << 20,
            max_rerank_body_bytes: 32 << 20,
            max_event_listeners: 256,
            serve_pictures: true,
            preview_cache_mib: 64,
            example_queries: Vec::new(),
            worker_metrics_urls: Vec::new(),
        }
    }
}

impl HttpOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = api_keys::validate_keys(&self.keys);
        problems.extend(validate_base_path(&self.base_path));
        if self.keys.is_empty() && !self.allow_unauthenticated && !self.listen.ip().is_loopback() {
            problems.push(format!(
                "listen: {} can be reached by other machines, and no key is required; add one to http.keys (`bsap keys new`), use 127.0.0.1, or set http.allow_unauthenticated = true behind a proxy that authenticates",
                self.listen
            ));
        }
        if self.tls_cert.as_os_str().is_empty() != self.tls_key.as_os_str().is_empty() {
            problems.push(
                "tls_cert: http.tls_cert and http.tls_key are set together or not at all".into(),
            );
        }
        for origin in &self.cors_origins {
            let is_origin = Url::parse(origin).is_ok_and(|url| {
                url.origin().is_tuple() && url.origin().ascii_serialization() == *origin
            });
            if !is_origin {
                problems.push(format!(
                    "cors_origins: {origin:?} is not an origin such as https://shop.example: scheme, host and, unless it is the scheme's default, port, with nothing after them"
                ));
            }
        }
        for url in
            self.worker_metrics_urls.iter().filter(|url| url.scheme() != "http" || !url.has_host())
        {
            problems.push(format!(
                "worker_metrics_urls: {url} is not an address such as http://worker:9464; metrics are served without TLS"
            ));
        }
        let p = &mut problems;
        validate::check_range(
            p,
            "worker_metrics_urls",
            self.worker_metrics_urls.len() as u64,
            0,
            MAX_POLLED_WORKERS as u64,
        );
        validate::check_range(
            p,
            "max_concurrent_requests",
            self.max_concurrent_requests as u64,
            1,
            100_000,
        );
        validate::check_range(p, "timeout_ms", self.timeout_ms, 10, 600_000);
        validate::check_range(p, "max_body_bytes", self.max_body_bytes as u64, 1024, 16 << 20);
        validate::check_range(
            p,
            "max_search_body_bytes",
            self.max_search_body_bytes as u64,
            1024,
            256 << 20,
        );
        validate::check_range(
            p,
            "max_rerank_body_bytes",
            self.max_rerank_body_bytes as u64,
            1024,
            256 << 20,
        );
        validate::check_range(
            p,
            "preview_cache_mib",
            self.preview_cache_mib as u64,
            0,
            MAX_PREVIEW_CACHE_MIB,
        );
        validate::check_range(p, "session_minutes", self.session_minutes, 1, 60 * 24 * 31);
        validate::check_range(p, "max_sessions", self.max_sessions as u64, 1, 100_000);
        validate::check_range(p, "max_connections", self.max_connections as u64, 1, 100_000);
        validate::check_range(p, "header_timeout_ms", self.header_timeout_ms, 10, 600_000);
        validate::check_range(p, "idle_timeout_ms", self.idle_timeout_ms, 10, 3_600_000);
        validate::check_range(p, "write_timeout_ms", self.write_timeout_ms, 10, 600_000);
        validate::check_range(
            p,
            "max_event_listeners",
            self.max_event_listeners as u64,
            0,
            100_000,
        );
        problems
    }

    /// Returns whether connections are encrypted.
    pub(super) fn is_tls_enabled(&self) -> bool {
        !self.tls_cert.as_os_str().is_empty()
    }
}
