//! One file a subcommand: configuration in, library calls, words for people out.

/// Prints a line for people, or for a program that reads on.
macro_rules! say {
    ($($text:tt)*) => { $crate::commands::terminal::print_line(std::io::stdout(), format_args!($($text)*)) };
}

/// Prints a line beside the output, on standard error.
macro_rules! remark {
    ($($text:tt)*) => { $crate::commands::terminal::print_line(std::io::stderr(), format_args!($($text)*)) };
}

mod check;
pub mod cli;
mod config;
mod dead_letters;
mod demo;
mod drawn;
mod embed;
mod evaluate;
mod evaluate_logs;
mod ingest;
mod judge;
mod keys;
mod model;
mod promote;
mod prompts;
mod publish;
mod reconcile;
mod reindex;
mod result_table;
mod search;
mod serve;
mod setup;
mod status;
mod suggest;
mod terminal;
mod thumbnails;
mod upkeep;
mod verify;

use std::fmt;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::config::{Config, ConfigError};
use crate::telemetry::otlp::{ENDPOINT_OFF, ExporterHandle, FLUSH_TIMEOUT};
use crate::telemetry::{self, event};
use cli::demo::DemoAction;
use cli::evaluate::{EvaluateAction, EvaluateArgs};
use cli::model::{ModelAction, ModelArgs};
use cli::prompts::PromptsAction;
use cli::reindex::ReindexAction;
use cli::{Cli, Command};

/// How a command failed: decides the exit code.
#[derive(Debug)]
pub enum CommandError {
    /// Arguments or configuration are wrong; nothing was done.
    Usage(anyhow::Error),
    /// The work failed.
    Failed(anyhow::Error),
}

impl CommandError {
    /// Says it on standard error. The exit code: 2 for usage and configuration, 1 for work.
    pub fn report(&self) -> ExitCode {
        remark!("error: {self}");
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }

    /// A failure of usage with this message.
    fn usage(message: impl fmt::Display) -> Self {
        Self::Usage(anyhow::Error::msg(message.to_string()))
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(error) | Self::Failed(error)) = self;
        write!(f, "{error:#}")
    }
}

impl<E: Into<anyhow::Error>> From<E> for CommandError {
    fn from(error: E) -> Self {
        let error = error.into();
        if error.is::<ConfigError>() { Self::Usage(error) } else { Self::Failed(error) }
    }
}

type CommandResult = Result<(), CommandError>;

/// Runs a command to its end.
pub fn run(cli: &Cli) -> CommandResult {
    let load = || crate::config::load(cli.config.as_deref(), std::env::vars());
    match &cli.command {
        Command::Config(args) => config::run(args, load),
        Command::Demo(args) => match &args.action {
            None => demo::run(args),
            Some(DemoAction::Render(args)) => demo::render_pictures(args),
            Some(DemoAction::Evaluate(args)) => judge::run(args),
        },
        Command::Embed(args) => embed::run(args),
        Command::Evaluate(args) => run_evaluate(args, load),
        Command::Keys(args) => keys::run(args),
        Command::Model(ModelArgs { action: ModelAction::Inspect { checkpoint, model } }) => {
            model::inspect(&model.to_options(checkpoint))
        }
        Command::Prompts(args) => match &args.action {
            PromptsAction::List => prompts::list_sets(&load_without_model(cli)?),
            PromptsAction::Show { set } => prompts::show_set(set),
            PromptsAction::Measure(args) => {
                run_with_logging(with_quiet_logging(load()?), |config, token| {
                    prompts::measure_sets(args, config, token)
                })
            }
            PromptsAction::Suggest(args) => {
                run_with_logging(with_quiet_logging(load()?), |config, token| {
                    suggest::run(args, config, token)
                })
            }
            PromptsAction::Retire { set } => {
                run_with_logging(with_quiet_logging(load_without_model(cli)?), |config, token| {
                    prompts::retire_set(set, config, token)
                })
            }
        },
        Command::Candidate(args) => {
            run_with_logging(with_quiet_logging(load_without_model(cli)?), |config, _| {
                promote::run_candidate(args, config)
            })
        }
        Command::Promote(args) => run_with_logging(with_quiet_logging(load()?), |config, token| {
            promote::promote(args, config, token)
        }),
        Command::Rollback(args) => {
            let config = with_quiet_logging(load_without_model(cli)?);
            run_with_logging(config, |config, token| promote::rollback(args, config, token))
        }
        Command::History(args) => {
            run_with_logging(with_quiet_logging(load_without_model(cli)?), |config, _| {
                promote::history(args, config)
            })
        }
        Command::Reindex(args) => {
            let config = with_quiet_logging(load()?);
            match &args.action {
                ReindexAction::Statistics(args) => run_with_logging(config, |config, token| {
                    reindex::reindex_statistics(args, config, token)
                }),
                ReindexAction::Model(args) => run_with_logging(config, |config, token| {
                    reindex::reindex_model(args, config, token)
                }),
            }
        }
        Command::Check => block_on(check::run(cli.config.as_deref())),
        Command::Ingest => run_with_logging(load()?, ingest::run),
        Command::Serve(args) => {
            let mut config = load()?;
            serve::override_listen(args, &mut config)?;
            run_with_logging(config, serve::run)
        }
        Command::Publish(args) => {
            let config = load_without_model(cli)?;
            run_with_logging(config, |config, token| publish::run(args, config, token))
        }
        Command::Reconcile(args) => {
            let config = load_without_model(cli)?;
            run_with_logging(config, |config, token| reconcile::run(args, config, token))
        }
        Command::DeadLetters(args) => {
            let config = with_quiet_logging(load_without_model(cli)?);
            run_with_logging(config, |config, token| dead_letters::run(args, config, token))
        }
        Command::Status(args) => {
            run_with_logging(with_quiet_logging(load_without_model(cli)?), |config, token| {
                status::run(args, config, token)
            })
        }
        Command::Verify(args) => {
            let config = with_quiet_logging(load_without_model(cli)?);
            run_with_logging(config, |config, token| verify::run(args, config, token))
        }
        Command::Compact(args) => {
            let config = with_quiet_logging(load_without_model(cli)?);
            run_with_logging(config, |config, token| upkeep::compact(args, config, token))
        }
        Command::Vacuum(args) => {
            run_with_logging(with_quiet_logging(load_without_model(cli)?), |config, _| {
                upkeep::vacuum(args, config)
            })
        }
        Command::Search(args) => {
            if args.server.is_some() {
                return block_on(search::search_server(args));
            }
            run_with_logging(with_quiet_logging(load()?), |config, token| {
                search::search_table(args, config, token)
            })
        }
    }
}

