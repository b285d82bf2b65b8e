//! Suggests prompts for a catalogue: chooses the texts of a pool, the normaliser and the weight
//! that do best on one half of the queries, and measures the choice on the other half.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};
use std::sync::Arc;

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::calibrate::{ThresholdTargets, is_in_selection_half};
use super::compare::{
    ConfigurationResolver, ConfigurationResult, Corpus, EvaluationError, RankingConfiguration,
    resolve_judgements,
};
use super::evaluation::{EvaluationPlan, evaluate_configurations};
use super::judgements::{JudgedQuery, Judgements};
use super::measures::{Cutoffs, FALSE_HIT_MEASURE};
use super::report::EvaluationReport;
use crate::balance::calibration::Vocabulary;
use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::statistics::dot_product;
use crate::prompts::{EmbeddedPromptSet, MAX_PROMPT_CHARS, MAX_PROMPTS};

/// Sizes of the subsets that are tried in addition to the whole pool.
const TRIED_SUBSET_SIZES: [usize; 4] = [32, 128, 512, 1_024];
/// Normalisers that are tried. `range` depends on the two outermost prompts alone and did worst on
/// every catalogue on which it was measured.
const TRIED_NORMALISERS: [Normaliser; 3] =
    [Normaliser::Nnn, Normaliser::Softmax, Normaliser::Zscore];
/// Weights that are tried. At full strength every normaliser did harm on every catalogue on which
/// it was measured.
const TRIED_WEIGHTS: [f32; 3] = [0.1, 0.25, 0.5];
/// Seed of the random subset with which the chosen one is compared.
const RANDOM_SUBSET_SEED: u64 = 1;

/// Texts that may become prompts: each once, and no judged query.
#[derive(Debug, Clone, Default)]
pub struct PromptPool {
    /// The texts.
    pub texts: Vec<String>,
    /// Number of texts left out because they are judged queries: a prompt with the text of a query
    /// would be measured on itself.
    pub excluded_judged_count: usize,
    /// Number of texts left out because the pool was full.
    pub excluded_overflow_count: usize,
    /// Texts of the judged queries, in lower case, which the pool refuses.
    excluded_query_texts: BTreeSet<String>,
    /// Texts that were added, in lower case.
    seen_texts: BTreeSet<String>,
}

impl PromptPool {
    /// Creates an empty pool that will not accept the texts of judged queries.
    pub fn without_judged_queries(queries: &[JudgedQuery]) -> Self {
        let judged = queries.iter().filter(|query| query.judgements != Judgements::Unjudged);
        let judged_queries = judged.map(|query| query.text.to_lowercase()).collect();
        Self { excluded_query_texts: judged_queries, ..Self::default() }
    }

    /// Creates an empty pool that will not accept these texts.
    pub fn without_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let excluded = texts.into_iter().map(str::to_lowercase).collect();
        Self { excluded_query_texts: excluded, ..Self::default() }
    }

    /// Adds texts. Empty texts, texts that are too long, and duplicates are skipped.
    pub fn add_texts<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) {
        for text in texts.into_iter().map(str::trim) {
            if text.is_empty() || text.chars().count() > MAX_PROMPT_CHARS {
                continue;
            }
            let key = text.to_lowercase();
            if self.excluded_query_texts.contains(&key) {
                self.excluded_judged_count += 1;
            } else if self.seen_texts.insert(key) {
                if self.texts.len() == MAX_PROMPTS {
                    self.excluded_overflow_count += 1;
                } else {
                    self.texts.push(text.to_owned());
                }
            }
        }
    }
}

/// The suggested prompts with the evaluations that support the suggestion.
pub struct PromptSuggestion {
    /// The suggested prompts; `None` if plain CLIP did best.
    pub chosen_prompts: Option<ChosenPrompts>,
    /// Everything that was tried, on the half of the queries on which the prompts were chosen.
    pub selection_report: EvaluationReport,
    /// The chosen configuration compared with plain CLIP, the served one, a random subset and the
    /// whole pool, on the other half of the queries.
    pub test_report: EvaluationReport,
}

