//! Candidate, promotion, roll back: every change of what is served is deliberate and recorded.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::ReindexError;
use crate::normalise::{Normaliser, Scale};
use crate::store::Store;
use crate::table::{
    Candidate, CatalogueState, Change, Readers, Report, Serving, StateStore, Stored,
};
use crate::telemetry::event;

/// How often a promotion looks whether the query workers are ready.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What a candidate is to be; what is left out is as it is served.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Name, for people and for requests.
    pub name: String,
    /// Key, name or name@version of a stored prompt set.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// Share of the queries that it answers.
    pub share: f32,
    /// Share of the queries that it answers in the shadow.
    pub shadow: f32,
    /// Fingerprint of the evaluation that speaks for it.
    pub evaluation: Option<String>,
}

/// Sets the candidate, in the place of an earlier one. Its scale constants are taken from the live
/// images and frozen.
pub async fn set_candidate(
    catalogue: &Store,
    wanted: &Wanted,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let refused = |why: String| ReindexError::Refused(why);
    let states = StateStore::new(catalogue);
    let newest = newest(&states, catalogue).await?;
    if ["", "live", "candidate", "raw"].contains(&wanted.name.as_str())
        || wanted.name == newest.name
    {
        return Err(refused(format!(
            "the name {:?} is taken; give the candidate one of its own",
            wanted.name
        )));
    }
    let set = match &wanted.prompt_set {
        None => newest.serving.prompt_set.clone(),
        Some(name) => newest
            .prompt_set(name)
            .map(|set| set.key.clone())
            .ok_or_else(|| {
                let known: Vec<&str> = newest.prompt_sets.iter().map(|s| s.key.as_str()).collect();
                refused(format!(
                    "--prompt-set: {name:?} is not stored; stored are {}; `bsap reindex statistics` adds one",
                    known.join(", ")
                ))
            })?,
    };
    let normaliser = wanted.normaliser.unwrap_or(newest.serving.normaliser);
    let scale = match normaliser {
        Normaliser::Zscore | Normaliser::Range => {
            let survey = Stored::open(catalogue, &newest.live).await?.survey(&set).await?;
            if survey.live == 0 || survey.statistics.len() < survey.live {
                return Err(refused(format!(
                    "{} of {} live images have the statistics of {set}; run `bsap reindex statistics` first, so that the scale is taken from all of them",
                    survey.statistics.len(),
                    survey.live
                )));
            }
            Scale::of(normaliser, survey.statistics.into_iter())
        }
        Normaliser::Raw | Normaliser::Softmax | Normaliser::Nnn => Scale::default(),
    };
    let serving = Serving {
        prompt_set: set,
        normaliser,
        weight: wanted.weight.unwrap_or(newest.serving.weight),
        lambda: wanted.lambda.unwrap_or(newest.serving.lambda),
        scale: Some(scale),
        calibration: None,
    };
    let state = states
        .change(by, |mut state| {
            if !state.prompt_sets.iter().any(|set| set.key == serving.prompt_set) {
                return Err(refused(format!("{} was retired meanwhile", serving.prompt_set)));
            }
            state.candidate = Some(Candidate {
                name: wanted.name.clone(),
                generation: state.live.id.clone(),
                serving: serving.clone(),
                share: wanted.share,
                shadow: wanted.shadow,
                only: None,
                since: Utc::now(),
                evaluation: wanted.evaluation.clone(),
            });
            state.change = Change::Candidate { name: wanted.name.clone() };
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::CANDIDATE,
        change = "set",
        name = wanted.name,
        revision = state.revision,
        by,
        "a candidate was set"
    );
    Ok(state)
}

/// Withdraws the candidate.
pub async fn withdraw_candidate(
    catalogue: &Store,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let mut name = String::new();
    if let Some(candidate) = newest(&states, catalogue).await?.candidate {
        name = candidate.name;
    }
    let state = states
        .change(by, |mut state| {
            let Some(candidate) = state.candidate.take() else {
                return Err(ReindexError::Refused("there is no candidate".into()));
            };
            state.change = Change::Candidate { name: candidate.name };
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::CANDIDATE,
        change = "withdrawn",
        name,
        revision = state.revision,
        by,
        "the candidate was withdrawn"
    );
    Ok(state)
}

/// What stands against promoting the candidate, and what will change.
#[derive(Debug, Clone, Serialize)]
pub struct Promotion {
    /// The revision that was looked at.
    pub revision: u64,
    /// The candidate.
    pub candidate: Candidate,
    /// What is served now.
    pub live: Serving,
    /// Name of that configuration.
    pub live_name: String,
    /// What forbids it, each with what to do.
    pub problems: Vec<String>,
    /// What should give pause.
    pub warnings: Vec<String>,
}

/// Looks at the candidate: coverage of its statistics, scale, age, evaluation.
pub async fn examine(
    catalogue: &Store,
    settle: Duration,
    now: DateTime<Utc>,
) -> Result<Promotion, ReindexError> {
    let state = newest(&StateStore::new(catalogue), catalogue).await?;
    let none =
        || ReindexError::Refused("there is no candidate; `bsap candidate set` names one".into());
    let candidate = state.candidate.clone().ok_or_else(none)?;
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    if candidate.generation != state.live.id {
        problems.push(format!(
            "the candidate reads generation {}, {} is live",
            candidate.generation, state.live.id
        ));
    }
    let key = &candidate.serving.prompt_set;
    match state.prompt_sets.iter().find(|set| set.key == *key) {
        None => problems.push(format!("the prompt set {key} is not stored")),
        Some(set) => {
            let coverage = Stored::open(catalogue, &state.live).await?.pending(key).await?.1;
            if !coverage.complete() {
                problems.push(format!(
                    "{} of {} rows have the statistics of {key}; run `bsap reindex statistics`",
                    coverage.covered, coverage.rows
                ));
            }
            if now - set.since < TimeDelta::from_std(settle).unwrap_or(TimeDelta::MAX) {
                problems.push(format!(
                    "{key} is known since {} only, workers may still write rows without it; try again in {} s",
                    set.since.format("%H:%M:%S UTC"),
                    settle.as_secs() + 1
                ));
            }
        }
    }
    let scaled = matches!(candidate.serving.normaliser, Normaliser::Zscore | Normaliser::Range);
    if scaled && candidate.serving.scale.is_none() {
        problems.push("its scale constants are not frozen; set the candidate again".into());
    }
    if candidate.evaluation.is_none() {
        warnings.push(
            "no evaluation speaks for it; measure it on your own data (`bsap evaluate`) and name the report with --evaluation".into(),
        );
    }
    if candidate.share == 0.0 && candidate.shadow == 0.0 {
        warnings.push("it has answered no share of the queries yet, not even in the shadow".into());
    }
    Ok(Promotion {
        revision: state.revision,
        candidate,
        live: state.serving,
        live_name: state.name,
        problems,
        warnings,
    })
}

/// How far the query workers are.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Standing {
    /// Query workers that serve the revision.
    pub ready: Vec<Report>,
    /// Those that do not yet.
    pub waiting: Vec<Report>,
    /// Those that were not heard for too long, and are not waited for.
    pub stale: Vec<Report>,
}

/// Waits until every query worker that is there has taken up `revision`, at most `limit`.
pub async fn wait_for_readers(
    catalogue: &Store,
    revision: u64,
    limit: Duration,
    token: &CancellationToken,
) -> Result<Standing, ReindexError> {
    let readers = Readers::new(catalogue);
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let now = Utc::now();
        let mut standing = Standing::default();
        for report in readers.all(now).await? {
            if report.is_stale(now) {
                standing.stale.push(report);
            } else if report.has(revision) {
                standing.ready.push(report);
            } else {
                standing.waiting.push(report);
            }
        }
        let over = tokio::time::Instant::now() >= deadline || token.is_cancelled();
        if standing.waiting.is_empty() || over {
            return Ok(standing);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = token.cancelled() => {}
        }
    }
}

