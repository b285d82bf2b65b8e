//! `bsap candidate`, `bsap promote`, `bsap rollback`, `bsap history`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use chrono::Utc;
use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Done, Failure, parts};
use crate::cli::{CandidateAction, CandidateArgs, CandidateSetArgs, HistoryArgs, PromoteArgs};
use crate::clip::self_test;
use crate::config::Config;
use crate::reindex::{self, Promotion, ReindexError, Standing, Wanted};
use crate::table::{CatalogueState, Change, Serving};

/// `bsap candidate`.
pub async fn candidate(args: &CandidateArgs, config: Config) -> Done {
    match &args.action {
        CandidateAction::Set(args) => set(args, config).await,
        CandidateAction::Show { json } => show(*json, config).await,
        CandidateAction::Withdraw => {
            let (store, _) = parts::catalogue(&config).await?;
            let by = parts::actor("bsap candidate withdraw");
            let state = reindex::withdraw_candidate(&store, &by).await?;
            say!("The candidate is withdrawn (revision {} of the state).", state.revision);
            Ok(())
        }
    }
}

async fn set(args: &CandidateSetArgs, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let wanted = Wanted {
        name: args.name.clone(),
        prompt_set: args.prompt_set.clone(),
        normaliser: args.normaliser,
        weight: args.weight,
        lambda: args.lambda,
        share: args.share,
        shadow: args.shadow,
        evaluation: args.evaluation.clone(),
    };
    let by = parts::actor("bsap candidate set");
    let state = reindex::set_candidate(&store, &wanted, &by).await?;
    say!("{} is the candidate (revision {} of the state).", args.name, state.revision);
    tell(&examined(&store, &config).await?);
    Ok(())
}

async fn show(as_json: bool, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let promotion = examined(&store, &config).await?;
    let none = Duration::ZERO;
    let (revision, token) = (promotion.revision, CancellationToken::new());
    let standing = reindex::wait_for_readers(&store, revision, none, &token).await?;
    if as_json {
        say!("{}", json!({"promotion": promotion, "query_workers": standing}));
        return Ok(());
    }
    tell(&promotion);
    tell_readers(&standing);
    Ok(())
}

async fn examined(store: &crate::store::Store, config: &Config) -> Result<Promotion, ReindexError> {
    reindex::examine(store, parts::settle(config), Utc::now()).await
}

/// `bsap promote`.
pub async fn promote(args: &PromoteArgs, config: Config, token: CancellationToken) -> Done {
    let (store, state) = parts::catalogue(&config).await?;
    let promotion = examined(&store, &config).await?;
    tell(&promotion);
    // The model that the catalogue's query workers use works, and is the one that filled it.
    let towers = parts::towers(&config)?;
    state.live.expect(&parts::generation(&config, &*towers))?;
    self_test(&*towers)?;
    say!("model       {} passes its self-test", state.live.model_name);
    if let Some(problem) = promotion.problems.first() {
        let more = promotion.problems.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" (and {more} more, above)") };
        return Err(anyhow::anyhow!("the candidate cannot be promoted: {problem}{more}").into());
    }
    let limit = Duration::from_secs(args.timeout);
    let patience = if args.dry_run { Duration::ZERO } else { limit };
    let standing = reindex::wait_for_readers(&store, promotion.revision, patience, &token).await?;
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
    let state = reindex::promote(&store, promotion.revision, &by).await?;
    say!("{} is live (revision {} of the state, by {by}).", state.name, state.revision);
    let standing = reindex::wait_for_readers(&store, state.revision, limit, &token).await?;
    tell_served(&standing);
    Ok(())
}

/// `bsap rollback`.
pub async fn rollback(config: Config, token: CancellationToken) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let by = parts::actor("bsap rollback");
    let state = reindex::roll_back(&store, &by).await?;
    say!(
        "{} is live again (revision {} of the state, by {by}): {}",
        state.name,
        state.revision,
        configuration(&state.serving)
    );
    let limit = Duration::from_secs(60);
    let standing = reindex::wait_for_readers(&store, state.revision, limit, &token).await?;
    tell_served(&standing);
    Ok(())
}

/// `bsap history`.
pub async fn history(args: &HistoryArgs, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let changes = reindex::history(&store, args.limit as usize).await?;
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
        Change::PromptSets { keys } => {
            let here = |key: &String| state.prompt_sets.iter().any(|set| set.key.as_str() == key);
            let what = if keys.iter().all(here) { "added" } else { "retired" };
            format!("prompt sets {what}: {}", keys.join(", "))
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
    say!("traffic     share {}, shadow {}", candidate.share, candidate.shadow);
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
