//! The candidate: what may be served next, beside what is, for a share of the queries.

use chrono::Utc;
use tracing::info;

use crate::backfill::ReindexError;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::StatisticsKey;
use crate::catalogue::{
    CatalogueState, PromptSetRecord, RolloutCandidate, ServingConfig, StateChange, StateStore,
};
use crate::store::Store;
use crate::table::{BackfillSource, Generation};
use crate::telemetry::event;

/// What a candidate is to be; what is left out is as the candidate of that name has it, or as it is served.
#[derive(Debug, Clone, Default)]
pub struct CandidateSpec {
    /// Name, for people and for requests.
    pub name: String,
    /// Whether it reads the generation beside the live one, another model's.
    pub standby: bool,
    /// Key, name or name@version of a prompt set of that generation.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// Share of the queries that it answers.
    pub traffic_share: f32,
    /// Share of the queries that it answers in the shadow.
    pub shadow_share: f32,
    /// Only queries whose filter asks for this attribute's value belong to the share, `name=value`.
    pub traffic_filter: Option<String>,
    /// Fingerprint of the evaluation that speaks for it.
    pub evaluation_fingerprint: Option<String>,
}

/// Sets the candidate, in the place of an earlier one. Its scale constants are taken from the live
/// images and frozen. One of the same name that answers as before keeps them, its thresholds and its
/// evaluation: only who gets it changes.
pub async fn set_candidate(
    catalogue: &Store,
    spec: &CandidateSpec,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let refused = |why: String| ReindexError::Refused(why);
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
    let before = newest.candidate.as_ref().filter(|candidate| candidate.name == spec.name);
    let is_beside = newest
        .standby
        .as_ref()
        .zip(before)
        .is_some_and(|(beside, before)| beside.generation.id == before.generation);
    let generation = match (&newest.standby, spec.standby || is_beside) {
        (_, false) => newest.live.clone(),
        (Some(beside), true) => beside.generation.clone(),
        (None, true) => return Err(refused(
            "--beside: no generation stands beside the live one; `bsap reindex model` sets one up"
                .into(),
        )),
    };
    let sets = newest.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    let reindex = reindex_command(&newest, &generation.id);
    let before = before.filter(|before| before.generation == generation.id);
    // Another model's sets have keys of their own: what is served is looked for by its name.
    let served = newest.find_prompt_set(newest.serving.prompt_set.as_str());
    let served = served.map(|set| format!("{}@{}", set.name, set.version));
    let served = before.map(|before| before.serving.prompt_set.as_str().to_owned()).or(served);
    let name = spec.prompt_set.clone().or(served).unwrap_or_default();
    let set = PromptSetRecord::find(sets, &name).map(|set| set.key.clone()).ok_or_else(|| {
        let known: Vec<&str> = sets.iter().map(|set| set.key.as_str()).collect();
        refused(format!(
            "--prompt-set: {name:?} is not stored in generation {}; stored are {}; {reindex} adds one",
            generation.id,
            known.join(", ")
        ))
    })?;
    let base = before.map_or(&newest.serving, |before| &before.serving);
    let normaliser = spec.normaliser.unwrap_or(base.normaliser);
    let weight = spec.weight.unwrap_or(base.weight);
    let lambda = spec.lambda.unwrap_or(base.lambda);
    let is_same_serving = |known: &ServingConfig| {
        known.prompt_set == set
            && known.normaliser == normaliser
            && (known.weight, known.lambda) == (weight, lambda)
    };
    let unchanged = before.filter(|before| is_same_serving(&before.serving));
    let serving = match unchanged {
        Some(kept) => kept.serving.clone(),
        None => ServingConfig {
            scale: Some(freeze_scale(catalogue, &generation, &set, normaliser, &reindex).await?),
            prompt_set: set,
            normaliser,
            weight,
            lambda,
            calibration: None,
        },
    };
    let evaluation = spec
        .evaluation_fingerprint
        .clone()
        .or(unchanged.and_then(|kept| kept.evaluation_fingerprint.clone()));
    let state = states
        .update(by, |mut state| {
            let sets = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
            if !sets.iter().any(|set| set.key == serving.prompt_set) {
                return Err(refused(format!("{} was retired meanwhile", serving.prompt_set)));
            }
            state.candidate = Some(RolloutCandidate {
                name: spec.name.clone(),
                generation: generation.id.clone(),
                serving: serving.clone(),
                traffic_share: spec.traffic_share,
                shadow_share: spec.shadow_share,
                traffic_filter: spec.traffic_filter.clone(),
                since: Utc::now(),
                evaluation_fingerprint: evaluation.clone(),
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
        actor = by,
        "a candidate was set"
    );
    Ok(state)
}

/// Scale constants of a normaliser over the live images of `generation`, as they are now.
async fn freeze_scale(
    catalogue: &Store,
    generation: &Generation,
    set: &StatisticsKey,
    normaliser: Normaliser,
    reindex: &str,
) -> Result<ScaleConstants, ReindexError> {
    if !matches!(normaliser, Normaliser::Zscore | Normaliser::Range) {
        return Ok(ScaleConstants::default());
    }
    let survey =
        BackfillSource::open(catalogue, generation).await?.read_live_statistics(set).await?;
    if survey.live_images == 0 || survey.statistics.len() < survey.live_images {
        return Err(ReindexError::Refused(format!(
            "{} of {} live images have the statistics of {set}; run {reindex} first, so that the scale is taken from all of them",
            survey.statistics.len(),
            survey.live_images
        )));
    }
    Ok(ScaleConstants::from_catalogue(normaliser, survey.statistics.into_iter()))
}

/// The command that brings a prompt set and its statistics to `generation`.
pub(crate) fn reindex_command(state: &CatalogueState, generation: &str) -> String {
    match &state.standby {
        Some(beside) if beside.generation.id == generation => format!(
            "`bsap reindex statistics` with model.checkpoint = {:?} (BSAP_MODEL__CHECKPOINT)",
            beside.checkpoint
        ),
        _ => "`bsap reindex statistics`".into(),
    }
}

/// Withdraws the candidate.
pub async fn withdraw_candidate(
    catalogue: &Store,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let mut name = String::new();
    if let Some(candidate) = load_newest_state(&states, catalogue).await?.candidate {
        name = candidate.name;
    }
    let state = states
        .update(by, |mut state| {
            let Some(candidate) = state.candidate.take() else {
                return Err(ReindexError::Refused("there is no candidate".into()));
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
        actor = by,
        "the candidate was withdrawn"
    );
    Ok(state)
}

/// The state as it is; none is the error of a catalogue that is not there.
pub(crate) async fn load_newest_state(
    states: &StateStore,
    catalogue: &Store,
) -> Result<CatalogueState, ReindexError> {
    let missing = || crate::table::TableError::NotFound { location: catalogue.url().to_string() };
    Ok(states.read_newest().await?.ok_or_else(missing)?)
}
