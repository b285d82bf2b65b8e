//! `bsap ingest`.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{Done, parts};
use crate::config::Config;
use crate::ingest::Progress;
use crate::telemetry::event;

/// Consumes events until `token` is cancelled.
pub async fn run(config: Config, token: CancellationToken) -> Done {
    let towers = parts::towers(&config)?;
    let worker = parts::worker(&config, towers, Arc::new(Progress::default())).await?;
    let drained = worker.run(token).await?;
    info!(event = event::STOP, role = "worker", drained, "stopped");
    Ok(())
}
