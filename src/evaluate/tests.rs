//! Ways to rank the small tables of two models, and what is chosen of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::calibrate::for_choosing;
use crate::balance::normalise::{Normaliser, Scale};
use crate::catalogue::Serving;
use crate::evaluate::*;
use crate::prompts::{EmbeddedSet, PromptSet};
use crate::record::{Image, ImageId};
use crate::search::testing::{Hashed, embedding, row, set};

const DIMENSION: usize = 16;
const IMAGES: u64 = 12;

/// The same images in a table for each of `roles`.
fn world(roles: &[&str]) -> World {
    let images = || -> BTreeMap<ImageId, Image> {
        let rows = (0..IMAGES).map(|i| row(&format!("i{i}"), 1, Some(embedding(i, DIMENSION))));
        rows.map(|row| (row.image_id, row.image.unwrap())).collect()
    };
    let rows = |role: &&str| Rows::of(role, role, 1, Hashed::new(DIMENSION), images());
    World::of(roles.iter().map(rows).collect())
}

/// Queries with a right image each.
fn judged(count: u64) -> Vec<Asked> {
    let one = |i: u64| {
        let id = ImageId::new(format!("i{}", i % IMAGES)).unwrap();
        let truth = Truth::Graded { grades: [(id, 1.0)].into(), condensed: false };
        Asked { text: format!("query {i}"), group: None, truth }
    };
    (0..count).map(one).collect()
}

#[test]
fn the_best_come_first() {
    assert_eq!(best(&[0.1, 0.5, 0.5, 0.9], 3), [3, 1, 2]);
    assert_eq!(best(&[0.1], 3), [0]);
}

#[test]
fn a_prompt_set_is_measured_in_its_newest_version_unless_another_is_named() {
    let world = world(&["live"]);
    let old = set("one", DIMENSION);
    let new = PromptSet { version: 2, ..old.set.clone() };
    let new = Arc::new(EmbeddedSet::of(new, old.embeddings.clone(), 100.0, 3));
    let serving = Serving::new(old.key.clone(), Normaliser::Nnn, 0.25);
    let mut resolver = Resolver::new(&world, None, serving, vec![old, new], 3);
    let mut version = |text: &str| {
        let configuration = resolver.resolve(&Spec::try_from(text).unwrap()).unwrap();
        configuration.set.unwrap().set.version
    };
    assert_eq!(version("set=one"), 2);
    assert_eq!(version("set=one@1"), 1);
    assert_eq!(version("live"), 1, "what is served is named by its key");
}

#[test]
fn frozen_constants_are_those_of_one_models_scores() {
    let world = world(&["live", "beside"]);
    let set = set("one", DIMENSION);
    let frozen = Scale { c: 7.0, m: 3.0 };
    let serving = Serving::new(set.key.clone(), Normaliser::Zscore, 0.5);
    let serving = Serving { scale: Some(frozen), ..serving };
    let mut resolver = Resolver::new(&world, None, serving, vec![set], 3);
    let mut scale = |text: &str| {
        let configuration = resolver.resolve(&Spec::try_from(text).unwrap()).unwrap();
        configuration.balance.scale
    };
    assert_eq!(scale("live"), frozen);
    let beside = scale("live,generation=beside");
    assert!(beside != frozen && beside != Scale::default(), "{beside:?}");
}

#[test]
fn prompts_are_chosen_at_the_lambda_that_is_served() {
    let world = world(&["live"]);
    let (served, pool) = (set("one", DIMENSION), set("pool", DIMENSION));
    let serving = Serving::new(served.key.clone(), Normaliser::Nnn, 0.25);
    let serving = Serving { lambda: 0.5, ..serving };
    let mut resolver = Resolver::new(&world, None, serving, vec![served], 3);
    let live = resolver.resolve(&Spec::of(Base::Live, "live")).unwrap();
    let (asked, token) = (judged(20), CancellationToken::new());
    let found = suggest(&mut resolver, &pool, &live, &asked, "test", &token, &|_| {}).unwrap();
    let tried = found.choosing.configurations.iter().map(|tried| tried.setting.balance);
    let nnn = tried.filter(|balance| balance.normaliser == Normaliser::Nnn);
    assert_eq!(nnn.map(|balance| balance.lambda).collect::<Vec<_>>(), [0.5; 3]);
    assert!(found.chosen.is_none_or(|chosen| chosen.lambda == 0.5));
}

#[test]
fn nothing_is_chosen_where_one_half_of_the_queries_is_not_judged() {
    let world = world(&["live"]);
    let mut asked = judged(20);
    assert!(enough_judged(&asked, &world).is_ok());
    asked.retain(|asked| for_choosing(&asked.text));
    let error = enough_judged(&asked, &world).unwrap_err();
    assert_eq!((error.choosing, error.test), (asked.len(), 0));
    assert!(error.to_string().starts_with("--queries: "), "{error}");
    for asked in &mut asked {
        asked.truth = Truth::Unknown;
    }
    asked.extend(judged(20).into_iter().map(|asked| Asked { truth: Truth::NoMatch, ..asked }));
    let error = enough_judged(&asked, &world).unwrap_err();
    assert_eq!((error.choosing, error.test), (0, 0));
}
