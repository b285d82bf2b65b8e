//! Promotion: every change of what is served is deliberate and recorded.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::candidate::{load_newest_state, reindex_command};
use crate::backfill::{GenerationGap, ReindexError};
use crate::balance::normalise::Normaliser;
use crate::catalogue::{
    CatalogueState, ReplicaReport, ReplicaReports, RolloutCandidate, ServingConfig, StateChange,
    StateStore,
};
use crate::store::Store;
use crate::table::{BackfillSource, Generation};
use crate::telemetry::event;

/// How often a promotion looks whether the query workers are ready.
const READINESS_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// What stands against promoting the candidate, and what will change.
#[derive(Debug, Clone, Serialize)]
pub struct PromotionCheck {
    /// The revision that was looked at.
    pub revision: u64,
    /// The candidate.
    pub candidate: RolloutCandidate,
    /// What is served now.
    pub live: ServingConfig,
    /// Name of that configuration.
    pub live_configuration_name: String,
    /// The generation that is served now.
    pub live_generation: Generation,
    /// The generation that the candidate reads.
    pub candidate_generation: Generation,
    /// How that generation covers the live images; none where it is the live one.
    pub coverage_gap: Option<GenerationGap>,
    /// What forbids it, each with what to do.
    pub blockers: Vec<String>,
    /// What should give pause.
    pub warnings: Vec<String>,
}

/// How a promotion is examined.
#[derive(Debug, Clone)]
pub struct PromotionRules<'a> {
    /// How long after a change workers may still write rows without it.
    pub propagation_delay: Duration,
    /// How long after the live generation took something in another may still lack it.
    pub grace_period: Duration,
    /// Live images that another generation may lack.
    pub max_missing: u64,
    /// Where files are sorted.
    pub temp_folder: &'a Path,
}

/// Looks at the candidate: coverage of the live images and of its statistics, scale, age, evaluation.
pub async fn check_promotion(
    catalogue: &Store,
    rules: &PromotionRules<'_>,
    now: DateTime<Utc>,
) -> Result<PromotionCheck, ReindexError> {
    let state = load_newest_state(&StateStore::new(catalogue), catalogue).await?;
    let none =
        || ReindexError::Refused("there is no candidate; `bsap candidate set` names one".into());
    let candidate = state.candidate.clone().ok_or_else(none)?;
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    let Some(to) = state.find_generation(&candidate.generation).cloned() else {
        return Err(ReindexError::Refused(format!(
            "the candidate reads generation {}, which is neither the live one nor beside it; set the candidate again",
            candidate.generation
        )));
    };
    let gap = if to.id == state.live.id {
        None
    } else {
        let cutoff = now - TimeDelta::from_std(rules.grace_period).unwrap_or(TimeDelta::MAX);
        Some(GenerationGap::compare(catalogue, &state.live, &to, rules.temp_folder, cutoff).await?)
    };
    if let Some(gap) = &gap {
        let summary = gap.summary(&to.id);
        // What it alone has would be found, deleted or not.
        let differs = gap.out_of_date_count() + gap.extra;
        if differs > rules.max_missing {
            problems.push(format!(
                "{summary}; are workers of {} running? `bsap reindex model` asks for what is missing, `bsap dead-letters` and `bsap status` say what failed or waits",
                to.model_name
            ));
        } else if differs > 0 {
            warnings.push(summary);
        }
        if gap.too_recent > 0 {
            warnings.push(format!(
                "{} images of the last {} s are still on their way to generation {}",
                gap.too_recent,
                rules.grace_period.as_secs(),
                to.id
            ));
        }
    }
    let propagation_delay = rules.propagation_delay;
    let key = &candidate.serving.prompt_set;
    let sets = state.prompt_sets_of_generation(&to.id).unwrap_or_default();
    let reindex = reindex_command(&state, &to.id);
    match sets.iter().find(|set| set.key == *key) {
        None => problems.push(format!("the prompt set {key} is not stored; {reindex} adds it")),
        Some(set) => {
            let coverage =
                BackfillSource::open(catalogue, &to).await?.list_pending_files(key).await?.1;
            if !coverage.is_complete() {
                problems.push(format!(
                    "{} of {} rows have the statistics of {key}; run {reindex}",
                    coverage.covered, coverage.rows
                ));
            }
            if now - set.since < TimeDelta::from_std(propagation_delay).unwrap_or(TimeDelta::MAX) {
                problems.push(format!(
                    "{key} is known since {} only, workers may still write rows without it; try again in {} s",
                    set.since.format("%H:%M:%S UTC"),
                    propagation_delay.as_secs() + 1
                ));
            }
        }
    }
    let scaled = matches!(candidate.serving.normaliser, Normaliser::Zscore | Normaliser::Range);
    if scaled && candidate.serving.scale.is_none() {
        problems.push("its scale constants are not frozen; set the candidate again".into());
    }
    if candidate.evaluation_fingerprint.is_none() {
        warnings.push(
            "no evaluation speaks for it; measure it on your own data (`bsap evaluate`) and name the report with --evaluation".into(),
        );
    }
    if candidate.traffic_share == 0.0 && candidate.shadow_share == 0.0 {
        warnings.push("it has answered no share of the queries yet, not even in the shadow".into());
    }
    Ok(PromotionCheck {
        revision: state.revision,
        candidate,
        live: state.serving,
        live_configuration_name: state.configuration_name,
        live_generation: state.live,
        candidate_generation: to,
        coverage_gap: gap,
        blockers: problems,
        warnings,
    })
}

