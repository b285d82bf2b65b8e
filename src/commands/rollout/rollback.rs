//! `bsap rollback`: makes the configuration before the last promotion live again.

use std::path::Path;
use std::time::Duration;

use chrono::Utc;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::readiness::{MISSING_IMAGE_GRACE, confirm, describe_serving, print_serving_workers};
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

/// `bsap rollback`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Within a generation it goes back at once. To another model's it first looks whether the workers of that \
model have kept up: images that it lacks would no longer be found, deleted ones would come back. \
Where there are any, it says so and asks.")]
pub struct RollbackArgs {
    /// Do not look and do not ask: go back at once, and say afterwards what is lacking
    #[arg(long)]
    pub yes: bool,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Goes back to the configuration before the last promotion.
pub fn run(args: &RollbackArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| roll_back(args, config, token))
}

/// `bsap rollback`.
async fn roll_back(args: &RollbackArgs, config: Config, token: CancellationToken) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let plan = RollbackPlan::load(&store).await?;
    if !args.yes && warn_of_missing_images(&plan, &store, args).await? && !confirm()? {
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let by = actor("bsap rollback");
    let state = plan.execute(&store, &by).await?;
    print_line!(
        "{} is live again (revision {} of the state, by {by}): {}",
        state.configuration_name,
        state.revision,
        describe_serving(&state.serving)
    );
    let limit = Duration::from_secs(60);
    let standing = rollout::wait_for_replicas(&store, state.revision, limit, &token).await?;
    print_serving_workers(&standing);
    // In an emergency it is done first; what it costs is said all the same.
    if args.yes
        && let Err(error) = warn_of_missing_images(&plan, &store, args).await
    {
        print_line!("WARNING     whether images are lacking now is not known: {error}");
    }
    Ok(())
}

/// Says what the generation that a roll back leads to lacks; whether it lacks anything.
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
    let lacks = gap.out_of_date_count() > 0;
    if lacks {
        let (summary, model) =
            (gap.summary(&plan.target_generation().id), &plan.target_generation().model_name);
        print_line!(
            "WARNING     {summary}; have workers of {model} run? `bsap status` says what waits for them"
        );
    }
    Ok(lacks)
}
