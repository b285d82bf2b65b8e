//! `bsap compact` and `bsap vacuum`.

use std::time::Instant;

use chrono::Utc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cli::table::{CompactArgs, VacuumArgs};
use super::{Done, parts};
use crate::catalogue::{CatalogueState, Generation, Retired, retired};
use crate::config::Config;
use crate::store::Store;
use crate::table::maintenance::schedule::{log_compaction, log_vacuum};
use crate::table::maintenance::upkeep;
use crate::table::{Compactor, Depth};
use crate::telemetry::event;

/// Compacts the tables of the live generation and of the one beside it once.
pub async fn compact(args: &CompactArgs, config: Config, token: CancellationToken) -> Done {
    let (store, state) = parts::catalogue(&config).await?;
    for generation in state.generations() {
        let attempts = config.table.commit_attempts;
        let compactor = Compactor::open(&store, generation, &config.upkeep, attempts).await?;
        name(&state, generation);
        if args.drop_damaged {
            drop_damaged(compactor, &token).await?;
        } else {
            compact_one(compactor, args, &config, &token).await?;
        }
    }
    if token.is_cancelled() && !args.drop_damaged {
        say!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}

/// Says which table what follows is about, where there are two.
pub fn name(state: &CatalogueState, generation: &Generation) {
    if state.beside.is_some() {
        say!("generation {} ({})", generation.id, generation.model_name);
    }
}

async fn compact_one(
    mut compactor: Compactor,
    args: &CompactArgs,
    config: &Config,
    token: &CancellationToken,
) -> Done {
    let depth = if args.merge { Depth::Merge } else { Depth::Deep };
    let bar = super::bar("compacting", 0)?;
    let started = Instant::now();
    let done = compactor.run(depth, Utc::now(), &super::steps(&bar), token).await?;
    bar.finish_and_clear();
    log_compaction(&done, started.elapsed());
    if done.jobs == 0 {
        say!("nothing to do: {} files wait for others of their size", compactor.files().await?);
    } else {
        say!(
            "{} files of {} became {} of {}; {} superseded rows and {} tombstones are gone",
            done.files_in,
            mib(done.bytes_in),
            done.files_out,
            mib(done.bytes_out),
            done.superseded,
            done.tombstones
        );
        say!(
            "The old files stay for {} hours for those who read an older version; then `bsap vacuum` removes them.",
            config.upkeep.retention_hours
        );
    }
    if done.lost > 0 {
        say!("{} merges were given up: another compactor had taken a file", done.lost);
    }
    Ok(())
}

async fn drop_damaged(mut compactor: Compactor, token: &CancellationToken) -> Done {
    let bar = super::bar("reading", 0)?;
    let dropped = compactor.drop_damaged(&super::steps(&bar), token).await?;
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
pub async fn vacuum(args: &VacuumArgs, config: Config) -> Done {
    let (store, state) = parts::catalogue(&config).await?;
    if args.generations {
        return vacuum_generations(&store, args.dry_run, &config).await;
    }
    for generation in state.generations() {
        name(&state, generation);
        let removed =
            upkeep::vacuum(&store, generation, &config.upkeep, Utc::now(), args.dry_run).await?;
        if args.dry_run {
            for file in &removed.files {
                say!("{file}");
            }
            say!("{} data files would be removed", removed.files.len());
        } else {
            log_vacuum(&removed);
            say!(
                "{} data files and {} files of the log removed",
                removed.files.len(),
                removed.log_files
            );
        }
    }
    Ok(())
}

async fn vacuum_generations(store: &Store, dry_run: bool, config: &Config) -> Done {
    let hours = config.upkeep.retention_hours;
    let found = retired(store, &config.upkeep, Utc::now(), dry_run).await?;
    for Retired { id, objects, bytes, newest, is_over } in &found {
        let what = match (is_over, dry_run) {
            (true, true) => "would be removed".to_owned(),
            (true, false) => "removed".to_owned(),
            (false, _) => {
                format!("stays until nothing was written to it for {hours} hours; stop its workers")
            }
        };
        let (size, newest) = (mib(*bytes), newest.format("%F %T UTC"));
        say!("{id}: {objects} objects, {size}, last written {newest}: {what}");
        if *is_over && !dry_run {
            info!(
                event = event::GENERATION_REMOVED,
                id, objects, bytes, "a generation was removed"
            );
        }
    }
    if found.is_empty() {
        say!("nothing to do: every generation is live or beside the live one");
    }
    Ok(())
}

/// A size for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
