//! `bsap serve`.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cli::ServeArgs;
use super::parts::{self, QueryWorker};
use super::{Done, Failure};
use crate::clip::Towers;
use crate::config::Config;
use crate::search::Engines;
use crate::serve::http;
use crate::table::TableError;
use crate::telemetry::metrics::{self, Health};
use crate::telemetry::{event, watch};

/// How often a query worker looks whether its catalogue has been made.
const WAIT_FOR_CATALOGUE: Duration = Duration::from_secs(2);

/// Failures in a row after which the model's device is taken for lost. CUDA gives up a device for
/// good: only a new process may get it back.
const LOST_AFTER: u32 = 3;

/// `--listen` wins over `http.listen`, and obeys the same rules.
pub fn override_listen(args: &ServeArgs, config: &mut Config) -> Result<(), Failure> {
    let Some(listen) = args.listen else { return Ok(()) };
    config.http.listen = listen;
    match config.http.problems().first() {
        Some(problem) => Err(Failure::usage(format!("http.{problem}"))),
        None => Ok(()),
    }
}

/// Serves until `token` is cancelled. Waits where no worker has made the catalogue yet.
pub async fn run(config: Config, token: CancellationToken) -> Done {
    let listener = http::listen(&config.http).await.map_err(Failure::usage)?;
    let url = listener.url()?;
    metrics::started("query worker");
    let health = Arc::new(Queries::default());
    watch::start(&config.metrics, health.clone(), token.child_token()).await;
    let models = parts::models(&config)?;
    let Some(worker) = opened(&config, &models, &token).await? else { return Ok(()) };
    let app = parts::app(&config, &worker, Vec::new())?;
    // The worker is opened once.
    let _ = health.0.set(worker.engines.clone());
    say!("serving on {url}");
    let QueryWorker { engines, reader, feedback, .. } = worker;
    let keeping = tokio::spawn(feedback.run(token.child_token()));
    tokio::spawn(engines.keep_watch(token.child_token()));
    let following = token.clone();
    let follow = tokio::spawn(async move {
        // Without the table there is nothing to serve, however following it ended.
        let _ended = following.clone().drop_guard();
        reader.run(following).await
    });
    http::serve(app, listener, token).await;
    follow.await??;
    keeping.await?;
    info!(event = event::STOP, role = "query worker", drained = true, "stopped");
    Ok(())
}

/// How a query worker is doing, once its engines are there.
#[derive(Default)]
struct Queries(OnceLock<Arc<Engines>>);

impl Health for Queries {
    fn observe(&self) {
        metrics::get().ready.set(&[], if self.ready().is_ok() { 1.0 } else { 0.0 });
    }

    fn live(&self) -> Result<(), String> {
        let failures = self.0.get().map_or(0, |engines| engines.live().towers().failures());
        if failures < LOST_AFTER {
            return Ok(());
        }
        Err(format!("the model's device failed {failures} times in a row; opened anew it may work"))
    }

    fn ready(&self) -> Result<(), String> {
        match self.0.get() {
            Some(engines) if engines.live().snapshots().ready() => Ok(()),
            Some(_) => Err("the table is being read".into()),
            None => Err("the model or the catalogue is not there yet".into()),
        }
    }
}

async fn opened(
    config: &Config,
    models: &[(&'static str, Arc<dyn Towers>)],
    token: &CancellationToken,
) -> anyhow::Result<Option<QueryWorker>> {
    let mut told = false;
    loop {
        let error = match parts::query_worker(config, models).await {
            Ok(worker) => return Ok(Some(worker)),
            Err(error) => error,
        };
        if !matches!(error.downcast_ref(), Some(TableError::Missing { .. })) {
            return Err(error);
        }
        if !told {
            warn!(event = event::FOLLOW_FAILED, %error, "waiting for a worker to make the catalogue");
            told = true;
        }
        tokio::select! {
            () = tokio::time::sleep(WAIT_FOR_CATALOGUE) => {}
            () = token.cancelled() => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::search::testing::{Hashed, served, set};
    use crate::search::{Engine, Options};

    #[test]
    fn a_lost_device_asks_for_a_restart() {
        let health = Queries::default();
        assert!(health.live().is_ok(), "nothing is loaded yet");
        let model = Hashed::new(8);
        let engine = Engine::new(model.clone(), served(vec![set("s", 8)]), Options::default());
        assert!(health.0.set(Arc::new(Engines::new(Arc::new(engine)))).is_ok());
        for (failures, lives) in [(0, true), (2, true), (3, false), (0, true)] {
            model.failures.store(failures, Ordering::Relaxed);
            assert_eq!(health.live().is_ok(), lives, "{failures}");
        }
    }
}