/// Chosen prompts and how scores are balanced with them.
#[derive(Clone)]
pub struct ChosenPrompts {
    /// The prompts.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// The formula that balances scores.
    pub normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score, 0 to 1.
    pub weight: f32,
    /// λ of `nnn`. It is the served λ, with which the prompts will be served too.
    pub lambda: f32,
}

/// One half of the queries has no judged query with a relevant image, so that prompts cannot be
/// chosen on one half and measured on the other.
#[derive(Debug, thiserror::Error)]
#[error(
    "--queries: {in_selection_half} judged queries with a right image in the catalogue fall into the half for choosing, {in_test_half} into the half for the test, and neither half can do without; have more queries judged (`relevant`, docs/evaluation.md)"
)]
pub struct HalfWithoutJudgedQueries {
    /// Number of judged queries in the half on which prompts are chosen.
    pub in_selection_half: usize,
    /// Number of judged queries in the half on which they are measured.
    pub in_test_half: usize,
}

/// Returns an error if one half of the queries has no judged query with a relevant image in the
/// corpus.
pub fn check_both_halves_judged(
    queries: &[JudgedQuery],
    corpus: &Corpus,
) -> Result<(), HalfWithoutJudgedQueries> {
    let has_relevant_image =
        |query: &&JudgedQuery| !resolve_judgements(query, corpus).0.ideal_grades().is_empty();
    let judged = queries.iter().filter(has_relevant_image);
    let (selection, test): (Vec<&JudgedQuery>, Vec<&JudgedQuery>) =
        judged.partition(|query| is_in_selection_half(&query.text));
    if selection.is_empty() || test.is_empty() {
        return Err(HalfWithoutJudgedQueries {
            in_selection_half: selection.len(),
            in_test_half: test.len(),
        });
    }
    Ok(())
}

/// Orders texts so that each prefix of the order covers all of them well, and returns the first
/// `max_count` indices: each text adds most to the sum over all texts of the cosine to the nearest
/// chosen one (greedy facility location; within 1 − 1/e of the optimum, Nemhauser et al., 1978).
/// `units` are unit-length embeddings.
pub fn select_by_coverage(units: &[Vec<f32>], max_count: usize) -> Vec<usize> {
    // Starts at 0: cosines below 0 cover nothing.
    let mut covered = vec![0f32; units.len()];
    let gain = |candidate: usize, covered: &[f32]| {
        let unit = &units[candidate];
        let gains = units.iter().zip(covered).map(|(u, c)| (dot_product(unit, u) - c).max(0.0));
        gains.map(f64::from).sum::<f64>()
    };
    let candidates = (0..units.len()).into_par_iter();
    let mut queue: BinaryHeap<CoverageGain> = candidates
        .map(|index| CoverageGain { gain: gain(index, &covered), index, chosen_before: 0 })
        .collect();
    let mut order = Vec::new();
    // What a text adds only falls while others are chosen. So the one at the head of the queue is the best as
    // soon as its gain is up to date, and few are computed again.
    while order.len() < max_count {
        let Some(head) = queue.pop() else { break };
        if head.chosen_before < order.len() {
            let gain = gain(head.index, &covered);
            queue.push(CoverageGain { gain, index: head.index, chosen_before: order.len() });
            continue;
        }
        for (covered, unit) in covered.iter_mut().zip(units) {
            *covered = covered.max(dot_product(&units[head.index], unit));
        }
        order.push(head.index);
    }
    order
}

/// What a text adds to the coverage.
struct CoverageGain {
    gain: f64,
    index: usize,
    /// Number of texts that were chosen when it was computed.
    chosen_before: usize,
}

