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
use super::{Done, Failure, parts};
use crate::backfill::ReindexError;
use crate::catalogue::{CatalogueState, Change, Generation, Serving};
use crate::clip::{Towers, self_test};
use crate::config::Config;
use crate::reconcile::temporary_folder;
use crate::rollout::{self, Promotion, Rules, Standing, Wanted, WayBack};
use crate::store::Store;

/// How long after the live generation took an image in another one may still lack it.
const GRACE: Duration = Duration::from_secs(60);

/// `bsap candidate`.
pub async fn candidate(args: &CandidateArgs, config: Config) -> Done {
    match &args.action {
        CandidateAction::Set(args) => set(args, config).await,
        CandidateAction::Show { json } => show(*json, config).await,
        CandidateAction::Withdraw => {
            let (store, _) = parts::catalogue(&config).await?;
            let by = parts::actor("bsap candidate withdraw");
            let state = rollout::withdraw_candidate(&store, &by).await?;
            say!("The candidate is withdrawn (revision {} of the state).", state.revision);
            Ok(())
        }
    }
}

async fn set(args: &CandidateSetArgs, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let wanted = Wanted {
        name: args.name.clone(),
        beside: args.beside,
        prompt_set: args.prompt_set.clone(),
        normaliser: args.normaliser,
        weight: args.weight,
        lambda: args.lambda,
        share: args.share,
        shadow: args.shadow,
        only: args.only.clone(),
        evaluation: args.evaluation.clone(),
    };
    let by = parts::actor("bsap candidate set");
    let state = rollout::set_candidate(&store, &wanted, &by).await?;
    say!("{} is the candidate (revision {} of the state).", args.name, state.revision);
    tell(&examined(&store, &config, 0, None).await?);
    Ok(())
}

async fn show(as_json: bool, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let promotion = examined(&store, &config, 0, None).await?;
    let none = Duration::ZERO;
    let (revision, token) = (promotion.revision, CancellationToken::new());
    let standing = rollout::wait_for_readers(&store, revision, none, &token).await?;
    if as_json {
        say!("{}", json!({"promotion": promotion, "query_workers": standing}));
        return Ok(());
    }
    tell(&promotion);
    tell_readers(&standing);
    Ok(())
}

async fn examined(
    store: &Store,
    config: &Config,
    allow_missing: u64,
    folder: Option<&Path>,
) -> Result<Promotion, ReindexError> {
    let temporary = temporary_folder();
    let rules = Rules {
        settle: parts::settle(config),
        grace: GRACE,
        allow_missing,
        folder: folder.unwrap_or(&temporary),
    };
    rollout::examine(store, &rules, Utc::now()).await
}

/// `bsap promote`.
pub async fn promote(args: &PromoteArgs, config: Config, token: CancellationToken) -> Done {
    let (store, state) = parts::catalogue(&config).await?;
    let folder = args.temp.as_deref();
    let promotion = examined(&store, &config, args.allow_missing, folder).await?;
    tell(&promotion);
    let live = tested(&config, &state, &promotion.to)?;
    say!("model       {} passes its self-test", promotion.to.model_name);
    if let Some(problem) = promotion.problems.first() {
        let more = promotion.problems.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" (and {more} more, above)") };
        return Err(anyhow::anyhow!("the candidate cannot be promoted: {problem}{more}").into());
    }
    let limit = Duration::from_secs(args.timeout);
    let patience = if args.dry_run { Duration::ZERO } else { limit };
    let standing = rollout::wait_for_readers(&store, promotion.revision, patience, &token).await?;
    tell_readers(&standing);
    if args.dry_run {
        say!("Nothing was changed.");
        return Ok(());
    }
    if !standing.waiting.is_empty() {
        return Err(anyhow::anyhow!(
            "{} query workers do not have the candidate in memory after {} s; nothing was changed",
            standing.waiting.len(),
            args.timeout
        )
        .into());
    }
    if !args.yes && !agreed()? {
        say!("Nothing was changed.");
        return Ok(());
    }
    let by = parts::actor("bsap promote");
    let state = rollout::promote(&store, promotion.revision, &live, &by).await?;
    say!("{} is live (revision {} of the state, by {by}).", state.name, state.revision);
    let standing = rollout::wait_for_readers(&store, state.revision, limit, &token).await?;
    tell_served(&standing);
    Ok(())
}

/// Makes sure that the model of the candidate's generation `to` is there, is the one that filled it,
/// and works. Gives the checkpoint of the live one.
fn tested(config: &Config, state: &CatalogueState, to: &Generation) -> anyhow::Result<String> {
    let models = parts::models(config)?;
    let live = parts::live_model(config, state, &models)?;
    let candidate = &config.search.candidate_checkpoint;
    let is_first = models[0].1.card().fingerprint == live.card().fingerprint;
    let checkpoint = if is_first { &config.model.checkpoint } else { candidate };
    let fits = |towers: &&Arc<dyn Towers>| towers.card().fingerprint == to.model_fingerprint;
    let known = models.iter().map(|(_, towers)| towers).find(fits).cloned();
    let towers = match (known, &state.beside) {
        (Some(towers), _) => towers,
        (None, Some(beside)) => parts::beside_model(config, beside)?,
        (None, None) => live,
    };
    to.expect(&parts::generation(config, &*towers))?;
    self_test(&*towers)?;
    Ok(checkpoint.clone())
}

