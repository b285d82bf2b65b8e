//! `bsap promote`: makes the candidate live.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::readiness::{
    check_candidate, confirm, print_promotion_check, print_readiness, print_serving_workers,
};
use crate::catalogue::CatalogueState;
use crate::clip::{Encoders, run_self_test};
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::configuration::{load_config, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::models::{
    configured_generation, find_live_model, load_models, load_standby_model,
};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::rollout;
use crate::table::Generation;

/// `bsap promote`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Checks that the candidate is complete, waits until every query worker has it in memory, and makes it
live in one write. No query fails during the change, and no answer mixes the two configurations.
`bsap rollback` undoes it.

The history records BSAP_ACTOR, or the user of this process; `bsap history` prints it.")]
pub struct PromoteArgs {
    /// Do not ask for confirmation
    #[arg(long)]
    pub yes: bool,
    /// Longest wait for the query workers, in seconds; after it nothing is changed
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Print what blocks the promotion and what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Number of live images that the candidate's generation may lack, for example because they cannot be
    /// fetched any more
    #[arg(long, value_name = "IMAGES", default_value_t = 0)]
    pub allow_missing: u64,
    /// Folder for sorting, some hundred bytes per image; by default the system's temporary folder
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Checks the candidate, waits for the query workers and makes it live.
pub fn run(args: &PromoteArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config(config_file)?);
    run_with_logging(config, |config, token| promote_candidate(args, config, token))
}

/// Promotes the candidate, unless it is blocked or not confirmed, and waits for the query workers.
async fn promote_candidate(
    args: &PromoteArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    let folder = args.temp_dir.as_deref();
    let promotion = check_candidate(&store, &config, args.allow_missing, folder).await?;
    print_promotion_check(&promotion);
    let live_checkpoint = test_candidate_model(&config, &state, &promotion.candidate_generation)?;
    print_line!("model       {} passes its self-test", promotion.candidate_generation.model_name);
    if let Some(blocker) = promotion.blockers.first() {
        let more = promotion.blockers.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" (and {more} more, above)") };
        return Err(anyhow::anyhow!("the candidate cannot be promoted: {blocker}{more}").into());
    }
    let timeout = Duration::from_secs(args.timeout);
    let preparation_timeout = if args.dry_run { Duration::ZERO } else { timeout };
    let readiness =
        rollout::wait_for_replicas(&store, promotion.revision, preparation_timeout, &token).await?;
    print_readiness(&readiness);
    if args.dry_run {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    if !readiness.not_ready.is_empty() {
        return Err(anyhow::anyhow!(
            "{} query workers do not have the candidate in memory after {} s; nothing was changed",
            readiness.not_ready.len(),
            args.timeout
        )
        .into());
    }
    if !args.yes && !confirm()? {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let changed_by = actor("bsap promote");
    let state = rollout::promote(&store, promotion.revision, &live_checkpoint, &changed_by).await?;
    print_line!(
        "{} is live (revision {} of the state, by {changed_by}).",
        state.configuration_name,
        state.revision
    );
    let readiness = rollout::wait_for_replicas(&store, state.revision, timeout, &token).await?;
    print_serving_workers(&readiness);
    Ok(())
}

/// Checks that the model of the candidate's generation can be loaded, is the one that filled it, and
/// passes its self-test. Returns the checkpoint of the live model.
fn test_candidate_model(
    config: &Config,
    state: &CatalogueState,
    candidate_generation: &Generation,
) -> anyhow::Result<String> {
    let models = load_models(config)?;
    let live = find_live_model(config, state, &models)?;
    let is_first = models[0].1.card().fingerprint == live.card().fingerprint;
    let live_checkpoint =
        if is_first { &config.model.checkpoint } else { &config.search.standby_checkpoint };
    let matches = |encoders: &&Arc<dyn Encoders>| {
        encoders.card().fingerprint == candidate_generation.model_fingerprint
    };
    let loaded = models.iter().map(|(_, encoders)| encoders).find(matches).cloned();
    let encoders = match (loaded, &state.standby) {
        (Some(encoders), _) => encoders,
        (None, Some(standby)) => load_standby_model(config, standby)?,
        (None, None) => live,
    };
    candidate_generation.ensure_compatible(&configured_generation(config, &*encoders))?;
    run_self_test(&*encoders)?;
    Ok(live_checkpoint.clone())
}
