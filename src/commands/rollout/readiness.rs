//! Whether a candidate can be promoted and the query workers are ready, checked and printed.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use chrono::Utc;

use crate::catalogue::ServingConfig;
use crate::commands::shared::catalogue::set_propagation_delay;
use crate::commands::shared::error::CommandError;
use crate::commands::shared::printing::print_line;
use crate::config::Config;
use crate::reconcile::default_temp_folder;
use crate::rollout::RolloutError;
use crate::rollout::{self, PromotionCheck, PromotionRules, ReplicaReadiness};
use crate::store::Store;

/// How long after the live generation took an image in another one may still lack it.
pub const MISSING_IMAGE_GRACE: Duration = Duration::from_secs(60);

pub async fn check_candidate(
    store: &Store,
    config: &Config,
    allow_missing: u64,
    folder: Option<&Path>,
) -> Result<PromotionCheck, RolloutError> {
    let temporary = default_temp_folder();
    let rules = PromotionRules {
        propagation_delay: set_propagation_delay(config),
        grace_period: MISSING_IMAGE_GRACE,
        max_missing: allow_missing,
        temp_folder: folder.unwrap_or(&temporary),
    };
    rollout::check_promotion(store, &rules, Utc::now()).await
}

pub fn print_promotion(promotion: &PromotionCheck) {
    let candidate = &promotion.candidate;
    print_line!(
        "live        {}: {}",
        promotion.live_configuration_name,
        describe_serving(&promotion.live)
    );
    print_line!("candidate   {}: {}", candidate.name, describe_serving(&candidate.serving));
    let (from, to) = (&promotion.live_generation, &promotion.candidate_generation);
    if let Some(gap) = &promotion.coverage_gap {
        print_line!(
            "generation  {} ({}, dimension {}) in the place of {} ({}, dimension {})",
            to.id,
            to.model_name,
            to.dimension,
            from.id,
            from.model_name,
            from.dimension
        );
        print_line!(
            "coverage    {} of {} live images; {} on their way",
            gap.live.saturating_sub(gap.missing + gap.outdated),
            gap.live,
            gap.too_recent
        );
    }
    let only =
        candidate.traffic_filter.as_ref().map_or(String::new(), |only| format!(" of {only}"));
    print_line!(
        "traffic     share {}{only}, shadow {}",
        candidate.traffic_share,
        candidate.shadow_share
    );
    print_line!("since       {}", candidate.since.format("%Y-%m-%d %H:%M:%S UTC"));
    print_line!("evaluation  {}", candidate.evaluation_fingerprint.as_deref().unwrap_or("none"));
    for warning in &promotion.warnings {
        print_line!("WARNING     {warning}");
    }
    for problem in &promotion.blockers {
        print_line!("PROBLEM     {problem}");
    }
}

pub fn print_readiness(readiness: &ReplicaReadiness) {
    print_line!(
        "readers     {} query workers have it in memory, {} do not yet",
        readiness.ready.len(),
        readiness.not_ready.len()
    );
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not yet");
        print_line!("            {} on {}: {problem}", report.id, report.host);
    }
    print_stale_workers(readiness);
}

fn print_stale_workers(readiness: &ReplicaReadiness) {
    for report in &readiness.unresponsive {
        let at = report.reported_at.format("%Y-%m-%d %H:%M:%S UTC");
        print_line!(
            "            {} on {} was last heard at {at}; not waited for",
            report.id,
            report.host
        );
    }
}

pub fn print_serving_workers(readiness: &ReplicaReadiness) {
    print_line!("{} query workers serve it.", readiness.ready.len());
    for report in &readiness.not_ready {
        let problem = report.problem.as_deref().unwrap_or("not heard of it yet");
        print_line!("WARNING: {} on {} does not yet: {problem}", report.id, report.host);
    }
}

pub fn describe_serving(serving: &ServingConfig) -> String {
    format!(
        "{} at weight {}, λ {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.lambda,
        serving.prompt_set
    )
}

/// Asks on the terminal; refused where there is none.
pub fn confirm() -> Result<bool, CommandError> {
    if !std::io::stdin().is_terminal() {
        return Err(CommandError::usage("there is no terminal to ask on; give --yes"));
    }
    let mut out = std::io::stdout();
    write!(out, "Make it live? [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
