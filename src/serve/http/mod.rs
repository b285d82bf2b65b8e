//! The query worker's face: JSON over HTTP, and one page.

pub(crate) mod api_keys;
mod auth;
mod connections;
mod openapi;
pub(crate) mod payload;
mod problem;
mod request_metrics;
mod routes;
mod session;
pub(crate) mod state_response;
mod worker_metrics;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use tracing::{error, warn};
use url::Url;

pub use api_keys::{ApiKey, KeyHash, Scope};
pub use connections::{Listener, listen};
pub use openapi::build_document as openapi;
pub use payload::{ImageInfo, SearchHit, SearchRequest, SearchResponse};
pub use state_response::Substitute;

use super::feedback::FeedbackQueue;
use crate::ingest::fetch::Fetcher;
use crate::search::Engines;
use crate::telemetry::event;
use crate::validate;
use auth::AuthLayer;
use connections::ConnectionLimits;
use problem::Problem;
use session::SessionStore;
use worker_metrics::WorkerPoller;

/// Where and how queries are served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpOptions {
    /// Address and port.
    pub listen: SocketAddr,
    /// Keys that are accepted, each `{ name, hash, scopes }`: `bsap keys new` prints one. With none,
    /// none is asked for.
    pub keys: Vec<ApiKey>,
    /// Whether other machines are answered without a key, where `keys` has none: for a proxy in front
    /// that authenticates.
    pub allow_unauthenticated: bool,
    /// How long somebody stays signed in on the page, in minutes.
    pub session_minutes: u64,
    /// Sessions of the page at one time; the oldest ends where there would be more.
    pub max_sessions: usize,
    /// PEM file of the certificate, its chain after it. Empty: no TLS.
    pub tls_cert: PathBuf,
    /// PEM file of the certificate's key.
    pub tls_key: PathBuf,
    /// Other sites whose pages may ask with a key (CORS), such as `https://shop.example`.
    pub cors_origins: Vec<String>,
    /// Connections at one time; more are turned away with 429.
    pub max_connections: usize,
    /// How long a connection may take to send a request's head, and stay open between requests, in
    /// milliseconds.
    pub header_timeout_ms: u64,
    /// How long a connection may take no byte of what is sent to it, in milliseconds; it is closed then.
    pub write_timeout_ms: u64,
    /// Requests computed at one time; more are turned away with 429.
    pub max_concurrent_requests: usize,
    /// How long a request may take, in milliseconds.
    pub timeout_ms: u64,
    /// Largest request body, in bytes, of routes that take no picture.
    pub max_body_bytes: usize,
    /// Largest body of a search or an explanation, in bytes: it may carry a picture in base64, four
    /// thirds of its file's size.
    pub max_search_body_bytes: usize,
    /// Listeners of the change feed (`/v1/events`) at one time.
    pub max_event_listeners: usize,
    /// Whether pictures are fetched and shown (`/v1/images/{id}/picture`); the limits of `fetch`
    /// hold.
    pub serve_pictures: bool,
    /// Example queries that the page offers.
    pub example_queries: Vec<String>,
    /// Where workers tell their metrics, such as `http://worker:9464`: what waits and what was put aside
    /// is asked of them for `/v1/state` and the page. A name may stand for several workers. Empty: both
    /// are said not to be seen.
    #[schemars(with = "Vec<String>")]
    pub worker_metrics_urls: Vec<Url>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            keys: Vec::new(),
            allow_unauthenticated: false,
            session_minutes: 12 * 60,
            max_sessions: 1024,
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            cors_origins: Vec::new(),
            max_connections: 1024,
            header_timeout_ms: 10_000,
            write_timeout_ms: 30_000,
            max_concurrent_requests: 64,
            timeout_ms: 10_000,
            max_body_bytes: 64 << 10,
            max_search_body_bytes: 12 << 20,
            max_event_listeners: 256,
            serve_pictures: true,
            example_queries: Vec::new(),
            worker_metrics_urls: Vec::new(),
        }
    }
}

