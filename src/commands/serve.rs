//! `bsap serve`: a query worker.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::shared::configuration::load_config;
use super::shared::error::{CommandError, CommandResult};
use super::shared::models::load_models;
use super::shared::printing::print_line;
use super::shared::query_worker::{QueryWorker, build_query_worker, build_server_context};
use super::shared::runtime::run_with_logging;
use crate::clip::Encoders;
use crate::config::Config;
use crate::search::Engines;
use crate::serve::http;
use crate::table::TableError;
use crate::telemetry::metrics::{self, HealthProbe};
use crate::telemetry::{admin, event};

/// How often a query worker checks whether its catalogue has been created.
const CATALOGUE_POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Consecutive failures after which the device of the model counts as lost. CUDA never recovers a lost
/// device within the process; a new process may open it.
const MAX_CONSECUTIVE_MODEL_FAILURES: u32 = 3;

/// `bsap serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and port, instead of http.listen
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
}

/// Runs a query worker until it is stopped by a signal.
pub fn run(args: &ServeArgs, config_file: Option<&Path>) -> CommandResult {
    let mut config = load_config(config_file)?;
    override_listen(args, &mut config)?;
    run_with_logging(config, serve_queries)
}

/// Sets `http.listen` to `--listen`, if given, and validates it in the same way.
fn override_listen(args: &ServeArgs, config: &mut Config) -> Result<(), CommandError> {
    let Some(listen) = args.listen else { return Ok(()) };
    config.http.listen = listen;
    match config.http.validate().first() {
        Some(problem) => Err(CommandError::usage(format!("http.{problem}"))),
        None => Ok(()),
    }
}

/// Serves until `token` is cancelled. If no worker has created the catalogue yet, waits for it.
async fn serve_queries(config: Config, token: CancellationToken) -> CommandResult {
    let listener = http::bind_listener(&config.http).await.map_err(CommandError::usage)?;
    let url = listener.url()?;
    metrics::record_process_start("query worker");
    let health = Arc::new(QueryWorkerHealth::default());
    admin::start_admin_server(&config.metrics, health.clone(), token.child_token()).await;
    let models = load_models(&config)?;
    let Some(worker) = wait_for_catalogue(&config, &models, &token).await? else { return Ok(()) };
    let context = build_server_context(&config, &worker, Vec::new())?;
    // Setting it fails only the second time.
    let _ = health.0.set(worker.engines.clone());
    print_line!("serving on {url}");
    let QueryWorker { engines, catalogue_follower, feedback_writer, .. } = worker;
    let feedback_task = tokio::spawn(feedback_writer.run(token.child_token()));
    tokio::spawn(engines.clone().monitor_fit(token.child_token()));
    tokio::spawn(engines.monitor_drift(token.child_token()));
    let follower_token = token.clone();
    let follower_task = tokio::spawn(async move {
        // However following the table ends, serving ends too.
        let _stop_serving = follower_token.clone().drop_guard();
        catalogue_follower.run(follower_token).await
    });
    http::serve(context, listener, token).await;
    follower_task.await??;
    feedback_task.await?;
    info!(event = event::STOP, role = "query worker", drained = true, "stopped");
    Ok(())
}

/// Health of a query worker; the engines are set once the catalogue is open.
#[derive(Default)]
struct QueryWorkerHealth(OnceLock<Arc<Engines>>);

impl HealthProbe for QueryWorkerHealth {
    fn update_gauges(&self) {
        metrics::global()
            .snapshot_ready
            .set(&[], if self.check_readiness().is_ok() { 1.0 } else { 0.0 });
    }

    fn check_liveness(&self) -> Result<(), String> {
        let failures =
            self.0.get().map_or(0, |engines| engines.live().encoders().consecutive_failures());
        if failures < MAX_CONSECUTIVE_MODEL_FAILURES {
            return Ok(());
        }
        Err(format!(
            "the model's device failed {failures} times in a row; a restart opens it again"
        ))
    }

    fn check_readiness(&self) -> Result<&'static str, String> {
        match self.0.get() {
            Some(engines) if engines.live().snapshots().is_ready() => Ok("ready"),
            Some(_) => Err("the table is being read".into()),
            None => Err("the model or the catalogue is not loaded yet".into()),
        }
    }
}

/// Builds the query worker; `None` if `token` was cancelled before a worker created the catalogue.
async fn wait_for_catalogue(
    config: &Config,
    models: &[(&'static str, Arc<dyn Encoders>)],
    token: &CancellationToken,
) -> anyhow::Result<Option<QueryWorker>> {
    let mut warned = false;
    loop {
        let error = match build_query_worker(config, models).await {
            Ok(worker) => return Ok(Some(worker)),
            Err(error) => error,
        };
        if !matches!(error.downcast_ref(), Some(TableError::NotFound { .. })) {
            return Err(error);
        }
        if !warned {
            warn!(event = event::TABLE_REFRESH_FAILED, %error, "waiting for a worker to create the catalogue");
            warned = true;
        }
        tokio::select! {
            () = tokio::time::sleep(CATALOGUE_POLL_INTERVAL) => {}
            () = token.cancelled() => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::search::testing::{HashEncoders, sample_prompt_set, sample_serving_snapshot};
    use crate::search::{Engine, SearchOptions};

    #[test]
    fn the_liveness_probe_fails_while_the_device_is_lost() {
        let health = QueryWorkerHealth::default();
        assert!(health.check_liveness().is_ok(), "nothing is loaded yet");
        let model = HashEncoders::new(8);
        let engine = Engine::new(
            model.clone(),
            sample_serving_snapshot(vec![sample_prompt_set("s", 8)]),
            SearchOptions::default(),
        );
        assert!(health.0.set(Arc::new(Engines::new(Arc::new(engine)))).is_ok());
        for (failures, is_alive) in [(0, true), (2, true), (3, false), (0, true)] {
            model.failures.store(failures, Ordering::Relaxed);
            assert_eq!(health.check_liveness().is_ok(), is_alive, "{failures}");
        }
    }
}
