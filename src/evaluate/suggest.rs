//! Prompts for a catalogue: which texts of a pool, with which normaliser and weight, do best on one
//! half of the queries, and what that is worth on the other.

use std::collections::BTreeSet;
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
use super::evaluation::{EvaluationPlan, evaluate};
use super::judgements::{JudgedQuery, Judgements};
use super::measures::{Cutoffs, FALSE_HIT_MEASURE};
use super::report::EvaluationReport;
use crate::balance::calibration::Vocabulary;
use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::statistics::dot_product;
use crate::prompts::{EmbeddedPromptSet, MAX_PROMPT_CHARS, MAX_PROMPTS};

/// Sizes of the subsets that are tried, besides the whole pool.
const TRIED_SUBSET_SIZES: [usize; 4] = [32, 128, 512, 1_024];
/// Normalisers that are tried. `range` hangs on the two outermost prompts and did worst wherever it
/// was measured.
const TRIED_NORMALISERS: [Normaliser; 3] =
    [Normaliser::Nnn, Normaliser::Softmax, Normaliser::Zscore];
/// Weights that are tried; at full strength every normaliser did harm wherever it was measured.
const TRIED_WEIGHTS: [f32; 3] = [0.1, 0.25, 0.5];
/// Decides the random subset that stands beside the chosen one.
const RANDOM_SUBSET_SEED: u64 = 1;

/// Texts that may become prompts, each once, none of them a judged query.
#[derive(Debug, Clone, Default)]
pub struct PromptPool {
    /// The texts.
    pub texts: Vec<String>,
    /// How many texts were left out because they stand among the judged queries: a prompt that says
    /// what a query says would be measured on itself.
    pub excluded_as_judged: usize,
    /// How many were left out because the pool was full.
    pub excluded_as_full: usize,
    judged_queries: BTreeSet<String>,
    seen_texts: BTreeSet<String>,
}

impl PromptPool {
    /// An empty pool, closed to the queries of which something is known.
    pub fn without_judged_queries(asked: &[JudgedQuery]) -> Self {
        let judged = asked.iter().filter(|asked| asked.judgements != Judgements::Unjudged);
        let queries = judged.map(|asked| asked.text.to_lowercase()).collect();
        Self { judged_queries: queries, ..Self::default() }
    }

    /// Adds texts; those that are empty, too long or there already are passed over.
    pub fn add_texts<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) {
        for text in texts.into_iter().map(str::trim) {
            if text.is_empty() || text.chars().count() > MAX_PROMPT_CHARS {
                continue;
            }
            let key = text.to_lowercase();
            if self.judged_queries.contains(&key) {
                self.excluded_as_judged += 1;
            } else if self.seen_texts.insert(key) {
                if self.texts.len() == MAX_PROMPTS {
                    self.excluded_as_full += 1;
                } else {
                    self.texts.push(text.to_owned());
                }
            }
        }
    }
}

/// What is suggested, and what speaks for it.
pub struct PromptSuggestion {
    /// The prompts; none where plain CLIP did best.
    pub chosen: Option<ChosenPrompts>,
    /// All that was tried, on the half of the queries that it was chosen on.
    pub selection_report: EvaluationReport,
    /// The chosen one beside plain CLIP, what is served, a random subset and the whole pool, on the
    /// other half of the queries, on which nothing was chosen.
    pub test_report: EvaluationReport,
}

/// A choice.
#[derive(Clone)]
pub struct ChosenPrompts {
    /// The prompts.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// With which formula.
    pub normaliser: Normaliser,
    /// At which weight.
    pub weight: f32,
    /// λ of `nnn`: the one that is served, with which the prompts will be served too.
    pub lambda: f32,
}

/// Nothing can be chosen on one half of the queries, or measured on the other.
#[derive(Debug, thiserror::Error)]
#[error(
    "--queries: {in_selection_half} judged queries with a right image in the catalogue fall into the half for choosing, {in_test_half} into the half for the test, and neither half can do without; have more queries judged (`relevant`, docs/evaluation.md)"
)]
pub struct TooFewJudgedQueries {
    /// Judged queries of the half for choosing.
    pub in_selection_half: usize,
    /// Those of the other half.
    pub in_test_half: usize,
}

