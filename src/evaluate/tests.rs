//! Ways to rank the small tables of two models, and what is chosen of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::calibrate::is_in_selection_half;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::catalogue::ServingConfig;
use crate::evaluate::*;
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::record::{ImageId, StoredImage};
use crate::search::testing::{HashEncoders, clip_like_embedding, sample_prompt_set, sample_row};

const DIMENSION: usize = 16;
const IMAGES: u64 = 12;

/// The same images in a table for each of `roles`.
fn corpus(roles: &[&str]) -> Corpus {
    let images = || -> BTreeMap<ImageId, StoredImage> {
        let rows = (0..IMAGES)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, DIMENSION))));
        rows.map(|row| (row.image_id, row.image.unwrap())).collect()
    };
    let rows =
        |role: &&str| LoadedGeneration::new(role, role, 1, HashEncoders::new(DIMENSION), images());
    Corpus::from_generations(roles.iter().map(rows).collect())
}

/// Queries with a right image each.
fn judged_queries(count: u64) -> Vec<JudgedQuery> {
    let one = |i: u64| {
        let id = ImageId::new(format!("i{}", i % IMAGES)).unwrap();
        let truth = Judgements::Graded { grades: [(id, 1.0)].into(), judged_only: false };
        JudgedQuery { text: format!("query {i}"), group: None, judgements: truth }
    };
    (0..count).map(one).collect()
}

#[test]
fn a_prompt_set_is_measured_in_its_newest_version_unless_another_is_named() {
    let world = corpus(&["live"]);
    let old = sample_prompt_set("one", DIMENSION);
    let new = PromptSet { version: 2, ..old.prompt_set.clone() };
    let new = Arc::new(EmbeddedPromptSet::from_embeddings(new, old.embeddings.clone(), 100.0, 3));
    let serving = ServingConfig::new(old.statistics_key.clone(), Normaliser::Nnn, 0.25);
    let mut resolver = ConfigurationResolver::new(&world, None, serving, vec![old, new], 3);
    let mut version = |text: &str| {
        let configuration = resolver.resolve(&ConfigurationSpec::try_from(text).unwrap()).unwrap();
        configuration.prompt_set.unwrap().prompt_set.version
    };
    assert_eq!(version("set=one"), 2);
    assert_eq!(version("set=one@1"), 1);
    assert_eq!(version("live"), 1, "what is served is named by its key");
}

#[test]
fn frozen_constants_are_those_of_one_models_scores() {
    let world = corpus(&["live", "standby"]);
    let set = sample_prompt_set("one", DIMENSION);
    let frozen = ScaleConstants { factor: 7.0, shift: 3.0 };
    let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Zscore, 0.5);
    let serving = ServingConfig { scale: Some(frozen), ..serving };
    let mut resolver = ConfigurationResolver::new(&world, None, serving, vec![set], 3);
    let mut scale = |text: &str| {
        let configuration = resolver.resolve(&ConfigurationSpec::try_from(text).unwrap()).unwrap();
        configuration.balance.scale
    };
    assert_eq!(scale("live"), frozen);
    let beside = scale("live,generation=beside");
    assert!(beside != frozen && beside != ScaleConstants::default(), "{beside:?}");
}

#[test]
fn prompts_are_chosen_at_the_lambda_that_is_served() {
    let world = corpus(&["live"]);
    let (served, pool) =
        (sample_prompt_set("one", DIMENSION), sample_prompt_set("pool", DIMENSION));
    let serving = ServingConfig::new(served.statistics_key.clone(), Normaliser::Nnn, 0.25);
    let serving = ServingConfig { lambda: 0.5, ..serving };
    let mut resolver = ConfigurationResolver::new(&world, None, serving, vec![served], 3);
    let live =
        resolver.resolve(&ConfigurationSpec::from_base(BaseConfiguration::Live, "live")).unwrap();
    let (asked, token) = (judged_queries(20), CancellationToken::new());
    let found =
        suggest_prompts(&mut resolver, &pool, &live, &asked, "test", &token, &|_| {}).unwrap();
    let tried = found.selection_report.configurations.iter().map(|tried| tried.setting.balance);
    let nnn = tried.filter(|balance| balance.normaliser == Normaliser::Nnn);
    assert_eq!(nnn.map(|balance| balance.lambda).collect::<Vec<_>>(), [0.5; 3]);
    assert!(found.chosen.is_none_or(|chosen| chosen.lambda == 0.5));
}

#[test]
fn nothing_is_chosen_where_one_half_of_the_queries_is_not_judged() {
    let world = corpus(&["live"]);
    let mut asked = judged_queries(20);
    assert!(check_enough_judged(&asked, &world).is_ok());
    asked.retain(|asked| is_in_selection_half(&asked.text));
    let error = check_enough_judged(&asked, &world).unwrap_err();
    assert_eq!((error.in_selection_half, error.in_test_half), (asked.len(), 0));
    assert!(error.to_string().starts_with("--queries: "), "{error}");
    for asked in &mut asked {
        asked.judgements = Judgements::Unjudged;
    }
    asked.extend(
        judged_queries(20)
            .into_iter()
            .map(|asked| JudgedQuery { judgements: Judgements::NoMatch, ..asked }),
    );
    let error = check_enough_judged(&asked, &world).unwrap_err();
    assert_eq!((error.in_selection_half, error.in_test_half), (0, 0));
}