impl HttpOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = api_keys::validate(&self.keys);
        if self.keys.is_empty() && !self.allow_unauthenticated && !self.listen.ip().is_loopback() {
            problems.push(format!(
                "listen: {} can be reached by other machines, and no key is asked for; add one to http.keys (`bsap keys new`), use 127.0.0.1, or set http.allow_unauthenticated = true behind a proxy that authenticates",
                self.listen
            ));
        }
        if self.tls_cert.as_os_str().is_empty() != self.tls_key.as_os_str().is_empty() {
            problems.push(
                "tls_cert: http.tls_cert and http.tls_key are set together or not at all".into(),
            );
        }
        for origin in &self.cors_origins {
            let right = Url::parse(origin).is_ok_and(|url| {
                url.origin().is_tuple() && url.origin().ascii_serialization() == *origin
            });
            if !right {
                problems.push(format!(
                    "cors_origins: {origin:?} is no origin such as https://shop.example: scheme, host and a port that is not the scheme's own, nothing after them"
                ));
            }
        }
        for url in
            self.worker_metrics_urls.iter().filter(|url| url.scheme() != "http" || !url.has_host())
        {
            problems.push(format!(
                "workers: {url} is no address such as http://worker:9464; metrics are served without TLS"
            ));
        }
        let p = &mut problems;
        validate::check_range(
            p,
            "worker_metrics_urls",
            self.worker_metrics_urls.len() as u64,
            0,
            worker_metrics::MAX_WORKERS as u64,
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
        validate::check_range(p, "session_minutes", self.session_minutes, 1, 60 * 24 * 31);
        validate::check_range(p, "max_sessions", self.max_sessions as u64, 1, 100_000);
        validate::check_range(p, "max_connections", self.max_connections as u64, 1, 100_000);
        validate::check_range(p, "header_timeout_ms", self.header_timeout_ms, 10, 600_000);
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

    /// Whether connections are encrypted.
    fn is_tls_enabled(&self) -> bool {
        !self.tls_cert.as_os_str().is_empty()
    }
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("http.listen: {address}: {source}; choose a free port, or stop what uses it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("{option}: {}: {reason}; it must be PEM, as `openssl` and ACME clients write it", .file.display())]
    Tls {
        /// Which option names the file.
        option: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Everything that requests are answered from.
pub struct ServerContext {
    /// Answer queries.
    pub engines: Arc<Engines>,
    /// Gets the bytes of pictures that are shown.
    pub fetcher: Fetcher,
    /// Takes in what users say of results.
    pub feedback_queue: FeedbackQueue,
    /// What stands in for real parts, where this is a demo.
    pub substitutes: Vec<Substitute>,
    /// Limits.
    pub options: HttpOptions,
}

/// Callers that sign in at one time.
const MAX_CONCURRENT_SIGN_INS: usize = 8;

/// What every handler gets.
struct HandlerState {
    context: ServerContext,
    /// A turn is held by each listener of the change feed.
    event_listener_permits: Arc<Semaphore>,
    api_keys: Vec<Arc<ApiKey>>,
    sessions: SessionStore,
    worker_poller: Arc<WorkerPoller>,
    cancel: CancellationToken,
}

/// Serves until `token` is cancelled, then lets open requests finish.
pub async fn serve(app: ServerContext, listener: Listener, token: CancellationToken) {
    let limits = ConnectionLimits::new(&app.options);
    let workers = Arc::new(WorkerPoller::new(&app.options.worker_metrics_urls));
    let router = build_router(app, workers.clone(), token.clone());
    let poller_cancel = token.clone();
    tokio::spawn(async move { workers.run(poller_cancel).await });
    connections::accept_connections(listener, router, limits, token).await;
}

fn build_router(
    app: ServerContext,
    workers: Arc<WorkerPoller>,
    token: CancellationToken,
) -> Router {
    let body_limit = DefaultBodyLimit::max(app.options.max_body_bytes);
    let picture_body_limit = DefaultBodyLimit::max(app.options.max_search_body_bytes);
    let shared = Arc::new(HandlerState {
        event_listener_permits: Arc::new(Semaphore::new(app.options.max_event_listeners)),
        api_keys: app.options.keys.iter().cloned().map(Arc::new).collect(),
        sessions: SessionStore::new(
            app.options.max_sessions,
            Duration::from_secs(60 * app.options.session_minutes),
        ),
        context: app,
        worker_poller: workers,
        cancel: token,
    });
    // The outermost layer comes last: who may not ask takes no turn.
    let compute_limit = ConcurrencyLimit::new(
        &shared,
        shared.context.options.max_concurrent_requests,
        "being computed (http.max_concurrent_requests)",
    );
    let compute_limit_layer = middleware::from_fn_with_state(compute_limit, limit_concurrency);
    // Before a key is known: callers without one may not take the turns of those who have one.
    let signing_in = ConcurrencyLimit::new(&shared, MAX_CONCURRENT_SIGN_INS, "signing in");
    let signing_in = middleware::from_fn_with_state(signing_in, limit_concurrency);
    let require_scope = |scope| {
        let auth_layer = AuthLayer { state: shared.clone(), required_scope: scope };
        middleware::from_fn_with_state(auth_layer, auth::authorise_request)
    };
    let compute_routes = Router::new()
        .route("/v1/search", post(routes::search).layer(picture_body_limit))
        .route("/v1/explain", post(routes::explain).layer(picture_body_limit))
        .route("/v1/images/{id}/picture", get(routes::get_picture))
        .route_layer(compute_limit_layer.clone());
    let search_routes = Router::new()
        .route("/v1/state", get(routes::get_state))
        .route("/v1/events", get(routes::stream_events))
        .route("/v1/images/{id}", get(routes::get_image))
        .merge(compute_routes)
        .route_layer(require_scope(Some(Scope::Search)));
    let feedback = Router::new()
        .route("/v1/feedback", post(routes::post_feedback).layer(compute_limit_layer.clone()))
        .route_layer(require_scope(Some(Scope::Feedback)));
    let session = Router::new()
        .route("/v1/session", get(auth::get_session).delete(auth::sign_out))
        .route_layer(require_scope(None))
        .route("/v1/session", post(auth::sign_in).layer(signing_in));
    let mut router = Router::new()
        .route("/", get(super::page::get_page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(routes::get_readyz))
        .route("/v1/openapi.json", get(|| async { Json(openapi::build_document()) }))
        .merge(search_routes)
        .merge(feedback)
        .merge(session)
        .fallback(routes::route_not_found)
        .method_not_allowed_fallback(routes::method_not_allowed)
        .layer(body_limit);
    if let Some(cors) = cors_layer(&shared.context.options.cors_origins) {
        router = router.layer(cors);
    }
    router
        .layer(CatchPanicLayer::custom(respond_to_panic))
        .layer(middleware::map_response(add_security_headers))
        .layer(middleware::from_fn(request_metrics::record_request_metrics))
        .with_state(shared)
}

/// Lets pages of `origins` ask with a key. Cookies are not for them.
fn cors_layer(origins: &[String]) -> Option<CorsLayer> {
    const PREFLIGHT_MAX_AGE: Duration = Duration::from_secs(600);
    let origins: Vec<_> = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok()).collect();
    let traceparent = HeaderName::from_static("traceparent");
    (!origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, traceparent])
            .expose_headers([header::RETRY_AFTER])
            .max_age(PREFLIGHT_MAX_AGE)
    })
}

