//! Metrics and probes of a process over HTTP, on a port of their own.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::event;
use super::metrics::{self, HealthProbe};

/// Where a process serves its metrics and probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsOptions {
    /// Whether `/metrics` (Prometheus), `/livez` and `/readyz` are served.
    pub enabled: bool,
    /// Address and port. Metrics and probes show numbers and names of stages, nothing of images or
    /// queries, and need no API key: let only the monitoring system connect. Port 0: any free port.
    pub listen: SocketAddr,
}

impl Default for MetricsOptions {
    fn default() -> Self {
        Self { enabled: true, listen: SocketAddr::from(([127, 0, 0, 1], 9464)) }
    }
}

/// Serves metrics and probes in the background until `token` is cancelled; returns the address.
/// Returns `None` if they are disabled, or if the port cannot be used: that is logged, and the process
/// works without metrics.
pub async fn start_admin_server(
    options: &MetricsOptions,
    health: Arc<dyn HealthProbe>,
    token: CancellationToken,
) -> Option<SocketAddr> {
    metrics::set_health_probe(health.clone());
    if !options.enabled {
        return None;
    }
    let listener = TcpListener::bind(options.listen).await.and_then(|l| Ok((l.local_addr()?, l)));
    let (address, listener) = match listener {
        Ok(listener) => listener,
        Err(error) => {
            let error = format!("metrics.listen: {}: {error}", options.listen);
            warn!(event = event::METRICS_UNAVAILABLE, error, "metrics are not served");
            return None;
        }
    };
    let router = Router::new()
        .route("/metrics", get(get_metrics))
        .route("/livez", get(get_livez))
        .route("/readyz", get(get_readyz))
        .with_state(health);
    tokio::spawn(async move {
        let server = axum::serve(listener, router).with_graceful_shutdown(token.cancelled_owned());
        if let Err(error) = server.await {
            warn!(event = event::METRICS_UNAVAILABLE, %error, "metrics are no longer served");
        }
    });
    Some(address)
}

async fn get_metrics() -> Response {
    ([(header::CONTENT_TYPE, metrics::PROMETHEUS_CONTENT_TYPE)], metrics::render_prometheus())
        .into_response()
}

async fn get_livez(State(health): State<Arc<dyn HealthProbe>>) -> Response {
    probe_response(health.check_liveness().map(|()| "alive"))
}

async fn get_readyz(State(health): State<Arc<dyn HealthProbe>>) -> Response {
    probe_response(health.check_readiness())
}

fn probe_response(health: Result<&'static str, String>) -> Response {
    match health {
        Ok(text) => format!("{text}\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n").into_response(),
    }
}
