//! `bsap ingest`: a worker.

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::shared::catalogue::open_store;
use super::shared::configuration::load_config;
use super::shared::error::CommandResult;
use super::shared::models::load_configured_model;
use super::shared::runtime::run_with_logging;
use super::shared::worker::{build_ingest_worker, spawn_background_tasks, spawn_table_maintenance};
use crate::config::Config;
use crate::ingest::Progress;
use crate::telemetry::{admin, event, metrics};

/// Runs a worker until it is stopped by a signal.
pub fn run(config_file: Option<&Path>) -> CommandResult {
    run_with_logging(load_config(config_file)?, consume_events)
}

/// Consumes events until `token` is cancelled, then drains the pipeline.
async fn consume_events(config: Config, token: CancellationToken) -> CommandResult {
    let encoders = load_configured_model(&config)?;
    let progress = Arc::new(Progress::default());
    metrics::record_process_start("worker");
    // Started before the catalogue is opened: a slow start must not fail its liveness probe.
    let admin_cancel = token.child_token();
    admin::start_admin_server(&config.metrics, progress.clone(), admin_cancel.clone()).await;
    let worker = build_ingest_worker(&config, encoders.clone(), progress).await?;
    let store = open_store(&config).await?;
    let mut background_tasks = spawn_background_tasks(&config, &store, &worker, &token);
    let maintenance_cancel = token.child_token();
    let maintenance_task =
        spawn_table_maintenance(&config, &*encoders, maintenance_cancel.clone()).await?;
    let stop_all = token.clone();
    let drained = worker.run(token).await;
    // If the worker ended with an error, the background tasks must end too.
    stop_all.cancel();
    while background_tasks.join_next().await.is_some() {}
    maintenance_cancel.cancel();
    maintenance_task.await?;
    admin_cancel.cancel();
    let drained = drained?;
    info!(event = event::STOP, role = "worker", drained, "stopped");
    Ok(())
}
