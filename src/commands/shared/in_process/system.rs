//! Broker, workers, table and page in this process.

use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::clip::Encoders;
use crate::commands::shared::catalogue::open_store;
use crate::commands::shared::query_worker::{
    QueryWorker, build_query_worker, build_server_context,
};
use crate::commands::shared::worker::{
    build_ingest_worker, spawn_background_tasks, spawn_table_maintenance,
};
use crate::config::Config;
use crate::demo::broker::MockBroker;
use crate::ingest::Progress;
use crate::search::Engine;
use crate::serve::http::{self, Listener, Substitute};
use crate::serve::result_judge::ResultJudge;
use crate::telemetry::{admin, metrics};

/// Longest time in which a worker finishes what it holds when it ends.
const DRAIN_SECONDS: u64 = 3;
/// In the mock cluster, a worker that joins late makes all others wait for a session timeout.
const SESSION_TIMEOUT_MS: u32 = 6_000;

/// What runs, and what the page shows besides results.
pub struct SystemPlan {
    /// Partitions of the topic of events.
    pub partitions: i32,
    /// Workers that share them.
    pub workers: usize,
    /// Whether the table is maintained.
    pub maintains_table: bool,
    /// What is there in place of real parts.
    pub substitutes: Vec<Substitute>,
    /// Knows which results are right; `None` if nobody does.
    pub judge: Option<Arc<dyn ResultJudge>>,
}

/// The parts that run.
pub struct LocalSystem {
    /// Answers queries.
    pub engine: Arc<Engine>,
    /// Counters of the workers.
    pub progress: Arc<Progress>,
    /// Keeps the events until workers have read them.
    pub broker: MockBroker,
    tasks: JoinSet<anyhow::Result<()>>,
    maintenance: Option<JoinHandle<()>>,
    token: CancellationToken,
}

/// Sets how long parts in one process wait for each other.
pub fn shorten_waits(config: &mut Config) {
    config.source.drain_seconds = DRAIN_SECONDS;
    config.source.session_timeout_ms = SESSION_TIMEOUT_MS;
    config.ingest.drain_seconds = DRAIN_SECONDS;
}

impl LocalSystem {
    /// Starts everything; sets `kafka.brokers` and `http.worker_metrics_urls`. `token` stops it.
    pub async fn start(
        plan: SystemPlan,
        config: &mut Config,
        encoders: Arc<dyn Encoders>,
        progress: Progress,
        listener: Listener,
        token: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let topics = [
            (config.source.topic.as_str(), plan.partitions),
            (config.dead_letter.topic.as_str(), 1),
        ];
        let broker = MockBroker::start(&topics).context("the broker in this process")?;
        config.kafka.brokers = broker.bootstrap_servers();
        let progress = Arc::new(progress);
        let mut tasks = JoinSet::new();
        for _ in 0..plan.workers {
            let worker = build_ingest_worker(config, encoders.clone(), progress.clone()).await?;
            let store = open_store(config).await?;
            spawn_background_tasks(config, &store, &worker, token).detach_all();
            let token = token.clone();
            tasks.spawn(async move { Ok(worker.run(token).await.map(|_drained| ())?) });
        }
        let maintenance = if plan.maintains_table {
            Some(spawn_table_maintenance(config, &*encoders, token.child_token()).await?)
        } else {
            None
        };
        // The page shows the lag, which it reads from the metrics of the workers.
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
        let mut context = build_server_context(config, &worker, plan.substitutes)?;
        context.judge = plan.judge;
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

    /// Waits until one of the parts ends: with an error, or because the token was cancelled.
    pub async fn wait_for_end(&mut self) -> anyhow::Result<()> {
        let ended = self.tasks.join_next().await;
        ended.map_or(Ok(()), |ended| ended?)?;
        if !self.token.is_cancelled() {
            bail!("a part ended although it was not stopped");
        }
        Ok(())
    }

    /// Stops everything and waits for it.
    pub async fn shut_down(mut self) -> anyhow::Result<()> {
        self.token.cancel();
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            result = result.and(ended.map_err(anyhow::Error::from).flatten());
        }
        if let Some(maintenance) = self.maintenance {
            maintenance.await?;
        }
        drop(self.broker);
        result
    }
}
