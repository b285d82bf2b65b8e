//! Checks and promotes the candidate, waits for the query workers, and lists the revisions.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::bank_check::{bank_warning, find_measured_bank};
use super::candidate::reindex_statistics_command;
use super::error::RolloutError;
use super::newest_state::load_newest_state;
use crate::backfill::GenerationGap;
use crate::balance::bank::MeasuredBank;
use crate::balance::normalise::Normaliser;
use crate::catalogue::{
    CatalogueState, ReplicaReport, ReplicaReports, RolloutCandidate, ServingConfig, StateChange,
    StateStore,
};
use crate::store::Store;
use crate::table::{BackfillSource, Generation};
use crate::telemetry::event;

/// How often the reports of the query workers are read while [`wait_for_replicas`] waits.
const READINESS_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Whether the candidate can be promoted, and what a promotion would change.
#[derive(Debug, Clone, Serialize)]
pub struct PromotionCheck {
    /// The revision that was checked.
    pub revision: u64,
    /// The candidate of that revision.
    pub candidate: RolloutCandidate,
    /// The live configuration.
    pub live: ServingConfig,
    /// Name of the live configuration.
    pub live_configuration_name: String,
    /// The live generation.
    pub live_generation: Generation,
    /// The generation that the candidate searches.
    pub candidate_generation: Generation,
    /// How the candidate's generation differs from the live one; `None` if they are the same.
    pub coverage_gap: Option<GenerationGap>,
    /// How well the candidate's prompt set fits recent queries, as a query worker measured it; `None` if
    /// none did.
    pub measured_bank: Option<MeasuredBank>,
    /// Why the candidate must not be promoted, each with what to do.
    pub blockers: Vec<String>,
    /// What to consider before a promotion.
    pub warnings: Vec<String>,
}

/// Limits of [`check_promotion`].
#[derive(Debug, Clone)]
pub struct PromotionRules<'a> {
    /// How long after a prompt set was added workers may still write rows without its statistics.
    pub propagation_delay: Duration,
    /// How long after the live generation got a row the candidate's generation may lack it.
    pub grace_period: Duration,
    /// Maximum number of images in which the candidate's generation may differ from the live one.
    pub max_differing_images: u64,
    /// Folder of temporary files for the comparison of generations.
    pub temp_folder: &'a Path,
}

/// Checks whether the candidate can be promoted: its generation has the live images, its statistics
/// are complete, and its scale is frozen; what is not fulfilled becomes a blocker. Only warns if no
/// evaluation supports the candidate, if it has neither a share of the traffic nor of shadow
/// queries, or if its prompt set has a low fit or a high concentration. Fails if there is no candidate.
pub async fn check_promotion(
    catalogue: &Store,
    rules: &PromotionRules<'_>,
    now: DateTime<Utc>,
) -> Result<PromotionCheck, RolloutError> {
    let state = load_newest_state(&StateStore::new(catalogue), catalogue).await?;
    let no_candidate =
        || RolloutError::Refused("there is no candidate; `bsap candidate set` sets one".into());
    let candidate = state.candidate.clone().ok_or_else(no_candidate)?;
    let (mut blockers, mut warnings) = (Vec::new(), Vec::new());
    let Some(candidate_generation) = state.find_generation(&candidate.generation).cloned() else {
        return Err(RolloutError::Refused(format!(
            "the candidate reads generation {}, which is neither live nor the standby; set the candidate again",
            candidate.generation
        )));
    };
    let coverage_gap = if candidate_generation.id == state.live.id {
        None
    } else {
        let cutoff = now - TimeDelta::from_std(rules.grace_period).unwrap_or(TimeDelta::MAX);
        let folder = rules.temp_folder;
        Some(
            GenerationGap::compare(catalogue, &state.live, &candidate_generation, folder, cutoff)
                .await?,
        )
    };
    if let Some(gap) = &coverage_gap {
        let summary = gap.summary(&candidate_generation.id);
        // Extra images count too: searches would find them, although they may be deleted.
        let difference_count = gap.out_of_date_count() + gap.extra;
        if difference_count > rules.max_differing_images {
            blockers.push(format!(
                "{summary}; are workers of {} running? `bsap reindex model` requests what is missing, `bsap dead-letters` and `bsap status` show what failed or waits",
                candidate_generation.model_name
            ));
        } else if difference_count > 0 {
            warnings.push(summary);
        }
        if gap.too_recent > 0 {
            warnings.push(format!(
                "{} images of the last {} s are still on their way to generation {}",
                gap.too_recent,
                rules.grace_period.as_secs(),
                candidate_generation.id
            ));
        }
    }
    let propagation_delay = rules.propagation_delay;
    let key = &candidate.serving.prompt_set;
    let sets = state.prompt_sets_of_generation(&candidate_generation.id).unwrap_or_default();
    let reindex = reindex_statistics_command(&state, &candidate_generation.id);
    match sets.iter().find(|set| set.key == *key) {
        None => blockers.push(format!("the prompt set {key} is not stored; {reindex} adds it")),
        Some(set) => {
            let (_, coverage) = BackfillSource::open(catalogue, &candidate_generation)
                .await?
                .list_pending_files_and_coverage(key)
                .await?;
            if !coverage.is_complete() {
                blockers.push(format!(
                    "{} of {} rows have the statistics of {key}; run {reindex}",
                    coverage.covered, coverage.rows
                ));
            }
            if now - set.since < TimeDelta::from_std(propagation_delay).unwrap_or(TimeDelta::MAX) {
                blockers.push(format!(
                    "{key} was added only at {}, workers may still write rows without its statistics; try again in {} s",
                    set.since.format("%H:%M:%S UTC"),
                    propagation_delay.as_secs() + 1
                ));
            }
        }
    }
    let needs_scale =
        matches!(candidate.serving.normaliser, Normaliser::Zscore | Normaliser::Range);
    if needs_scale && candidate.serving.scale.is_none() {
        blockers.push("its scale constants are not frozen; set the candidate again".into());
    }
    let measured_bank = find_measured_bank(catalogue, &candidate, now).await?;
    warnings.extend(bank_warning(&candidate.serving, measured_bank.as_ref()));
    if candidate.evaluation_fingerprint.is_none() {
        warnings.push(
            "no evaluation supports it; evaluate it on your own data (`bsap evaluate`) and name the report with --evaluation".into(),
        );
    }
    if candidate.traffic_share == 0.0 && candidate.shadow_share == 0.0 {
        warnings.push("it has neither a share of the traffic nor of shadow queries yet".into());
    }
    Ok(PromotionCheck {
        revision: state.revision,
        candidate,
        live: state.serving,
        live_configuration_name: state.configuration_name,
        live_generation: state.live,
        candidate_generation,
        coverage_gap,
        measured_bank,
        blockers,
        warnings,
    })
}

