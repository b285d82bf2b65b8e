//! One evaluation: ranks the queries under every configuration and compares the rankings.

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::calibrate::ThresholdTargets;
use super::compare::{
    ConfigurationComparison, ConfigurationResolver, CorrectionCost, EvaluationError, ImageGrades,
    QueryRanking, Ranker, RankingConfiguration, resolve_judgements,
};
use super::judgements::{
    JudgedQuery, Judgements, NoMatchProbe, builtin_no_match_probes, fingerprint_queries,
};
use super::measures::Cutoffs;
use super::report::{EvaluationReport, QueryCounts};

/// What an evaluation measures, and on which queries.
pub struct EvaluationPlan {
    /// The catalogue as reports name it: its URL, or a description of a synthetic one.
    pub catalogue_name: String,
    /// Where the queries come from, as reports name it.
    pub query_source: String,
    /// The queries to rank.
    pub queries: Vec<JudgedQuery>,
    /// Name of the configuration with which all others are compared.
    pub baseline_name: String,
    /// The ranks down to which the measures go.
    pub cutoffs: Cutoffs,
    /// What chosen thresholds must achieve.
    pub threshold_targets: ThresholdTargets,
    /// The cost of manual correction, if the owner gave it.
    pub correction_cost: Option<CorrectionCost>,
    /// Caveats that a reader of the figures must know.
    pub notes: Vec<String>,
}

impl EvaluationPlan {
    /// Returns how many texts will be ranked: the queries, and the no-match probes if any query is
    /// judged.
    pub fn ranked_text_count(&self) -> usize {
        self.queries.len() + self.no_match_probes().len()
    }

    fn no_match_probes(&self) -> Vec<NoMatchProbe> {
        let is_graded = |query: &JudgedQuery| matches!(query.judgements, Judgements::Graded { .. });
        if self.queries.iter().any(is_graded) { builtin_no_match_probes() } else { Vec::new() }
    }
}

/// A report with the rankings on which it is based.
pub struct Evaluation {
    /// The report.
    pub report: EvaluationReport,
    /// One row per query, then one row per probe; each has one entry per configuration.
    pub rankings: Vec<Vec<QueryRanking>>,
    /// Grades of the judged images of each query.
    pub image_grades: Vec<ImageGrades>,
}

/// Ranks the queries under every configuration and compares the rankings. Blocks for as long as the
/// computation takes. `progress` is called with how many more texts were ranked.
pub fn evaluate_configurations(
    resolver: &mut ConfigurationResolver,
    configurations: &[RankingConfiguration],
    mut plan: EvaluationPlan,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Evaluation, EvaluationError> {
    let corpus = resolver.corpus;
    let mut query_counts = QueryCounts {
        source: plan.query_source.clone(),
        fingerprint: fingerprint_queries(&plan.queries),
        total: plan.queries.len(),
        ..QueryCounts::default()
    };
    let mut image_grades = Vec::with_capacity(plan.queries.len());
    for query in &plan.queries {
        let (grades, missing) = resolve_judgements(query, corpus);
        query_counts.missing_images += missing;
        match &query.judgements {
            Judgements::Unjudged => query_counts.unjudged += 1,
            Judgements::NoMatch => query_counts.judged_no_match += 1,
            Judgements::Graded { .. } if grades.ideal_grades().is_empty() => {
                query_counts.without_relevant_image += 1;
            }
            Judgements::Graded { .. } => query_counts.judged += 1,
        }
        image_grades.push(grades);
    }
    if query_counts.missing_images > 0 {
        plan.notes.push(format!(
            "{} judged images are not in the catalogue and were left out.",
            query_counts.missing_images
        ));
    }
    let probes = plan.no_match_probes();
    query_counts.probes = probes.len();
    let query_texts = plan.queries.iter().map(|query| query.text.as_str());
    let texts: Vec<&str> =
        query_texts.chain(probes.iter().map(|probe| probe.text.as_str())).collect();
    let mut grades_of_texts = image_grades.clone();
    grades_of_texts.resize(texts.len(), ImageGrades::default());
    let baseline = configurations.iter().position(|c| c.name == plan.baseline_name).unwrap_or(0);
    let ranker = Ranker::new(resolver, configurations, plan.cutoffs.depth());
    let rankings = ranker.rank_texts(&texts, &grades_of_texts, token, progress)?;
    let comparison = ConfigurationComparison {
        corpus,
        configurations,
        baseline_index: baseline,
        queries: &plan.queries,
        image_grades: &image_grades,
        probes: &probes,
        rankings: &rankings,
        cutoffs: &plan.cutoffs,
        threshold_targets: plan.threshold_targets,
        correction_cost: plan.correction_cost,
    };
    let report = EvaluationReport {
        fingerprint: String::new(),
        created_at: Utc::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        catalogue: plan.catalogue_name,
        models: corpus.tables.iter().map(|table| table.model_info.clone()).collect(),
        queries: query_counts,
        measures: plan.cutoffs.measure_names(),
        baseline: configurations[baseline].name.clone(),
        cost: plan.correction_cost,
        verdict: String::new(),
        notes: plan.notes,
        configurations: comparison.compare_all(),
    };
    Ok(Evaluation { report: report.with_verdict_and_fingerprint(), rankings, image_grades })
}
