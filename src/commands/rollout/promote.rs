//! `bsap promote`: makes the candidate live.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::readiness::{
    check_candidate, confirm, print_promotion, print_readiness, print_serving_workers,
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
live in one write. No query fails meanwhile and no answer mixes the two. `bsap rollback` goes back.

Who did it is BSAP_ACTOR, or the user of this process; `bsap history` prints it.")]
pub struct PromoteArgs {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Longest wait for the query workers, in seconds; nothing is changed when it is over
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Print what stands against it and what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Live images that the candidate's generation may lack, for example because their addresses are
    /// dead
    #[arg(long, value_name = "IMAGES", default_value_t = 0)]
    pub allow_missing: u64,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Checks the candidate, waits for the query workers and makes it live.
pub fn run(args: &PromoteArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config(config_file)?);
    run_with_logging(config, |config, token| promote_candidate(args, config, token))
}

/// `bsap promote`.
async fn promote_candidate(
    args: &PromoteArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    let folder = args.temp_dir.as_deref();
    let promotion = check_candidate(&store, &config, args.allow_missing, folder).await?;
    print_promotion(&promotion);
    let live = test_candidate_model(&config, &state, &promotion.candidate_generation)?;
    print_line!("model       {} passes its self-test", promotion.candidate_generation.model_name);
    if let Some(problem) = promotion.blockers.first() {
        let more = promotion.blockers.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" (and {more} more, above)") };
        return Err(anyhow::anyhow!("the candidate cannot be promoted: {problem}{more}").into());
    }
    let limit = Duration::from_secs(args.timeout);
    let wait_limit = if args.dry_run { Duration::ZERO } else { limit };
    let standing =
        rollout::wait_for_replicas(&store, promotion.revision, wait_limit, &token).await?;
    print_readiness(&standing);
    if args.dry_run {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    if !standing.not_ready.is_empty() {
        return Err(anyhow::anyhow!(
            "{} query workers do not have the candidate in memory after {} s; nothing was changed",
            standing.not_ready.len(),
            args.timeout
        )
        .into());
    }
    if !args.yes && !confirm()? {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let by = actor("bsap promote");
    let state = rollout::promote(&store, promotion.revision, &live, &by).await?;
    print_line!(
        "{} is live (revision {} of the state, by {by}).",
        state.configuration_name,
        state.revision
    );
    let standing = rollout::wait_for_replicas(&store, state.revision, limit, &token).await?;
    print_serving_workers(&standing);
    Ok(())
}

/// Makes sure that the model of the candidate's generation `to` is there, is the one that filled it,
/// and works. Gives the checkpoint of the live one.
fn test_candidate_model(
    config: &Config,
    state: &CatalogueState,
    to: &Generation,
) -> anyhow::Result<String> {
    let models = load_models(config)?;
    let live = find_live_model(config, state, &models)?;
    let candidate = &config.search.standby_checkpoint;
    let is_first = models[0].1.card().fingerprint == live.card().fingerprint;
    let checkpoint = if is_first { &config.model.checkpoint } else { candidate };
    let fits = |towers: &&Arc<dyn Encoders>| towers.card().fingerprint == to.model_fingerprint;
    let known = models.iter().map(|(_, towers)| towers).find(fits).cloned();
    let encoders = match (known, &state.standby) {
        (Some(towers), _) => towers,
        (None, Some(standby)) => load_standby_model(config, standby)?,
        (None, None) => live,
    };
    to.ensure_compatible(&configured_generation(config, &*encoders))?;
    run_self_test(&*encoders)?;
    Ok(checkpoint.clone())
}
