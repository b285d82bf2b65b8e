//! One file a subcommand: configuration in, library calls, words for people out.

/// Prints a line for people, or for a program that reads on.
macro_rules! say {
    ($($text:tt)*) => { $crate::commands::terminal::line(std::io::stdout(), format_args!($($text)*)) };
}

/// Prints a line beside the output, on standard error.
macro_rules! remark {
    ($($text:tt)*) => { $crate::commands::terminal::line(std::io::stderr(), format_args!($($text)*)) };
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
mod parts;
mod promote;
mod prompts;
mod publish;
mod reconcile;
mod reindex;
mod search;
mod serve;
mod status;
mod suggest;
mod table_view;
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
use crate::telemetry::otlp::{FLUSH, OFF, Sending};
use crate::telemetry::{self, event};
use cli::demo::DemoAction;
use cli::evaluate::{EvaluateAction, EvaluateArgs};
use cli::model::{ModelAction, ModelArgs};
use cli::prompts::PromptsAction;
use cli::reindex::ReindexAction;
use cli::{Cli, Command};

/// How a command failed: decides the exit code.
#[derive(Debug)]
pub enum Failure {
    /// Arguments or configuration are wrong; nothing was done.
    Usage(anyhow::Error),
    /// The work failed.
    Work(anyhow::Error),
}

impl Failure {
    /// Says it on standard error. The exit code: 2 for usage and configuration, 1 for work.
    pub fn told(&self) -> ExitCode {
        remark!("error: {self}");
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Work(_) => ExitCode::FAILURE,
        }
    }

    /// A failure of usage with this message.
    fn usage(message: impl fmt::Display) -> Self {
        Self::Usage(anyhow::Error::msg(message.to_string()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(error) | Self::Work(error)) = self;
        write!(f, "{error:#}")
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        if error.is::<ConfigError>() { Self::Usage(error) } else { Self::Work(error) }
    }
}

type Done = Result<(), Failure>;

/// Runs a command to its end.
pub fn run(cli: &Cli) -> Done {
    let load = || crate::config::load(cli.config.as_deref(), std::env::vars());
    match &cli.command {
        Command::Config(args) => config::run(args, load),
        Command::Demo(args) => match &args.action {
            None => demo::run(args),
            Some(DemoAction::Render(args)) => demo::render(args),
            Some(DemoAction::Evaluate(args)) => judge::run(args),
        },
        Command::Embed(args) => embed::run(args),
        Command::Evaluate(args) => evaluate_on(args, load),
        Command::Keys(args) => keys::run(args),
        Command::Model(ModelArgs { action: ModelAction::Inspect { checkpoint, model } }) => {
            model::inspect(&model.options(checkpoint))
        }
        Command::Prompts(args) => match &args.action {
            PromptsAction::List => prompts::list(&load_for_client(cli)?),
            PromptsAction::Show { set } => prompts::show(set),
            PromptsAction::Measure(args) => {
                logged(quiet(load()?), |config, token| prompts::measure(args, config, token))
            }
            PromptsAction::Suggest(args) => {
                logged(quiet(load()?), |config, token| suggest::run(args, config, token))
            }
            PromptsAction::Retire { set } => {
                logged(quiet(load_for_client(cli)?), |config, _| prompts::retire(set, config))
            }
        },
        Command::Candidate(args) => {
            logged(quiet(load_for_client(cli)?), |config, _| promote::candidate(args, config))
        }
        Command::Promote(args) => {
            logged(quiet(load()?), |config, token| promote::promote(args, config, token))
        }
        Command::Rollback(args) => {
            let config = quiet(load_for_client(cli)?);
            logged(config, |config, token| promote::rollback(args, config, token))
        }
        Command::History(args) => {
            logged(quiet(load_for_client(cli)?), |config, _| promote::history(args, config))
        }
        Command::Reindex(args) => {
            let config = quiet(load()?);
            match &args.action {
                ReindexAction::Statistics(args) => {
                    logged(config, |config, token| reindex::statistics(args, config, token))
                }
                ReindexAction::Model(args) => {
                    logged(config, |config, token| reindex::model(args, config, token))
                }
            }
        }
        Command::Check => block_on(check::run(cli.config.as_deref())),
        Command::Ingest => logged(load()?, ingest::run),
        Command::Serve(args) => {
            let mut config = load()?;
            serve::override_listen(args, &mut config)?;
            logged(config, serve::run)
        }
        Command::Publish(args) => {
            let config = load_for_client(cli)?;
            logged(config, |config, token| publish::run(args, config, token))
        }
        Command::Reconcile(args) => {
            let config = load_for_client(cli)?;
            logged(config, |config, token| reconcile::run(args, config, token))
        }
        Command::DeadLetters(args) => {
            let config = quiet(load_for_client(cli)?);
            logged(config, |config, token| dead_letters::run(args, config, token))
        }
        Command::Status(args) => {
            logged(quiet(load_for_client(cli)?), |config, _| status::run(args, config))
        }
        Command::Verify(args) => {
            let config = quiet(load_for_client(cli)?);
            logged(config, |config, token| verify::run(args, config, token))
        }
        Command::Compact(args) => {
            let config = quiet(load_for_client(cli)?);
            logged(config, |config, token| upkeep::compact(args, config, token))
        }
        Command::Vacuum(args) => {
            logged(quiet(load_for_client(cli)?), |config, _| upkeep::vacuum(args, config))
        }
        Command::Search(args) => {
            if args.server.is_some() {
                return block_on(search::ask_server(args));
            }
            logged(quiet(load()?), |config, token| search::ask_table(args, config, token))
        }
    }
}

/// Rankings from files, a drawn catalogue, or the stored table.
fn evaluate_on(args: &EvaluateArgs, load: impl FnOnce() -> Result<Config, ConfigError>) -> Done {
    if let Some(EvaluateAction::Rankings(args)) = &args.action {
        return evaluate::rankings(args);
    }
    if !args.from_logs.is_empty() {
        return evaluate_logs::run(args);
    }
    if args.drawn.is_some() {
        let config = quiet(Config::default());
        return logged(config, |_, token| evaluate::run_drawn(args, token));
    }
    logged(quiet(load()?), |config, token| evaluate::run(args, config, token))
}

/// A command that loads no model does not ask for one.
fn load_for_client(cli: &Cli) -> Result<Config, ConfigError> {
    const CHECKPOINT: &str = "BSAP_MODEL__CHECKPOINT";
    let others = std::env::vars().filter(|(name, _)| name != CHECKPOINT);
    let here = others.chain([(CHECKPOINT.to_owned(), ".".to_owned())]);
    crate::config::load(cli.config.as_deref(), here)
}

/// For a command whose answer stands on the terminal: what it logs goes there only where it warns. A file has
/// all.
fn quiet(mut config: Config) -> Config {
    config.otlp.endpoint = OFF.into();
    if !config.log.file.as_os_str().is_empty() {
        return config;
    }
    // The kernel logs as an error that a table is not there, which is told better by who asked for it.
    config.log.level = "warn,deltalake_core=error,delta_kernel=off,buoyant_kernel=off".into();
    config
}

/// A progress bar for work whose length is known.
fn bar(what: &str, length: u64) -> anyhow::Result<ProgressBar> {
    let template = format!("{what:>10} [{{bar:40}}] {{pos}}/{{len}} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?.progress_chars("=> ");
    Ok(ProgressBar::new(length).with_style(style))
}

/// Shows how much of how much is done.
fn steps(bar: &ProgressBar) -> impl Fn(usize, usize) + Sync {
    |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    }
}

/// Starts logging, then runs `work` with a token that SIGINT and SIGTERM cancel.
fn logged<W>(config: Config, work: impl FnOnce(Config, CancellationToken) -> W) -> Done
where
    W: Future<Output = Done>,
{
    let exporter = telemetry::init(&config.log, &config.otlp).map_err(Failure::usage)?;
    let token = CancellationToken::new();
    block_on(async {
        tokio::spawn(cancel_on_signal(token.clone()));
        let sending = exporter.map(Sending::start);
        let done = work(config, token).await;
        if let Err(failure) = &done {
            error!(event = event::FATAL, error = %failure, "ended by an error");
        }
        if let Some(sending) = sending {
            sending.end(FLUSH).await;
        }
        done
    })
}

/// Runs on all cores. What still blocks a thread when `work` is done is not waited for.
fn block_on(work: impl Future<Output = Done>) -> Done {
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
