//! Ranks arrays under every run, measures the bank, and compares the rankings.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::bank::measure_bank;
use super::runs::{ArrayRun, DEFAULT_NAME, RAW_NAME};
use super::scan::{ExactRanking, Scan, ScanResult};
use crate::balance::bank::BankReport;
use crate::balance::calibration::{BestHitFeatures, ScoreDistribution};
use crate::balance::fit::{BankFit, concentration};
use crate::balance::normalise::{BalanceParameters, ExactTransform, Normaliser, ScaleConstants};
use crate::balance::proposal::ProposedBalance;
use crate::balance::statistics::{StatisticsKey, StatisticsSettings};
use crate::evaluate::calibrate::ThresholdTargets;
use crate::evaluate::compare::{
    ComparedConfiguration, ConfigurationSpec, CorpusImage, ImageGrades, MAX_IMAGES, ModelInfo,
    QueryRanking, ReportedConfiguration,
};
use crate::evaluate::evaluation::{EvaluationPlan, RankedQueries};
use crate::evaluate::judgements::{JudgedQuery, Judgements, MAX_QUERIES, NoMatchKind};
use crate::evaluate::measures::interval::ConfidenceInterval;
use crate::evaluate::measures::{Cutoffs, FALSE_HIT_MEASURE, MAP_MEASURE};
use crate::evaluate::report::EvaluationReport;
use crate::record::arrays::{ArrayError, EmbeddingArray};
use crate::record::{Attributes, ImageId, to_hex};

/// Most prompts: all of an image's scores for them are sorted.
const MAX_PROMPTS: usize = 20_000;

/// Arrays and judgements.
pub struct ArrayInputs {
    /// Embeddings of the images.
    pub images: EmbeddingArray,
    /// Embeddings of the queries.
    pub queries: EmbeddingArray,
    /// Embeddings of the prompts: the bank.
    pub prompts: EmbeddingArray,
    /// The right images of each query; a query without any is not measured.
    pub relevant: Vec<Vec<u32>>,
    /// Embeddings of queries that no image answers.
    pub unanswerable: Option<EmbeddingArray>,
    /// The model's logit scale L, which `softmax` needs.
    pub logit_scale: f32,
}

/// The main figures of a run.
#[derive(Debug, Clone, Serialize)]
pub struct RunSummary {
    /// Name of the run.
    pub name: String,
    /// The formula.
    pub normaliser: Normaliser,
    /// The weight.
    pub weight: f32,
    /// k of `nnn`.
    pub top_k: usize,
    /// λ of `nnn`.
    pub lambda: f32,
    /// Temperature of `softmax`, as a factor of the logit scale.
    pub temperature: f32,
    /// Share of the queries whose first result is right.
    pub hit_at_1: f64,
    /// Mean share of the right images that are among the first ten.
    pub recall_at_10: f64,
    /// Mean average precision over the whole ranking.
    pub map: f64,
    /// Differences from plain CLIP, by measure, paired by query.
    pub gain: BTreeMap<&'static str, ConfidenceInterval>,
    /// Share of the queries whose first result is wrong.
    pub false_hits: f64,
    /// How well the score of the first result separates judged from unanswerable queries; `None` without
    /// unanswerable ones.
    pub auroc: Option<f64>,
}

/// The result of an evaluation of arrays.
pub struct ArrayEvaluation {
    /// The report, as of any evaluation.
    pub report: EvaluationReport,
    /// The main figures of each run, in the order of the report's configurations.
    pub runs: Vec<RunSummary>,
    /// What is known of the bank, and the weight that `default` has because of it.
    pub bank: BankReport,
    /// α and β of every image, by run; empty for plain CLIP.
    pub transforms: Vec<Vec<ExactTransform>>,
    /// The images as reports name them.
    pub images: Vec<CorpusImage>,
    /// One row per query, the unanswerable ones last; each has one entry per run.
    pub rankings: Vec<Vec<QueryRanking>>,
    /// Grades of the right images of each query.
    pub image_grades: Vec<ImageGrades>,
}

/// Why arrays cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum ArrayEvaluationError {
    /// An array is refused.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// A configuration is refused.
    #[error(transparent)]
    Run(#[from] super::runs::RunSpecError),
}

