//! One evaluation: ranks the queries under every configuration and compares the rankings.

use std::collections::{BTreeMap, HashSet};

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::calibrate::ThresholdTargets;
use super::compare::{
    ComparedConfiguration, ConfigurationComparison, ConfigurationResolver, Corpus, CorpusImage,
    CorrectionCost, EvaluationError, ImageGrades, ModelInfo, QueryRanking, Ranker,
    RankingConfiguration, resolve_judgements,
};
use super::judgements::{
    JudgedQuery, Judgements, NoMatchProbe, builtin_no_match_probes, fingerprint_queries,
};
use super::measures::Cutoffs;
use super::report::{EvaluationReport, QueryCounts};
use crate::balance::bank::{BankReport, QueriedImages};
use crate::balance::statistics::StatisticsKey;
use crate::record::Embedding;

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
    let mut missing_images = 0;
    let mut image_grades = Vec::with_capacity(plan.queries.len());
    for query in &plan.queries {
        let (grades, missing) = resolve_judgements(query, corpus);
        missing_images += missing;
        image_grades.push(grades);
    }
    if missing_images > 0 {
        plan.notes.push(format!(
            "{missing_images} judged images are not in the catalogue and were left out."
        ));
    }
    let probes = plan.no_match_probes();
    let query_texts = plan.queries.iter().map(|query| query.text.as_str());
    let texts: Vec<&str> =
        query_texts.chain(probes.iter().map(|probe| probe.text.as_str())).collect();
    let mut grades_of_texts = image_grades.clone();
    grades_of_texts.resize(texts.len(), ImageGrades::default());
    let ranker = Ranker::new(resolver, configurations, plan.cutoffs.depth());
    let embeddings = ranker.embed_texts(&texts)?;
    let rankings = ranker.rank_texts(&texts, &embeddings, &grades_of_texts, token, progress)?;
    let banks = measure_banks(corpus, configurations, &plan.queries, &embeddings);
    let compared = configurations.iter().zip(banks).map(|(c, bank)| c.to_compared(corpus, bank));
    let compared: Vec<ComparedConfiguration> = compared.collect();
    let ranked = RankedQueries {
        images: &corpus.images,
        models: corpus.tables.iter().map(|table| table.model_info.clone()).collect(),
        configurations: &compared,
        image_grades: &image_grades,
        missing_images,
        probes: &probes,
        rankings: &rankings,
    };
    let report = ranked.compare(plan);
    Ok(Evaluation { report, rankings, image_grades })
}

/// Measures how the prompt set of each configuration fits the queries, each different text once.
/// `embeddings` are those of all ranked texts by table, of which the queries come first.
fn measure_banks(
    corpus: &Corpus,
    configurations: &[RankingConfiguration],
    queries: &[JudgedQuery],
    embeddings: &[Vec<Vec<f32>>],
) -> Vec<Option<BankReport>> {
    let mut seen = HashSet::new();
    let distinct: Vec<usize> =
        (0..queries.len()).filter(|query| seen.insert(queries[*query].text.as_str())).collect();
    let mut images_by_table: BTreeMap<usize, QueriedImages> = BTreeMap::new();
    let mut reports: BTreeMap<(usize, StatisticsKey), BankReport> = BTreeMap::new();
    let mut measure = |configuration: &RankingConfiguration| {
        let set = configuration.prompt_set.as_ref()?;
        let table_index = configuration.table_index;
        let images = images_by_table.entry(table_index).or_insert_with(|| {
            let images = corpus.tables[table_index].embeddings();
            let units: Vec<Vec<f32>> =
                distinct.iter().map(|query| embeddings[table_index][*query].clone()).collect();
            QueriedImages::new(images.iter().map(Embedding::values).collect(), &units)
        });
        let report = reports
            .entry((table_index, set.statistics_key.clone()))
            .or_insert_with(|| images.measure_bank(&set.prompt_embeddings));
        Some(report.clone())
    };
    configurations.iter().map(&mut measure).collect()
}

/// The rankings of the queries of a plan, with what a report says about them.
pub(super) struct RankedQueries<'a> {
    /// The images that were ranked.
    pub images: &'a [CorpusImage],
    /// The models whose embeddings were ranked.
    pub models: Vec<ModelInfo>,
    /// The configurations that ranked them.
    pub configurations: &'a [ComparedConfiguration],
    /// Grades of the judged images of each query of the plan.
    pub image_grades: &'a [ImageGrades],
    /// Judged images that were not ranked because they are not in the catalogue.
    pub missing_images: usize,
    /// Texts that match no image.
    pub probes: &'a [NoMatchProbe],
    /// One row per query, then one row per probe; each has one entry per configuration.
    pub rankings: &'a [Vec<QueryRanking>],
}

impl RankedQueries<'_> {
    /// Compares the rankings with those of the plan's baseline.
    pub fn compare(self, plan: EvaluationPlan) -> EvaluationReport {
        let baseline_index =
            self.configurations.iter().position(|c| c.name == plan.baseline_name).unwrap_or(0);
        let queries = self.count_queries(&plan);
        let comparison = ConfigurationComparison {
            images: self.images,
            configurations: self.configurations,
            baseline_index,
            queries: &plan.queries,
            image_grades: self.image_grades,
            probes: self.probes,
            rankings: self.rankings,
            cutoffs: &plan.cutoffs,
            threshold_targets: plan.threshold_targets,
            correction_cost: plan.correction_cost,
        };
        let configurations = comparison.compare_all();
        let report = EvaluationReport {
            fingerprint: String::new(),
            created_at: Utc::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            catalogue: plan.catalogue_name,
            models: self.models,
            queries,
            measures: plan.cutoffs.measure_names(),
            baseline: self.configurations[baseline_index].name.clone(),
            cost: plan.correction_cost,
            verdict: String::new(),
            notes: plan.notes,
            configurations,
        };
        report.with_verdict_and_fingerprint()
    }

    fn count_queries(&self, plan: &EvaluationPlan) -> QueryCounts {
        let mut counts = QueryCounts {
            source: plan.query_source.clone(),
            fingerprint: fingerprint_queries(&plan.queries),
            total: plan.queries.len(),
            missing_images: self.missing_images,
            probes: self.probes.len(),
            ..QueryCounts::default()
        };
        for (query, grades) in plan.queries.iter().zip(self.image_grades) {
            match &query.judgements {
                Judgements::Unjudged => counts.unjudged += 1,
                Judgements::NoMatch => counts.judged_no_match += 1,
                Judgements::Graded { .. } if grades.ideal_grades().is_empty() => {
                    counts.without_relevant_image += 1;
                }
                Judgements::Graded { .. } => counts.judged += 1,
            }
        }
        counts
    }
}
