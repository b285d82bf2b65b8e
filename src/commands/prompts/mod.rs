//! `bsap prompts`: lists, measures, suggests and retires prompt sets.

mod arguments;
mod list;
mod measure;
mod retire;
mod suggest;
mod suggest_bank;
mod suggest_shared;

use std::path::Path;

pub use arguments::{PromptsAction, PromptsArgs};

use super::shared::configuration::{load_config, load_config_without_model, with_quiet_logging};
use super::shared::error::CommandResult;
use super::shared::runtime::run_with_logging;

/// Lists, shows, measures, suggests or retires prompt sets.
pub fn run(args: &PromptsArgs, config_file: Option<&Path>) -> CommandResult {
    match &args.action {
        PromptsAction::List => list::print_sets(&load_config_without_model(config_file)?),
        PromptsAction::Show { set } => list::print_set(set),
        PromptsAction::Measure(args) => {
            let config = with_quiet_logging(load_config(config_file)?);
            run_with_logging(config, |config, token| measure::measure_sets(args, config, token))
        }
        PromptsAction::Suggest(args) => {
            args.validate()?;
            let config = with_quiet_logging(load_config(config_file)?);
            run_with_logging(config, async |config, token| match &args.queries {
                Some(queries) => suggest::suggest_set(args, queries, config, token).await,
                None => suggest_bank::suggest_bank_set(args, config, token).await,
            })
        }
        PromptsAction::Retire { set } => {
            let config = with_quiet_logging(load_config_without_model(config_file)?);
            run_with_logging(config, |config, token| retire::retire_set(set, config, token))
        }
    }
}
