//! `bsap prompts retire`: removes a stored set from the catalogue.

use tokio_util::sync::CancellationToken;

use crate::backfill;
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::config::Config;
use crate::prompts::PromptSet;

/// Forgets a stored set.
pub async fn retire_set(name: &str, config: Config, token: CancellationToken) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let changed_by = actor("bsap prompts retire");
    let attempts = config.table.max_commit_attempts;
    let (key, dropped) =
        backfill::retire_prompt_set(&store, name, attempts, &changed_by, &token).await?;
    print_line!("{key} is retired; {dropped} files of backfilled statistics are dropped");
    let configured = config.prompts.sets.iter().filter_map(|name| PromptSet::load(name).ok());
    if configured.into_iter().any(|set| key.starts_with(&format!("{}@{}:", set.name, set.version)))
    {
        print_line!(
            "Take it out of prompts.sets too: a worker that starts with it makes it known again."
        );
    }
    Ok(())
}
