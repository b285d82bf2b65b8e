//! Checks and prints whether the candidate can be promoted and which query workers are ready for it.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use chrono::Utc;

use crate::catalogue::ServingConfig;
use crate::commands::shared::catalogue::prompt_set_propagation_delay;
use crate::commands::shared::error::CommandError;
use crate::commands::shared::printing::print_line;
use crate::config::Config;
use crate::reconcile::default_temp_folder;
use crate::rollout::RolloutError;
use crate::rollout::{
    self, PromotionCheck, PromotionRules, ReplicaReadiness, describe_measured_bank,
};
use crate::store::Store;

/// An image that the live generation stored less than this long ago does not count as missing in
/// another one.
pub const MISSING_IMAGE_GRACE: Duration = Duration::from_secs(60);

/// Checks whether the candidate can be promoted; its generation may lack `max_missing` live images.
pub async fn check_candidate(
    store: &Store,
    config: &Config,
    max_missing: u64,
    temp_folder: Option<&Path>,
) -> Result<PromotionCheck, RolloutError> {
    let default_folder = default_temp_folder();
    let rules = PromotionRules {
        propagation_delay: prompt_set_propagation_delay(config),
        grace_period: MISSING_IMAGE_GRACE,
        max_differing_images: max_missing,
        temp_folder: temp_folder.unwrap_or(&default_folder),
    };
    rollout::check_promotion(store, &rules, Utc::now()).await
}

/// Prints the live configuration, the candidate, and what blocks its promotion.
pub fn print_promotion_check(promotion: &PromotionCheck) {
    let candidate = &promotion.candidate;
    print_line!(
        "live        {}: {}",
        promotion.live_configuration_name,
        describe_serving_config(&promotion.live)
    );
    print_line!("candidate   {}: {}", candidate.name, describe_serving_config(&candidate.serving));
    let (from, to) = (&promotion.live_generation, &promotion.candidate_generation);
    if let Some(gap) = &promotion.coverage_gap {
        print_line!(
            "generation  {} ({}, dimension {}) instead of {} ({}, dimension {})",
            to.id,
            to.model_name,
            to.dimension,
            from.id,
            from.model_name,
            from.dimension
        );
        print_line!(
            "coverage    {} of {} live images; {} too recent to be counted",
            gap.live.saturating_sub(gap.missing + gap.outdated),
            gap.live,
            gap.too_recent
        );
    }
    let filter =
        candidate.traffic_filter.as_ref().map_or(String::new(), |filter| format!(" of {filter}"));
    print_line!(
        "traffic     share {}{filter}, shadow {}",
        candidate.traffic_share,
        candidate.shadow_share
    );
    match &promotion.measured_bank {
        Some(bank) => print_line!(
            "fit         {}; proposed weight {}: {}",
            describe_measured_bank(bank),
            bank.report.proposed_weight,
            bank.report.reason
        ),
        None => print_line!("fit         not measured by a query worker yet"),
    }
    print_line!("since       {}", candidate.since.format("%Y-%m-%d %H:%M:%S UTC"));
    print_line!("evaluation  {}", candidate.evaluation_fingerprint.as_deref().unwrap_or("none"));
    for warning in &promotion.warnings {
        print_line!("WARNING     {warning}");
    }
    for blocker in &promotion.blockers {
        print_line!("PROBLEM     {blocker}");
    }
}

/// Prints which query workers have the candidate in memory.
pub fn print_readiness(readiness: &ReplicaReadiness) {
    print_line!(
        "replicas    {} query workers have it in memory, {} do not yet",
        readiness.ready.len(),
        readiness.not_ready.len()
    );
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not yet");
        print_line!("            {} on {}: {problem}", report.id, report.host);
    }
    print_stale_workers(readiness);
}

/// Prints the query workers that have stopped reporting.
fn print_stale_workers(readiness: &ReplicaReadiness) {
    for report in &readiness.unresponsive {
        let at = report.reported_at.format("%Y-%m-%d %H:%M:%S UTC");
        print_line!(
            "            {} on {} last reported at {at}; not waited for",
            report.id,
            report.host
        );
    }
}

/// Prints how many query workers serve the new configuration, and which do not.
pub fn print_serving_workers(readiness: &ReplicaReadiness) {
    print_line!("{} query workers serve it.", readiness.ready.len());
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not loaded yet");
        print_line!("WARNING: {} on {} does not yet: {problem}", report.id, report.host);
    }
}

/// Describes how a configuration ranks.
pub fn describe_serving_config(serving: &ServingConfig) -> String {
    format!(
        "{} at weight {}, λ {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.lambda,
        serving.prompt_set
    )
}

/// Asks for confirmation on the terminal; an error if there is none.
pub fn confirm() -> Result<bool, CommandError> {
    if !std::io::stdin().is_terminal() {
        return Err(CommandError::usage("there is no terminal for the confirmation; give --yes"));
    }
    let mut out = std::io::stdout();
    write!(out, "Make it live? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