/// Ranks the queries by plain CLIP, by what is proposed for the bank, and by the given configurations, and
/// compares the rankings. Blocks for as long as it takes. `progress` is called with how many more images
/// are ranked.
pub fn evaluate_arrays(
    inputs: &ArrayInputs,
    specs: &[ConfigurationSpec],
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ArrayEvaluation, ArrayEvaluationError> {
    check_sizes(inputs)?;
    // The proposal is known only after the queries were ranked: all that it may choose are ranked too.
    let proposable = ArrayRun::proposable();
    let mut ranked_runs = vec![ArrayRun::raw()];
    ranked_runs.extend(proposable.iter().cloned());
    ranked_runs.extend(ArrayRun::from_specs(specs)?);
    let (corrections, mut balances) = balance_images(inputs, &ranked_runs);
    let (result, fingerprint) = rayon::join(
        || rank_queries(inputs, &mut balances, progress),
        || to_hex(&inputs.images.fingerprint()),
    );
    let bank = measure_fit(inputs, &corrections, &result);
    let weight = bank.proposed_weight;
    // Plain CLIP, then what is proposed, which ranks as plain CLIP does at weight 0, then the others.
    let proposed = ArrayRun::from_proposal(DEFAULT_NAME, &ProposedBalance::with_weight(weight));
    let proposed_index =
        proposable.iter().position(|run| run.weight == weight).map_or(0, |i| i + 1);
    let mut kept: Vec<usize> = vec![0, proposed_index];
    kept.extend(proposable.len() + 1..ranked_runs.len());
    let mut runs: Vec<ArrayRun> = kept.iter().map(|run| ranked_runs[*run].clone()).collect();
    runs[1] = proposed;
    let of_query = |row: &Vec<ExactRanking>| {
        kept.iter().map(|run| to_query_ranking(&row[*run])).collect::<Vec<_>>()
    };
    let rankings: Vec<Vec<QueryRanking>> = result.rankings.iter().map(of_query).collect();
    let transforms = kept.iter().map(|run| balances[*run].transforms.clone()).collect();
    let scales: Vec<ScaleConstants> = kept.iter().map(|run| balances[*run].scale).collect();
    let images: Vec<CorpusImage> =
        (0..inputs.images.rows()).map(|row| describe_image(&inputs.images, row)).collect();
    let image_grades = grade_images(inputs);
    let model = describe_model(inputs, fingerprint);
    let ranked = RankedQueries {
        images: &images,
        models: vec![model.clone()],
        configurations: &describe_runs(inputs, &runs, &scales, &model, &bank),
        image_grades: &image_grades,
        missing_images: 0,
        probes: &[],
        rankings: &rankings,
    };
    let report = ranked.compare(EvaluationPlan {
        catalogue_name: inputs.images.name().to_owned(),
        query_source: inputs.queries.name().to_owned(),
        queries: describe_queries(inputs),
        baseline_name: RAW_NAME.to_owned(),
        cutoffs: Cutoffs::default(),
        threshold_targets: ThresholdTargets::default(),
        correction_cost: None,
        notes: describe_bank(inputs, &bank, &runs[1]),
    });
    let runs = runs.iter().enumerate().map(|(i, run)| summarise_run(run, &report, i)).collect();
    Ok(ArrayEvaluation { report, runs, bank, transforms, images, rankings, image_grades })
}

/// Checks that the arrays belong together and are not too large.
fn check_sizes(inputs: &ArrayInputs) -> Result<(), ArrayError> {
    let ArrayInputs { images, queries, prompts, unanswerable, .. } = inputs;
    let texts = [Some(queries), Some(prompts), unanswerable.as_ref()].into_iter().flatten();
    for array in texts {
        if array.dimension() != images.dimension() {
            let reason = format!(
                "has rows of {} values, but {} has rows of {}; give embeddings of one model",
                array.dimension(),
                images.name(),
                images.dimension()
            );
            return Err(ArrayError::new(array.name(), reason));
        }
    }
    let limits = [
        (Some(images), MAX_IMAGES),
        (Some(queries), MAX_QUERIES),
        (Some(prompts), MAX_PROMPTS),
        (unanswerable.as_ref(), MAX_QUERIES),
    ];
    for (array, limit) in limits {
        if let Some(array) = array.filter(|array| array.rows() > limit) {
            let reason = format!("has {} rows, more than {limit}; take a sample", array.rows());
            return Err(ArrayError::new(array.name(), reason));
        }
    }
    Ok(())
}

/// α and β of every image, none for plain CLIP, and the scale constants that they contain.
struct RunBalance {
    transforms: Vec<ExactTransform>,
    scale: ScaleConstants,
}

/// Returns the correction of each image by the bank, and the balance of each run.
fn balance_images(inputs: &ArrayInputs, runs: &[ArrayRun]) -> (Vec<f64>, Vec<RunBalance>) {
    let mut settings: Vec<StatisticsSettings> = Vec::new();
    for run in runs {
        if !settings.contains(&run.statistics) {
            settings.push(run.statistics);
        }
    }
    let scores = measure_bank(&inputs.images, &inputs.prompts, &settings, inputs.logit_scale);
    let balance = |run: &ArrayRun| {
        if run.normaliser == Normaliser::Raw {
            return RunBalance { transforms: Vec::new(), scale: ScaleConstants::default() };
        }
        let index = settings.iter().position(|known| *known == run.statistics).unwrap_or(0);
        let softmax_scale = f64::from(run.statistics.temperature) * f64::from(inputs.logit_scale);
        let statistics = &scores.statistics[index];
        let (transforms, scale) = run.balance().exact_transforms(statistics, softmax_scale);
        RunBalance { transforms, scale }
    };
    let balances = runs.iter().map(balance).collect();
    (scores.corrections, balances)
}

/// Ranks all queries, the unanswerable ones last.
fn rank_queries(
    inputs: &ArrayInputs,
    balances: &mut [RunBalance],
    progress: &(dyn Fn(u64) + Sync),
) -> ScanResult {
    let units = |array: &EmbeddingArray| -> Vec<Vec<f64>> {
        (0..array.rows()).map(|row| array.unit_row(row)).collect()
    };
    let mut queries = units(&inputs.queries);
    queries.extend(inputs.unanswerable.iter().flat_map(units));
    let mut relevant = inputs.relevant.clone();
    relevant.resize(queries.len(), Vec::new());
    let transforms: Vec<Vec<ExactTransform>> =
        balances.iter_mut().map(|balance| std::mem::take(&mut balance.transforms)).collect();
    let scan = Scan {
        images: &inputs.images,
        queries: &queries,
        correcting_queries: inputs.queries.rows(),
        relevant: &relevant,
        transforms: &transforms,
        depth: Cutoffs::default().depth(),
    };
    let result = scan.run(progress);
    balances.iter_mut().zip(transforms).for_each(|(balance, t)| balance.transforms = t);
    result
}

/// Measures the bank on the queries, the unanswerable ones excluded.
fn measure_fit(inputs: &ArrayInputs, corrections: &[f64], result: &ScanResult) -> BankReport {
    let queries = inputs.queries.rows();
    let raw = result.rankings.iter().take(queries).filter_map(|row| row.first()?.best.first());
    let first_images: Vec<usize> = raw.map(|(image, _)| *image as usize).collect();
    BankReport::new(
        inputs.prompts.rows(),
        inputs.prompts.row_bytes().collect::<HashSet<_>>().len(),
        BankFit::from_corrections(corrections, &result.corrections, queries, &result.sample),
        concentration(corrections, &first_images),
    )
}

fn to_query_ranking(ranking: &ExactRanking) -> QueryRanking {
    QueryRanking {
        top_results: ranking.best.iter().map(|(image, score)| (*image, *score as f32)).collect(),
        right_ranks: ranking.right_ranks.clone(),
        best_hit_features: BestHitFeatures {
            score: ranking.best.first().map_or(f32::NEG_INFINITY, |(_, score)| *score as f32),
            // No rule for texts that match nothing is chosen without probes, which need a model.
            background: ScoreDistribution { mean: 0.0, std: 1.0 },
            known_word_share: 0.0,
        },
    }
}

/// Returns an image with its row as id, and what the files say of it as title.
fn describe_image(images: &EmbeddingArray, row: usize) -> CorpusImage {
    let mut attributes = Attributes::new();
    if let Some(label) = images.label(row) {
        attributes.insert("title".into(), label.to_owned());
    }
    CorpusImage { image_id: ImageId::from_number(row), uri: None, attributes }
}

/// Returns the queries with their right images, and then the unanswerable ones.
fn describe_queries(inputs: &ArrayInputs) -> Vec<JudgedQuery> {
    let describe = |array: &EmbeddingArray, row: usize, kind: &str, judgements| {
        let text = array.label(row).map_or_else(|| format!("{kind} {row}"), str::to_owned);
        JudgedQuery { text, group: None, judgements }
    };
    let answerable = inputs.relevant.iter().enumerate().map(|(row, images)| {
        let grades: BTreeMap<ImageId, f64> =
            images.iter().map(|image| (ImageId::from_number(*image as usize), 1.0)).collect();
        let judgements = if grades.is_empty() {
            Judgements::Unjudged
        } else {
            Judgements::Graded { grades, judged_only: false }
        };
        describe(&inputs.queries, row, "query", judgements)
    });
    let unanswerable = inputs.unanswerable.iter().flat_map(|array| {
        let rows = 0..array.rows();
        rows.map(move |row| describe(array, row, "unanswerable", Judgements::NoMatch))
    });
    answerable.chain(unanswerable).collect()
}

/// Returns the grades of the right images: 1 each.
fn grade_images(inputs: &ArrayInputs) -> Vec<ImageGrades> {
    let grade = |images: &Vec<u32>| ImageGrades {
        grades_by_position: images.iter().map(|image| (*image, 1.0)).collect(),
        judged_only: false,
    };
    let unanswerable = inputs.unanswerable.as_ref().map_or(0, EmbeddingArray::rows);
    let mut grades: Vec<ImageGrades> = inputs.relevant.iter().map(grade).collect();
    grades.resize(grades.len() + unanswerable, ImageGrades::default());
    grades
}

fn describe_model(inputs: &ArrayInputs, fingerprint: String) -> ModelInfo {
    ModelInfo {
        role: "arrays".to_owned(),
        generation: inputs.images.name().to_owned(),
        model: format!("embeddings of {} values", inputs.images.dimension()),
        fingerprint,
        logit_scale: inputs.logit_scale,
        images: inputs.images.rows(),
        table_version: 0,
    }
}

fn describe_runs(
    inputs: &ArrayInputs,
    runs: &[ArrayRun],
    scales: &[ScaleConstants],
    model: &ModelInfo,
    bank: &BankReport,
) -> Vec<ComparedConfiguration> {
    let fingerprint = to_hex(&inputs.prompts.fingerprint());
    let key = |settings: StatisticsSettings| {
        StatisticsKey::new("prompts", 1, &fingerprint, inputs.logit_scale, settings)
    };
    let describe = |(run, scale): (&ArrayRun, &ScaleConstants)| ComparedConfiguration {
        name: run.name.clone(),
        setting: ReportedConfiguration {
            generation: model.generation.clone(),
            model: model.fingerprint.clone(),
            prompt_set: (run.normaliser != Normaliser::Raw).then(|| key(run.statistics)),
            balance: BalanceParameters { scale: *scale, ..run.balance() },
            min_score: None,
        },
        image_count: inputs.images.rows(),
        bank: (run.normaliser != Normaliser::Raw).then(|| bank.clone()),
    };
    runs.iter().zip(scales).map(describe).collect()
}

/// Describes the bank and the proposal in sentences, and what makes the figures doubtful.
fn describe_bank(inputs: &ArrayInputs, bank: &BankReport, proposed: &ArrayRun) -> Vec<String> {
    let mut notes = vec![format!(
        "Proposed as {DEFAULT_NAME}: {} at weight {}, because {}.",
        proposed.normaliser.name(),
        proposed.weight,
        bank.reason
    )];
    let queries: HashSet<Vec<u8>> = inputs.queries.row_bytes().collect();
    let shared = inputs.prompts.row_bytes().filter(|prompt| queries.contains(prompt)).count();
    if shared > 0 {
        notes.push(format!(
            "{shared} prompts are queries too, so that these queries are measured on themselves; leave them out of the bank."
        ));
    }
    notes
}

/// Returns the main figures of the run that is the report's configuration `index`.
fn summarise_run(run: &ArrayRun, report: &EvaluationReport, index: usize) -> RunSummary {
    let result = &report.configurations[index];
    let compared = |measure: &str| report.measure_comparison(result, measure);
    // Every file of pairs has a pair, so that there are measures.
    let value = |measure: &str| compared(measure).map_or(0.0, |c| c.value.mean);
    let measures = [
        ("hit_at_1", "hit@1"),
        ("recall_at_10", "recall@10"),
        ("map", MAP_MEASURE),
        ("false_hits", FALSE_HIT_MEASURE),
    ];
    let mut gain: BTreeMap<&'static str, ConfidenceInterval> = measures
        .into_iter()
        .filter_map(|(name, measure)| Some((name, compared(measure)?.gain)))
        .collect();
    let separation = result.separation.iter().find(|s| s.kind == NoMatchKind::Absent);
    if let Some(separation) = separation {
        gain.insert("auroc", separation.gain);
    }
    RunSummary {
        name: run.name.clone(),
        normaliser: run.normaliser,
        weight: run.weight,
        top_k: run.statistics.top_k,
        lambda: run.lambda,
        temperature: run.statistics.temperature,
        hit_at_1: value("hit@1"),
        recall_at_10: value("recall@10"),
        map: value(MAP_MEASURE),
        gain,
        false_hits: value(FALSE_HIT_MEASURE),
        auroc: separation.map(|separation| separation.auroc.mean),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::arrays::Values;

    fn array(name: &str, rows: &[[f64; 3]]) -> EmbeddingArray {
        let values = Values::F64(rows.as_flattened().to_vec());
        EmbeddingArray::new(name, values, [rows.len(), 3]).unwrap()
    }

    /// Image 0 is a hub: near to every query, and to both prompts, although it answers none.
    fn inputs() -> ArrayInputs {
        let images =
            [[0.7, 0.7, 0.1], [0.6, 0.0, 0.8], [0.0, 0.6, 0.8], [0.0, 0.5, -1.0], [0.5, 0.0, -1.0]];
        let queries = [[0.9, 0.4, 0.2], [0.4, 0.9, 0.2]];
        ArrayInputs {
            images: array("images", &images),
            queries: array("queries", &queries.repeat(32)),
            prompts: array("prompts", &[[1.0, 0.5, 0.0], [0.5, 1.0, 0.0]]),
            relevant: (0..64).map(|query| vec![1 + query % 2]).collect(),
            unanswerable: Some(array("none", &[[-1.0, 0.1, 0.2], [0.1, -1.0, 0.3]])),
            logit_scale: 100.0,
        }
    }

    #[test]
    fn a_run_that_balances_the_hub_gains_and_the_default_is_what_is_proposed() {
        let spec = "normaliser=nnn,weight=1,top_k=1,name=strong";
        let spec = ConfigurationSpec::try_from(spec).unwrap();
        let evaluated = evaluate_arrays(&inputs(), &[spec], &|_| {}).unwrap();
        let names: Vec<&str> = evaluated.runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(names, ["raw", "default", "strong"]);
        let [raw, default, strong] = &evaluated.runs[..] else { panic!("{names:?}") };
        assert_eq!((raw.hit_at_1, raw.false_hits, raw.map), (0.0, 1.0, 0.5));
        assert_eq!((raw.gain["hit_at_1"].mean, raw.normaliser), (0.0, Normaliser::Raw));
        assert_eq!((strong.hit_at_1, strong.gain["map"].mean), (1.0, 0.5), "{strong:?}");
        let bank = &evaluated.bank;
        assert_eq!((bank.texts, bank.fit.unwrap().queries), (2, 64));
        // Two texts: the weight is never raised, whatever the fit.
        assert!(bank.fit.unwrap().value > 0.6, "{bank:?}");
        assert_eq!(default.weight, 0.25);
        assert!(bank.reason.contains("2 texts"), "{}", bank.reason);
        assert!(raw.auroc.is_some() && strong.gain.contains_key("auroc"));
        assert_eq!(evaluated.transforms[0], []);
        assert_eq!(evaluated.transforms[2].len(), 5);
        assert_eq!(evaluated.report.queries.judged_no_match, 2);
        assert!(evaluated.report.notes[0].contains("Proposed as default: nnn at weight 0.25"));
    }

    #[test]
    fn few_queries_give_no_fit_and_arrays_of_two_models_are_refused() {
        let mut inputs = inputs();
        inputs.queries = array("queries", &[[0.9, 0.4, 0.2], [1.0, 0.5, 0.0]]);
        inputs.relevant = vec![vec![1], vec![]];
        let evaluated = evaluate_arrays(&inputs, &[], &|_| {}).unwrap();
        assert_eq!((evaluated.bank.fit, evaluated.bank.concentration), (None, None));
        assert_eq!(evaluated.report.queries.unjudged, 1);
        let notes = evaluated.report.notes.join(" ");
        assert!(notes.contains("is not known") && notes.contains("1 prompts are queries too"));
        let other = Values::F64(vec![1.0, 0.0]);
        inputs.prompts = EmbeddingArray::new("prompts", other, [1, 2]).unwrap();
        let error = evaluate_arrays(&inputs, &[], &|_| {}).err().unwrap().to_string();
        assert!(error.contains("prompts: has rows of 2 values, but images has rows of 3"));
    }
}
