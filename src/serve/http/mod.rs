//! The query worker's face: JSON over HTTP, and one page.

mod access;
pub(crate) mod answer;
mod connections;
pub(crate) mod keys;
mod measure;
mod openapi;
mod problem;
mod routes;
mod session;
pub(crate) mod state;
mod workers;

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

pub use answer::{HitAnswer, ImageAnswer, SearchAnswer, SearchRequest};
pub use connections::{Listener, listen};
pub use keys::{Hash, Key, Scope};
pub use openapi::document as openapi;
pub use state::StandIn;

use super::feedback::Inbox;
use crate::ingest::fetch::Fetcher;
use crate::search::Engines;
use crate::telemetry::event;
use crate::validate;
use access::Door;
use connections::Limits;
use problem::Problem;
use session::Sessions;
use workers::Workers;

/// Where and how queries are served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Address and port.
    pub listen: SocketAddr,
    /// Keys that are accepted, each `{ name, hash, scopes }`: `bsap keys new` prints one. With none,
    /// none is asked for.
    pub keys: Vec<Key>,
    /// Whether other machines are answered without a key, where `keys` has none: for a proxy in front
    /// that authenticates.
    pub open: bool,
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
    pub concurrency: usize,
    /// How long a request may take, in milliseconds.
    pub timeout_ms: u64,
    /// Largest request body, in bytes, of routes that take no picture.
    pub max_body_bytes: usize,
    /// Largest body of a search or an explanation, in bytes: it may carry a picture in base64, four
    /// thirds of its file's size.
    pub max_picture_body_bytes: usize,
    /// Listeners of the change feed (`/v1/events`) at one time.
    pub max_listeners: usize,
    /// Whether pictures are fetched and shown (`/v1/images/{id}/picture`); the limits of `fetch`
    /// hold.
    pub pictures: bool,
    /// Example queries that the page offers.
    pub examples: Vec<String>,
    /// Where workers tell their metrics, such as `http://worker:9464`: what waits and what was put aside
    /// is asked of them for `/v1/state` and the page. A name may stand for several workers. Empty: both
    /// are said not to be seen.
    #[schemars(with = "Vec<String>")]
    pub workers: Vec<Url>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            keys: Vec::new(),
            open: false,
            session_minutes: 12 * 60,
            max_sessions: 1024,
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            cors_origins: Vec::new(),
            max_connections: 1024,
            header_timeout_ms: 10_000,
            write_timeout_ms: 30_000,
            concurrency: 64,
            timeout_ms: 10_000,
            max_body_bytes: 64 << 10,
            max_picture_body_bytes: 12 << 20,
            max_listeners: 256,
            pictures: true,
            examples: Vec::new(),
            workers: Vec::new(),
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = keys::problems(&self.keys);
        if self.keys.is_empty() && !self.open && !self.listen.ip().is_loopback() {
            problems.push(format!(
                "listen: {} can be reached by other machines, and no key is asked for; add one to http.keys (`bsap keys new`), use 127.0.0.1, or set http.open = true behind a proxy that authenticates",
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
        for place in self.workers.iter().filter(|url| url.scheme() != "http" || !url.has_host()) {
            problems.push(format!(
                "workers: {place} is no address such as http://worker:9464; metrics are served without TLS"
            ));
        }
        let p = &mut problems;
        validate::range(p, "workers", self.workers.len() as u64, 0, workers::MOST as u64);
        validate::range(p, "concurrency", self.concurrency as u64, 1, 100_000);
        validate::range(p, "timeout_ms", self.timeout_ms, 10, 600_000);
        validate::range(p, "max_body_bytes", self.max_body_bytes as u64, 1024, 16 << 20);
        validate::range(
            p,
            "max_picture_body_bytes",
            self.max_picture_body_bytes as u64,
            1024,
            256 << 20,
        );
        validate::range(p, "session_minutes", self.session_minutes, 1, 60 * 24 * 31);
        validate::range(p, "max_sessions", self.max_sessions as u64, 1, 100_000);
        validate::range(p, "max_connections", self.max_connections as u64, 1, 100_000);
        validate::range(p, "header_timeout_ms", self.header_timeout_ms, 10, 600_000);
        validate::range(p, "write_timeout_ms", self.write_timeout_ms, 10, 600_000);
        validate::range(p, "max_listeners", self.max_listeners as u64, 0, 100_000);
        problems
    }

    /// Whether connections are encrypted.
    fn tls(&self) -> bool {
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
pub struct App {
    /// Answer queries.
    pub engines: Arc<Engines>,
    /// Gets the bytes of pictures that are shown.
    pub fetcher: Fetcher,
    /// Takes in what users say of results.
    pub feedback: Inbox,
    /// What stands in for real parts, where this is a demo.
    pub stand_ins: Vec<StandIn>,
    /// Limits.
    pub options: Options,
}

/// Callers that sign in at one time.
const MAX_SIGNING_IN: usize = 8;

/// What every handler gets.
struct Shared {
    app: App,
    /// A turn is held by each listener of the change feed.
    listeners: Arc<Semaphore>,
    keys: Vec<Arc<Key>>,
    sessions: Sessions,
    workers: Arc<Workers>,
    token: CancellationToken,
}

/// Serves until `token` is cancelled, then lets open requests finish.
pub async fn serve(app: App, listener: Listener, token: CancellationToken) {
    let limits = Limits::new(&app.options);
    let workers = Arc::new(Workers::new(&app.options.workers));
    let router = router(app, workers.clone(), token.clone());
    let asking = token.clone();
    tokio::spawn(async move { workers.run(asking).await });
    connections::serve(listener, router, limits, token).await;
}

fn router(app: App, workers: Arc<Workers>, token: CancellationToken) -> Router {
    let body = DefaultBodyLimit::max(app.options.max_body_bytes);
    let with_picture = DefaultBodyLimit::max(app.options.max_picture_body_bytes);
    let shared = Arc::new(Shared {
        listeners: Arc::new(Semaphore::new(app.options.max_listeners)),
        keys: app.options.keys.iter().cloned().map(Arc::new).collect(),
        sessions: Sessions::new(
            app.options.max_sessions,
            Duration::from_secs(60 * app.options.session_minutes),
        ),
        app,
        workers,
        token,
    });
    // The outermost layer comes last: who may not ask takes no turn.
    let computing =
        Gate::new(&shared, shared.app.options.concurrency, "being computed (http.concurrency)");
    let turn = middleware::from_fn_with_state(computing, limit);
    // Before a key is known: callers without one may not take the turns of those who have one.
    let signing_in = Gate::new(&shared, MAX_SIGNING_IN, "signing in");
    let signing_in = middleware::from_fn_with_state(signing_in, limit);
    let needs = |scope| {
        let door = Door { shared: shared.clone(), scope };
        middleware::from_fn_with_state(door, access::pass)
    };
    let computed = Router::new()
        .route("/v1/search", post(routes::search).layer(with_picture))
        .route("/v1/explain", post(routes::explain).layer(with_picture))
        .route("/v1/images/{id}/picture", get(routes::picture))
        .route_layer(turn.clone());
    let searched = Router::new()
        .route("/v1/state", get(routes::state))
        .route("/v1/events", get(routes::events))
        .route("/v1/images/{id}", get(routes::image))
        .merge(computed)
        .route_layer(needs(Some(Scope::Search)));
    let feedback = Router::new()
        .route("/v1/feedback", post(routes::feedback).layer(turn.clone()))
        .route_layer(needs(Some(Scope::Feedback)));
    let session = Router::new()
        .route("/v1/session", get(access::session).delete(access::sign_out))
        .route_layer(needs(None))
        .route("/v1/session", post(access::sign_in).layer(signing_in));
    let mut router = Router::new()
        .route("/", get(super::page::page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(routes::ready))
        .route("/v1/openapi.json", get(|| async { Json(openapi::document()) }))
        .merge(searched)
        .merge(feedback)
        .merge(session)
        .fallback(routes::unknown)
        .method_not_allowed_fallback(routes::wrong_method)
        .layer(body);
    if let Some(cors) = cors(&shared.app.options.cors_origins) {
        router = router.layer(cors);
    }
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::map_response(guard))
        .layer(middleware::from_fn(measure::measure))
        .with_state(shared)
}

/// Lets pages of `origins` ask with a key. Cookies are not for them.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    const PREFLIGHT: Duration = Duration::from_secs(600);
    let origins: Vec<_> = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok()).collect();
    let traceparent = HeaderName::from_static("traceparent");
    (!origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, traceparent])
            .expose_headers([header::RETRY_AFTER])
            .max_age(PREFLIGHT)
    })
}

