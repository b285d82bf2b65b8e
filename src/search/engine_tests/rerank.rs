//! Candidates of a caller: exactly these are ranked, as a search would have ranked them.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::balance::normalise::BalanceParameters;
use crate::catalogue::{RolloutCandidate, ServingConfig};
use crate::search::engine_tests::query_for as text_query;

fn by_id(id: &str) -> RerankCandidate {
    RerankCandidate { id: id.into(), embedding: None, score: None }
}

fn foreign(id: &str, number: u64) -> RerankCandidate {
    let embedding = serde_json::from_value(json!(clip_like_embedding(number, DIMENSION))).unwrap();
    RerankCandidate { embedding: Some(embedding), ..by_id(id) }
}

fn rerank(
    engine: &Engine,
    query: &Query,
    candidates: &[RerankCandidate],
) -> Result<RerankResults, QueryError> {
    engine.rerank(query, &candidates.into(), false, &CancellationToken::new())
}

fn ids(results: &RerankResults) -> Vec<&str> {
    results.images.iter().map(|image| image.id.as_str()).collect()
}

#[tokio::test]
async fn candidates_are_ranked_as_a_search_ranks_them() {
    let engine = engine_with_images(SearchOptions::default(), 200).await;
    for normaliser in Normaliser::ALL {
        let query = Query {
            k: Some(200),
            normaliser: Some(normaliser),
            weight: Some(0.7),
            ..text_query("a mug")
        };
        let search = engine.search(&query).unwrap();
        let hits: HashMap<String, &Hit> =
            search.hits.iter().map(|hit| (hit.image_metadata.image_id.to_string(), hit)).collect();
        let chosen: Vec<RerankCandidate> =
            (0..200).step_by(7).map(|i| by_id(&format!("i{i:04}"))).collect();
        let results = rerank(&engine, &query, &chosen).unwrap();
        assert_eq!((results.images.len(), results.unknown_ids.len()), (chosen.len(), 0));
        let expected: Vec<String> = hit_ids(&search.hits)
            .into_iter()
            .filter(|id| chosen.iter().any(|candidate| candidate.id == *id))
            .collect();
        assert_eq!(ids(&results), expected, "{normaliser:?}");
        let mut raw: Vec<&RerankedImage> = results.images.iter().collect();
        raw.sort_by_key(|image| hits[&image.id].raw_rank);
        for (i, image) in raw.iter().enumerate() {
            let hit = hits[&image.id];
            assert!(image.is_known && image.raw.rank == i + 1, "{image:?}");
            assert_eq!(image.raw.score, hit.reported_raw_score());
            assert_eq!(image.balanced.score, hit.reported_score());
            assert_eq!(image.affine, hit.affine);
        }
    }
}

#[tokio::test]
async fn a_foreign_embedding_is_scored_as_if_it_were_stored() {
    let engine = engine_with_images(SearchOptions::default(), 50).await;
    let query = text_query("a mug");
    let known = rerank(&engine, &query, &[by_id("i0003"), by_id("i0009")]).unwrap();
    // The image i0003 has the embedding 3; an id of the catalogue may come with another embedding.
    let given = rerank(&engine, &query, &[foreign("x", 3), foreign("i0001", 9)]).unwrap();
    for (name, other) in [("i0003", "x"), ("i0009", "i0001")] {
        let find = |results: &RerankResults, id: &str| {
            let image = results.images.iter().find(|image| image.id == id).unwrap();
            (image.raw, image.balanced, image.affine, image.is_known)
        };
        let (raw, balanced, affine, _) = find(&known, name);
        assert_eq!(find(&given, other), (raw, balanced, affine, other == "i0001"));
    }
}

#[tokio::test]
async fn unknown_ids_are_named_and_own_scores_get_ranks() {
    let engine = engine_with_images(SearchOptions::default(), 20).await;
    let with_score = |id: &str, score: f64| RerankCandidate { score: Some(score), ..by_id(id) };
    let candidates =
        [with_score("i0004", 1.5), by_id("gone"), with_score("i0005", 7.0), by_id("i0006")];
    let results = rerank(&engine, &text_query("a mug"), &candidates).unwrap();
    assert_eq!((results.images.len(), &results.unknown_ids[..]), (3, &["gone".to_owned()][..]));
    let own: HashMap<&str, Option<usize>> =
        results.images.iter().map(|i| (i.id.as_str(), i.own.map(|own| own.rank))).collect();
    assert_eq!(own, [("i0004", Some(2)), ("i0005", Some(1)), ("i0006", None)].into());
    let mut ranks: Vec<usize> = results.images.iter().map(|image| image.raw.rank).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [1, 2, 3]);
}