/// `bsap rollback`.
pub async fn rollback(args: &RollbackArgs, config: Config, token: CancellationToken) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let way = WayBack::of(&store).await?;
    if !args.yes && loses(&way, &store, args).await? && !agreed()? {
        say!("Nothing was changed.");
        return Ok(());
    }
    let by = parts::actor("bsap rollback");
    let state = way.go(&store, &by).await?;
    say!(
        "{} is live again (revision {} of the state, by {by}): {}",
        state.name,
        state.revision,
        configuration(&state.serving)
    );
    let limit = Duration::from_secs(60);
    let standing = rollout::wait_for_readers(&store, state.revision, limit, &token).await?;
    tell_served(&standing);
    // In an emergency it is done first; what it costs is said all the same.
    if args.yes
        && let Err(error) = loses(&way, &store, args).await
    {
        say!("WARNING     whether images are lacking now is not known: {error}");
    }
    Ok(())
}

/// Says what the generation that a roll back leads to lacks; whether it lacks anything.
async fn loses(way: &WayBack, store: &Store, args: &RollbackArgs) -> Result<bool, ReindexError> {
    let folder = args.temp.clone().unwrap_or_else(temporary_folder);
    let Some(gap) = way.gap(store, &folder, GRACE, Utc::now()).await? else { return Ok(false) };
    let lacks = gap.lacking() > 0;
    if lacks {
        let (told, model) = (gap.told(&way.to().id), &way.to().model_name);
        say!(
            "WARNING     {told}; have workers of {model} run? `bsap status` says what waits for them"
        );
    }
    Ok(lacks)
}

/// `bsap history`.
pub async fn history(args: &HistoryArgs, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let changes = rollout::history(&store, args.limit as usize).await?;
    if args.json {
        for state in &changes {
            say!(
                "{}",
                json!({
                    "revision": state.revision, "at": state.at, "by": state.by,
                    "change": state.change, "name": state.name, "serving": state.serving,
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
            state.at.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
            state.by.clone(),
            what(state),
            format!("{}: {}", state.name, configuration(&state.serving)),
        ]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    say!("{table}");
    Ok(())
}

fn what(state: &CatalogueState) -> String {
    match &state.change {
        Change::Created => "the catalogue was made".into(),
        Change::PromptSets { keys, generation } => {
            let sets = state.sets_of(generation.as_ref().unwrap_or(&state.live.id));
            let sets = sets.unwrap_or_default();
            let here = |key: &String| sets.iter().any(|set| set.key.as_str() == key);
            let what = if keys.iter().all(here) { "added" } else { "retired" };
            let of =
                generation.as_ref().map_or(String::new(), |id| format!(" for generation {id}"));
            format!("prompt sets {what}{of}: {}", keys.join(", "))
        }
        Change::Beside { generation } => match &state.beside {
            Some(_) => format!("generation {generation} is filled beside the live one"),
            None => format!("generation {generation} is no longer filled"),
        },
        Change::Candidate { name } => match &state.candidate {
            Some(candidate) => format!("candidate {name}: {}", configuration(&candidate.serving)),
            None => format!("candidate {name} withdrawn"),
        },
        Change::Promoted { name, from, evaluation } => {
            let evaluation = evaluation.as_deref().unwrap_or("none");
            format!("{name} promoted in the place of revision {from}, evaluation {evaluation}")
        }
        Change::RolledBack { to } => format!("rolled back to revision {to}"),
        Change::Calibrated { evaluation } => {
            format!("thresholds calibrated, evaluation {evaluation}")
        }
    }
}

fn configuration(serving: &Serving) -> String {
    format!(
        "{} at weight {}, λ {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.lambda,
        serving.prompt_set
    )
}

fn tell(promotion: &Promotion) {
    let candidate = &promotion.candidate;
    say!("live        {}: {}", promotion.live_name, configuration(&promotion.live));
    say!("candidate   {}: {}", candidate.name, configuration(&candidate.serving));
    let (from, to) = (&promotion.from, &promotion.to);
    if let Some(gap) = &promotion.gap {
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
            gap.live.saturating_sub(gap.missing + gap.behind),
            gap.live,
            gap.on_their_way
        );
    }
    let only = candidate.only.as_ref().map_or(String::new(), |only| format!(" of {only}"));
    say!("traffic     share {}{only}, shadow {}", candidate.share, candidate.shadow);
    say!("since       {}", candidate.since.format("%Y-%m-%d %H:%M:%S UTC"));
    say!("evaluation  {}", candidate.evaluation.as_deref().unwrap_or("none"));
    for warning in &promotion.warnings {
        say!("WARNING     {warning}");
    }
    for problem in &promotion.problems {
        say!("PROBLEM     {problem}");
    }
}

fn tell_readers(standing: &Standing) {
    say!(
        "readers     {} query workers have it in memory, {} do not yet",
        standing.ready.len(),
        standing.waiting.len()
    );
    for report in &standing.waiting {
        let problem = report.problem.as_deref().unwrap_or("not yet");
        say!("            {} on {}: {problem}", report.id, report.host);
    }
    tell_stale(standing);
}

fn tell_stale(standing: &Standing) {
    for report in &standing.stale {
        let at = report.at.format("%Y-%m-%d %H:%M:%S UTC");
        say!("            {} on {} was last heard at {at}; not waited for", report.id, report.host);
    }
}

fn tell_served(standing: &Standing) {
    say!("{} query workers serve it.", standing.ready.len());
    for report in &standing.waiting {
        let problem = report.problem.as_deref().unwrap_or("not heard of it yet");
        say!("WARNING: {} on {} does not yet: {problem}", report.id, report.host);
    }
}

/// Asks on the terminal; refused where there is none.
fn agreed() -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage("there is no terminal to ask on; give --yes"));
    }
    let mut out = std::io::stdout();
    write!(out, "Make it live? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
