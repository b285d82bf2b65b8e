//! `bsap candidate`: sets, shows and withdraws the candidate configuration.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::readiness::{check_candidate, print_promotion_check, print_readiness};
use crate::balance::normalise::Normaliser;
use crate::commands::shared::catalogue::{actor, open_catalogue};
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::rollout::{self, CandidateSpec};

/// `bsap candidate`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap candidate set mine --prompt-set mine --normaliser nnn --weight 0.5 --shadow 0.05
  bsap candidate set mine --prompt-set mine --weight 0.5 --traffic-share 0.1
  bsap candidate set large --standby --traffic-share 0.1 --traffic-filter category=shoes
  bsap candidate show
  bsap candidate withdraw

Every query worker has the candidate in memory. Requests may select it by name; it may answer a share
of the other requests, or be computed as a shadow of the live configuration, whose results are compared
and not shown (log event `shadow.compared`). `bsap promote` makes it live.")]
pub struct CandidateArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: CandidateAction,
}

/// What `bsap candidate` does.
#[derive(Debug, Subcommand)]
pub enum CandidateAction {
    /// Set the candidate, replacing an earlier one
    Set(CandidateSetArgs),
    /// Print the candidate, how complete its statistics are, and what blocks its promotion
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Withdraw the candidate
    Withdraw,
}

/// `bsap candidate set`. Options for ranking that are left out keep the value of an existing candidate of
/// that name, otherwise that of the live configuration; `--traffic-share`, `--shadow` and
/// `--traffic-filter` must be given each time.
#[derive(Debug, Args)]
pub struct CandidateSetArgs {
    /// Name of the candidate, for people and for requests that select it
    pub name: String,
    /// Search the standby generation, by another model (`bsap reindex model`)
    #[arg(long)]
    pub standby: bool,
    /// Stored prompt set: its name, name@version or key
    #[arg(long, value_name = "SET")]
    pub prompt_set: Option<String>,
    /// Normaliser
    #[arg(long)]
    pub normaliser: Option<Normaliser>,
    /// Weight of the normalised score in the balanced score, 0 (plain CLIP) to 1
    #[arg(long, value_parser = parse_share)]
    pub weight: Option<f32>,
    /// λ of `nnn`, 0 to 10
    #[arg(long, value_parser = parse_lambda)]
    pub lambda: Option<f32>,
    /// Share of the queries that it answers, 0 to 1, chosen by the traffic key of the request
    #[arg(long, default_value = "0", value_parser = parse_share)]
    pub traffic_share: f32,
    /// Share of the queries that it computes as a shadow, 0 to 1: results are compared, not shown
    #[arg(long, default_value = "0", value_parser = parse_share)]
    pub shadow: f32,
    /// Restrict the share to queries whose filter has this value of an attribute, for example one
    /// category
    #[arg(long, value_name = "NAME=VALUE", value_parser = validate_name_value)]
    pub traffic_filter: Option<String>,
    /// Fingerprint of the evaluation that supports it
    #[arg(long, value_name = "FINGERPRINT")]
    pub evaluation: Option<String>,
}

/// Sets, shows or withdraws the candidate.
pub fn run(args: &CandidateArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, _| handle_action(args, config))
}

/// Carries out the action that the arguments name.
async fn handle_action(args: &CandidateArgs, config: Config) -> CommandResult {
    match &args.action {
        CandidateAction::Set(args) => set_candidate(args, config).await,
        CandidateAction::Show { json } => show_candidate(*json, config).await,
        CandidateAction::Withdraw => {
            let (store, _) = open_catalogue(&config).await?;
            let changed_by = actor("bsap candidate withdraw");
            let state = rollout::withdraw_candidate(&store, &changed_by).await?;
            print_line!("The candidate is withdrawn (revision {} of the state).", state.revision);
            Ok(())
        }
    }
}

async fn set_candidate(args: &CandidateSetArgs, config: Config) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let request = CandidateSpec {
        name: args.name.clone(),
        use_standby_generation: args.standby,
        prompt_set: args.prompt_set.clone(),
        normaliser: args.normaliser,
        weight: args.weight,
        lambda: args.lambda,
        traffic_share: args.traffic_share,
        shadow_share: args.shadow,
        traffic_filter: args.traffic_filter.clone(),
        evaluation_fingerprint: args.evaluation.clone(),
    };
    let changed_by = actor("bsap candidate set");
    let state = rollout::set_candidate(&store, &request, &changed_by).await?;
    print_line!("{} is the candidate (revision {} of the state).", args.name, state.revision);
    print_promotion_check(&check_candidate(&store, &config, 0, None).await?);
    Ok(())
}

async fn show_candidate(as_json: bool, config: Config) -> CommandResult {
    let (store, _) = open_catalogue(&config).await?;
    let promotion = check_candidate(&store, &config, 0, None).await?;
    let (revision, token) = (promotion.revision, CancellationToken::new());
    let readiness = rollout::wait_for_replicas(&store, revision, Duration::ZERO, &token).await?;
    if as_json {
        print_line!("{}", json!({"promotion": promotion, "query_workers": readiness}));
        return Ok(());
    }
    print_promotion_check(&promotion);
    print_readiness(&readiness);
    Ok(())
}

fn parse_number_up_to(text: &str, max: f32) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "is not a number".to_owned())?;
    if (0.0..=max).contains(&value) {
        Ok(value)
    } else {
        Err(format!("is not between 0 and {max}"))
    }
}

/// Checks that `text` is NAME=VALUE.
fn validate_name_value(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => Ok(text.to_owned()),
        _ => Err("is not an attribute's name, =, and a value".into()),
    }
}

fn parse_share(text: &str) -> Result<f32, String> {
    parse_number_up_to(text, 1.0)
}

fn parse_lambda(text: &str) -> Result<f32, String> {
    parse_number_up_to(text, 10.0)
}
