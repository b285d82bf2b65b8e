//! Prompts for a catalogue: which texts of a pool, with which normaliser and weight, do best on one
//! half of the queries, and what that is worth on the other.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::calibrate::{Wanted, for_choosing};
use super::compare::configuration::{Configuration, Resolver};
use super::compare::world::{EvaluateError, World};
use super::compare::{Outcome, right_of};
use super::judgements::asked::{Asked, Truth};
use super::measures::{Cutoffs, FALSE_HIT};
use super::report::Report;
use super::{Plan, evaluate};
use crate::balance::calibration::Vocabulary;
use crate::balance::normalise::{Balance, Normaliser, Scale};
use crate::balance::statistics::dot;
use crate::prompts::{EmbeddedSet, MAX_PROMPT_CHARS, MAX_PROMPTS};

/// Sizes of the subsets that are tried, besides the whole pool.
const SIZES: [usize; 4] = [32, 128, 512, 1_024];
/// Normalisers that are tried. `range` hangs on the two outermost prompts and did worst wherever it
/// was measured.
const NORMALISERS: [Normaliser; 3] = [Normaliser::Nnn, Normaliser::Softmax, Normaliser::Zscore];
/// Weights that are tried; at full strength every normaliser did harm wherever it was measured.
const WEIGHTS: [f32; 3] = [0.1, 0.25, 0.5];
/// Decides the random subset that stands beside the chosen one.
const SEED: u64 = 1;

/// Texts that may become prompts, each once, none of them a judged query.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// The texts.
    pub texts: Vec<String>,
    /// How many texts were left out because they stand among the judged queries: a prompt that says
    /// what a query says would be measured on itself.
    pub judged: usize,
    /// How many were left out because the pool was full.
    pub beyond: usize,
    queries: BTreeSet<String>,
    known: BTreeSet<String>,
}

impl Pool {
    /// An empty pool, closed to the queries of which something is known.
    pub fn closed_to(asked: &[Asked]) -> Self {
        let judged = asked.iter().filter(|asked| asked.truth != Truth::Unknown);
        let queries = judged.map(|asked| asked.text.to_lowercase()).collect();
        Self { queries, ..Self::default() }
    }

    /// Adds texts; those that are empty, too long or there already are passed over.
    pub fn add<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) {
        for text in texts.into_iter().map(str::trim) {
            if text.is_empty() || text.chars().count() > MAX_PROMPT_CHARS {
                continue;
            }
            let key = text.to_lowercase();
            if self.queries.contains(&key) {
                self.judged += 1;
            } else if self.known.insert(key) {
                if self.texts.len() == MAX_PROMPTS {
                    self.beyond += 1;
                } else {
                    self.texts.push(text.to_owned());
                }
            }
        }
    }
}

/// What is suggested, and what speaks for it.
pub struct Suggestion {
    /// The prompts; none where plain CLIP did best.
    pub chosen: Option<Chosen>,
    /// All that was tried, on the half of the queries that it was chosen on.
    pub choosing: Report,
    /// The chosen one beside plain CLIP, what is served, a random subset and the whole pool, on the
    /// other half of the queries, on which nothing was chosen.
    pub test: Report,
}

/// A choice.
#[derive(Clone)]
pub struct Chosen {
    /// The prompts.
    pub set: Arc<EmbeddedSet>,
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
    "--queries: {choosing} judged queries with a right image in the catalogue fall into the half for choosing, {test} into the half for the test, and neither half can do without; have more queries judged (`relevant`, docs/evaluation.md)"
)]
pub struct TooFewJudged {
    /// Judged queries of the half for choosing.
    pub choosing: usize,
    /// Those of the other half.
    pub test: usize,
}

/// Refuses queries of which one half has none with a right image in `world`.
pub fn enough_judged(asked: &[Asked], world: &World) -> Result<(), TooFewJudged> {
    let judged = asked.iter().filter(|asked| !right_of(asked, world).0.ideal().is_empty());
    let (choosing, test): (Vec<&Asked>, Vec<&Asked>) =
        judged.partition(|asked| for_choosing(&asked.text));
    if choosing.is_empty() || test.is_empty() {
        return Err(TooFewJudged { choosing: choosing.len(), test: test.len() });
    }
    Ok(())
}

/// The texts in an order in which every beginning covers all of them as well as it can: greedily,
/// each adds most to Σ over all texts of the cosine to the nearest chosen one (facility location;
/// within 1 − 1/e of the best, Nemhauser et al., 1978). `units` are unit-length embeddings.
pub fn by_coverage(units: &[Vec<f32>], most: usize) -> Vec<usize> {
    // Cosines below 0 cover nothing.
    let mut covered = vec![0f32; units.len()];
    let mut order = Vec::new();
    let mut left: Vec<usize> = (0..units.len()).collect();
    while order.len() < most && !left.is_empty() {
        let gain = |candidate: &usize| {
            let own = &units[*candidate];
            let more = units.iter().zip(&covered).map(|(u, c)| (dot(own, u) - c).max(0.0));
            more.map(f64::from).sum::<f64>()
        };
        let gains: Vec<f64> = left.par_iter().map(gain).collect();
        let best = (0..left.len()).max_by(|a, b| gains[*a].total_cmp(&gains[*b]).then(b.cmp(a)));
        let Some(best) = best else { break };
        let chosen = left.remove(best);
        for (covered, unit) in covered.iter_mut().zip(units) {
            *covered = covered.max(dot(&units[chosen], unit));
        }
        order.push(chosen);
    }
    order
}

