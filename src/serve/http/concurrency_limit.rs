//! Rejects requests if too many are processed at the same time, and ends those that take too long.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use super::body::problem::Problem;
use crate::telemetry::event;

/// Counts a request against its limit for as long as any clone exists. Handlers pass a clone to the
/// computation, which may outlive the request.
#[derive(Clone)]
pub struct ConcurrencyPermit(
    #[expect(dead_code, reason = "it counts by being held")] Arc<OwnedSemaphorePermit>,
);

/// A limit that the requests of one or more routes share.
#[derive(Clone)]
pub struct ConcurrencyLimit {
    permits: Arc<Semaphore>,
    max_concurrent_requests: usize,
    /// What the requests do, for the error message: "<n> requests are <activity>".
    activity_description: &'static str,
    request_timeout_ms: u64,
}

impl ConcurrencyLimit {
    pub fn new(max_concurrent: usize, activity: &'static str, timeout_ms: u64) -> Self {
        let permits = Arc::new(Semaphore::new(max_concurrent));
        Self {
            permits,
            max_concurrent_requests: max_concurrent,
            activity_description: activity,
            request_timeout_ms: timeout_ms,
        }
    }
}

/// Rejects a request if the limit is reached, and answers with an error if it takes too long.
pub async fn limit_concurrency_and_duration(
    State(concurrency): State<ConcurrencyLimit>,
    mut request: Request,
    next: Next,
) -> Response {
    let ConcurrencyLimit {
        permits,
        max_concurrent_requests: max_concurrent,
        activity_description: activity,
        request_timeout_ms: timeout_ms,
    } = concurrency;
    let Ok(permit) = permits.try_acquire_owned() else {
        warn!(
            event = event::REQUEST_REJECTED,
            limit = max_concurrent,
            "too many requests; one was rejected"
        );
        return Problem::too_many_requests(max_concurrent, &format!("requests are {activity}"))
            .into_response();
    };
    // A computation continues for a while after its caller has left, and holds the permit until
    // then.
    request.extensions_mut().insert(ConcurrencyPermit(Arc::new(permit)));
    match tokio::time::timeout(Duration::from_millis(timeout_ms), next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timeout(timeout_ms).into_response(),
    }
}
