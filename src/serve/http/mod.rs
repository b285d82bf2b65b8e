//! The HTTP interface of the query worker: JSON, a feed of changes, and one page.
//!
//! `connections` accepts and limits connections, `base_path` is where a proxy serves this server,
//! `router` combines the routes with their limits and scopes, `routes`, `pictures` and `auth` answer requests,
//! `body` has that JSON (`body/request.rs`: a search's JSON becomes a `Query`), and `credentials` has
//! keys and sessions.

mod auth;
mod base_path;
mod body;
mod compression;
mod concurrency_limit;
mod connections;
mod credentials;
mod error;
mod openapi;
mod options;
mod pictures;
mod request_metrics;
mod router;
mod routes;
mod state;
mod worker_metrics;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub use body::request::SearchRequest;
pub use body::rerank::RerankRequest;
pub use body::response::{ImageInfo, RightAnswers, SearchHit, SearchResponse};
pub use connections::{Listener, bind_listener};
pub use credentials::api_keys::{ApiKey, KeyHash, Scope};
pub use error::ServerStartError;
pub use openapi::build_document as openapi;
pub use options::HttpOptions;
pub use state::{ServerContext, Substitute};

use connections::ConnectionLimits;
use worker_metrics::WorkerPoller;

/// Answers requests until `cancel` is cancelled, then lets open requests finish.
pub async fn serve(context: ServerContext, listener: Listener, cancel: CancellationToken) {
    let limits = ConnectionLimits::new(&context.options);
    let worker_poller = Arc::new(WorkerPoller::new(&context.options.worker_metrics_urls));
    let router = router::build_router(context, worker_poller.clone(), cancel.clone());
    let poller_cancel = cancel.clone();
    tokio::spawn(async move { worker_poller.run(poller_cancel).await });
    connections::accept_connections(listener, router, limits, cancel).await;
}

#[cfg(test)]
mod tests;
