//! `bsap history`: the revisions of the catalogue state.

use std::path::Path;

use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde_json::json;

use super::readiness::describe_serving_config;
use crate::catalogue::{CatalogueState, StateChange};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::rollout;

/// `bsap history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Print at most so many changes, the newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Print one line of JSON per change
    #[arg(long)]
    pub json: bool,
}

/// Prints what was changed, when and by whom.
pub fn run(args: &HistoryArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, _| print_history(args, config))
}

/// Prints the newest revisions.
async fn print_history(args: &HistoryArgs, config: Config) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let changes = rollout::list_revisions(&store, args.limit as usize).await?;
    if args.json {
        for state in &changes {
            print_line!(
                "{}",
                json!({
                    "revision": state.revision, "created_at": state.created_at, "actor": state.actor,
                    "change": state.change, "configuration_name": state.configuration_name, "serving": state.serving,
                    "generation": state.live.id,
                })
            );
        }
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(["revision", "when", "who", "what", "served from then on"]);
    for state in &changes {
        table.add_row([
            state.revision.to_string(),
            state.created_at.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
            state.actor.clone(),
            describe_change(state),
            format!("{}: {}", state.configuration_name, describe_serving_config(&state.serving)),
        ]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    print_line!("{table}");
    Ok(())
}

/// Describes the change that a revision made.
fn describe_change(state: &CatalogueState) -> String {
    match &state.change {
        StateChange::Created => "the catalogue was created".into(),
        StateChange::PromptSets { keys, generation } => {
            let sets =
                state.prompt_sets_of_generation(generation.as_ref().unwrap_or(&state.live.id));
            let sets = sets.unwrap_or_default();
            let is_stored = |key: &String| sets.iter().any(|set| set.key.as_str() == key);
            let action = if keys.iter().all(is_stored) { "added" } else { "retired" };
            let for_generation =
                generation.as_ref().map_or(String::new(), |id| format!(" for generation {id}"));
            format!("prompt sets {action}{for_generation}: {}", keys.join(", "))
        }
        StateChange::Standby { generation } => match &state.standby {
            Some(_) => format!("generation {generation} is filled as the standby"),
            None => format!("generation {generation} is no longer filled"),
        },
        StateChange::Candidate { name } => match &state.candidate {
            Some(candidate) => {
                format!("candidate {name}: {}", describe_serving_config(&candidate.serving))
            }
            None => format!("candidate {name} withdrawn"),
        },
        StateChange::Promoted { name, previous_revision, evaluation_fingerprint: evaluation } => {
            let evaluation = evaluation.as_deref().unwrap_or("none");
            format!(
                "{name} promoted, replacing revision {previous_revision}, evaluation {evaluation}"
            )
        }
        StateChange::RolledBack { restored_revision } => {
            format!("rolled back to revision {restored_revision}")
        }
        StateChange::Calibrated { evaluation_fingerprint: evaluation } => {
            format!("thresholds calibrated, evaluation {evaluation}")
        }
    }
}