/// Makes the candidate of revision `revision` live, in one write; refused where the state has
/// changed since.
pub async fn promote(
    catalogue: &Store,
    revision: u64,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let state = StateStore::new(catalogue)
        .change(by, |mut state| {
            if state.revision != revision {
                return Err(ReindexError::Refused(format!(
                    "the state has changed meanwhile: revision {} by {}; look again",
                    state.revision, state.by
                )));
            }
            let Some(candidate) = state.candidate.take() else {
                return Err(ReindexError::Refused("there is no candidate".into()));
            };
            state.change = Change::Promoted {
                name: candidate.name.clone(),
                from: revision,
                evaluation: candidate.evaluation,
            };
            state.serving = candidate.serving;
            state.name = candidate.name;
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::PROMOTE,
        name = state.name,
        from = revision,
        revision = state.revision,
        by,
        "the candidate is live"
    );
    Ok(state)
}

/// Makes live what was live before the last promotion, at once. A candidate is withdrawn. Rolling
/// back again goes further back.
pub async fn roll_back(catalogue: &Store, by: &str) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let newest = newest(&states, catalogue).await?;
    let before = before(&states, &newest).await?;
    let to = before.revision;
    let state = states
        .change(by, |mut state| {
            if state.revision != newest.revision {
                return Err(ReindexError::Refused(format!(
                    "the state has changed meanwhile: revision {} by {}; look again",
                    state.revision, state.by
                )));
            }
            // A set that was retired since comes back: what rows lack of it is computed by the query
            // workers until it is backfilled.
            let key = &before.serving.prompt_set;
            if !state.prompt_sets.iter().any(|set| set.key == *key) {
                let found = before.prompt_sets.iter().find(|set| set.key == *key).cloned();
                let mut set = found.ok_or_else(|| {
                    ReindexError::Refused(format!("revision {to} does not have its own set {key}"))
                })?;
                set.since = Utc::now();
                state.prompt_sets.push(set);
            }
            state.serving = before.serving.clone();
            state.name.clone_from(&before.name);
            state.candidate = None;
            state.change = Change::RolledBack { to };
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::ROLLBACK,
        to,
        name = state.name,
        revision = state.revision,
        by,
        "rolled back"
    );
    Ok(state)
}

/// The revision that was served before what is served at `state`.
async fn before(
    states: &StateStore,
    state: &CatalogueState,
) -> Result<CatalogueState, ReindexError> {
    let nothing = || {
        ReindexError::Refused("nothing was promoted yet: there is nothing to go back to".to_owned())
    };
    let missing = |revision: u64| {
        ReindexError::Refused(format!("revision {revision} of the state is not there any more"))
    };
    let mut revision = state.revision;
    loop {
        let looked = states.at(revision).await?.ok_or_else(|| missing(revision))?;
        match looked.change {
            Change::Promoted { from, .. } => {
                if looked.live.id != state.live.id {
                    return Err(ReindexError::Refused(format!(
                        "revision {from} served generation {}, {} is live",
                        looked.live.id, state.live.id
                    )));
                }
                return states.at(from).await?.ok_or_else(|| missing(from));
            }
            // What was live then was live before: go on from there.
            Change::RolledBack { to } => revision = to,
            _ => revision = revision.checked_sub(1).filter(|r| *r > 0).ok_or_else(nothing)?,
        }
    }
}

/// The newest revisions, the newest first, at most `limit`.
pub async fn history(catalogue: &Store, limit: usize) -> Result<Vec<CatalogueState>, ReindexError> {
    let states = StateStore::new(catalogue);
    let newest = newest(&states, catalogue).await?;
    let mut found = Vec::new();
    for revision in (1..=newest.revision).rev().take(limit) {
        found.extend(states.at(revision).await?);
    }
    Ok(found)
}

async fn newest(states: &StateStore, catalogue: &Store) -> Result<CatalogueState, ReindexError> {
    let missing = || crate::table::TableError::Missing { place: catalogue.url().to_string() };
    Ok(states.newest().await?.ok_or_else(missing)?)
}
