//! `bsap vacuum`: removes files and generations that are no longer used.

use std::path::Path;

use chrono::Utc;
use clap::Args;
use tracing::info;

use super::formatting::{format_mebibytes, print_generation};
use crate::catalogue::{RetiredGeneration, list_retired_and_remove_expired};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::store::Store;
use crate::table::maintenance::schedule::log_vacuum;
use crate::table::maintenance::vacuum;
use crate::telemetry::event;

/// `bsap vacuum`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Removes data files that have not been part of the table for maintenance.deleted_file_retention_hours, leftovers of \
crashes that are as old, and the log of commits older than maintenance.log_retention_hours. Workers do this by \
themselves (maintenance.interval_seconds).

With --generations it removes instead the tables of generations that are neither live nor standby, and to \
which nothing was written for maintenance.deleted_file_retention_hours. `bsap rollback` cannot go back to \
them, and nothing maintains them: embeddings of deleted images would remain in them.")]
pub struct VacuumArgs {
    /// Remove the tables of old generations instead
    #[arg(long)]
    pub generations: bool,
    /// Print what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Removes files, or with `--generations` tables, that are older than the retention.
pub fn run(args: &VacuumArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, _| vacuum_tables(args, config))
}

/// Removes files of each generation, or retired generations, that are older than the retention.
async fn vacuum_tables(args: &VacuumArgs, config: Config) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    if args.generations {
        return vacuum_generations(&store, args.dry_run, &config).await;
    }
    for generation in state.generations() {
        print_generation(&state, generation);
        let removed =
            vacuum::vacuum(&store, generation, &config.maintenance, Utc::now(), args.dry_run)
                .await?;
        if args.dry_run {
            for file in &removed.removed_file_paths {
                print_line!("{file}");
            }
            print_line!("{} data files would be removed", removed.removed_file_paths.len());
        } else {
            log_vacuum(&removed);
            print_line!(
                "{} data files and {} files of the log removed",
                removed.removed_file_paths.len(),
                removed.removed_log_file_count
            );
        }
    }
    Ok(())
}

async fn vacuum_generations(store: &Store, dry_run: bool, config: &Config) -> CommandResult {
    let hours = config.maintenance.deleted_file_retention_hours;
    let retired =
        list_retired_and_remove_expired(store, &config.maintenance, Utc::now(), dry_run).await?;
    for RetiredGeneration {
        id,
        object_count: objects,
        byte_size: bytes,
        last_modified: newest,
        is_expired,
    } in &retired
    {
        let outcome = match (is_expired, dry_run) {
            (true, true) => "would be removed".to_owned(),
            (true, false) => "removed".to_owned(),
            (false, _) => {
                format!("kept until nothing was written to it for {hours} hours; stop its workers")
            }
        };
        let (size, newest) = (format_mebibytes(*bytes), newest.format("%F %T UTC"));
        print_line!("{id}: {objects} objects, {size}, last written {newest}: {outcome}");
        if *is_expired && !dry_run {
            info!(
                event = event::GENERATION_REMOVED,
                generation = id,
                objects,
                bytes,
                "a generation was removed"
            );
        }
    }
    if retired.is_empty() {
        print_line!("nothing to do: every generation is live or standby");
    }
    Ok(())
}
