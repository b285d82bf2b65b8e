//! TODO

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::calibrate::ThresholdTargets;
use super::compare::{
    ConfigurationComparison, ConfigurationResolver, CorrectionCost, EvaluationError, ImageGrades,
    QueryRanking, Ranker, RankingConfiguration, resolve_judgements,
};
use super::judgements::{
    JudgedQuery, Judgements, NoMatchProbe, builtin_probes, fingerprint_queries,
};
use super::measures::Cutoffs;
use super::report::{EvaluationReport, QueryCounts};

/// What is to be found out.
pub struct EvaluationPlan {
    /// The catalogue: its address, or what was drawn.
    pub catalogue: String,
    /// Where the queries come from.
    pub query_source: String,
    /// The queries.
    pub queries: Vec<JudgedQuery>,
    /// With which configuration all others are compared: its name.
    pub baseline: String,
    /// How far down is looked.
    pub cutoffs: Cutoffs,
    /// What thresholds are to reach.
    pub targets: ThresholdTargets,
    /// What hand correction costs.
    pub cost: Option<CorrectionCost>,
    /// What must be known to read the figures.
    pub notes: Vec<String>,
}

impl EvaluationPlan {
    /// Texts that will be ranked: the queries, and probes where something is judged.
    pub fn ranked_text_count(&self) -> usize {
        self.queries.len() + self.no_match_probes().len()
    }

    fn no_match_probes(&self) -> Vec<NoMatchProbe> {
        let judged = |asked: &JudgedQuery| matches!(asked.judgements, Judgements::Graded { .. });
        if self.queries.iter().any(judged) { builtin_probes() } else { Vec::new() }
    }
}

/// A report with the rankings that it rests on.
pub struct Evaluation {
    /// The report.
    pub report: EvaluationReport,
    /// A row a query, then a row a probe; in it an entry a configuration.
    pub rankings: Vec<Vec<QueryRanking>>,
    /// The right images of each query.
    pub image_grades: Vec<ImageGrades>,
}

/// Ranks and compares. Computes: may block for long. `progress` hears of how many more texts are
/// ranked.
pub fn evaluate(
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    mut plan: EvaluationPlan,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Evaluation, EvaluationError> {
    let corpus = resolver.corpus;
    let mut queries = QueryCounts {
        source: plan.query_source.clone(),
        fingerprint: fingerprint_queries(&plan.queries),
        total: plan.queries.len(),
        ..QueryCounts::default()
    };
    let mut image_grades = Vec::with_capacity(plan.queries.len());
    for asked in &plan.queries {
        let (found, missing) = resolve_judgements(asked, corpus);
        queries.missing_images += missing;
        match &asked.judgements {
            Judgements::Unjudged => queries.unjudged += 1,
            Judgements::NoMatch => queries.judged_no_match += 1,
            Judgements::Graded { .. } if found.ideal_grades().is_empty() => {
                queries.without_relevant_image += 1
            }
            Judgements::Graded { .. } => queries.judged += 1,
        }
        image_grades.push(found);
    }
    if queries.missing_images > 0 {
        plan.notes.push(format!(
            "{} judged images are not in the catalogue and were left out.",
            queries.missing_images
        ));
    }
    let probes = plan.no_match_probes();
    queries.probes = probes.len();
    let asked = plan.queries.iter().map(|asked| asked.text.as_str());
    let texts: Vec<&str> = asked.chain(probes.iter().map(|probe| probe.text.as_str())).collect();
    let mut all_right = image_grades.clone();
    all_right.resize(texts.len(), ImageGrades::default());
    let baseline = configurations.iter().position(|known| known.name == plan.baseline);
    let baseline = baseline.unwrap_or(0);
    let ranking = Ranker::new(resolver, configurations, plan.cutoffs.depth());
    let ranked = ranking.rank(&texts, &all_right, token, progress)?;
    let comparison = ConfigurationComparison {
        corpus,
        configurations,
        baseline,
        queries: &plan.queries,
        image_grades: &image_grades,
        probes: &probes,
        rankings: &ranked,
        cutoffs: &plan.cutoffs,
        targets: plan.targets,
        cost: plan.cost,
    };
    let report = EvaluationReport {
        fingerprint: String::new(),
        created_at: Utc::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        catalogue: plan.catalogue,
        models: corpus.tables.iter().map(|table| table.model_info.clone()).collect(),
        queries,
        measures: plan.cutoffs.measure_names(),
        baseline: configurations[baseline].name.clone(),
        cost: plan.cost,
        verdict: String::new(),
        notes: plan.notes,
        configurations: comparison.compare_all(),
    };
    Ok(Evaluation { report: report.with_verdict_and_fingerprint(), rankings: ranked, image_grades })
}
