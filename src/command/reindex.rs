//! `bsap reindex`.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{Done, Failure, parts};
use crate::cli::StatisticsArgs;
use crate::config::Config;
use crate::prompts::PromptSet;
use crate::reindex::{Job, add_set};
use crate::table::Stored;

/// Computes the statistics of every stored row for a prompt set.
pub async fn statistics(args: &StatisticsArgs, config: Config, token: CancellationToken) -> Done {
    let set = PromptSet::load(&args.prompt_set).map_err(Failure::usage)?;
    let (store, state) = parts::catalogue(&config).await?;
    let towers = parts::towers(&config)?;
    let generation = parts::generation(&config, &*towers);
    state.live.expect(&generation)?;
    if let Some(warning) = set.warning(&*towers) {
        say!("WARNING: {warning}");
    }
    let top_k = args.top_k.map_or(config.prompts.top_k, usize::from);
    let set = set.embed(&*towers, top_k)?;
    let known = state.prompt_sets.iter().any(|record| record.key == set.key);
    let (pending, coverage) = Stored::open(&store, &generation).await?.pending(&set.key).await?;
    say!(
        "{}: {} prompts; {} of {} rows have its statistics, {} files are to be measured",
        set.key,
        set.set.texts.len(),
        coverage.covered,
        coverage.rows,
        pending.len()
    );
    if args.dry_run {
        if !known {
            say!("The set would be made known to the catalogue, so that new rows carry it.");
        }
        say!("Nothing was changed.");
        return Ok(());
    }
    if !known {
        let by = parts::actor("bsap reindex statistics");
        let state = add_set(&store, &generation, &set, &by).await?;
        say!(
            "The set is known from revision {} of the state on: new rows carry it.",
            state.revision
        );
    }
    let job = Job {
        settle: parts::settle(&config),
        attempts: config.table.commit_attempts,
        lanes: parts::lanes(),
        catalogue: store,
        generation,
        set: Arc::new(set),
    };
    let bar = super::bar("rows", coverage.rows as u64)?;
    let progress = |coverage: &crate::table::Coverage, _: usize| {
        bar.set_length(coverage.rows as u64);
        bar.set_position(coverage.covered as u64);
    };
    let started = std::time::Instant::now();
    let done = job.run(&progress, &token).await?;
    bar.finish_and_clear();
    say!(
        "{} rows in {} files were measured here in {:.1} s",
        done.rows,
        done.files,
        started.elapsed().as_secs_f64()
    );
    if done.complete {
        say!("Every stored row has the statistics of {}.", job.set.key);
    } else {
        say!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}