/// Refuses queries of which one half has none with a right image in `world`.
pub fn check_enough_judged(
    asked: &[JudgedQuery],
    corpus: &Corpus,
) -> Result<(), TooFewJudgedQueries> {
    let judged =
        asked.iter().filter(|asked| !resolve_judgements(asked, corpus).0.ideal_grades().is_empty());
    let (choosing, test): (Vec<&JudgedQuery>, Vec<&JudgedQuery>) =
        judged.partition(|asked| is_in_selection_half(&asked.text));
    if choosing.is_empty() || test.is_empty() {
        return Err(TooFewJudgedQueries {
            in_selection_half: choosing.len(),
            in_test_half: test.len(),
        });
    }
    Ok(())
}

/// The texts in an order in which every beginning covers all of them as well as it can: greedily,
/// each adds most to Σ over all texts of the cosine to the nearest chosen one (facility location;
/// within 1 − 1/e of the best, Nemhauser et al., 1978). `units` are unit-length embeddings.
pub fn order_by_coverage(units: &[Vec<f32>], max_count: usize) -> Vec<usize> {
    // Cosines below 0 cover nothing.
    let mut covered = vec![0f32; units.len()];
    let mut order = Vec::new();
    let mut remaining: Vec<usize> = (0..units.len()).collect();
    while order.len() < max_count && !remaining.is_empty() {
        let gain = |candidate: &usize| {
            let own = &units[*candidate];
            let more = units.iter().zip(&covered).map(|(u, c)| (dot_product(own, u) - c).max(0.0));
            more.map(f64::from).sum::<f64>()
        };
        let gains: Vec<f64> = remaining.par_iter().map(gain).collect();
        let best =
            (0..remaining.len()).max_by(|a, b| gains[*a].total_cmp(&gains[*b]).then(b.cmp(a)));
        let Some(best) = best else { break };
        let chosen = remaining.remove(best);
        for (covered, unit) in covered.iter_mut().zip(units) {
            *covered = covered.max(dot_product(&units[chosen], unit));
        }
        order.push(chosen);
    }
    order
}

