//! Runs a command: the async runtime, logging and signals.

use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::error::{CommandError, CommandResult};
use crate::clip::Encoders;
use crate::config::Config;
use crate::store::Store;
use crate::table::Generation;
use crate::telemetry::otlp::{ExporterHandle, FLUSH_TIMEOUT, OtlpExporter};
use crate::telemetry::{self, event};

/// Starts logging, then runs `work` to its end with a token that SIGINT and SIGTERM cancel.
pub fn run_with_logging<'a, W>(
    config: Config,
    work: impl FnOnce(Config, CancellationToken) -> W + 'a,
) -> CommandResult
where
    W: Future<Output = CommandResult> + 'a,
{
    let exporter =
        telemetry::init_logging(&config.log, &config.otlp).map_err(CommandError::usage)?;
    let token = CancellationToken::new();
    let work_token = token.clone();
    let work = async move { work(config, work_token).await };
    block_on(log_and_flush(exporter, token, work.boxed_local()))
}

/// Runs `work`, logs its error, and sends what the exporter still holds.
async fn log_and_flush(
    exporter: Option<OtlpExporter>,
    token: CancellationToken,
    work: LocalBoxFuture<'_, CommandResult>,
) -> CommandResult {
    tokio::spawn(cancel_on_signal(token));
    let exporter = exporter.map(ExporterHandle::start);
    let result = work.await;
    if let Err(error) = &result
        && !matches!(error, CommandError::Unhealthy { .. })
    {
        error!(event = event::FATAL, %error, "ended by an error");
    }
    if let Some(exporter) = exporter {
        exporter.shut_down(FLUSH_TIMEOUT).await;
    }
    result
}

/// Runs `work` to its end on all cores. Does not wait for threads that are still blocked then.
pub fn block_on<'a>(work: impl Future<Output = CommandResult> + 'a) -> CommandResult {
    // Boxed, so that the runtime is compiled once and not for every command.
    block_on_boxed(work.boxed_local())
}

fn block_on_boxed(work: LocalBoxFuture<'_, CommandResult>) -> CommandResult {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// Cancels `token` at the first SIGINT or SIGTERM; a second one ends the process at once.
async fn cancel_on_signal(token: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    let mut wait_for_signal = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    wait_for_signal().await;
    token.cancel();
    wait_for_signal().await;
    std::process::exit(130);
}

/// Logs the event `start`; `limits` are the options that bound memory and concurrency.
pub fn log_worker_start(
    role: &str,
    encoders: &dyn Encoders,
    generation: &Generation,
    store: &Store,
    limits: &str,
) {
    let card = encoders.card();
    info!(
        event = event::START, role, version = env!("CARGO_PKG_VERSION"), model_name = card.name,
        model_fingerprint = card.fingerprint, generation = generation.id, table = %store.url(), limits, "started"
    );
}
