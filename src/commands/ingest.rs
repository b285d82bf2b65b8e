//! `bsap ingest`.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{Done, parts};
use crate::config::Config;
use crate::ingest::Progress;
use crate::telemetry::{event, metrics, watch};

/// Consumes events until `token` is cancelled.
pub async fn run(config: Config, token: CancellationToken) -> Done {
    let towers = parts::towers(&config)?;
    let progress = Arc::new(Progress::default());
    metrics::started("worker");
    // Before the catalogue is opened: a probe that is refused kills a slow start.
    let watched = token.child_token();
    watch::start(&config.metrics, progress.clone(), watched.clone()).await;
    let worker = parts::worker(&config, towers.clone(), progress).await?;
    let store = parts::store(&config).await?;
    let mut governed = parts::governed(&config, &store, &worker, &token);
    let upkeep = parts::upkeep(&config, &*towers).await?;
    let tidying = token.child_token();
    // On a thread of its own: merging files computes for seconds.
    let (runtime, until) = (Handle::current(), tidying.clone());
    let tidied = tokio::task::spawn_blocking(move || runtime.block_on(upkeep.run(until)));
    let stopped = token.clone();
    let drained = worker.run(token).await;
    // A worker that ends by an error takes the rest with it.
    stopped.cancel();
    while governed.join_next().await.is_some() {}
    // A merge under way is finished, the next is not begun.
    tidying.cancel();
    tidied.await?;
    watched.cancel();
    let drained = drained?;
    info!(event = event::STOP, role = "worker", drained, "stopped");
    Ok(())
}
