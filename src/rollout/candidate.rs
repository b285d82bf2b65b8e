//! Sets and withdraws the candidate: the configuration that may become live, and answers a share of
//! the queries before that.

use chrono::Utc;
use tracing::info;

use super::error::RolloutError;
use super::newest_state::load_newest_state;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::{
    CatalogueState, PromptSetRecord, RolloutCandidate, ServingConfig, StateChange, StateStore,
};
use crate::store::Store;
use crate::table::{BackfillSource, Generation};
use crate::telemetry::event;

/// What a candidate should be. Settings that are `None` are taken from the present candidate of the
/// same name or, if there is none, from the live configuration.
#[derive(Debug, Clone, Default)]
pub struct CandidateSpec {
    /// Name of the configuration.
    pub name: String,
    /// Whether it searches the standby generation instead of the live one.
    pub use_standby_generation: bool,
    /// Key, name or name@version of a prompt set of its generation.
    pub prompt_set: Option<String>,
    /// Normaliser of the scores.
    pub normaliser: Option<Normaliser>,
    /// Weight of the normalised score in the balanced score, 0 to 1.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// Share of the queries that it answers, 0 to 1.
    pub traffic_share: f32,
    /// Share of the live configuration's queries that it computes too, without showing the result,
    /// 0 to 1.
    pub shadow_share: f32,
    /// `name=value`: only queries whose filter requires this value of the attribute belong to the
    /// traffic share.
    pub traffic_filter: Option<String>,
    /// Fingerprint of the evaluation report that supports it.
    pub evaluation_fingerprint: Option<String>,
}

