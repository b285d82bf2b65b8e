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
use super::shared::query_worker::{QueryWorker, build_app, build_query_worker};
use super::shared::runtime::run_with_logging;
use crate::clip::Encoders;
use crate::config::Config;
use crate::search::Engines;
use crate::serve::http;
use crate::table::TableError;
use crate::telemetry::metrics::{self, HealthProbe};
use crate::telemetry::{admin, event};

/// `bsap serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and port, instead of http.listen
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
}

/// How often a query worker looks whether its catalogue has been made.
const CATALOGUE_POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Failures in a row after which the model's device is taken for lost. CUDA gives up a device for
/// good: only a new process may get it back.
const MAX_CONSECUTIVE_FAILURES: u32 = 3;

/// Runs a query worker until it is stopped by a signal.
pub fn run(args: &ServeArgs, config_file: Option<&Path>) -> CommandResult {
    let mut config = load_config(config_file)?;
    override_listen(args, &mut config)?;
    run_with_logging(config, serve_queries)
}

/// `--listen` wins over `http.listen`, and obeys the same rules.
fn override_listen(args: &ServeArgs, config: &mut Config) -> Result<(), CommandError> {
    let Some(listen) = args.listen else { return Ok(()) };
    config.http.listen = listen;
    match config.http.validate().first() {
        Some(problem) => Err(CommandError::usage(format!("http.{problem}"))),
        None => Ok(()),
    }
}

/// Serves until `token` is cancelled. Waits where no worker has made the catalogue yet.
async fn serve_queries(config: Config, token: CancellationToken) -> CommandResult {
    let listener = http::listen(&config.http).await.map_err(CommandError::usage)?;
    let url = listener.url()?;
    metrics::record_start("query worker");
    let health = Arc::new(QueryWorkerHealth::default());
    admin::start_server(&config.metrics, health.clone(), token.child_token()).await;
    let models = load_models(&config)?;
    let Some(worker) = wait_for_catalogue(&config, &models, &token).await? else { return Ok(()) };
    let app = build_app(&config, &worker, Vec::new())?;
    // The worker is opened once.
    let _ = health.0.set(worker.engines.clone());
    print_line!("serving on {url}");
    let QueryWorker { engines, catalogue_follower: reader, feedback_writer: feedback, .. } = worker;
    let feedback_task = tokio::spawn(feedback.run(token.child_token()));
    tokio::spawn(engines.monitor_drift(token.child_token()));
    let follower_token = token.clone();
    let follower_task = tokio::spawn(async move {
        // Without the table there is nothing to serve, however following it ended.
        let _ended = follower_token.clone().drop_guard();
        reader.run(follower_token).await
    });
    http::serve(app, listener, token).await;
    follower_task.await??;
    feedback_task.await?;
    info!(event = event::STOP, role = "query worker", drained = true, "stopped");
    Ok(())
}

/// How a query worker is doing, once its engines are there.
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
        if failures < MAX_CONSECUTIVE_FAILURES {
            return Ok(());
        }
        Err(format!("the model's device failed {failures} times in a row; opened anew it may work"))
    }

    fn check_readiness(&self) -> Result<(), String> {
        match self.0.get() {
            Some(engines) if engines.live().snapshots().is_ready() => Ok(()),
            Some(_) => Err("the table is being read".into()),
            None => Err("the model or the catalogue is not there yet".into()),
        }
    }
}

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
            warn!(event = event::TABLE_REFRESH_FAILED, %error, "waiting for a worker to make the catalogue");
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
    fn a_lost_device_asks_for_a_restart() {
        let health = QueryWorkerHealth::default();
        assert!(health.check_liveness().is_ok(), "nothing is loaded yet");
        let model = HashEncoders::new(8);
        let engine = Engine::new(
            model.clone(),
            sample_serving_snapshot(vec![sample_prompt_set("s", 8)]),
            SearchOptions::default(),
        );
        assert!(health.0.set(Arc::new(Engines::new(Arc::new(engine)))).is_ok());
        for (failures, lives) in [(0, true), (2, true), (3, false), (0, true)] {
            model.failures.store(failures, Ordering::Relaxed);
            assert_eq!(health.check_liveness().is_ok(), lives, "{failures}");
        }
    }
}
