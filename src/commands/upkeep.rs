//! `bsap compact` and `bsap vacuum`.

use std::time::Instant;

use chrono::Utc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cli::table::{CompactArgs, VacuumArgs};
use super::{CommandResult, setup};
use crate::catalogue::{CatalogueState, RetiredGeneration, remove_retired_generations};
use crate::config::Config;
use crate::store::Store;
use crate::table::maintenance::schedule::{log_compaction, log_vacuum};
use crate::table::maintenance::vacuum;
use crate::table::{CompactionMode, Compactor, Generation};
use crate::telemetry::event;

/// Compacts the tables of the live generation and of the one beside it once.
pub async fn compact(
    args: &CompactArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = setup::open_catalogue(&config).await?;
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
        say!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}

/// Says which table what follows is about, where there are two.
pub fn print_generation(state: &CatalogueState, generation: &Generation) {
    if state.standby.is_some() {
        say!("generation {} ({})", generation.id, generation.model_name);
    }
}

async fn compact_generation(
    mut compactor: Compactor,
    args: &CompactArgs,
    config: &Config,
    token: &CancellationToken,
) -> CommandResult {
    let depth = if args.merge { CompactionMode::Merge } else { CompactionMode::Deep };
    let bar = super::progress_bar("compacting", 0)?;
    let started = Instant::now();
    let done = compactor.run(depth, Utc::now(), &super::progress_callback(&bar), token).await?;
    bar.finish_and_clear();
    log_compaction(&done, started.elapsed());
    if done.committed_jobs == 0 {
        say!(
            "nothing to do: {} files wait for others of their size",
            compactor.count_files().await?
        );
    } else {
        say!(
            "{} files of {} became {} of {}; {} superseded rows and {} tombstones are gone",
            done.files_in,
            format_mebibytes(done.bytes_in),
            done.files_out,
            format_mebibytes(done.bytes_out),
            done.dropped_superseded_rows,
            done.dropped_tombstones
        );
        say!(
            "The old files stay for {} hours for those who read an older version; then `bsap vacuum` removes them.",
            config.maintenance.deleted_file_retention_hours
        );
    }
    if done.conflicting_jobs > 0 {
        say!("{} merges were given up: another compactor had taken a file", done.conflicting_jobs);
    }
    Ok(())
}

async fn drop_damaged(mut compactor: Compactor, token: &CancellationToken) -> CommandResult {
    let bar = super::progress_bar("reading", 0)?;
    let dropped = compactor.drop_damaged_files(&super::progress_callback(&bar), token).await?;
    bar.finish_and_clear();
    let Some(dropped) = dropped else {
        say!(
            "nothing was done: it was interrupted, or another compactor took a file; run it again"
        );
        return Ok(());
    };
    for file in &dropped {
        warn!(event = event::FILE_DROPPED, file, "a damaged file was taken out of the table");
        say!("{file}");
    }
    match dropped.len() {
        0 => say!("nothing to do: every file is what was written"),
        files => say!(
            "{files} files are no longer part of the table. `bsap reconcile --repair` announces what they held, and deletes what was deleted in them."
        ),
    }
    Ok(())
}

/// Removes what is older than the retention.
pub async fn vacuum(args: &VacuumArgs, config: Config) -> CommandResult {
    let (store, state) = setup::open_catalogue(&config).await?;
    if args.generations {
        return vacuum_generations(&store, args.dry_run, &config).await;
    }
    for generation in state.generations() {
        print_generation(&state, generation);
        let removed =
            vacuum::vacuum(&store, generation, &config.maintenance, Utc::now(), args.dry_run)
                .await?;
        if args.dry_run {
            for file in &removed.removed_files {
                say!("{file}");
            }
            say!("{} data files would be removed", removed.removed_files.len());
        } else {
            log_vacuum(&removed);
            say!(
                "{} data files and {} files of the log removed",
                removed.removed_files.len(),
                removed.removed_log_files
            );
        }
    }
    Ok(())
}

async fn vacuum_generations(store: &Store, dry_run: bool, config: &Config) -> CommandResult {
    let hours = config.maintenance.deleted_file_retention_hours;
    let found = remove_retired_generations(store, &config.maintenance, Utc::now(), dry_run).await?;
    for RetiredGeneration { id, object_count: objects, bytes, last_modified: newest, is_expired } in
        &found
    {
        let what = match (is_expired, dry_run) {
            (true, true) => "would be removed".to_owned(),
            (true, false) => "removed".to_owned(),
            (false, _) => {
                format!("stays until nothing was written to it for {hours} hours; stop its workers")
            }
        };
        let (size, newest) = (format_mebibytes(*bytes), newest.format("%F %T UTC"));
        say!("{id}: {objects} objects, {size}, last written {newest}: {what}");
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
    if found.is_empty() {
        say!("nothing to do: every generation is live or beside the live one");
    }
    Ok(())
}

/// A size for people.
pub fn format_mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