impl Ord for CoverageGain {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for CoverageGain {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for CoverageGain {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for CoverageGain {}

/// Chooses prompts from `pool`, the set of all texts that may become prompts, for the live table,
/// at the served λ. Blocks for as long as the computation takes. `progress` is called with how many
/// more texts were ranked.
pub fn suggest_prompts(
    resolver: &mut ConfigurationResolver,
    pool: &EmbeddedPromptSet,
    live: &RankingConfiguration,
    queries: &[JudgedQuery],
    catalogue: &str,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<PromptSuggestion, EvaluationError> {
    let (name, pool_size) = (&pool.prompt_set.name, pool.prompt_set.texts.len());
    let sizes: Vec<usize> =
        TRIED_SUBSET_SIZES.into_iter().filter(|size| *size < pool_size).collect();
    let order = select_by_coverage(&pool.prompt_embeddings, sizes.last().copied().unwrap_or(0));
    let mut sets: Vec<Arc<EmbeddedPromptSet>> = sizes
        .iter()
        .map(|size| Arc::new(pool.subset(&format!("{name}-{size}"), &order[..*size])))
        .collect();
    sets.push(Arc::new(pool.subset(&format!("{name}-all"), &(0..pool_size).collect::<Vec<_>>())));

    let raw = RankingConfiguration {
        name: "raw".into(),
        prompt_set: None,
        balance: BalanceParameters::RAW,
        min_score: None,
        calibration: None,
        ..live.clone()
    };
    let mut tried = vec![raw.clone()];
    for set in &sets {
        for normaliser in TRIED_NORMALISERS {
            for weight in TRIED_WEIGHTS {
                tried.push(build_configuration(resolver, set, normaliser, weight));
            }
        }
    }
    let (selection_half, test_half): (Vec<JudgedQuery>, Vec<JudgedQuery>) =
        queries.iter().cloned().partition(|query| is_in_selection_half(&query.text));
    let plan = |queries: Vec<JudgedQuery>, half: &str| EvaluationPlan {
        catalogue_name: catalogue.to_owned(),
        query_source: half.to_owned(),
        queries,
        baseline_name: "raw".into(),
        cutoffs: Cutoffs::default(),
        threshold_targets: ThresholdTargets::default(),
        correction_cost: None,
        notes: Vec::new(),
    };
    let selection_plan = plan(selection_half, "the half of the queries for choosing");
    let selection_report =
        evaluate_configurations(resolver, &tried, selection_plan, token, progress)?.report;
    let best = best_configuration_index(&selection_report);
    let mut compared = vec![raw, RankingConfiguration { name: "live".into(), ..live.clone() }];
    let chosen = best.map(|best| {
        let configuration = &tried[best];
        let BalanceParameters { normaliser, weight, lambda, .. } = configuration.balance;
        let is_chosen = |set: &Arc<EmbeddedPromptSet>| {
            let chosen = configuration.prompt_set.as_ref();
            chosen.is_some_and(|chosen| chosen.statistics_key == set.statistics_key)
        };
        let set = sets[sets.iter().position(is_chosen).unwrap_or(0)].clone();
        let count = set.prompt_set.texts.len();
        compared.push(RankingConfiguration { name: "suggested".into(), ..configuration.clone() });
        // If the whole pool was chosen, there is no random subset of the same size.
        if count < pool_size {
            let mut shuffled: Vec<usize> = (0..pool_size).collect();
            shuffled.shuffle(&mut ChaCha8Rng::seed_from_u64(RANDOM_SUBSET_SEED));
            let random = Arc::new(pool.subset(&format!("{name}-random"), &shuffled[..count]));
            let random = build_configuration(resolver, &random, normaliser, weight);
            compared.push(RankingConfiguration { name: format!("random {count}"), ..random });
            let all = build_configuration(resolver, &sets[sets.len() - 1], normaliser, weight);
            compared.push(RankingConfiguration { name: "whole pool".into(), ..all });
        }
        ChosenPrompts { prompt_set: set, normaliser, weight, lambda }
    });
    let test_plan = plan(test_half, "the half of the queries that nothing was chosen on");
    let test_report =
        evaluate_configurations(resolver, &compared, test_plan, token, progress)?.report;
    Ok(PromptSuggestion { chosen_prompts: chosen, selection_report, test_report })
}

fn build_configuration(
    resolver: &mut ConfigurationResolver,
    set: &Arc<EmbeddedPromptSet>,
    normaliser: Normaliser,
    weight: f32,
) -> RankingConfiguration {
    let statistics = resolver.cached_statistics(0, set);
    let scale = ScaleConstants::from_catalogue(normaliser, statistics.iter().copied());
    // λ of `nnn` is not chosen: the prompts will be served with the λ that is served now.
    let lambda = resolver.state.map_or(&resolver.default_serving, |state| &state.serving).lambda;
    RankingConfiguration {
        name: format!("{}, {} {weight}", set.prompt_set.name, normaliser.name()),
        table_index: 0,
        prompt_set: Some(set.clone()),
        balance: BalanceParameters { normaliser, weight, lambda, scale },
        min_score: None,
        calibration: None,
        vocabulary: Arc::new(Vocabulary::from_texts(
            set.prompt_set.texts.iter().map(String::as_str),
        )),
    }
}

/// Returns the index of the configuration that gains most in false hits and nDCG together, among
/// those with no more false hits than plain CLIP; `None` if none gains.
fn best_configuration_index(report: &EvaluationReport) -> Option<usize> {
    let ndcg = report.measures.iter().find(|name| name.starts_with("nDCG"))?;
    let gain = |result: &ConfigurationResult| {
        let false_hits = report.measure_comparison(result, FALSE_HIT_MEASURE)?.gain.mean;
        let gain = report.measure_comparison(result, ndcg)?.gain.mean - false_hits;
        (false_hits <= 0.0 && gain > 0.0).then_some(gain)
    };
    let results = report.configurations.iter().enumerate();
    let gains = results.filter_map(|(index, result)| Some((index, gain(result)?)));
    gains.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_of_the_order_covers_all_texts() {
        let unit = |angle: f32| vec![angle.cos(), angle.sin()];
        // Three near 0, two near 1.5, one at 0.75: each cluster has a prompt before one has a
        // second.
        let units: Vec<Vec<f32>> = [0.0, 0.02, 0.04, 1.5, 1.52, 0.75].map(unit).into();
        let order = select_by_coverage(&units, 3);
        let cluster = |i: &usize| usize::from(*i >= 3) + usize::from(*i == 5);
        let clusters: BTreeSet<usize> = order.iter().map(cluster).collect();
        assert_eq!(clusters.len(), 3, "{order:?}");
        assert_eq!(select_by_coverage(&units, 99).len(), 6);
        assert_eq!(order, select_naively(&units, 3));
        assert!(select_by_coverage(&[], 3).is_empty());
    }

    /// Chooses the text that adds most, again and again.
    fn select_naively(units: &[Vec<f32>], count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = Vec::new();
        for _ in 0..count {
            let covered = |unit: &Vec<f32>| {
                order.iter().fold(0f32, |most, i| most.max(dot_product(&units[*i], unit)))
            };
            let gain = |candidate: &usize| {
                let gains = units
                    .iter()
                    .map(|u| (dot_product(&units[*candidate], u) - covered(u)).max(0.0));
                gains.map(f64::from).sum::<f64>()
            };
            let remaining = (0..units.len()).filter(|i| !order.contains(i));
            let best = remaining.max_by(|a, b| gain(a).total_cmp(&gain(b)).then(b.cmp(a)));
            order.push(best.unwrap());
        }
        order
    }

    #[test]
    fn the_queue_chooses_what_a_computation_of_every_gain_chooses() {
        let units: Vec<Vec<f32>> =
            (0..90).map(|i| crate::search::testing::clip_like_embedding(i % 80, 12)).collect();
        assert_eq!(select_by_coverage(&units, 40), select_naively(&units, 40));
    }

    #[test]
    fn a_pool_holds_each_text_once_and_no_judged_query() {
        let query =
            |text: &str, judgements| JudgedQuery { text: text.into(), group: None, judgements };
        let queries =
            [query("a red mug", Judgements::NoMatch), query("a hat", Judgements::Unjudged)];
        let mut pool = PromptPool::without_judged_queries(&queries);
        pool.add_texts(["A red mug", "a hat", " A Hat ", "", "a shoe"]);
        assert_eq!(pool.texts, ["a hat", "a shoe"]);
        assert_eq!((pool.excluded_judged_count, pool.excluded_overflow_count), (1, 0));
    }
}
