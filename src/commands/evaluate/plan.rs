//! Turns arguments into the configurations to compare and the plan of the evaluation.

use tokio_util::sync::CancellationToken;

use super::arguments::EvaluateArgs;
use crate::catalogue::CatalogueState;
use crate::commands::shared::error::CommandError;
use crate::commands::shared::progress::progress_bar;
use crate::evaluate::{
    self, BaseConfiguration, ConfigurationResolver, ConfigurationSpec, CorrectionCost, Evaluation,
    EvaluationPlan, JudgedQuery, MAX_CONFIGURATIONS, RankingConfiguration, ThresholdTargets,
};

/// Returns the configurations to compare: first raw, unless it is given; then the given ones, by default
/// live and the candidate; last plain CLIP on the generation of the configuration to be calibrated, if
/// that is another generation.
pub fn configuration_specs(
    args: &EvaluateArgs,
    state: Option<&CatalogueState>,
) -> Result<Vec<ConfigurationSpec>, CommandError> {
    let mut specs = args.configurations.clone();
    if specs.is_empty() {
        specs.push(ConfigurationSpec::from_base(BaseConfiguration::Live, "live"));
        if let Some(candidate) = state.and_then(|state| state.candidate.as_ref()) {
            specs.push(ConfigurationSpec::from_base(BaseConfiguration::Candidate, &candidate.name));
        }
    }
    if !specs.iter().any(ConfigurationSpec::is_raw) {
        specs.insert(0, ConfigurationSpec::plain_clip());
    }
    if let (Some(calibrated), Some(state)) = (&args.calibrate, state) {
        let plain = evaluate::plain_clip_counterpart(&specs, calibrated, state);
        specs.extend(plain);
    }
    if specs.len() > MAX_CONFIGURATIONS {
        return Err(CommandError::usage(format!(
            "--configuration: {} of them, more than {MAX_CONFIGURATIONS}",
            specs.len()
        )));
    }
    Ok(specs)
}

/// Resolves the configurations; their names must be unique and include the baseline.
pub fn resolve_configurations(
    args: &EvaluateArgs,
    specs: &[ConfigurationSpec],
    resolver: &mut ConfigurationResolver,
) -> Result<Vec<RankingConfiguration>, CommandError> {
    let mut configurations: Vec<RankingConfiguration> = Vec::new();
    for spec in specs {
        let configuration = resolver.resolve(spec).map_err(CommandError::usage)?;
        if configurations.iter().any(|known| known.name == configuration.name) {
            return Err(CommandError::usage(format!(
                "--configuration: {:?} is given twice; give one a name=",
                configuration.name
            )));
        }
        configurations.push(configuration);
    }
    configuration_index(&configurations, &args.baseline)?;
    Ok(configurations)
}

/// Returns the index of the configuration `name`.
pub fn configuration_index(
    configurations: &[RankingConfiguration],
    name: &str,
) -> Result<usize, CommandError> {
    configurations.iter().position(|known| known.name == name).ok_or_else(|| {
        let names: Vec<&str> = configurations.iter().map(|known| known.name.as_str()).collect();
        CommandError::usage(format!("{name:?} is none of the configurations: {}", names.join(", ")))
    })
}

/// Builds the plan from the arguments and the queries.
pub fn build_evaluation_plan(
    args: &EvaluateArgs,
    catalogue: String,
    source: String,
    judged_queries: Vec<JudgedQuery>,
    notes: Vec<String>,
) -> EvaluationPlan {
    let cost = args.minutes_per_false_hit.zip(args.queries_per_day);
    EvaluationPlan {
        catalogue_name: catalogue,
        query_source: source,
        queries: judged_queries,
        baseline_name: args.baseline.clone(),
        cutoffs: args.k.clone(),
        threshold_targets: ThresholdTargets {
            target_false_hit_rate: args.target_false_hit_rate,
            max_lost_hits: args.max_lost_hits,
        },
        correction_cost: cost.map(|(minutes_per_false_hit, queries_per_day)| CorrectionCost {
            minutes_per_false_hit,
            queries_per_day,
            hourly_cost: args.hourly_cost,
        }),
        notes,
    }
}

/// Runs the evaluation, and shows its progress. Blocks while it computes.
pub fn evaluate_with_progress(
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    plan: EvaluationPlan,
    token: &CancellationToken,
) -> anyhow::Result<Evaluation> {
    let bar = progress_bar("ranked", plan.ranked_text_count() as u64)?;
    let evaluated =
        evaluate::evaluate_configurations(resolver, configurations, plan, token, &|n| bar.inc(n));
    bar.finish_and_clear();
    Ok(evaluated?)
}
