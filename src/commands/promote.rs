//! `bsap candidate`, `bsap promote`, `bsap rollback`, `bsap history`.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::cli::reindex::{
    CandidateAction, CandidateArgs, CandidateSetArgs, HistoryArgs, PromoteArgs, RollbackArgs,
};
use super::{CommandError, CommandResult, setup};
use crate::catalogue::{CatalogueState, Generation, ServingConfig, StateChange};
use crate::clip::{Encoders, run_self_test};
use crate::config::Config;
use crate::reconcile::default_temp_folder;
use crate::rollout::{
    self, CandidateSpec, PromotionCheck, PromotionRules, ReplicaReadiness, RollbackPlan,
    RolloutError,
};
use crate::store::Store;

/// How long after the live generation took an image in another one may still lack it.
const MISSING_IMAGE_GRACE: Duration = Duration::from_secs(60);

/// `bsap candidate`.
pub async fn run_candidate(args: &CandidateArgs, config: Config) -> CommandResult {
    match &args.action {
        CandidateAction::Set(args) => set_candidate(args, config).await,
        CandidateAction::Show { json } => show_candidate(*json, config).await,
        CandidateAction::Withdraw => {
            let (store, _) = setup::open_catalogue(&config).await?;
            let by = setup::actor("bsap candidate withdraw");
            let state = rollout::withdraw_candidate(&store, &by).await?;
            say!("The candidate is withdrawn (revision {} of the state).", state.revision);
            Ok(())
        }
    }
}

async fn set_candidate(args: &CandidateSetArgs, config: Config) -> CommandResult {
    let (store, _) = setup::open_catalogue(&config).await?;
    let request = CandidateSpec {
        name: args.name.clone(),
        standby: args.standby,
        prompt_set: args.prompt_set.clone(),
        normaliser: args.normaliser,
        weight: args.weight,
        lambda: args.lambda,
        traffic_share: args.traffic_share,
        shadow_share: args.shadow,
        traffic_filter: args.traffic_filter.clone(),
        evaluation_fingerprint: args.evaluation.clone(),
    };
    let by = setup::actor("bsap candidate set");
    let state = rollout::set_candidate(&store, &request, &by).await?;
    say!("{} is the candidate (revision {} of the state).", args.name, state.revision);
    print_promotion(&check_candidate(&store, &config, 0, None).await?);
    Ok(())
}

async fn show_candidate(as_json: bool, config: Config) -> CommandResult {
    let (store, _) = setup::open_catalogue(&config).await?;
    let promotion = check_candidate(&store, &config, 0, None).await?;
    let none = Duration::ZERO;
    let (revision, token) = (promotion.revision, CancellationToken::new());
    let standing = rollout::wait_for_replicas(&store, revision, none, &token).await?;
    if as_json {
        say!("{}", json!({"promotion": promotion, "query_workers": standing}));
        return Ok(());
    }
    print_promotion(&promotion);
    print_readiness(&standing);
    Ok(())
}

async fn check_candidate(
    store: &Store,
    config: &Config,
    allow_missing: u64,
    folder: Option<&Path>,
) -> Result<PromotionCheck, RolloutError> {
    let temporary = default_temp_folder();
    let rules = PromotionRules {
        propagation_delay: setup::set_propagation_delay(config),
        grace_period: MISSING_IMAGE_GRACE,
        max_missing: allow_missing,
        temp_folder: folder.unwrap_or(&temporary),
    };
    rollout::check_promotion(store, &rules, Utc::now()).await
}

/// `bsap promote`.
pub async fn promote(
    args: &PromoteArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = setup::open_catalogue(&config).await?;
    let folder = args.temp_dir.as_deref();
    let promotion = check_candidate(&store, &config, args.allow_missing, folder).await?;
    print_promotion(&promotion);
    let live = test_candidate_model(&config, &state, &promotion.candidate_generation)?;
    say!("model       {} passes its self-test", promotion.candidate_generation.model_name);
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
        say!("Nothing was changed.");
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
        say!("Nothing was changed.");
        return Ok(());
    }
    let by = setup::actor("bsap promote");
    let state = rollout::promote(&store, promotion.revision, &live, &by).await?;
    say!(
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
    let models = setup::load_models(config)?;
    let live = setup::find_live_model(config, state, &models)?;
    let candidate = &config.search.standby_checkpoint;
    let is_first = models[0].1.card().fingerprint == live.card().fingerprint;
    let checkpoint = if is_first { &config.model.checkpoint } else { candidate };
    let fits = |towers: &&Arc<dyn Encoders>| towers.card().fingerprint == to.model_fingerprint;
    let known = models.iter().map(|(_, towers)| towers).find(fits).cloned();
    let encoders = match (known, &state.standby) {
        (Some(towers), _) => towers,
        (None, Some(standby)) => setup::load_standby_model(config, standby)?,
        (None, None) => live,
    };
    to.ensure_compatible(&setup::configured_generation(config, &*encoders))?;
    run_self_test(&*encoders)?;
    Ok(checkpoint.clone())
}

/// `bsap rollback`.
pub async fn rollback(
    args: &RollbackArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, _) = setup::open_catalogue(&config).await?;
    let plan = RollbackPlan::load(&store).await?;
    if !args.yes && warn_of_missing_images(&plan, &store, args).await? && !confirm()? {
        say!("Nothing was changed.");
        return Ok(());
    }
    let by = setup::actor("bsap rollback");
    let state = plan.execute(&store, &by).await?;
    say!(
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
        say!("WARNING     whether images are lacking now is not known: {error}");
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
        say!(
            "WARNING     {summary}; have workers of {model} run? `bsap status` says what waits for them"
        );
    }
    Ok(lacks)
}