#[tokio::test]
async fn invalid_candidates_are_all_described() {
    let engine = engine_with_images(SearchOptions::default(), 5).await;
    let message = |candidates: &[RerankCandidate]| {
        rerank(&engine, &text_query("a mug"), candidates).unwrap_err().to_string()
    };
    let short = RerankCandidate {
        embedding: Some(serde_json::from_value(json!([1.0, 2.0])).unwrap()),
        ..by_id("short")
    };
    let error = message(&[by_id("a"), by_id("a"), short, by_id("")]);
    for part in [
        "candidates: 1 (\"a\"): id is given twice; ",
        "2 (\"short\"): embedding has 2 numbers; an embedding of this model has 16; ",
        "3 (\"\"): id is empty",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(message(&[]).contains("0 candidates; give 1 to 5000"));
    let many: Vec<_> = (0..5_001).map(|i| by_id(&i.to_string())).collect();
    assert!(message(&many).contains("5001 candidates"));
    assert!(message(&vec![by_id("a"); 100]).ends_with("; and 89 more"));
}

#[tokio::test]
async fn an_explanation_names_statistics_and_prompts() {
    let engine = engine_with_images(SearchOptions::default(), 20).await;
    let query = text_query("a mug");
    let candidates: Arc<[_]> = [by_id("i0001"), foreign("x", 99), by_id("i0002")].into();
    let results = engine.rerank(&query, &candidates, true, &CancellationToken::new()).unwrap();
    for image in &results.images {
        let explanation = image.explanation.as_ref().unwrap();
        let statistics = explanation.statistics.unwrap();
        assert_eq!((statistics.n, explanation.top_prompts.len()), (6, 5));
        assert!((explanation.top_prompts[0].score - statistics.max).abs() < 1e-6);
        assert!(explanation.summary.contains("of 3."), "{}", explanation.summary);
    }
}

#[tokio::test]
async fn the_candidate_configuration_answers_and_is_compared_in_the_shadow() {
    let sets = vec![sample_prompt_set("one", DIMENSION), sample_prompt_set("other", DIMENSION)];
    let mut serving = sample_serving_snapshot(sets.clone());
    let of_candidate = ServingConfig::new(sets[1].statistics_key.clone(), Normaliser::Nnn, 1.0);
    serving.candidate = Some(RolloutCandidate {
        name: "next".into(),
        generation: "g".into(),
        serving: of_candidate,
        traffic_share: 0.0,
        shadow_share: 1.0,
        traffic_filter: None,
        since: DateTime::from_timestamp(1, 0).unwrap(),
        evaluation_fingerprint: None,
    });
    let engine = Engine::new(HashEncoders::new(DIMENSION), serving, SearchOptions::default());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    apply_rows(&engine, 1, (0..40).map(|i| sample_image_row(i, &mut rng)).collect()).await;
    let candidates: Vec<_> = (0..20).map(|i| by_id(&format!("i{i:04}"))).collect();
    let engines = Engines::new(Arc::new(engine));
    let answer = |configuration: Option<&str>| {
        let query = Query {
            requested_configuration: configuration.map(str::to_owned),
            ..text_query("a mug")
        };
        engines.rerank(&query, candidates.clone(), false, &CancellationToken::new()).unwrap()
    };
    let next = answer(Some("next"));
    assert_eq!(next.configuration_name, "next");
    let BalanceParameters { normaliser, weight, .. } = next.balance;
    assert_eq!((normaliser, weight), (Normaliser::Nnn, 1.0));
    let live = answer(None);
    assert_eq!(live.configuration_name, "live");
    assert_ne!(ids(&live), ids(&next));
    // The shadow runs on a thread of its own.
    let counts = loop {
        let counts = engines.live().traffic_counts();
        if counts.shadow_queries > 0 {
            break counts;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    assert_eq!((counts.live, counts.candidate, counts.mean_overlap), (1, 1, Some(1.0)));
    let changes_first = ids(&live)[0] != ids(&next)[0];
    assert_eq!(counts.top_hit_changed, u64::from(changes_first));
}