/// Which query workers serve a revision.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ReplicaReadiness {
    /// Query workers that serve the revision.
    pub ready: Vec<ReplicaReport>,
    /// Query workers that do not serve it yet.
    pub not_ready: Vec<ReplicaReport>,
    /// Query workers whose last report is too old, and for which nothing waits.
    pub unresponsive: Vec<ReplicaReport>,
}

/// Waits until every responsive query worker serves `revision`, for at most `timeout`, and returns
/// which do.
pub async fn wait_for_replicas(
    catalogue: &Store,
    revision: u64,
    timeout: Duration,
    cancel: &CancellationToken,
) -> Result<ReplicaReadiness, RolloutError> {
    let reports = ReplicaReports::new(catalogue);
    let deadline = tokio::time::Instant::now() + timeout;
    loop {
        let now = Utc::now();
        let mut readiness = ReplicaReadiness::default();
        for report in reports.list_and_remove_expired(now).await? {
            if report.is_stale(now) {
                readiness.unresponsive.push(report);
            } else if report.serves_revision_or_later(revision) {
                readiness.ready.push(report);
            } else {
                readiness.not_ready.push(report);
            }
        }
        let is_over = tokio::time::Instant::now() >= deadline || cancel.is_cancelled();
        if readiness.not_ready.is_empty() || is_over {
            return Ok(readiness);
        }
        tokio::select! {
            () = tokio::time::sleep(READINESS_POLL_INTERVAL) => {}
            () = cancel.cancelled() => {}
        }
    }
}

/// Makes the candidate of revision `revision` live, in one write; refused if the state has changed
/// since then. If the candidate searches the standby generation, that becomes live and the live one
/// becomes the standby; `live_checkpoint` is the checkpoint of the model that was live until then.
pub async fn promote(
    catalogue: &Store,
    revision: u64,
    live_checkpoint: &str,
    actor: &str,
) -> Result<CatalogueState, RolloutError> {
    let state = StateStore::new(catalogue)
        .update(actor, |mut state| {
            if state.revision != revision {
                return Err(RolloutError::Refused(format!(
                    "the state has changed in the meantime: revision {} by {}; check again",
                    state.revision, state.actor
                )));
            }
            let Some(candidate) = state.candidate.take() else {
                return Err(RolloutError::Refused("there is no candidate".into()));
            };
            if candidate.generation != state.live.id {
                let standby_id = state.standby.as_ref().map(|standby| &standby.generation.id);
                if standby_id != Some(&candidate.generation)
                    || !state.swap_live_and_standby(live_checkpoint)
                {
                    return Err(RolloutError::Refused(format!(
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
        actor,
        "the candidate is live"
    );
    Ok(state)
}

/// Returns the newest revisions, at most `limit`, the newest first.
pub async fn list_revisions(
    catalogue: &Store,
    limit: usize,
) -> Result<Vec<CatalogueState>, RolloutError> {
    let states = StateStore::new(catalogue);
    let newest = load_newest_state(&states, catalogue).await?;
    let mut revisions = Vec::new();
    for revision in (1..=newest.revision).rev().take(limit) {
        revisions.extend(states.read_revision(revision).await?);
    }
    Ok(revisions)
}