/// Chooses prompts of `pool`, a set of all texts that may be prompts, for the live table, at the λ that
/// is served. Computes: may block for long. `progress` hears of how many more texts are ranked.
pub fn suggest(
    resolver: &mut Resolver,
    pool: &EmbeddedSet,
    live: &Configuration,
    asked: &[Asked],
    catalogue: &str,
    token: &CancellationToken,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Suggestion, EvaluateError> {
    let (name, whole) = (&pool.set.name, pool.set.texts.len());
    let sizes: Vec<usize> = SIZES.into_iter().filter(|size| *size < whole).collect();
    let order = by_coverage(&pool.embeddings, sizes.last().copied().unwrap_or(0));
    let mut sets: Vec<Arc<EmbeddedSet>> = sizes
        .iter()
        .map(|size| Arc::new(pool.subset(&format!("{name}-{size}"), &order[..*size])))
        .collect();
    sets.push(Arc::new(pool.subset(&format!("{name}-all"), &(0..whole).collect::<Vec<_>>())));

    let raw = Configuration {
        name: "raw".into(),
        set: None,
        balance: Balance::RAW,
        min_score: None,
        calibration: None,
        ..live.clone()
    };
    let mut tried = vec![raw.clone()];
    for set in &sets {
        for normaliser in NORMALISERS {
            for weight in WEIGHTS {
                tried.push(configuration(resolver, set, normaliser, weight));
            }
        }
    }
    let (choosing, test): (Vec<Asked>, Vec<Asked>) =
        asked.iter().cloned().partition(|asked| for_choosing(&asked.text));
    let plan = |asked: Vec<Asked>, half: &str| Plan {
        catalogue: catalogue.to_owned(),
        source: half.to_owned(),
        asked,
        baseline: "raw".into(),
        cutoffs: Cutoffs::default(),
        wanted: Wanted::default(),
        cost: None,
        notes: Vec::new(),
    };
    let chosen_on = plan(choosing, "the half of the queries for choosing");
    let choosing = evaluate(resolver, &tried, chosen_on, token, progress)?.report;
    let best = best_of(&choosing);
    let mut compared = vec![raw, Configuration { name: "live".into(), ..live.clone() }];
    let chosen = best.map(|place| {
        let own = &tried[place];
        let Balance { normaliser, weight, lambda, .. } = own.balance;
        // The whole pool is a choice as well, of which there is no random subset.
        let place = sets.iter().position(|set| own.set.as_ref().is_some_and(|s| s.key == set.key));
        let set = sets[place.unwrap_or(0)].clone();
        let count = set.set.texts.len();
        compared.push(Configuration { name: "suggested".into(), ..own.clone() });
        if count < whole {
            let mut any: Vec<usize> = (0..whole).collect();
            any.shuffle(&mut ChaCha8Rng::seed_from_u64(SEED));
            let random = Arc::new(pool.subset(&format!("{name}-random"), &any[..count]));
            let random = configuration(resolver, &random, normaliser, weight);
            compared.push(Configuration { name: format!("random {count}"), ..random });
            let all = configuration(resolver, &sets[sets.len() - 1], normaliser, weight);
            compared.push(Configuration { name: "whole pool".into(), ..all });
        }
        Chosen { set, normaliser, weight, lambda }
    });
    let tested = plan(test, "the half of the queries that nothing was chosen on");
    let test = evaluate(resolver, &compared, tested, token, progress)?.report;
    Ok(Suggestion { chosen, choosing, test })
}

fn configuration(
    resolver: &mut Resolver,
    set: &Arc<EmbeddedSet>,
    normaliser: Normaliser,
    weight: f32,
) -> Configuration {
    let statistics = resolver.statistics(0, set);
    let scale = Scale::of(normaliser, statistics.iter().copied());
    // What is chosen takes the place of what is served, whose λ stays.
    let lambda = resolver.state.map_or(&resolver.fallback, |state| &state.serving).lambda;
    Configuration {
        name: format!("{}, {} {weight}", set.set.name, normaliser.name()),
        table: 0,
        set: Some(set.clone()),
        balance: Balance { normaliser, weight, lambda, scale },
        min_score: None,
        calibration: None,
        vocabulary: Arc::new(Vocabulary::of(set.set.texts.iter().map(String::as_str))),
    }
}

/// Of all that show no more false hits than plain CLIP, the one that gains most in false hits and
/// nDCG together; none where none gains.
fn best_of(report: &Report) -> Option<usize> {
    let ndcg = report.measures.iter().find(|name| name.starts_with("nDCG"))?;
    let gain = |outcome: &Outcome| {
        let false_hits = report.column(outcome, FALSE_HIT)?.gain.mean;
        let gain = report.column(outcome, ndcg)?.gain.mean - false_hits;
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
        let order = by_coverage(&units, 3);
        let bundle = |i: &usize| usize::from(*i >= 3) + usize::from(*i == 5);
        let bundles: BTreeSet<usize> = order.iter().map(bundle).collect();
        assert_eq!(bundles.len(), 3, "{order:?}");
        assert_eq!(by_coverage(&units, 99).len(), 6);
        assert!(by_coverage(&[], 3).is_empty());
    }

    #[test]
    fn a_pool_holds_each_text_once_and_no_judged_query() {
        let ask = |text: &str, truth| Asked { text: text.into(), group: None, truth };
        let asked = [ask("a red mug", Truth::NoMatch), ask("a hat", Truth::Unknown)];
        let mut pool = Pool::closed_to(&asked);
        pool.add(["A red mug", "a hat", " A Hat ", "", "a shoe"]);
        assert_eq!(pool.texts, ["a hat", "a shoe"]);
        assert_eq!((pool.judged, pool.beyond), (1, 0));
    }
}
