//! Running a command: the async runtime, logging and signals.

use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::error::{CommandError, CommandResult};
use crate::clip::Encoders;
use crate::config::Config;
use crate::store::Store;
use crate::table::Generation;
use crate::telemetry::otlp::{ExporterHandle, FLUSH_TIMEOUT};
use crate::telemetry::{self, event};

/// Starts logging, then runs `work` with a token that SIGINT and SIGTERM cancel.
pub fn run_with_logging<W>(
    config: Config,
    work: impl FnOnce(Config, CancellationToken) -> W,
) -> CommandResult
where
    W: Future<Output = CommandResult>,
{
    let exporter =
        telemetry::init_logging(&config.log, &config.otlp).map_err(CommandError::usage)?;
    let token = CancellationToken::new();
    block_on(async {
        tokio::spawn(cancel_on_signal(token.clone()));
        let sending = exporter.map(ExporterHandle::start);
        let done = work(config, token).await;
        if let Err(failure) = &done {
            error!(event = event::FATAL, error = %failure, "ended by an error");
        }
        if let Some(sending) = sending {
            sending.shut_down(FLUSH_TIMEOUT).await;
        }
        done
    })
}

/// Runs on all cores. What still blocks a thread when `work` is done is not waited for.
pub fn block_on(work: impl Future<Output = CommandResult>) -> CommandResult {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

/// Cancels `token` at the first SIGINT or SIGTERM; a second one ends the process at once.
async fn cancel_on_signal(token: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    let mut wait = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    wait().await;
    token.cancel();
    wait().await;
    std::process::exit(130);
}

pub fn log_start(
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
