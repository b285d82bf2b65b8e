//! The query worker's face: JSON over HTTP, and one page.

mod answer;
mod measure;
mod openapi;
mod page;
mod problem;
mod routes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{error, warn};

pub use answer::{HitAnswer, ImageAnswer, SearchAnswer, SearchRequest, StandIn};
pub use openapi::document as openapi;

use crate::feedback::Inbox;
use crate::fetch::Fetcher;
use crate::limits;
use crate::search::Engine;
use crate::telemetry::event;
use problem::Problem;

/// How long open requests may take to finish at shutdown.
const DRAIN: Duration = Duration::from_secs(2);

/// Where and how queries are served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Address and port.
    pub listen: SocketAddr,
    /// Allows an address that other machines reach. There is no authentication: put a proxy that
    /// has it in front.
    pub open: bool,
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
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            open: false,
            concurrency: 64,
            timeout_ms: 10_000,
            max_body_bytes: 64 << 10,
            max_picture_body_bytes: 12 << 20,
            max_listeners: 256,
            pictures: true,
            examples: Vec::new(),
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.open && !self.listen.ip().is_loopback() {
            problems.push(format!(
                "listen: {} can be reached by other machines and there is no authentication; use 127.0.0.1, or set http.open = true behind a proxy that authenticates",
                self.listen
            ));
        }
        let p = &mut problems;
        limits::range(p, "concurrency", self.concurrency as u64, 1, 100_000);
        limits::range(p, "timeout_ms", self.timeout_ms, 10, 600_000);
        limits::range(p, "max_body_bytes", self.max_body_bytes as u64, 1024, 16 << 20);
        limits::range(
            p,
            "max_picture_body_bytes",
            self.max_picture_body_bytes as u64,
            1024,
            256 << 20,
        );
        limits::range(p, "max_listeners", self.max_listeners as u64, 0, 100_000);
        problems
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
    /// The server failed.
    #[error("the HTTP server failed: {0}")]
    Serve(std::io::Error),
}

/// Everything that requests are answered from.
pub struct App {
    /// Answers queries.
    pub engine: Arc<Engine>,
    /// Gets the bytes of pictures that are shown.
    pub fetcher: Fetcher,
    /// Takes in what users say of results.
    pub feedback: Inbox,
    /// Identifier of the generation that is served.
    pub generation: String,
    /// What stands in for real parts, where this is a demo.
    pub stand_ins: Vec<StandIn>,
    /// Limits.
    pub options: Options,
}

/// What every handler gets.
struct Shared {
    app: App,
    /// A turn is held while a request is computed.
    turns: Arc<Semaphore>,
    /// A turn is held by each listener of the change feed.
    listeners: Arc<Semaphore>,
    token: CancellationToken,
}

/// Opens the port: a port in use shows before anything expensive is loaded.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })
}

/// Serves until `token` is cancelled, then lets open requests finish.
pub async fn serve(
    app: App,
    listener: TcpListener,
    token: CancellationToken,
) -> Result<(), ServeError> {
    let router = router(app, token.clone());
    let draining = token.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(draining.cancelled_owned());
    let overdue = async {
        token.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server.into_future() => result.map_err(ServeError::Serve),
        () = overdue => Ok(()),
    }
}

fn router(app: App, token: CancellationToken) -> Router {
    let body = DefaultBodyLimit::max(app.options.max_body_bytes);
    let with_picture = DefaultBodyLimit::max(app.options.max_picture_body_bytes);
    let shared = Arc::new(Shared {
        turns: Arc::new(Semaphore::new(app.options.concurrency)),
        listeners: Arc::new(Semaphore::new(app.options.max_listeners)),
        app,
        token,
    });
    let computed = Router::new()
        .route("/v1/search", post(routes::search).layer(with_picture))
        .route("/v1/explain", post(routes::explain).layer(with_picture))
        .route("/v1/images/{id}/picture", get(routes::picture))
        .route("/v1/feedback", post(routes::feedback))
        .layer(middleware::from_fn_with_state(shared.clone(), limit));
    Router::new()
        .route("/", get(page::page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(routes::ready))
        .route("/v1/state", get(routes::state))
        .route("/v1/openapi.json", get(|| async { Json(openapi::document()) }))
        .route("/v1/events", get(routes::events))
        .route("/v1/images/{id}", get(routes::image))
        .merge(computed)
        .fallback(routes::unknown)
        .method_not_allowed_fallback(routes::wrong_method)
        .layer(body)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::map_response(guard))
        .layer(middleware::from_fn(measure::measure))
        .with_state(shared)
}

/// Turns a request away when too many are computed, and ends one that takes too long.
async fn limit(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let options = &shared.app.options;
    let Ok(_turn) = shared.turns.clone().try_acquire_owned() else {
        warn!(
            event = event::SHED,
            limit = options.concurrency,
            "too many requests; one was turned away"
        );
        return Problem::busy(
            options.concurrency,
            "requests are being computed (http.concurrency)",
        )
        .into_response();
    };
    let limit = Duration::from_millis(options.timeout_ms);
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timeout(options.timeout_ms).into_response(),
    }
}

/// Headers that every answer carries: answers are data, never something to run or to frame.
async fn guard(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let set = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
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
mod tests;
