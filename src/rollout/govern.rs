//! Promotion: every change of what is served is deliberate and recorded.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::candidate::{newest, reindex_of};
use crate::backfill::{Gap, ReindexError};
use crate::balance::normalise::Normaliser;
use crate::catalogue::{
    Candidate, CatalogueState, Change, Generation, Readers, Report, Serving, StateStore,
};
use crate::store::Store;
use crate::table::Stored;
use crate::telemetry::event;

/// How often a promotion looks whether the query workers are ready.
const LOOK_EVERY: Duration = Duration::from_millis(200);

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
    /// The generation that is served now.
    pub from: Generation,
    /// The generation that the candidate reads.
    pub to: Generation,
    /// How that generation covers the live images; none where it is the live one.
    pub gap: Option<Gap>,
    /// What forbids it, each with what to do.
    pub problems: Vec<String>,
    /// What should give pause.
    pub warnings: Vec<String>,
}

/// How a promotion is examined.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    /// How long after a change workers may still write rows without it.
    pub settle: Duration,
    /// How long after the live generation took something in another may still lack it.
    pub grace: Duration,
    /// Live images that another generation may lack.
    pub allow_missing: u64,
    /// Where files are sorted.
    pub folder: &'a Path,
}

/// Looks at the candidate: coverage of the live images and of its statistics, scale, age, evaluation.
pub async fn examine(
    catalogue: &Store,
    rules: &Rules<'_>,
    now: DateTime<Utc>,
) -> Result<Promotion, ReindexError> {
    let state = newest(&StateStore::new(catalogue), catalogue).await?;
    let none =
        || ReindexError::Refused("there is no candidate; `bsap candidate set` names one".into());
    let candidate = state.candidate.clone().ok_or_else(none)?;
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    let Some(to) = state.generation(&candidate.generation).cloned() else {
        return Err(ReindexError::Refused(format!(
            "the candidate reads generation {}, which is neither the live one nor beside it; set the candidate again",
            candidate.generation
        )));
    };
    let gap = if to.id == state.live.id {
        None
    } else {
        let before = now - TimeDelta::from_std(rules.grace).unwrap_or(TimeDelta::MAX);
        Some(Gap::of(catalogue, &state.live, &to, rules.folder, before).await?)
    };
    if let Some(gap) = &gap {
        let told = gap.told(&to.id);
        // What it alone has would be found, deleted or not.
        let differs = gap.lacking() + gap.alone;
        if differs > rules.allow_missing {
            problems.push(format!(
                "{told}; are workers of {} running? `bsap reindex model` asks for what is missing, `bsap dead-letters` and `bsap status` say what failed or waits",
                to.model_name
            ));
        } else if differs > 0 {
            warnings.push(told);
        }
        if gap.on_their_way > 0 {
            warnings.push(format!(
                "{} images of the last {} s are still on their way to generation {}",
                gap.on_their_way,
                rules.grace.as_secs(),
                to.id
            ));
        }
    }
    let settle = rules.settle;
    let key = &candidate.serving.prompt_set;
    let sets = state.sets_of(&to.id).unwrap_or_default();
    let reindex = reindex_of(&state, &to.id);
    match sets.iter().find(|set| set.key == *key) {
        None => problems.push(format!("the prompt set {key} is not stored; {reindex} adds it")),
        Some(set) => {
            let coverage = Stored::open(catalogue, &to).await?.pending(key).await?.1;
            if !coverage.complete() {
                problems.push(format!(
                    "{} of {} rows have the statistics of {key}; run {reindex}",
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
        from: state.live,
        to,
        gap,
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
/// changed since. Where it reads the generation beside the live one, the two change places;
/// `checkpoint` is that of the model that was live till now.
pub async fn promote(
    catalogue: &Store,
    revision: u64,
    checkpoint: &str,
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
            if candidate.generation != state.live.id {
                let beside = state.beside.as_ref().map(|beside| &beside.generation.id);
                if beside != Some(&candidate.generation) || !state.swap_generations(checkpoint) {
                    return Err(ReindexError::Refused(format!(
                        "generation {} is no longer filled; set the candidate again",
                        candidate.generation
                    )));
                }
            }
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
        generation = state.live.id,
        by,
        "the candidate is live"
    );
    Ok(state)
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