/// Rankings from files, a drawn catalogue, or the stored table.
fn run_evaluate(
    args: &EvaluateArgs,
    load: impl FnOnce() -> Result<Config, ConfigError>,
) -> CommandResult {
    if let Some(EvaluateAction::Rankings(args)) = &args.action {
        return evaluate::evaluate_rankings(args);
    }
    if !args.from_logs.is_empty() {
        return evaluate_logs::run(args);
    }
    if args.synthetic.is_some() {
        let config = with_quiet_logging(Config::default());
        return run_with_logging(config, |_, token| {
            evaluate::run_on_synthetic_catalogue(args, token)
        });
    }
    run_with_logging(with_quiet_logging(load()?), |config, token| {
        evaluate::run_on_table(args, config, token)
    })
}

/// A command that loads no model does not ask for one.
fn load_without_model(cli: &Cli) -> Result<Config, ConfigError> {
    const CHECKPOINT_VAR: &str = "BSAP_MODEL__CHECKPOINT";
    let others = std::env::vars().filter(|(name, _)| name != CHECKPOINT_VAR);
    let environment = others.chain([(CHECKPOINT_VAR.to_owned(), ".".to_owned())]);
    crate::config::load(cli.config.as_deref(), environment)
}

/// For a command whose answer stands on the terminal: what it logs goes there only where it warns. A file has
/// all.
fn with_quiet_logging(mut config: Config) -> Config {
    config.otlp.endpoint = ENDPOINT_OFF.into();
    if !config.log.file.as_os_str().is_empty() {
        return config;
    }
    // The kernel logs as an error that a table is not there, which is told better by who asked for it.
    config.log.level = "warn,deltalake_core=error,delta_kernel=off,buoyant_kernel=off".into();
    config
}

/// A progress bar for work whose length is known.
fn progress_bar(what: &str, length: u64) -> anyhow::Result<ProgressBar> {
    let template = format!("{what:>10} [{{bar:40}}] {{pos}}/{{len}} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?.progress_chars("=> ");
    Ok(ProgressBar::new(length).with_style(style))
}

/// Shows how much of how much is done.
fn progress_callback(bar: &ProgressBar) -> impl Fn(usize, usize) + Sync {
    |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    }
}

/// Starts logging, then runs `work` with a token that SIGINT and SIGTERM cancel.
fn run_with_logging<W>(
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
fn block_on(work: impl Future<Output = CommandResult>) -> CommandResult {
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
