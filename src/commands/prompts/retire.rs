//! `bsap prompts retire`: removes a stored set from the catalogue.

use tokio_util::sync::CancellationToken;

use crate::backfill;
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::config::Config;
use crate::prompts::PromptSet;

/// Removes a stored set and its backfilled statistics from the catalogue.
pub async fn retire_set(name: &str, config: Config, token: CancellationToken) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let changed_by = actor("bsap prompts retire");
    let attempts = config.table.max_commit_attempts;
    let (key, dropped) =
        backfill::retire_prompt_set(&store, name, attempts, &changed_by, &token).await?;
    print_line!("{key} is retired; {dropped} files of backfilled statistics are dropped");
    let configured =
        config.prompts.sets.iter().filter_map(|name| PromptSet::load_builtin_or_file(name).ok());
    if configured.into_iter().any(|set| key.starts_with(&format!("{}@{}:", set.name, set.version)))
    {
        print_line!("Remove it from prompts.sets too: a worker that starts with it adds it again.");
    }
    Ok(())
}
