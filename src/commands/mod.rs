//! The subcommands of `bsap`: each file or folder holds the arguments of one command or family and
//! the function that runs it.
//!
//! This file is the map: [`Command`] lists the commands, [`run`] dispatches them, and
//! `CONFIG_SECTIONS` says which sections of the configuration each one reads. What several
//! commands need is in `shared`; no command imports another one.

mod check;
mod config;
mod dead_letters;
mod demo;
mod embed;
mod evaluate;
mod export;
mod import;
mod ingest;
mod keys;
mod model;
mod prompts;
mod publish;
mod reconcile;
mod reindex;
mod rollout;
mod search;
mod serve;
mod shared;
mod table;
mod try_pictures;
mod welcome;

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::section_help_text;
use crate::ingest::decode::READABLE_FORMATS;
use shared::error::CommandResult;
use shared::printing::print_line;

const LONG_ABOUT: &str = "\
Text→image search that can be trusted. Workers (`ingest`) consume new-image events from Kafka, \
embed each image with CLIP, measure it against auxiliary prompts (BSAP) and store both on object \
storage; the query worker (`serve`) follows the stored table and answers queries balanced against \
each image's own score distribution.

Without a command, bsap shows three ways to begin; `bsap demo` needs nothing: everything in one process.";

const AFTER_LONG_HELP: &str = "\
Exit codes: 0 done, 1 the work failed, 2 usage or configuration is invalid.

Every option of the configuration file can be set by an environment variable \
BSAP_<SECTION>__<KEY>. `bsap config reference` describes all of them.";

/// Command, and the sections of the configuration that it reads: its long help describes them.
const CONFIG_SECTIONS: [(&str, &[&str]); 20] = [
    (
        "try",
        &["model", "prompts", "attributes", "fetch", "decode", "ingest", "search", "http", "log"],
    ),
    (
        "ingest",
        &[
            "kafka",
            "source",
            "dead_letter",
            "attributes",
            "fetch",
            "decode",
            "model",
            "prompts",
            "table",
            "maintenance",
            "ingest",
            "log",
            "metrics",
            "otlp",
        ],
    ),
    (
        "serve",
        &[
            "model",
            "table",
            "search",
            "attributes",
            "decode",
            "fetch",
            "http",
            "log",
            "metrics",
            "otlp",
        ],
    ),
    ("publish", &["kafka", "source", "attributes", "fetch"]),
    ("import", &["source", "attributes", "fetch", "decode", "model", "prompts", "table", "ingest"]),
    ("reconcile", &["kafka", "source", "attributes", "fetch", "table", "maintenance"]),
    ("dead-letters", &["kafka", "dead_letter"]),
    ("status", &["table", "kafka", "source"]),
    ("verify", &["table", "maintenance", "decode"]),
    ("compact", &["table", "maintenance"]),
    ("vacuum", &["table", "maintenance"]),
    ("reindex", &["kafka", "source", "attributes", "prompts", "model", "table"]),
    ("candidate", &["table"]),
    ("promote", &["model", "table"]),
    ("rollback", &["table"]),
    ("history", &["table"]),
    ("search", &["model", "table", "search", "attributes", "decode"]),
    ("evaluate", &["model", "table", "prompts"]),
    ("prompts", &["prompts", "model", "table"]),
    ("export", &["model", "table", "prompts"]),
];

/// The arguments of the process.
#[derive(Debug, Parser)]
#[command(name = "bsap", version, about = "Text→image search that can be trusted", long_about = LONG_ABOUT, after_long_help = AFTER_LONG_HELP)]
pub struct Cli {
    /// Configuration file; without one, the defaults apply.
    #[arg(long, short, global = true, env = "BSAP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The subcommand; without one, the program says how to begin.
    #[command(subcommand)]
    pub command: Option<Command>,
}

