//! Suggests a bank of prompts for a catalogue without judgements: chooses texts by coverage, and measures
//! how the bank fits queries that were held out.

use std::sync::Arc;

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::suggest::select_by_coverage;
use crate::balance::bank::{BankReport, QueriedImages};
use crate::balance::fit::MIN_FIT_QUERIES;
use crate::balance::proposal::MIN_TEXTS;
use crate::prompts::EmbeddedPromptSet;

/// Maximum number of texts that are held out: with more, the interval of the fit is hardly narrower.
const MAX_HELD_OUT: usize = 1_024;
/// Sizes that are measured in addition to the one that is asked for.
const COMPARED_SIZES: [usize; 4] = [32, 128, 512, 1_024];
/// Seed of the random subset with which the chosen one is compared.
const RANDOM_SUBSET_SEED: u64 = 1;

/// Divides texts into those that are held out and those that may become prompts: half and half, but if there
/// are few, at first the number that a fit needs is held out, as long as a bank of [`MIN_TEXTS`] is left.
pub fn divide_texts(mut texts: Vec<String>) -> (Vec<String>, Vec<String>) {
    let needed = MIN_FIT_QUERIES.min(texts.len().saturating_sub(MIN_TEXTS));
    let rest = texts.split_off((texts.len() / 2).max(needed).min(MAX_HELD_OUT));
    (texts, rest)
}

/// A suggested bank, and what was measured of it and of others.
pub struct BankSuggestion {
    /// The suggested prompts.
    pub chosen: EmbeddedPromptSet,
    /// What was measured of it.
    pub report: BankReport,
    /// What was measured of other banks, with a description of each.
    pub compared: Vec<(String, BankReport)>,
}

/// Chooses `size` texts of `pool` (all, if it has fewer) that cover it as well as possible, as a set of the
/// pool's name, and measures their fit to `queries`; in addition that of other sizes, of a random subset, of
/// the whole pool and of `others`. `images` and `queries` are unit-length embeddings. Blocks for as long as
/// the computation takes.
pub fn suggest_bank(
    images: Vec<&[f32]>,
    pool: &EmbeddedPromptSet,
    size: usize,
    queries: &[Vec<f32>],
    others: &[(String, Arc<EmbeddedPromptSet>)],
) -> BankSuggestion {
    let pool_size = pool.prompt_set.texts.len();
    let size = size.min(pool_size);
    let other_sizes = COMPARED_SIZES.into_iter().filter(|other| *other < pool_size);
    let other_sizes: Vec<usize> = other_sizes.filter(|other| *other != size).collect();
    let largest = other_sizes.iter().copied().chain([size]).max().unwrap_or(size);
    let order = select_by_coverage(&pool.prompt_embeddings, largest);
    let queried = QueriedImages::new(images, queries);
    let embeddings = |indices: &[usize]| -> Vec<Vec<f32>> {
        indices.iter().map(|i| pool.prompt_embeddings[*i].clone()).collect()
    };
    let chosen = pool.subset(&pool.prompt_set.name, &order[..size]);
    let mut compared = Vec::new();
    for other in other_sizes {
        let report = queried.measure_bank(&embeddings(&order[..other]));
        compared.push((format!("{other} by coverage"), report));
    }
    if size < pool_size {
        let mut random: Vec<usize> = (0..pool_size).collect();
        random.shuffle(&mut ChaCha8Rng::seed_from_u64(RANDOM_SUBSET_SEED));
        let report = queried.measure_bank(&embeddings(&random[..size]));
        compared.push((format!("{size} at random"), report));
        let report = queried.measure_bank(&pool.prompt_embeddings);
        compared.push((format!("the whole pool of {pool_size}"), report));
    }
    for (name, set) in others {
        compared.push((name.clone(), queried.measure_bank(&set.prompt_embeddings)));
    }
    BankSuggestion { report: queried.measure_bank(&chosen.prompt_embeddings), chosen, compared }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::statistics::StatisticsSettings;
    use crate::prompts::PromptSet;
    use crate::search::testing::clip_like_embedding;

    const DIMENSION: usize = 16;

    fn pool(size: u64) -> EmbeddedPromptSet {
        let texts = (0..size).map(|i| format!("text {i}")).collect();
        let embeddings = (0..size).map(|i| clip_like_embedding(i, DIMENSION)).collect();
        let settings = StatisticsSettings::with_top_k(16);
        EmbeddedPromptSet::from_embeddings(
            PromptSet::new("mine", texts),
            embeddings,
            100.0,
            settings,
        )
    }

    #[test]
    fn a_fit_can_be_measured_as_soon_as_texts_suffice() {
        let divided = |count: usize| {
            let texts = (0..count).map(|i| i.to_string()).collect();
            let (held_out, pool) = divide_texts(texts);
            assert_eq!(held_out.len() + pool.len(), count);
            (held_out.len(), pool.len())
        };
        assert_eq!(divided(0), (0, 0));
        assert_eq!(divided(20), (10, 10));
        assert_eq!(divided(96), (64, 32));
        assert_eq!(divided(100), (64, 36));
        assert_eq!(divided(400), (200, 200));
        assert_eq!(divided(10_000), (1_024, 8_976));
    }

    #[test]
    fn the_bank_is_measured_on_held_out_queries_next_to_others() {
        let images: Vec<Vec<f32>> = (500..800).map(|i| clip_like_embedding(i, DIMENSION)).collect();
        let queries: Vec<Vec<f32>> =
            (800..900).map(|i| clip_like_embedding(i, DIMENSION)).collect();
        let (pool, other) = (pool(200), Arc::new(pool(10)));
        let images = || images.iter().map(Vec::as_slice).collect();
        let others = [("served".to_owned(), other)];
        let suggestion = suggest_bank(images(), &pool, 64, &queries, &others);
        assert_eq!(suggestion.chosen.prompt_set.texts.len(), 64);
        assert!(suggestion.chosen.statistics_key.as_str().starts_with("mine@1:"));
        let names: Vec<&str> = suggestion.compared.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [
            "32 by coverage",
            "128 by coverage",
            "64 at random",
            "the whole pool of 200",
            "served",
        ];
        assert_eq!(names, expected);
        let expected = QueriedImages::new(images(), &queries)
            .measure_bank(&suggestion.chosen.prompt_embeddings);
        assert_eq!((suggestion.report.fit.unwrap().queries, &suggestion.report), (100, &expected));

        let all = suggest_bank(images(), &pool, 4_000, &queries[..10], &[]);
        assert_eq!((all.report.texts, all.report.fit), (200, None));
        let names: Vec<&str> = all.compared.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["32 by coverage", "128 by coverage"]);
    }
}