/// How far the query workers are.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ReplicaReadiness {
    /// Query workers that serve the revision.
    pub ready: Vec<ReplicaReport>,
    /// Those that do not yet.
    pub not_ready: Vec<ReplicaReport>,
    /// Those that were not heard for too long, and are not waited for.
    pub unresponsive: Vec<ReplicaReport>,
}

/// Waits until every query worker that is there has taken up `revision`, at most `limit`.
pub async fn wait_for_replicas(
    catalogue: &Store,
    revision: u64,
    limit: Duration,
    token: &CancellationToken,
) -> Result<ReplicaReadiness, ReindexError> {
    let readers = ReplicaReports::new(catalogue);
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let now = Utc::now();
        let mut readiness = ReplicaReadiness::default();
        for report in readers.list(now).await? {
            if report.is_stale(now) {
                readiness.unresponsive.push(report);
            } else if report.serves_revision(revision) {
                readiness.ready.push(report);
            } else {
                readiness.not_ready.push(report);
            }
        }
        let over = tokio::time::Instant::now() >= deadline || token.is_cancelled();
        if readiness.not_ready.is_empty() || over {
            return Ok(readiness);
        }
        tokio::select! {
            () = tokio::time::sleep(READINESS_POLL_INTERVAL) => {}
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
        .update(by, |mut state| {
            if state.revision != revision {
                return Err(ReindexError::Refused(format!(
                    "the state has changed meanwhile: revision {} by {}; look again",
                    state.revision, state.actor
                )));
            }
            let Some(candidate) = state.candidate.take() else {
                return Err(ReindexError::Refused("there is no candidate".into()));
            };
            if candidate.generation != state.live.id {
                let beside = state.standby.as_ref().map(|beside| &beside.generation.id);
                if beside != Some(&candidate.generation) || !state.swap_live_and_standby(checkpoint)
                {
                    return Err(ReindexError::Refused(format!(
                        "generation {} is no longer filled; set the candidate again",
                        candidate.generation
                    )));
                }
            }
            state.change = StateChange::Promoted {
                name: candidate.name.clone(),
                previous_revision: revision,
                evaluation_fingerprint: candidate.evaluation_fingerprint,
            };
            state.serving = candidate.serving;
            state.configuration_name = candidate.name;
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::PROMOTE,
        name = state.configuration_name,
        previous_revision = revision,
        revision = state.revision,
        generation = state.live.id,
        actor = by,
        "the candidate is live"
    );
    Ok(state)
}

/// The newest revisions, the newest first, at most `limit`.
pub async fn list_revisions(
    catalogue: &Store,
    limit: usize,
) -> Result<Vec<CatalogueState>, ReindexError> {
    let states = StateStore::new(catalogue);
    let newest = load_newest_state(&states, catalogue).await?;
    let mut found = Vec::new();
    for revision in (1..=newest.revision).rev().take(limit) {
        found.extend(states.read_revision(revision).await?);
    }
    Ok(found)
}
