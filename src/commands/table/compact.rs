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
Workers do this by themselves (maintenance.interval_seconds), one of them at a time. By hand it is safe at any \
time, beside workers, query workers and another compaction. The generation beside the live one is \
compacted too.

With --drop-damaged every file is read, and what is not there or not what was written leaves the table: \
query workers that start, and merging, would stop at it. What it held is then not stored any more, and \
a deleted image may be back in an older version, until `bsap reconcile --repair` has run. A query \
worker that runs serves what it holds until it starts anew.")]
pub struct CompactArgs {
    /// Merge small files only, without reading the keys of all rows
    #[arg(long)]
    pub merge: bool,
    /// Only take out files that are missing or damaged, after `bsap verify` found some
    #[arg(long, conflicts_with = "merge")]
    pub drop_damaged: bool,
}

/// Compacts the tables of the live generation and of the standby generation once.
pub fn run(args: &CompactArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| compact_tables(args, config, token))
}

/// Compacts the tables of the live generation and of the one beside it once.
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
        print_line!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}

async fn compact_generation(
    mut compactor: Compactor,
    args: &CompactArgs,
    config: &Config,
    token: &CancellationToken,
) -> CommandResult {
    let depth = if args.merge { CompactionMode::Merge } else { CompactionMode::Deep };
    let bar = progress_bar("compacting", 0)?;
    let started = Instant::now();
    let done = compactor.run(depth, Utc::now(), &progress_callback(&bar), token).await?;
    bar.finish_and_clear();
    log_compaction(&done, started.elapsed());
    if done.committed_jobs == 0 {
        print_line!(
            "nothing to do: {} files wait for others of their size",
            compactor.count_files().await?
        );
    } else {
        print_line!(
            "{} files of {} became {} of {}; {} superseded rows and {} tombstones are gone",
            done.files_in,
            format_mebibytes(done.bytes_in),
            done.files_out,
            format_mebibytes(done.bytes_out),
            done.dropped_superseded_rows,
            done.dropped_tombstones
        );
        print_line!(
            "The old files stay for {} hours for those who read an older version; then `bsap vacuum` removes them.",
            config.maintenance.deleted_file_retention_hours
        );
    }
    if done.conflicting_jobs > 0 {
        print_line!(
            "{} merges were given up: another compactor had taken a file",
            done.conflicting_jobs
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
            "nothing was done: it was interrupted, or another compactor took a file; run it again"
        );
        return Ok(());
    };
    for file in &dropped {
        warn!(event = event::FILE_DROPPED, file, "a damaged file was taken out of the table");
        print_line!("{file}");
    }
    match dropped.len() {
        0 => print_line!("nothing to do: every file is what was written"),
        files => print_line!(
            "{files} files are no longer part of the table. `bsap reconcile --repair` announces what they held, and deletes what was deleted in them."
        ),
    }
    Ok(())
}