/// Chooses prompts of `pool`, a set of all texts that may be prompts, for the live table, at the λ that
/// is served. Computes: may block for long. `progress` hears of how many more texts are ranked.
pub fn suggest_prompts(
    resolver: &mut ConfigurationResolver,
    pool: &EmbeddedPromptSet,
    live: &RankingConfiguration,
    queries: &[JudgedQuery],
    catalogue: &str,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<PromptSuggestion, EvaluationError> {
    let (name, whole) = (&pool.prompt_set.name, pool.prompt_set.texts.len());
    let sizes: Vec<usize> = TRIED_SUBSET_SIZES.into_iter().filter(|size| *size < whole).collect();
    let order = order_by_coverage(&pool.embeddings, sizes.last().copied().unwrap_or(0));
    let mut sets: Vec<Arc<EmbeddedPromptSet>> = sizes
        .iter()
        .map(|size| Arc::new(pool.subset(&format!("{name}-{size}"), &order[..*size])))
        .collect();
    sets.push(Arc::new(pool.subset(&format!("{name}-all"), &(0..whole).collect::<Vec<_>>())));

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
    let (choosing, test): (Vec<JudgedQuery>, Vec<JudgedQuery>) =
        queries.iter().cloned().partition(|asked| is_in_selection_half(&asked.text));
    let plan = |asked: Vec<JudgedQuery>, half: &str| EvaluationPlan {
        catalogue: catalogue.to_owned(),
        query_source: half.to_owned(),
        queries: asked,
        baseline: "raw".into(),
        cutoffs: Cutoffs::default(),
        targets: ThresholdTargets::default(),
        cost: None,
        notes: Vec::new(),
    };
    let chosen_on = plan(choosing, "the half of the queries for choosing");
    let choosing = evaluate(resolver, &tried, chosen_on, token, progress)?.report;
    let best = best_configuration_index(&choosing);
    let mut compared = vec![raw, RankingConfiguration { name: "live".into(), ..live.clone() }];
    let chosen = best.map(|place| {
        let own = &tried[place];
        let BalanceParameters { normaliser, weight, lambda, .. } = own.balance;
        // The whole pool is a choice as well, of which there is no random subset.
        let place = sets.iter().position(|set| {
            own.prompt_set.as_ref().is_some_and(|s| s.statistics_key == set.statistics_key)
        });
        let set = sets[place.unwrap_or(0)].clone();
        let count = set.prompt_set.texts.len();
        compared.push(RankingConfiguration { name: "suggested".into(), ..own.clone() });
        if count < whole {
            let mut any: Vec<usize> = (0..whole).collect();
            any.shuffle(&mut ChaCha8Rng::seed_from_u64(RANDOM_SUBSET_SEED));
            let random = Arc::new(pool.subset(&format!("{name}-random"), &any[..count]));
            let random = build_configuration(resolver, &random, normaliser, weight);
            compared.push(RankingConfiguration { name: format!("random {count}"), ..random });
            let all = build_configuration(resolver, &sets[sets.len() - 1], normaliser, weight);
            compared.push(RankingConfiguration { name: "whole pool".into(), ..all });
        }
        ChosenPrompts { prompt_set: set, normaliser, weight, lambda }
    });
    let tested = plan(test, "the half of the queries that nothing was chosen on");
    let test = evaluate(resolver, &compared, tested, token, progress)?.report;
    Ok(PromptSuggestion { chosen, selection_report: choosing, test_report: test })
}

fn build_configuration(
    resolver: &mut ConfigurationResolver,
    set: &Arc<EmbeddedPromptSet>,
    normaliser: Normaliser,
    weight: f32,
) -> RankingConfiguration {
    let statistics = resolver.statistics(0, set);
    let scale = ScaleConstants::from_catalogue(normaliser, statistics.iter().copied());
    // What is chosen takes the place of what is served, whose λ stays.
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

/// Of all that show no more false hits than plain CLIP, the one that gains most in false hits and
/// nDCG together; none where none gains.
fn best_configuration_index(report: &EvaluationReport) -> Option<usize> {
    let ndcg = report.measures.iter().find(|name| name.starts_with("nDCG"))?;
    let gain = |outcome: &ConfigurationResult| {
        let false_hits = report.measure_comparison(outcome, FALSE_HIT_MEASURE)?.gain.mean;
        let gain = report.measure_comparison(outcome, ndcg)?.gain.mean - false_hits;
        (false_hits <= 0.0 && gain > 0.0).then_some(gain)
    };
    let gains = report.configurations.iter().enumerate();
    let gains = gains.filter_map(|(place, outcome)| Some((place, gain(outcome)?)));
    gains.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_beginning_covers_what_there_is() {
        let unit = |angle: f32| vec![angle.cos(), angle.sin()];
        // Three near 0, two near 1.5, one at 0.75: a prompt of each bundle comes before a second one.
        let units: Vec<Vec<f32>> = [0.0, 0.02, 0.04, 1.5, 1.52, 0.75].map(unit).into();
        let order = order_by_coverage(&units, 3);
        let bundle = |i: &usize| usize::from(*i >= 3) + usize::from(*i == 5);
        let bundles: BTreeSet<usize> = order.iter().map(bundle).collect();
        assert_eq!(bundles.len(), 3, "{order:?}");
        assert_eq!(order_by_coverage(&units, 99).len(), 6);
        assert!(order_by_coverage(&[], 3).is_empty());
    }

    #[test]
    fn a_pool_holds_each_text_once_and_no_judged_query() {
        let ask =
            |text: &str, truth| JudgedQuery { text: text.into(), group: None, judgements: truth };
        let asked = [ask("a red mug", Judgements::NoMatch), ask("a hat", Judgements::Unjudged)];
        let mut pool = PromptPool::without_judged_queries(&asked);
        pool.add_texts(["A red mug", "a hat", " A Hat ", "", "a shoe"]);
        assert_eq!(pool.texts, ["a hat", "a shoe"]);
        assert_eq!((pool.excluded_as_judged, pool.excluded_as_full), (1, 0));
    }
}
