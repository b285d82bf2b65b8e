//! `bsap compact`: merges small files and drops superseded rows.

use std::path::Path;
use std::time::Instant;

use chrono::Utc;
use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::formatting::{format_mebibytes, print_generation};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::table::maintenance::schedule::log_compaction;
use crate::table::{CompactionMode, Compactor};
use crate::telemetry::event;

/// `bsap compact`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Workers do this by themselves (maintenance.interval_seconds), one of them at a time. The command is safe at \
any time, while workers, query workers and other compactions run. The standby generation is compacted \
too.

With --drop-damaged every file is read, and files that are missing or damaged are removed from the table: \
query workers that start, and merges, would fail because of them. Their rows are then no longer stored, and \
an older version of a deleted image may reappear, until `bsap reconcile --repair` has run. A running query \
worker serves what it has loaded until it is restarted.")]
pub struct CompactArgs {
    /// Merge small files only, without reading the keys of all rows
    #[arg(long)]
    pub merge: bool,
    /// Only remove files that are missing or damaged, after `bsap verify` found some
    #[arg(long, conflicts_with = "merge")]
    pub drop_damaged: bool,
}

/// Compacts the tables of the live generation and of the standby generation once.
pub fn run(args: &CompactArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| compact_tables(args, config, token))
}

/// Compacts one generation after another.
async fn compact_tables(
    args: &CompactArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    for generation in state.generations() {
        let attempts = config.table.max_commit_attempts;
        let compactor = Compactor::open(&store, generation, &config.maintenance, attempts).await?;
        print_generation(&state, generation);
        if args.drop_damaged {
            drop_damaged(compactor, &token).await?;
        } else {
            compact_generation(compactor, args, &config, &token).await?;
        }
    }
    if token.is_cancelled() && !args.drop_damaged {
        print_line!("interrupted; committed work is kept, run it again for the rest");
    }
    Ok(())
}

async fn compact_generation(
    mut compactor: Compactor,
    args: &CompactArgs,
    config: &Config,
    token: &CancellationToken,
) -> CommandResult {
    let mode = if args.merge { CompactionMode::Merge } else { CompactionMode::Deep };
    let bar = progress_bar("compacting", 0)?;
    let started = Instant::now();
    let summary = compactor.run(mode, Utc::now(), &progress_callback(&bar), token).await?;
    bar.finish_and_clear();
    log_compaction(&summary, started.elapsed());
    if summary.committed_job_count == 0 {
        print_line!(
            "nothing to do: {} files are too few of their size to be merged",
            compactor.count_files().await?
        );
    } else {
        print_line!(
            "{} files of {} became {} of {}; {} superseded rows and {} tombstones are gone",
            summary.removed_file_count,
            format_mebibytes(summary.bytes_in),
            summary.written_file_count,
            format_mebibytes(summary.bytes_out),
            summary.dropped_superseded_row_count,
            summary.dropped_tombstone_count
        );
        print_line!(
            "The old files are kept for {} hours for readers of older versions; then `bsap vacuum` removes them.",
            config.maintenance.deleted_file_retention_hours
        );
    }
    if summary.conflicting_job_count > 0 {
        print_line!(
            "{} merges were abandoned: another compactor had already replaced a file",
            summary.conflicting_job_count
        );
    }
    Ok(())
}

async fn drop_damaged(mut compactor: Compactor, token: &CancellationToken) -> CommandResult {
    let bar = progress_bar("reading", 0)?;
    let dropped = compactor.drop_damaged_files(&progress_callback(&bar), token).await?;
    bar.finish_and_clear();
    let Some(dropped) = dropped else {
        print_line!(
            "nothing was done: it was interrupted, or another compactor replaced a file; run it again"
        );
        return Ok(());
    };
    for file in &dropped {
        warn!(event = event::FILE_DROPPED, file, "a damaged file was removed from the table");
        print_line!("{file}");
    }
    match dropped.len() {
        0 => print_line!("nothing to do: no file is missing or damaged"),
        files => print_line!(
            "{files} files are no longer part of the table. `bsap reconcile --repair` announces the images of their rows, and deletes those that they had deleted."
        ),
    }
    Ok(())
}