impl Cli {
    /// Parses the arguments of the process; ends the process with code 2 if they are invalid. The
    /// long help of a command describes the options of the configuration that it reads.
    pub fn from_process() -> Self {
        if asks_for_verbose_version(std::env::args().skip(1)) {
            print_line!("{}", verbose_version());
            std::process::exit(0);
        }
        let mut command = Self::command();
        for (name, sections) in CONFIG_SECTIONS {
            let options = section_help_text(sections);
            command = command.mut_subcommand(name, |command| {
                let help = match command.get_after_long_help() {
                    Some(examples) => format!("{examples}\n\n{options}"),
                    None => options,
                };
                command.after_long_help(help)
            });
        }
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

/// Whether the arguments are `--version` and `--verbose`, and nothing else.
fn asks_for_verbose_version(arguments: impl Iterator<Item = String>) -> bool {
    let arguments: Vec<String> = arguments.collect();
    let has = |names: &[&str]| arguments.iter().any(|argument| names.contains(&argument.as_str()));
    arguments.len() == 2 && has(&["--version", "-V"]) && has(&["--verbose"])
}

/// Returns the version, and what this build has and reads.
fn verbose_version() -> String {
    let mut text = format!("bsap {}\ncuda: {}", env!("CARGO_PKG_VERSION"), cfg!(feature = "cuda"));
    for (format, decoder) in READABLE_FORMATS {
        text = format!("{text}\n{}: {decoder}", format.name());
    }
    if !cfg!(feature = "avif") {
        text += "\nAVIF: not read by this build (cargo feature `avif`)";
    }
    text
}

/// The subcommands, in the order of the help.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show everything at work: broker, storage, workers and page in one process
    Demo(demo::DemoArgs),
    /// Try your own pictures: a folder, a bucket or a list, in one process, with nothing to set up
    Try(try_pictures::TryArgs),
    /// Consume new-image events and store embeddings and statistics, until stopped
    Ingest,
    /// Follow the stored table and answer queries over HTTP, until stopped
    Serve(serve::ServeArgs),
    /// Announce images: files, folders, bucket prefixes or JSON lines become events
    Publish(publish::PublishArgs),
    /// Store embeddings that you have already: NumPy, Parquet or clip-retrieval, nothing embedded again
    Import(Box<import::ImportArgs>),
    /// Find images that are new, changed or removed without an event, and announce them
    Reconcile(reconcile::ReconcileArgs),
    /// List, show and replay messages that could not be used
    DeadLetters(dead_letters::DeadLettersArgs),
    /// Show what is stored, how it is served, and how far ingestion is behind
    Status(table::StatusArgs),
    /// Check that the stored table is complete and correct
    Verify(table::VerifyArgs),
    /// Merge small files of the table, and drop superseded rows
    Compact(table::CompactArgs),
    /// Remove files that are no longer part of the table
    Vacuum(table::VacuumArgs),
    /// Compute statistics or embeddings of stored images again, for another prompt set or model
    Reindex(reindex::ReindexArgs),
    /// Name a configuration that may become live, and observe it
    Candidate(rollout::CandidateArgs),
    /// Make the candidate live
    Promote(rollout::PromoteArgs),
    /// Make live again what was live before the last promotion
    Rollback(rollout::RollbackArgs),
    /// Print what was changed, when and by whom
    History(rollout::HistoryArgs),
    /// Query a running server, or the table itself
    Search(search::SearchArgs),
    /// Compare ranking configurations on your own queries: is balancing worth it?
    Evaluate(Box<evaluate::EvaluateArgs>),
    /// Write what an index of your own needs to rank as this catalogue does
    Export(export::ExportArgs),
    /// Embed texts and images and print the numbers, to compare with a reference
    Embed(embed::EmbedArgs),
    /// Describe a checkpoint, and test it
    Model(model::ModelArgs),
    /// List prompt sets, and measure what one does on the stored images
    Prompts(prompts::PromptsArgs),
    /// Make API keys for the query worker
    Keys(keys::KeysArgs),
    /// Check the configuration and try every connection that it names
    Check,
    /// Print an example, the effective configuration, the reference or the JSON schema
    Config(config::ConfigArgs),
}

/// Runs a command to its end.
pub fn run(cli: &Cli) -> CommandResult {
    let config_file = cli.config.as_deref();
    let Some(command) = &cli.command else {
        print_line!("{}", welcome::WAYS_TO_BEGIN);
        return Ok(());
    };
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Try(args) => try_pictures::run(args, config_file),
        Command::Ingest => ingest::run(config_file),
        Command::Serve(args) => serve::run(args, config_file),
        Command::Publish(args) => publish::run(args, config_file),
        Command::Import(args) => import::run(args, config_file),
        Command::Reconcile(args) => reconcile::run(args, config_file),
        Command::DeadLetters(args) => dead_letters::run(args, config_file),
        Command::Status(args) => table::status::run(args, config_file),
        Command::Verify(args) => table::verify::run(args, config_file),
        Command::Compact(args) => table::compact::run(args, config_file),
        Command::Vacuum(args) => table::vacuum::run(args, config_file),
        Command::Reindex(args) => reindex::run(args, config_file),
        Command::Candidate(args) => rollout::candidate::run(args, config_file),
        Command::Promote(args) => rollout::promote::run(args, config_file),
        Command::Rollback(args) => rollout::rollback::run(args, config_file),
        Command::History(args) => rollout::history::run(args, config_file),
        Command::Search(args) => search::run(args, config_file),
        Command::Evaluate(args) => evaluate::run(args, config_file),
        Command::Export(args) => export::run(args, config_file),
        Command::Embed(args) => embed::run(args),
        Command::Model(args) => model::run(args),
        Command::Prompts(args) => prompts::run(args, config_file),
        Command::Keys(args) => keys::run(args),
        Command::Check => check::run(config_file),
        Command::Config(args) => config::run(args, config_file),
    }
}
