//! Counts requests and measures how long they take.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;

use crate::telemetry::metrics;

/// Records a request under its route. Requests without a route count as `other`: clients choose
/// paths, and each label value of a metric takes memory.
pub async fn record_request_metrics(
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let response = next.run(request).await;
    let route = path.as_ref().map_or("other", MatchedPath::as_str);
    metrics::global().http_requests.add(&[route, response.status().as_str()], 1);
    metrics::global()
        .http_request_seconds
        .observe_seconds(&[route], started.elapsed().as_secs_f64());
    response
}
