//! `bsap evaluate`: compares ranking configurations on judged queries, and calibrates thresholds.

mod arguments;
mod arrays;
mod calibration;
mod files;
mod from_logs;
mod output;
mod plan;
mod rankings;
mod stored_table;
mod synthetic;

use std::path::Path;

pub use arguments::{EvaluateAction, EvaluateArgs};

use super::shared::configuration::{load_config, with_quiet_logging};
use super::shared::error::CommandResult;
use super::shared::runtime::run_with_logging;
use crate::config::Config;

/// Evaluates arrays or rankings from files, logs of query workers, a synthetic catalogue, or the stored table.
pub fn run(args: &EvaluateArgs, config_file: Option<&Path>) -> CommandResult {
    match &args.action {
        Some(EvaluateAction::Arrays(args)) => return arrays::evaluate(args),
        Some(EvaluateAction::Rankings(args)) => return rankings::evaluate_rankings(args),
        None => {}
    }
    if !args.from_logs.is_empty() {
        return from_logs::evaluate_logs(args);
    }
    if args.synthetic.is_some() {
        let config = with_quiet_logging(Config::default());
        return run_with_logging(config, |_, token| {
            synthetic::evaluate_on_synthetic_catalogue(args, token)
        });
    }
    let config = with_quiet_logging(load_config(config_file)?);
    run_with_logging(config, |config, token| stored_table::evaluate_on_table(args, config, token))
}
