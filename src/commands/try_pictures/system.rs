//! Broker, worker, table and page in this process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::clip::Encoders;
use crate::commands::shared::catalogue::open_store;
use crate::commands::shared::query_worker::{
    QueryWorker, build_query_worker, build_server_context,
};
use crate::commands::shared::worker::{
    build_ingest_worker, build_table_maintenance, spawn_background_tasks,
};
use crate::config::Config;
use crate::demo::broker::MockBroker;
use crate::ingest::Progress;
use crate::search::Engine;
use crate::serve::http::{self, Listener};
use crate::telemetry::{admin, metrics};

/// How often it is checked whether the table has been read.
const READY_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The parts that run.
pub struct LocalSystem {
    /// Answers queries.
    pub engine: Arc<Engine>,
    /// Counters of the worker.
    pub progress: Arc<Progress>,
    broker: MockBroker,
    tasks: JoinSet<anyhow::Result<()>>,
    maintenance: JoinHandle<()>,
    token: CancellationToken,
}

impl LocalSystem {
    /// Starts everything; sets `kafka.brokers`. `token` stops it.
    pub async fn start(
        config: &mut Config,
        encoders: Arc<dyn Encoders>,
        progress: Progress,
        listener: Listener,
        token: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let topics = [(config.source.topic.as_str(), 1), (config.dead_letter.topic.as_str(), 1)];
        let broker = MockBroker::start(&topics).context("the broker in this process")?;
        config.kafka.brokers = broker.bootstrap_servers();
        let progress = Arc::new(progress);
        let worker = build_ingest_worker(config, encoders.clone(), progress.clone()).await?;
        let store = open_store(config).await?;
        spawn_background_tasks(config, &store, &worker, token).detach_all();
        let maintenance = build_table_maintenance(config, &*encoders).await?;
        // On a thread of its own, because merging files computes for seconds without yielding.
        let (runtime, maintenance_token) = (Handle::current(), token.child_token());
        let maintenance = tokio::task::spawn_blocking(move || {
            runtime.block_on(maintenance.run(maintenance_token));
        });
        let mut tasks = JoinSet::new();
        let worker_token = token.clone();
        tasks.spawn(async move { Ok(worker.run(worker_token).await.map(|_drained| ())?) });
        // The page shows the lag, which it reads from the metrics of the worker.
        let metrics_options = admin::MetricsOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            ..admin::MetricsOptions::default()
        };
        let address =
            admin::start_admin_server(&metrics_options, progress.clone(), token.child_token())
                .await;
        metrics::record_process_start("worker");
        let metrics_url = address.map(|address| format!("http://{address}").parse()).transpose()?;
        config.http.worker_metrics_urls = metrics_url.into_iter().collect();
        let worker = build_query_worker(config, &[("model.checkpoint", encoders)]).await?;
        let context = build_server_context(config, &worker, Vec::new())?;
        let QueryWorker { engines, catalogue_follower, feedback_writer, .. } = worker;
        tokio::spawn(feedback_writer.run(token.clone()));
        tokio::spawn(engines.clone().monitor_drift(token.clone()));
        tokio::spawn(engines.clone().monitor_fit(token.clone()));
        let engine = engines.live();
        let follower_token = token.clone();
        tasks.spawn(async move { Ok(catalogue_follower.run(follower_token).await?) });
        let server_token = token.clone();
        tasks.spawn(async move {
            http::serve(context, listener, server_token).await;
            Ok(())
        });
        Ok(Self { engine, progress, broker, tasks, maintenance, token: token.clone() })
    }

    /// Waits until what is stored can be searched. Returns false if the token was cancelled before.
    pub async fn wait_until_ready(&mut self) -> anyhow::Result<bool> {
        let token = self.token.clone();
        while !self.engine.snapshots().is_ready() {
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(false),
                error = self.wait_for_failure() => return Err(error),
                () = tokio::time::sleep(READY_POLL_INTERVAL) => {}
            }
        }
        Ok(true)
    }

    /// Waits until one of the parts ends, which none does before the token is cancelled; returns why.
    pub async fn wait_for_failure(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(panic)) => panic.into(),
            Some(Ok(Ok(()))) | None => anyhow::anyhow!("a part ended although it was not stopped"),
        }
    }

    /// Stops everything and waits for it.
    pub async fn shut_down(mut self) -> anyhow::Result<()> {
        self.token.cancel();
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            result = result.and(ended.map_err(anyhow::Error::from).flatten());
        }
        self.maintenance.await?;
        drop(self.broker);
        result
    }
}