/// Held for as long as a request is computed.
#[derive(Clone)]
struct ConcurrencyPermit(
    #[expect(dead_code, reason = "it counts while it is there")] Arc<OwnedSemaphorePermit>,
);

/// What only so many requests may do at one time.
#[derive(Clone)]
struct ConcurrencyLimit {
    permits: Arc<Semaphore>,
    max_concurrent: usize,
    /// What they do.
    activity: &'static str,
    timeout_ms: u64,
}

impl ConcurrencyLimit {
    fn new(shared: &HandlerState, limit: usize, doing: &'static str) -> Self {
        let timeout_ms = shared.context.options.timeout_ms;
        Self {
            permits: Arc::new(Semaphore::new(limit)),
            max_concurrent: limit,
            activity: doing,
            timeout_ms,
        }
    }
}

/// Turns a request away when too many do the same, and ends one that takes too long.
async fn limit_concurrency(
    State(concurrency): State<ConcurrencyLimit>,
    mut request: Request,
    next: Next,
) -> Response {
    let ConcurrencyLimit { permits: turns, max_concurrent: limit, activity: doing, timeout_ms } =
        concurrency;
    let Ok(permit) = turns.try_acquire_owned() else {
        warn!(event = event::REQUEST_REJECTED, limit, "too many requests; one was turned away");
        return Problem::too_many_requests(limit, &format!("requests are {doing}")).into_response();
    };
    // What is computed goes on for a while after its caller has left, and holds the turn until then.
    request.extensions_mut().insert(ConcurrencyPermit(Arc::new(permit)));
    match tokio::time::timeout(Duration::from_millis(timeout_ms), next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timeout(timeout_ms).into_response(),
    }
}

/// Headers that every answer carries: answers are data, never something to run or to frame.
async fn add_security_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let set = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in set {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[expect(clippy::needless_pass_by_value, reason = "the layer's signature")]
fn respond_to_panic(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    error!(event = event::HTTP_ERROR, code = "panic", error = text, "a handler panicked");
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        "the request failed; see the server's log",
    )
    .into_response()
}

#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod tests;
