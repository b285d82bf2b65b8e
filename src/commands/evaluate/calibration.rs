//! `bsap evaluate --calibrate` and `--store`: the thresholds of a configuration.

use anyhow::bail;
use chrono::Utc;

use crate::balance::calibration::Calibration;
use crate::balance::normalise::Normaliser;
use crate::catalogue::{CatalogueState, ServingConfig, StateChange, StateStore};
use crate::commands::shared::catalogue::actor;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_note;
use crate::evaluate::{
    BaseConfiguration, ConfigurationResolver, ConfigurationSpec, Evaluation, RankingConfiguration,
};
use crate::store::Store;

/// Returns the thresholds of a configuration, in the form that the catalogue state has.
pub fn build_calibration(
    evaluated: &Evaluation,
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    index: usize,
) -> Result<Calibration, CommandError> {
    let report = &evaluated.report;
    let outcome = &report.configurations[index];
    let thresholds = outcome.thresholds.as_ref().ok_or_else(|| {
        CommandError::usage(format!(
            "--calibrate: {} judged queries are too few; there must be some in both halves",
            report.queries.judged
        ))
    })?;
    let baseline = evaluated.drift_baseline(resolver, configurations, index);
    if baseline.is_none() {
        print_note!(
            "--calibrate: these queries give no baseline, so that query workers have nothing to compare with (balance.drift); calibrate with --queries"
        );
    }
    Ok(Calibration {
        min_score: thresholds.min_score,
        no_match: thresholds.no_match,
        measured_at: Utc::now(),
        evaluation_fingerprint: report.fingerprint.clone(),
        baseline,
    })
}

/// Stores a calibration with the configuration that it was measured for, in a new revision of the
/// catalogue state. An error if the configuration has changed since `measured_state`.
pub async fn store_calibration(
    store: &Store,
    measured_state: &CatalogueState,
    spec: &ConfigurationSpec,
    configuration: &RankingConfiguration,
    calibration: Calibration,
) -> CommandResult {
    if !spec.is_unmodified_base() {
        return Err(CommandError::usage(
            "--store: thresholds hold for one configuration, and only live and candidate are stored: calibrate one of these unchanged",
        ));
    }
    let changed_by = actor("bsap evaluate --calibrate");
    let state = StateStore::new(store)
        .update(&changed_by, |mut next| {
            let evaluation = calibration.evaluation_fingerprint.clone();
            // Another model may have the same prompt set and constants, but has other scores.
            let generation = |state: &CatalogueState| match (spec.base, &state.candidate) {
                (Some(BaseConfiguration::Candidate), Some(candidate)) => {
                    candidate.generation.clone()
                }
                _ => state.live.id.clone(),
            };
            let same_generation = generation(&next) == generation(measured_state);
            let serving: &mut ServingConfig = match (spec.base, &mut next.candidate) {
                (Some(BaseConfiguration::Candidate), Some(candidate)) => {
                    candidate.evaluation_fingerprint = Some(evaluation.clone());
                    &mut candidate.serving
                }
                (Some(BaseConfiguration::Candidate), None) => {
                    bail!("--store: the candidate was withdrawn")
                }
                _ => &mut next.serving,
            };
            let balance = &configuration.balance;
            let raw = balance.normaliser == Normaliser::Raw;
            let key = configuration.prompt_set.as_ref().map(|set| &set.statistics_key);
            let is_unchanged = same_generation
                && serving.normaliser == balance.normaliser
                && key.is_none_or(|key| *key == serving.prompt_set)
                && (raw || (serving.weight, serving.lambda) == (balance.weight, balance.lambda))
                && serving.scale.is_none_or(|scale| scale == balance.scale);
            if !is_unchanged {
                bail!(
                    "--store: the configuration was changed while it was measured; measure again"
                );
            }
            serving.calibration = Some(calibration.clone());
            // Thresholds hold only for the scale at which they were measured.
            serving.scale = Some(balance.scale);
            next.change = StateChange::Calibrated { evaluation_fingerprint: evaluation };
            Ok(Some(next))
        })
        .await?;
    print_note!("stored as revision {} of the catalogue's state", state.revision);
    Ok(())
}
