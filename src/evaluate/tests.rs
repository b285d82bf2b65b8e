//! Configurations over the small tables of two models, and prompt suggestions for them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::calibrate::is_in_selection_half;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::StatisticsSettings;
use crate::catalogue::ServingConfig;
use crate::evaluate::*;
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::record::{ImageId, StoredImage};
use crate::search::testing::{HashEncoders, clip_like_embedding, sample_prompt_set, sample_row};

const DIMENSION: usize = 16;
const IMAGES: u64 = 12;

/// Returns a corpus with the same images in one table per role.
fn corpus(roles: &[&str]) -> Corpus {
    let images = || -> BTreeMap<ImageId, StoredImage> {
        let rows = (0..IMAGES)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, DIMENSION))));
        rows.map(|row| (row.image_id, row.image.unwrap())).collect()
    };
    let generation =
        |role: &&str| LoadedGeneration::new(role, role, 1, HashEncoders::new(DIMENSION), images());
    Corpus::from_generations(roles.iter().map(generation).collect())
}

/// Returns queries that have one relevant image each.
fn judged_queries(count: u64) -> Vec<JudgedQuery> {
    let query = |i: u64| {
        let id = ImageId::new(format!("i{}", i % IMAGES)).unwrap();
        let judgements = Judgements::Graded { grades: [(id, 1.0)].into(), judged_only: false };
        JudgedQuery { text: format!("query {i}"), group: None, judgements }
    };
    (0..count).map(query).collect()
}

#[test]
fn a_prompt_set_name_resolves_to_its_newest_version_unless_another_is_named() {
    let corpus = corpus(&["live"]);
    let old = sample_prompt_set("one", DIMENSION);
    let new = PromptSet { version: 2, ..old.prompt_set.clone() };
    let settings = StatisticsSettings::with_top_k(3);
    let embeddings = old.prompt_embeddings.clone();
    let new = Arc::new(EmbeddedPromptSet::from_embeddings(new, embeddings, 100.0, settings));
    let serving = ServingConfig::new(old.statistics_key.clone(), Normaliser::Nnn, 0.25);
    let mut resolver = ConfigurationResolver::new(&corpus, None, serving, vec![old, new], settings);
    let mut version = |text: &str| {
        let configuration = resolver.resolve(&ConfigurationSpec::try_from(text).unwrap()).unwrap();
        configuration.prompt_set.unwrap().prompt_set.version
    };
    assert_eq!(version("set=one"), 2);
    assert_eq!(version("set=one@1"), 1);
    assert_eq!(version("live"), 1, "the served set is found by its key");
}

#[test]
fn frozen_scale_constants_apply_only_to_the_model_that_they_were_computed_for() {
    let corpus = corpus(&["live", "standby"]);
    let set = sample_prompt_set("one", DIMENSION);
    let frozen = ScaleConstants { factor: 7.0, shift: 3.0 };
    let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Zscore, 0.5);
    let serving = ServingConfig { scale: Some(frozen), ..serving };
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        None,
        serving,
        vec![set],
        StatisticsSettings::with_top_k(3),
    );
    let mut scale = |text: &str| {
        let configuration = resolver.resolve(&ConfigurationSpec::try_from(text).unwrap()).unwrap();
        configuration.balance.scale
    };
    assert_eq!(scale("live"), frozen);
    let standby = scale("live,generation=standby");
    assert!(standby != frozen && standby != ScaleConstants::default(), "{standby:?}");
}

#[test]
fn prompts_are_chosen_at_the_served_lambda() {
    let corpus = corpus(&["live"]);
    let (served, pool) =
        (sample_prompt_set("one", DIMENSION), sample_prompt_set("pool", DIMENSION));
    let serving = ServingConfig::new(served.statistics_key.clone(), Normaliser::Nnn, 0.25);
    let serving = ServingConfig { lambda: 0.5, ..serving };
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        None,
        serving,
        vec![served],
        StatisticsSettings::with_top_k(3),
    );
    let live =
        resolver.resolve(&ConfigurationSpec::from_base(BaseConfiguration::Live, "live")).unwrap();
    let (queries, token) = (judged_queries(20), CancellationToken::new());
    let suggestion =
        suggest_prompts(&mut resolver, &pool, &live, &queries, "test", &token, &|_| {}).unwrap();
    let tried = suggestion.selection_report.configurations.iter().map(|c| c.setting.balance);
    let nnn = tried.filter(|balance| balance.normaliser == Normaliser::Nnn);
    assert_eq!(nnn.map(|balance| balance.lambda).collect::<Vec<_>>(), [0.5; 3]);
    assert!(suggestion.chosen_prompts.is_none_or(|chosen| chosen.lambda == 0.5));
}

#[test]
fn prompts_cannot_be_chosen_if_one_half_of_the_queries_is_not_judged() {
    let corpus = corpus(&["live"]);
    let mut queries = judged_queries(20);
    assert!(check_both_halves_judged(&queries, &corpus).is_ok());
    queries.retain(|query| is_in_selection_half(&query.text));
    let error = check_both_halves_judged(&queries, &corpus).unwrap_err();
    assert_eq!((error.in_selection_half, error.in_test_half), (queries.len(), 0));
    assert!(error.to_string().starts_with("--queries: "), "{error}");
    for query in &mut queries {
        query.judgements = Judgements::Unjudged;
    }
    queries.extend(
        judged_queries(20)
            .into_iter()
            .map(|query| JudgedQuery { judgements: Judgements::NoMatch, ..query }),
    );
    let error = check_both_halves_judged(&queries, &corpus).unwrap_err();
    assert_eq!((error.in_selection_half, error.in_test_half), (0, 0));
}
