//! Adds a prompt set to the catalogue and computes its statistics for the stored rows.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::catalogue::{actor, backfill_parallelism, prompt_set_propagation_delay};
use super::printing::print_line;
use super::progress::progress_bar;
use crate::backfill::{StatisticsBackfill, add_prompt_set};
use crate::catalogue::CatalogueState;
use crate::config::Config;
use crate::prompts::EmbeddedPromptSet;
use crate::store::Store;
use crate::table::{Generation, StatisticsCoverage};

/// Adds `set` to the catalogue for `generation`, unless it is there, and computes its statistics for every
/// stored row that lacks them; prints both. Returns false if that was interrupted. `command` is named in the
/// history.
pub async fn store_statistics(
    config: &Config,
    store: &Store,
    state: &CatalogueState,
    generation: &Generation,
    set: EmbeddedPromptSet,
    command: &str,
    token: &CancellationToken,
) -> anyhow::Result<bool> {
    let stored = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    if !stored.iter().any(|record| record.key == set.statistics_key) {
        let state = add_prompt_set(store, generation, &set, &actor(command)).await?;
        print_line!(
            "The set is added by revision {} of the state: new rows will have its statistics.",
            state.revision
        );
    }
    let job = StatisticsBackfill {
        propagation_delay: prompt_set_propagation_delay(config),
        max_commit_attempts: config.table.max_commit_attempts,
        max_concurrent_files: backfill_parallelism(),
        catalogue: store.clone(),
        generation: generation.clone(),
        prompt_set: Arc::new(set),
    };
    let bar = progress_bar("rows", 0)?;
    let progress = |coverage: &StatisticsCoverage, _: usize| {
        bar.set_length(coverage.rows as u64);
        bar.set_position(coverage.covered as u64);
    };
    let started = std::time::Instant::now();
    let summary = job.run(&progress, token).await?;
    bar.finish_and_clear();
    print_line!(
        "{} rows in {} files were measured here in {:.1} s",
        summary.measured_row_count,
        summary.measured_file_count,
        started.elapsed().as_secs_f64()
    );
    if summary.is_complete {
        print_line!("Every stored row has the statistics of {}.", job.prompt_set.statistics_key);
    } else {
        print_line!("interrupted; committed work is kept, run it again for the rest");
    }
    Ok(summary.is_complete)
}