/// `bsap history`.
pub async fn history(args: &HistoryArgs, config: Config) -> CommandResult {
    let (store, _) = setup::open_catalogue(&config).await?;
    let changes = rollout::list_revisions(&store, args.limit as usize).await?;
    if args.json {
        for state in &changes {
            say!(
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
    table.set_header(["revision", "when", "who", "what", "then served"]);
    for state in &changes {
        table.add_row([
            state.revision.to_string(),
            state.created_at.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
            state.actor.clone(),
            describe_change(state),
            format!("{}: {}", state.configuration_name, describe_serving(&state.serving)),
        ]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    say!("{table}");
    Ok(())
}

fn describe_change(state: &CatalogueState) -> String {
    match &state.change {
        StateChange::Created => "the catalogue was made".into(),
        StateChange::PromptSets { keys, generation } => {
            let sets =
                state.prompt_sets_of_generation(generation.as_ref().unwrap_or(&state.live.id));
            let sets = sets.unwrap_or_default();
            let here = |key: &String| sets.iter().any(|set| set.key.as_str() == key);
            let what = if keys.iter().all(here) { "added" } else { "retired" };
            let for_generation =
                generation.as_ref().map_or(String::new(), |id| format!(" for generation {id}"));
            format!("prompt sets {what}{for_generation}: {}", keys.join(", "))
        }
        StateChange::Standby { generation } => match &state.standby {
            Some(_) => format!("generation {generation} is filled beside the live one"),
            None => format!("generation {generation} is no longer filled"),
        },
        StateChange::Candidate { name } => match &state.candidate {
            Some(candidate) => {
                format!("candidate {name}: {}", describe_serving(&candidate.serving))
            }
            None => format!("candidate {name} withdrawn"),
        },
        StateChange::Promoted {
            name,
            previous_revision: from,
            evaluation_fingerprint: evaluation,
        } => {
            let evaluation = evaluation.as_deref().unwrap_or("none");
            format!("{name} promoted in the place of revision {from}, evaluation {evaluation}")
        }
        StateChange::RolledBack { restored_revision: to } => {
            format!("rolled back to revision {to}")
        }
        StateChange::Calibrated { evaluation_fingerprint: evaluation } => {
            format!("thresholds calibrated, evaluation {evaluation}")
        }
    }
}

fn describe_serving(serving: &ServingConfig) -> String {
    format!(
        "{} at weight {}, λ {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.lambda,
        serving.prompt_set
    )
}

fn print_promotion(promotion: &PromotionCheck) {
    let candidate = &promotion.candidate;
    say!(
        "live        {}: {}",
        promotion.live_configuration_name,
        describe_serving(&promotion.live)
    );
    say!("candidate   {}: {}", candidate.name, describe_serving(&candidate.serving));
    let (from, to) = (&promotion.live_generation, &promotion.candidate_generation);
    if let Some(gap) = &promotion.coverage_gap {
        say!(
            "generation  {} ({}, dimension {}) in the place of {} ({}, dimension {})",
            to.id,
            to.model_name,
            to.dimension,
            from.id,
            from.model_name,
            from.dimension
        );
        say!(
            "coverage    {} of {} live images; {} on their way",
            gap.live.saturating_sub(gap.missing + gap.outdated),
            gap.live,
            gap.too_recent
        );
    }
    let only =
        candidate.traffic_filter.as_ref().map_or(String::new(), |only| format!(" of {only}"));
    say!("traffic     share {}{only}, shadow {}", candidate.traffic_share, candidate.shadow_share);
    say!("since       {}", candidate.since.format("%Y-%m-%d %H:%M:%S UTC"));
    say!("evaluation  {}", candidate.evaluation_fingerprint.as_deref().unwrap_or("none"));
    for warning in &promotion.warnings {
        say!("WARNING     {warning}");
    }
    for problem in &promotion.blockers {
        say!("PROBLEM     {problem}");
    }
}

fn print_readiness(readiness: &ReplicaReadiness) {
    say!(
        "readers     {} query workers have it in memory, {} do not yet",
        readiness.ready.len(),
        readiness.not_ready.len()
    );
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not yet");
        say!("            {} on {}: {problem}", report.id, report.host);
    }
    print_stale_workers(readiness);
}

fn print_stale_workers(readiness: &ReplicaReadiness) {
    for report in &readiness.unresponsive {
        let at = report.reported_at.format("%Y-%m-%d %H:%M:%S UTC");
        say!("            {} on {} was last heard at {at}; not waited for", report.id, report.host);
    }
}

fn print_serving_workers(readiness: &ReplicaReadiness) {
    say!("{} query workers serve it.", readiness.ready.len());
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not heard of it yet");
        say!("WARNING: {} on {} does not yet: {problem}", report.id, report.host);
    }
}

/// Asks on the terminal; refused where there is none.
fn confirm() -> Result<bool, CommandError> {
    if !std::io::stdin().is_terminal() {
        return Err(CommandError::usage("there is no terminal to ask on; give --yes"));
    }
    let mut out = std::io::stdout();
    write!(out, "Make it live? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