/// Held for as long as a request is computed.
#[derive(Clone)]
struct Turn(#[expect(dead_code, reason = "it counts while it is there")] Arc<OwnedSemaphorePermit>);

/// What only so many requests may do at one time.
#[derive(Clone)]
struct Gate {
    turns: Arc<Semaphore>,
    limit: usize,
    /// What they do.
    doing: &'static str,
    timeout_ms: u64,
}

impl Gate {
    fn new(shared: &Shared, limit: usize, doing: &'static str) -> Self {
        let timeout_ms = shared.app.options.timeout_ms;
        Self { turns: Arc::new(Semaphore::new(limit)), limit, doing, timeout_ms }
    }
}

/// Turns a request away when too many do the same, and ends one that takes too long.
async fn limit(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let Gate { turns, limit, doing, timeout_ms } = gate;
    let Ok(turn) = turns.try_acquire_owned() else {
        warn!(event = event::SHED, limit, "too many requests; one was turned away");
        return Problem::busy(limit, &format!("requests are {doing}")).into_response();
    };
    // What is computed goes on for a while after its caller has left, and holds the turn until then.
    request.extensions_mut().insert(Turn(Arc::new(turn)));
    match tokio::time::timeout(Duration::from_millis(timeout_ms), next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timeout(timeout_ms).into_response(),
    }
}

/// Headers that every answer carries: answers are data, never something to run or to frame.
async fn guard(mut response: Response) -> Response {
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
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
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
mod access_tests;
#[cfg(test)]
mod tests;
