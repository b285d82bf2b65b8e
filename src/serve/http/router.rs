//! The routes and the layers around them: limits, scopes, headers.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use tracing::error;

use super::auth::{self, AuthLayer};
use super::base_path::accept_base_path;
use super::body::problem::Problem;
use super::compression::{compress_response, reject_compressed_body};
use super::concurrency_limit::{ConcurrencyLimit, limit_concurrency_and_duration};
use super::credentials::api_keys::Scope;
use super::request_metrics::record_request_metrics;
use super::state::{HandlerState, ServerContext};
use super::worker_metrics::WorkerPoller;
use super::{pictures, routes};
use crate::serve::page;
use crate::telemetry::event;

/// Maximum number of requests that sign in at one time.
const MAX_CONCURRENT_SIGN_INS: usize = 8;

/// Builds the router of a query worker.
pub fn build_router(
    context: ServerContext,
    worker_poller: Arc<WorkerPoller>,
    cancel: CancellationToken,
) -> Router {
    let body_limit = DefaultBodyLimit::max(context.options.max_body_bytes);
    let search_body_limit = DefaultBodyLimit::max(context.options.max_search_body_bytes);
    let rerank_body_limit = DefaultBodyLimit::max(context.options.max_rerank_body_bytes);
    let shared = Arc::new(HandlerState::new(context, worker_poller, cancel));
    let timeout_ms = shared.context.options.timeout_ms;
    // The layer that is added last runs first: an unauthorised request takes no permit.
    let compute_limit = ConcurrencyLimit::new(
        shared.context.options.max_concurrent_requests,
        "being computed (http.max_concurrent_requests)",
        timeout_ms,
    );
    let compute_limit_layer =
        middleware::from_fn_with_state(compute_limit, limit_concurrency_and_duration);
    // Signing in has permits of its own: clients without a key must not use up those of clients
    // with one.
    let sign_in_limit = ConcurrencyLimit::new(MAX_CONCURRENT_SIGN_INS, "signing in", timeout_ms);
    let sign_in_limit_layer =
        middleware::from_fn_with_state(sign_in_limit, limit_concurrency_and_duration);
    let require_scope = |scope| {
        let auth_layer = AuthLayer { handler_state: shared.clone(), required_scope: scope };
        middleware::from_fn_with_state(auth_layer, auth::authorise_request)
    };
    let compute_routes = Router::new()
        .route("/v1/search", post(routes::search).layer(search_body_limit))
        .route("/v1/explain", post(routes::explain).layer(search_body_limit))
        .route("/v1/rerank", post(routes::rerank).layer(rerank_body_limit))
        .route("/v1/images/newest", get(routes::list_newest_images))
        .route("/v1/images/picture", get(pictures::get_picture))
        .route("/v1/sample-score", get(routes::get_sample_score))
        .route_layer(compute_limit_layer.clone());
    let search_routes = Router::new()
        .route("/v1/state", get(routes::get_state))
        .route("/v1/events", get(routes::stream_events))
        .route("/v1/images", get(routes::get_image))
        .merge(compute_routes)
        .route_layer(require_scope(Some(Scope::Search)));
    let feedback_routes = Router::new()
        .route("/v1/feedback", post(routes::post_feedback).layer(compute_limit_layer.clone()))
        .route_layer(require_scope(Some(Scope::Feedback)));
    let session_routes = Router::new()
        .route("/v1/session", get(auth::get_session).delete(auth::sign_out))
        .route_layer(require_scope(None))
        .route("/v1/session", post(auth::sign_in).layer(sign_in_limit_layer));
    let mut router = Router::new()
        .route("/", get(page::get_page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(routes::get_readyz))
        .route("/v1/openapi.json", get(routes::get_openapi))
        .merge(search_routes)
        .merge(feedback_routes)
        .merge(session_routes)
        .fallback(routes::route_not_found)
        .method_not_allowed_fallback(routes::method_not_allowed)
        .layer(body_limit)
        .layer(middleware::from_fn(reject_compressed_body))
        .layer(middleware::from_fn(compress_response));
    if let Some(cors) = cors_layer(&shared.context.options.cors_origins) {
        router = router.layer(cors);
    }
    let base_path: Arc<str> = shared.context.options.base_path.as_str().into();
    let router = router
        .layer(CatchPanicLayer::custom(respond_to_panic))
        .layer(middleware::map_response(add_security_headers))
        .layer(middleware::from_fn(record_request_metrics))
        .with_state(shared);
    accept_base_path(router, base_path)
}

/// Allows pages of `origins` to send requests with a key, but no cookies; `None` if there are no
/// origins.
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

/// Forbids browsers to run or to frame any response: responses are data.
async fn add_security_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let security_headers = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in security_headers {
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
    Problem::internal().into_response()
}
