//! `bsap try`: the user's own pictures in one process, with a page, and nothing to set up.
//!
//! The same worker and query worker as in production, with librdkafka's mock cluster as Kafka and a folder as
//! object storage. `follow` lists the sources, sends events for what differs from the table, and waits until
//! they are stored, so that the broker never has to keep more than a few events.

mod arguments;
mod configuration;
mod display;
mod evaluation;
mod follow;
mod live;
mod model;
mod outcome;
mod production;
mod state_folder;
mod text_cache;

use std::path::Path;

pub use arguments::TryArgs;

use super::shared::error::{CommandError, CommandResult};
use super::shared::query_files::read_judged_queries;
use super::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::watch::open_sources;
use configuration::{adapt_to_try, add_sources, load_base_config};
use live::{PreparedTry, run_try};
use production::write_production_config;
use state_folder::StateFolder;

/// Checks all arguments, then runs until everything is stored or a signal stops it.
pub fn run(args: &TryArgs, config_file: Option<&Path>) -> CommandResult {
    let mut config = load_base_config(args, config_file)?;
    let sources =
        open_sources(&args.paths, &config.fetch.store_options).map_err(CommandError::usage)?;
    let queries = match &args.queries {
        Some(file) => Some((file.clone(), read_judged_queries(file, "--queries")?)),
        None => None,
    };
    add_sources(&mut config, &sources)?;
    let folder = StateFolder::open(args.dir.as_deref(), &sources)?;
    let production = config.clone();
    adapt_to_try(args, &folder.path, &mut config)?;
    if let Some(file) = &args.write_config {
        let production = Config { model: config.model.clone(), ..production };
        write_production_config(file, &production, &sources)?;
    }
    let prepared = PreparedTry { sources, folder, queries };
    run_with_logging(config, |config, token| run_try(args, prepared, config, token))
}
