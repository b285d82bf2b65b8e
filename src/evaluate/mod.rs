//! Is a way to rank better than another, on the owner's own catalogue and queries?
//!
//! [`World`] is the stored table in memory, [`Asked`] the queries with what is known of their right
//! answers, [`Configuration`] a way to rank. [`evaluate`] ranks every query under every configuration
//! from one pass over the images (all are affine in the raw score) and gives a [`Report`], which is
//! shown on a terminal, as JSON or as one HTML file. docs/evaluation.md is for users.

pub(crate) mod calibrate;
pub(crate) mod compare;
pub(crate) mod judgements;
pub(crate) mod logs;
pub(crate) mod measures;
pub(crate) mod report;
pub(crate) mod suggest;
pub mod trec;
mod usual;

use std::fmt::Write as _;

use chrono::Utc;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

pub use calibrate::{Thresholds, Wanted};
pub use compare::configuration::{
    Base, Configuration, ConfigurationError, MAX_CONFIGURATIONS, Resolver, Setting, Spec,
};
pub use compare::rank::{Ranked, Ranking, Right};
pub use compare::world::{EvaluateError, Picture, Rows, Table, World};
pub use compare::{Change, CostModel, Outcome, Shown, Summary};
pub use judgements::asked::{Asked, QueriesError, Truth, from_csv, from_feedback, from_json_lines};
use judgements::probes::{Probe, probes};
pub use logs::reader::Reader as LogReader;
pub use logs::shown::{html as logs_html, terminal as logs_terminal};
pub use logs::{LogReport, LogsError};
pub use measures::interval::{Column, Direction, Interval, SEED, bootstrap, columns};
pub use measures::{Cutoffs, FALSE_HIT, Judged};
pub use report::html::{Pictures, html, pictured};
pub use report::text::{terminal, terminal_runs};
pub use report::{Finding, Queries, Report, finding};
pub use suggest::{Chosen, Pool, Suggestion, TooFewJudged, enough_judged, suggest};
pub use usual::plain_for;

use crate::record::hex;
use compare::{Comparison, right_of};

/// What is to be found out.
pub struct Plan {
    /// The catalogue: its address, or what was drawn.
    pub catalogue: String,
    /// Where the queries come from.
    pub source: String,
    /// The queries.
    pub asked: Vec<Asked>,
    /// With which configuration all others are compared: its name.
    pub baseline: String,
    /// How far down is looked.
    pub cutoffs: Cutoffs,
    /// What thresholds are to reach.
    pub wanted: Wanted,
    /// What hand correction costs.
    pub cost: Option<CostModel>,
    /// What must be known to read the figures.
    pub notes: Vec<String>,
}

impl Plan {
    /// Texts that will be ranked: the queries, and probes where something is judged.
    pub fn texts(&self) -> usize {
        self.asked.len() + self.probes().len()
    }

    fn probes(&self) -> Vec<Probe> {
        let judged = |asked: &Asked| matches!(asked.truth, Truth::Graded { .. });
        if self.asked.iter().any(judged) { probes() } else { Vec::new() }
    }
}

/// A report with the rankings that it rests on.
pub struct Evaluated {
    /// The report.
    pub report: Report,
    /// A row a query, then a row a probe; in it an entry a configuration.
    pub ranked: Vec<Vec<Ranked>>,
    /// The right images of each query.
    pub right: Vec<Right>,
}

/// Ranks and compares. Computes: may block for long. `progress` hears of how many more texts are
/// ranked.
pub fn evaluate(
    resolver: &mut Resolver,
    configurations: &[Configuration],
    mut plan: Plan,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Evaluated, EvaluateError> {
    let world = resolver.world;
    let mut queries = Queries {
        source: plan.source.clone(),
        fingerprint: fingerprint(&plan.asked),
        asked: plan.asked.len(),
        ..Queries::default()
    };
    let mut right = Vec::with_capacity(plan.asked.len());
    for asked in &plan.asked {
        let (found, missing) = right_of(asked, world);
        queries.missing_images += missing;
        match &asked.truth {
            Truth::Unknown => queries.unknown += 1,
            Truth::NoMatch => queries.nothing += 1,
            Truth::Graded { .. } if found.ideal().is_empty() => queries.left_out += 1,
            Truth::Graded { .. } => queries.judged += 1,
        }
        right.push(found);
    }
    if queries.missing_images > 0 {
        plan.notes.push(format!(
            "{} judged images are not in the catalogue and were left out.",
            queries.missing_images
        ));
    }
    let probes = plan.probes();
    queries.probes = probes.len();
    let asked = plan.asked.iter().map(|asked| asked.text.as_str());
    let texts: Vec<&str> = asked.chain(probes.iter().map(|probe| probe.text.as_str())).collect();
    let mut all_right = right.clone();
    all_right.resize(texts.len(), Right::default());
    let baseline = configurations.iter().position(|known| known.name == plan.baseline);
    let baseline = baseline.unwrap_or(0);
    let ranking = Ranking::new(resolver, configurations, plan.cutoffs.depth());
    let ranked = ranking.rank(&texts, &all_right, token, progress)?;
    let comparison = Comparison {
        world,
        configurations,
        baseline,
        asked: &plan.asked,
        right: &right,
        probes: &probes,
        ranked: &ranked,
        cutoffs: &plan.cutoffs,
        wanted: plan.wanted,
        cost: plan.cost,
    };
    let report = Report {
        fingerprint: String::new(),
        at: Utc::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        catalogue: plan.catalogue,
        models: world.tables.iter().map(|table| table.note.clone()).collect(),
        queries,
        measures: plan.cutoffs.names(),
        baseline: configurations[baseline].name.clone(),
        cost: plan.cost,
        verdict: String::new(),
        notes: plan.notes,
        configurations: comparison.outcomes(),
    };
    Ok(Evaluated { report: report.finish(), ranked, right })
}

/// SHA-256 over texts and judgements.
fn fingerprint(asked: &[Asked]) -> String {
    let mut hasher = Sha256::new();
    let mut line = String::new();
    for asked in asked {
        line.clear();
        let _ = writeln!(line, "{asked:?}");
        hasher.update(line.as_bytes());
    }
    hex(&hasher.finalize())
}

/// Indices of the `depth` largest scores, best first; ties go to the smaller index.
pub fn best(scores: &[f32], depth: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if depth < order.len() {
        order.select_nth_unstable_by(depth, by_score);
        order.truncate(depth);
    }
    order.sort_unstable_by(by_score);
    order
}

#[cfg(test)]
mod tests;
