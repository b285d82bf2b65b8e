//! `bsap rollback`: makes the configuration before the last promotion live again.

use std::path::Path;
use std::time::Duration;

use chrono::Utc;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::readiness::{
    MISSING_IMAGE_GRACE, confirm, describe_serving_config, print_serving_workers,
};
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::reconcile::default_temp_folder;
use crate::rollout::RolloutError;
use crate::rollout::{self, RollbackPlan};
use crate::store::Store;

/// How long a rollback waits until the query workers serve the restored configuration.
const REPLICA_TIMEOUT: Duration = Duration::from_secs(60);

/// `bsap rollback`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Within a generation the change is immediate. Before a change to the generation of another model it checks \
whether the workers of that model have kept up: images that the generation lacks would no longer be found, \
deleted ones would come back. If there are any, it says so and asks for confirmation.")]
pub struct RollbackArgs {
    /// Go back at once without a check or confirmation, and report missing images afterwards
    #[arg(long)]
    pub yes: bool,
    /// Folder for sorting, some hundred bytes per image; by default the system's temporary folder
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Goes back to the configuration before the last promotion.
pub fn run(args: &RollbackArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| roll_back(args, config, token))
}

/// Checks for missing images, unless `--yes` is given, goes back, and waits for the query workers.
async fn roll_back(args: &RollbackArgs, config: Config, token: CancellationToken) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let plan = RollbackPlan::prepare(&store).await?;
    if !args.yes && warn_of_missing_images(&plan, &store, args).await? && !confirm()? {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let changed_by = actor("bsap rollback");
    let state = plan.execute(&store, &changed_by).await?;
    print_line!(
        "{} is live again (revision {} of the state, by {changed_by}): {}",
        state.configuration_name,
        state.revision,
        describe_serving_config(&state.serving)
    );
    let readiness =
        rollout::wait_for_replicas(&store, state.revision, REPLICA_TIMEOUT, &token).await?;
    print_serving_workers(&readiness);
    // In an emergency the check must not delay the change, so it is done afterwards.
    if args.yes
        && let Err(error) = warn_of_missing_images(&plan, &store, args).await
    {
        print_line!("WARNING     it is not known whether images are missing now: {error}");
    }
    Ok(())
}

/// Prints a warning if the generation that becomes live again lacks images or deletes of the current
/// one; returns whether it does.
async fn warn_of_missing_images(
    plan: &RollbackPlan,
    store: &Store,
    args: &RollbackArgs,
) -> Result<bool, RolloutError> {
    let folder = args.temp_dir.clone().unwrap_or_else(default_temp_folder);
    let Some(gap) =
        plan.compare_generations(store, &folder, MISSING_IMAGE_GRACE, Utc::now()).await?
    else {
        return Ok(false);
    };
    let has_gap = gap.out_of_date_count() > 0;
    if has_gap {
        let (summary, model) =
            (gap.summary(&plan.target_generation().id), &plan.target_generation().model_name);
        print_line!(
            "WARNING     {summary}; have workers of {model} been running? `bsap status` shows their lag"
        );
    }
    Ok(has_gap)
}