/// Sets the candidate; replaces an earlier one. Its scale constants are computed from all images of
/// its generation and frozen. If the earlier candidate has the same name and settings, its scale
/// constants, thresholds and evaluation are kept: only its shares change.
pub async fn set_candidate(
    catalogue: &Store,
    spec: &CandidateSpec,
    actor: &str,
) -> Result<CatalogueState, RolloutError> {
    let refused = |reason: String| RolloutError::Refused(reason);
    let states = StateStore::new(catalogue);
    let newest = load_newest_state(&states, catalogue).await?;
    if ["", "live", "candidate", "raw"].contains(&spec.name.as_str())
        || spec.name == newest.configuration_name
    {
        return Err(refused(format!(
            "the name {:?} is taken; give the candidate one of its own",
            spec.name
        )));
    }
    let previous = newest.candidate.as_ref().filter(|candidate| candidate.name == spec.name);
    let was_on_standby = newest
        .standby
        .as_ref()
        .zip(previous)
        .is_some_and(|(standby, previous)| standby.generation.id == previous.generation);
    let generation = match (&newest.standby, spec.use_standby_generation || was_on_standby) {
        (_, false) => newest.live.clone(),
        (Some(standby), true) => standby.generation.clone(),
        (None, true) => {
            return Err(refused(
                "--standby: there is no standby generation; `bsap reindex model` sets one up"
                    .into(),
            ));
        }
    };
    let sets = newest.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    let reindex = reindex_statistics_command(&newest, &generation.id);
    let previous = previous.filter(|previous| previous.generation == generation.id);
    // Keys differ between models, so the live configuration's set is looked up by name and version.
    let live_set = newest.find_prompt_set(newest.serving.prompt_set.as_str());
    let live_set = live_set.map(|set| format!("{}@{}", set.name, set.version));
    let previous_set = previous.map(|previous| previous.serving.prompt_set.as_str().to_owned());
    let name = spec.prompt_set.clone().or(previous_set).or(live_set).unwrap_or_default();
    let set = PromptSetRecord::find_by_selector(sets, &name).map(|set| set.key.clone()).ok_or_else(|| {
        let stored_keys: Vec<&str> = sets.iter().map(|set| set.key.as_str()).collect();
        refused(format!(
            "--prompt-set: {name:?} is not stored in generation {}; stored are {}; {reindex} adds one",
            generation.id,
            stored_keys.join(", ")
        ))
    })?;
    let base = previous.map_or(&newest.serving, |previous| &previous.serving);
    let normaliser = spec.normaliser.unwrap_or(base.normaliser);
    let weight = spec.weight.unwrap_or(base.weight);
    let lambda = spec.lambda.unwrap_or(base.lambda);
    let has_same_settings = |serving: &ServingConfig| {
        serving.prompt_set == set
            && serving.normaliser == normaliser
            && (serving.weight, serving.lambda) == (weight, lambda)
    };
    let unchanged = previous.filter(|previous| has_same_settings(&previous.serving));
    let serving = match unchanged {
        Some(unchanged) => unchanged.serving.clone(),
        None => ServingConfig {
            scale: Some(
                compute_scale_constants(catalogue, &generation, &set, normaliser, &reindex).await?,
            ),
            prompt_set: set,
            normaliser,
            weight,
            lambda,
            calibration: None,
        },
    };
    let evaluation_fingerprint = spec
        .evaluation_fingerprint
        .clone()
        .or(unchanged.and_then(|unchanged| unchanged.evaluation_fingerprint.clone()));
    let state = states
        .update(actor, |mut state| {
            let sets = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
            if !sets.iter().any(|set| set.key == serving.prompt_set) {
                return Err(refused(format!("{} was retired in the meantime", serving.prompt_set)));
            }
            state.candidate = Some(RolloutCandidate {
                name: spec.name.clone(),
                generation: generation.id.clone(),
                serving: serving.clone(),
                traffic_share: spec.traffic_share,
                shadow_share: spec.shadow_share,
                traffic_filter: spec.traffic_filter.clone(),
                since: Utc::now(),
                evaluation_fingerprint: evaluation_fingerprint.clone(),
            });
            state.change = StateChange::Candidate { name: spec.name.clone() };
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::CANDIDATE_CHANGED,
        change = "set",
        name = spec.name,
        revision = state.revision,
        actor,
        "a candidate was set"
    );
    Ok(state)
}

/// Computes the scale constants of a normaliser from the present images of `generation`.
async fn compute_scale_constants(
    catalogue: &Store,
    generation: &Generation,
    set: &StatisticsKey,
    normaliser: Normaliser,
    reindex_command: &str,
) -> Result<ScaleConstants, RolloutError> {
    if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
        return Ok(ScaleConstants::default());
    }
    let live = BackfillSource::open(catalogue, generation).await?.read_live_statistics(set).await?;
    if live.live_image_count == 0 || live.statistics.len() < live.live_image_count {
        return Err(RolloutError::Refused(format!(
            "{} of {} live images have the statistics of {set}; run {reindex_command} first, so that the scale is taken from all of them",
            live.statistics.len(),
            live.live_image_count
        )));
    }
    Ok(ScaleConstants::from_catalogue(normaliser, live.statistics.into_iter()))
}

/// Returns the command that adds a prompt set and its statistics to `generation`.
pub fn reindex_statistics_command(state: &CatalogueState, generation: &str) -> String {
    match &state.standby {
        Some(standby) if standby.generation.id == generation => format!(
            "`bsap reindex statistics` with model.checkpoint = {:?} (BSAP_MODEL__CHECKPOINT)",
            standby.checkpoint
        ),
        _ => "`bsap reindex statistics`".into(),
    }
}

/// Removes the candidate from the state; refused if there is none.
pub async fn withdraw_candidate(
    catalogue: &Store,
    actor: &str,
) -> Result<CatalogueState, RolloutError> {
    let states = StateStore::new(catalogue);
    let mut name = String::new();
    if let Some(candidate) = load_newest_state(&states, catalogue).await?.candidate {
        name = candidate.name;
    }
    let state = states
        .update(actor, |mut state| {
            let Some(candidate) = state.candidate.take() else {
                return Err(RolloutError::Refused("there is no candidate".into()));
            };
            state.change = StateChange::Candidate { name: candidate.name };
            Ok(Some(state))
        })
        .await?;
    info!(
        event = event::CANDIDATE_CHANGED,
        change = "withdrawn",
        name,
        revision = state.revision,
        actor,
        "the candidate was withdrawn"
    );
    Ok(state)
}
