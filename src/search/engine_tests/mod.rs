//! Queries of all kinds, and queries that are rejected.

mod filters;
mod rerank;

use std::collections::BTreeMap;
use std::io::Cursor as Bytes;
use std::sync::atomic::Ordering;

use chrono::DateTime;
use image::{ImageFormat, RgbImage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::testing::{
    HashEncoders, clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
};
use crate::balance::calibration::{Calibration, NoMatchRule, NoMatchSignal};
use crate::balance::normalise::Normaliser;
use crate::ingest::decode;
use crate::record::{AttributeType, AttributeTypes, ImageRow};
use crate::search::*;
use crate::table::{SnapshotPart, TableChanges};

const DIMENSION: usize = 16;

fn declared_attributes() -> AttributeTypes {
    [
        ("colour", AttributeType::Text),
        ("stock", AttributeType::Integer),
        ("price", AttributeType::Number),
        ("new", AttributeType::Boolean),
        ("shot", AttributeType::Time),
    ]
    .map(|(name, kind)| (name.to_owned(), kind))
    .into()
}

fn empty_engine(options: SearchOptions) -> Engine {
    Engine::new(
        HashEncoders::new(DIMENSION),
        sample_serving_snapshot(vec![sample_prompt_set("one", DIMENSION)]),
        options,
    )
    .with_attributes_and_decoding(declared_attributes(), decode::DecodeOptions::default())
}

async fn apply_rows(engine: &Engine, version: u64, rows: Vec<ImageRow>) {
    let changes = TableChanges {
        table_version: version,
        is_full_snapshot: version == 1,
        part: SnapshotPart::All,
        rows,
    };
    engine.snapshots().apply_changes(changes).await.unwrap();
}

/// An image with some attributes, different for each number.
fn sample_image_row(number: u64, rng: &mut ChaCha8Rng) -> ImageRow {
    let mut row =
        sample_row(&format!("i{number:04}"), 1, Some(clip_like_embedding(number, DIMENSION)));
    row.event_time =
        rng.random_bool(0.8).then(|| DateTime::from_timestamp(number as i64, 0)).flatten();
    let mut attributes = BTreeMap::new();
    let mut maybe_add = |name: &str, value: String| {
        if rng.random_bool(0.8) {
            attributes.insert(name.to_owned(), value);
        }
    };
    maybe_add("colour", ["red", "dark red; red", "blue", "grün"][number as usize % 4].into());
    maybe_add("stock", (number as i64 % 9 - 4).to_string());
    maybe_add("price", format!("{:.1}", number as f64 / 10.0));
    maybe_add("new", number.is_multiple_of(3).to_string());
    maybe_add("shot", format!("2026-01-{:02}T00:00:00.000000Z", number % 28 + 1));
    row.image.as_mut().unwrap().attributes = attributes;
    row
}

async fn engine_with_images(options: SearchOptions, count: u64) -> Engine {
    let engine = empty_engine(options);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    apply_rows(&engine, 1, (0..count).map(|i| sample_image_row(i, &mut rng)).collect()).await;
    engine
}

fn hit_ids(hits: &[Hit]) -> Vec<String> {
    hits.iter().map(|hit| hit.image_metadata.image_id.to_string()).collect()
}

fn query_for(input: impl Into<QueryInput>) -> Query {
    Query { input: input.into(), k: Some(10), ..Query::default() }
}

#[tokio::test]
async fn equivalent_inputs_find_the_same_images() {
    let engine = engine_with_images(SearchOptions::default(), 200).await;
    let encoders = HashEncoders::new(DIMENSION);
    let expected = hit_ids(&engine.search(&query_for("a mug")).unwrap().hits);
    let vector = encoders.embed_bytes(b"a mug").iter().map(|v| v * 7.5).collect();
    assert_eq!(
        hit_ids(&engine.search(&query_for(QueryInput::Vector(vector))).unwrap().hits),
        expected
    );
    let texts = |weights: &[(&str, f32)]| {
        let weighted_text =
            |(text, weight): &(&str, f32)| WeightedText { text: (*text).into(), weight: *weight };
        QueryInput::WeightedTexts(weights.iter().map(weighted_text).collect())
    };
    let mixed = |weights: &[(&str, f32)]| engine.search(&query_for(texts(weights)));
    assert_eq!(hit_ids(&mixed(&[("a mug", 0.1)]).unwrap().hits), expected);
    assert_eq!(hit_ids(&mixed(&[("a mug", 2.0), ("x", 1.0), ("x", -1.0)]).unwrap().hits), expected);
    assert_ne!(hit_ids(&mixed(&[("a mug", 1.0), ("x", -0.5)]).unwrap().hits), expected);
    let error = mixed(&[("a mug", 1.0), ("a mug", -1.0)]).unwrap_err();
    assert!(error.to_string().starts_with("texts: the weighted texts cancel"), "{error}");
}

#[tokio::test]
async fn an_answer_says_what_of_the_query_was_not_read() {
    let engine = engine_with_images(SearchOptions::default(), 20).await;
    let warning = |input: QueryInput| engine.search(&query_for(input)).unwrap().warning;
    assert_eq!(warning("a mug".into()), None);
    let long = "red ".repeat(80) + "mug";
    let weighted = vec![WeightedText { text: long.clone(), weight: 1.0 }];
    for input in [QueryInput::Text(long), QueryInput::WeightedTexts(weighted)] {
        let warning = warning(input).unwrap();
        assert!(
            warning.contains("77 tokens") && warning.contains("“red red red mug”"),
            "{warning}"
        );
    }
}

#[tokio::test]
async fn an_image_query_includes_itself_only_when_requested() {
    let engine = engine_with_images(SearchOptions::default(), 200).await;
    let query_with =
        |include_self| Query { include_self, ..query_for(QueryInput::ImageId("i0007".into())) };
    let without_self = engine.search(&query_with(false)).unwrap();
    assert!(!hit_ids(&without_self.hits).contains(&"i0007".to_owned()));
    assert_eq!((without_self.scanned_image_count, without_self.matched_image_count), (200, 199));
    // The prompts are texts, so that image queries are not balanced.
    let balance = without_self.balance;
    assert_eq!((balance.normaliser, balance.weight), (Normaliser::Raw, 0.0));
    let with_self = engine.search(&query_with(true)).unwrap();
    assert_eq!(hit_ids(&with_self.hits)[0], "i0007");
    assert_eq!(hit_ids(&with_self.hits)[1..], hit_ids(&without_self.hits)[..9]);
    let balanced = Query { weight: Some(0.5), ..query_with(false) };
    assert_eq!(engine.search(&balanced).unwrap().balance.normaliser, Normaliser::Softmax);
    let error = engine.search(&query_for(QueryInput::ImageId("unknown".into()))).unwrap_err();
    assert!(matches!(error, QueryError::ImageNotFound(id) if id == "unknown"));
}

#[tokio::test]
async fn a_picture_is_decoded_within_the_limits_and_embedded_once() {
    let picture = RgbImage::from_pixel(64, 32, image::Rgb([9, 8, 7]));
    let mut png = Bytes::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).unwrap();
    let png = png.into_inner();
    let model = HashEncoders::new(DIMENSION);
    let engine = Engine::new(
        model.clone(),
        sample_serving_snapshot(vec![sample_prompt_set("one", DIMENSION)]),
        SearchOptions::default(),
    );
    let engine = engine
        .with_attributes_and_decoding(declared_attributes(), decode::DecodeOptions::default());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    apply_rows(&engine, 1, (0..200).map(|i| sample_image_row(i, &mut rng)).collect()).await;
    let results = engine.search(&query_for(QueryInput::ImageBytes(png.clone()))).unwrap();
    let same_vector = HashEncoders::new(DIMENSION).embed_bytes(picture.as_raw());
    let raw =
        Query { normaliser: Some(Normaliser::Raw), ..query_for(QueryInput::Vector(same_vector)) };
    assert_eq!(hit_ids(&results.hits), hit_ids(&engine.search(&raw).unwrap().hits));
    assert_eq!(results.balance.weight, 0.0);
    let repeated = engine.search(&query_for(QueryInput::ImageBytes(png.clone()))).unwrap();
    assert_eq!(hit_ids(&repeated.hits), hit_ids(&results.hits));
    assert_eq!(model.embedded_images.load(Ordering::Relaxed), 1, "the embedding is cached");
    let small = decode::DecodeOptions { max_side: 63, ..decode::DecodeOptions::default() };
    let strict = engine_with_decoding(small).await;
    let error = strict.search(&query_for(QueryInput::ImageBytes(png))).unwrap_err();
    assert!(error.to_string().starts_with("image: 64×32 pixels are more"), "{error}");
    let error =
        strict.search(&query_for(QueryInput::ImageBytes(b"no picture".to_vec()))).unwrap_err();
    assert!(error.to_string().starts_with("image: not an image"), "{error}");
}

async fn engine_with_decoding(decode: decode::DecodeOptions) -> Engine {
    let engine = empty_engine(SearchOptions::default())
        .with_attributes_and_decoding(declared_attributes(), decode);
    apply_rows(&engine, 1, Vec::new()).await;
    engine
}

#[tokio::test]
async fn invalid_inputs_are_rejected_with_the_field_name() {
    let engine = engine_with_images(SearchOptions::default(), 3).await;
    let many = vec![WeightedText { text: "a".into(), weight: 1.0 }; 17];
    let heavy = vec![WeightedText { text: "a".into(), weight: f32::NAN }];
    for (input, expected) in [
        (QueryInput::Text("  ".into()), "text: is empty"),
        (QueryInput::Text("x".repeat(1001)), "text: has 1001 characters, more than 1000"),
        (QueryInput::WeightedTexts(Vec::new()), "texts: has 0 texts; 1 to 16"),
        (QueryInput::WeightedTexts(many), "texts: has 17 texts"),
        (QueryInput::WeightedTexts(heavy), "texts: the weight NaN is not between -100 and 100"),
        (QueryInput::Vector(vec![1.0; 3]), "vector: has 3 numbers; an embedding has 16"),
        (QueryInput::Vector(vec![0.0; DIMENSION]), "vector: has length 0"),
        (QueryInput::Vector(vec![f32::INFINITY; DIMENSION]), "vector: number 0 is not finite"),
    ] {
        let error = engine.search(&query_for(input)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[tokio::test]
async fn cancelled_queries_compute_nothing_and_filtered_images_have_no_rank() {
    let engine = engine_with_images(SearchOptions::default(), 30).await;
    let cancel = CancellationToken::new();
    let red = Query {
        filter: Some(serde_json::from_value(json!({"eq": {"colour": "red"}})).unwrap()),
        ..query_for("a mug")
    };
    let hits = engine.search(&red).unwrap().hits;
    let explanation =
        engine.explain(&red, hits[0].image_metadata.image_id.as_str(), &cancel).unwrap();
    assert_eq!((explanation.hit.rank, explanation.hit.raw_rank), (hits[0].rank, hits[0].raw_rank));
    let all = Query { k: Some(30), ..query_for("a mug") };
    let other = engine.search(&all).unwrap().hits.into_iter().find(|hit| {
        hit.image_metadata.attributes.get("colour").is_none_or(|colour| colour != "red")
    });
    let other = other.unwrap().image_metadata.image_id.to_string();
    let error = engine.explain(&red, &other, &cancel).unwrap_err().to_string();
    assert!(error.starts_with("image_id: is excluded"), "{error}");
    cancel.cancel();
    assert!(matches!(
        engine.search_with_cancel(&query_for("a cup"), &cancel),
        Err(QueryError::Cancelled)
    ));
    assert!(matches!(
        engine.explain(&query_for("a cup"), &other, &cancel),
        Err(QueryError::Cancelled)
    ));
}

#[tokio::test]
async fn pages_are_those_of_one_ranking_while_the_catalogue_changes() {
    let engine = engine_with_images(SearchOptions::default(), 230).await;
    let filter = || Some(serde_json::from_value(json!({"ne": {"colour": "blue"}})).unwrap());
    for (i, query) in [
        query_for("a mug"),
        Query { normaliser: Some(Normaliser::Zscore), weight: Some(0.7), ..query_for("a mug") },
        Query { filter: filter(), ..query_for(QueryInput::ImageId("i0003".into())) },
    ]
    .into_iter()
    .enumerate()
    {
        let whole = engine.search(&Query { k: Some(1000), ..query.clone() }).unwrap();
        assert_eq!(whole.next_cursor, None);
        let mut query = Query { k: Some(40), ..query };
        let (mut ids, mut raw_ids) = (Vec::new(), Vec::new());
        for page in 0.. {
            let results = engine.search(&query).unwrap();
            assert_eq!(results.table_version, whole.table_version);
            assert_eq!(results.hits[0].rank, 40 * page + 1);
            ids.extend(hit_ids(&results.hits));
            raw_ids.extend(hit_ids(&results.raw_hits));
            let Some(next) = results.next_cursor else { break };
            query.cursor = Some(next);
            let version = whole.table_version + page as u64 + 1;
            let new_rows = (0..5).map(|n| {
                sample_row(
                    &format!("n{version}-{n}"),
                    1,
                    Some(clip_like_embedding(version * 9 + n, DIMENSION)),
                )
            });
            apply_rows(&engine, version, new_rows.collect()).await;
        }
        assert_eq!((ids, raw_ids), (hit_ids(&whole.hits), hit_ids(&whole.raw_hits)), "query {i}");
    }
}

#[tokio::test]
async fn a_cursor_continues_only_its_own_query_while_its_version_is_pinned() {
    let engine =
        engine_with_images(SearchOptions { cursor_seconds: 3, ..SearchOptions::default() }, 50)
            .await;
    let cursor = engine.search(&query_for("a mug")).unwrap().next_cursor;
    let continue_with = |query: Query| engine.search(&Query { cursor: cursor.clone(), ..query });
    assert!(continue_with(query_for("a mug")).is_ok());
    assert!(
        continue_with(Query { k: Some(3), ..query_for("a mug") }).is_ok(),
        "pages may differ in size"
    );
    for other in [query_for("a cup"), Query { weight: Some(0.1), ..query_for("a mug") }] {
        let error = continue_with(other).unwrap_err().to_string();
        assert!(error.starts_with("cursor: belongs to another query"), "{error}");
    }
    let broken = Query { cursor: Some("AAAA".into()), ..query_for("a mug") };
    let error = engine.search(&broken).unwrap_err().to_string();
    assert!(error.starts_with("cursor: is not a cursor"), "{error}");
    let other_engine = engine_with_decoding(decode::DecodeOptions::default()).await;
    apply_rows(&other_engine, 9, vec![sample_row("a", 1, Some(clip_like_embedding(1, DIMENSION)))])
        .await;
    let result = other_engine.search(&Query { cursor: cursor.clone(), ..query_for("a mug") });
    assert!(matches!(result, Err(QueryError::CursorExpired { version: 1 })));
    apply_rows(&engine, 2, vec![sample_row("new", 1, Some(clip_like_embedding(1, DIMENSION)))])
        .await;
    assert!(continue_with(query_for("a mug")).is_ok(), "the version is pinned");
    tokio::time::sleep(std::time::Duration::from_millis(3_100)).await;
    assert!(matches!(continue_with(query_for("a mug")), Err(QueryError::CursorExpired { .. })));
}

#[tokio::test]
async fn pinned_snapshots_take_no_more_memory_than_the_limit() {
    let engine =
        engine_with_images(SearchOptions { cursor_mib: 1, ..SearchOptions::default() }, 50).await;
    let mut cursors = Vec::new();
    for version in 2..12u64 {
        cursors.push(engine.search(&query_for("a mug")).unwrap().next_cursor);
        // Every image changes, so that no chunk is shared: 80 images of at least 5 KB take 0.4 MB.
        let mut rng = ChaCha8Rng::seed_from_u64(version);
        let mut rows: Vec<ImageRow> = (0..80).map(|i| sample_image_row(i, &mut rng)).collect();
        for row in &mut rows {
            row.sequence = crate::record::SequenceKey::from_number(version);
            row.image.as_mut().unwrap().uri = Some(format!("file:///{}", "x".repeat(5_000)));
        }
        apply_rows(&engine, version, rows).await;
        engine.evict_pinned_snapshots();
        assert!(engine.pinned_snapshot_bytes() <= 1 << 20, "{}", engine.pinned_snapshot_bytes());
    }
    let continue_with = |cursor: &Option<String>| {
        engine.search(&Query { cursor: cursor.clone(), ..query_for("a mug") })
    };
    assert!(matches!(continue_with(&cursors[2]), Err(QueryError::CursorExpired { .. })));
    assert!(continue_with(cursors.last().unwrap()).is_ok());
}

#[tokio::test]
async fn calibrated_thresholds_apply_only_to_the_configuration_that_answers() {
    let mut serving_snapshot = sample_serving_snapshot(vec![sample_prompt_set("one", DIMENSION)]);
    serving_snapshot.serving.calibration = Some(Calibration {
        min_score: Some(0.5),
        no_match: Some(NoMatchRule { signal: NoMatchSignal::VocabularyZScore, threshold: 1e6 }),
        measured_at: chrono::Utc::now(),
        evaluation_fingerprint: "e".into(),
        baseline: None,
    });
    let engine =
        Engine::new(HashEncoders::new(DIMENSION), serving_snapshot, SearchOptions::default());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    apply_rows(&engine, 1, (0..90).map(|i| sample_image_row(i, &mut rng)).collect()).await;
    let results = engine.search(&query_for("one 1")).unwrap();
    let no_match = results.no_match_verdict.unwrap();
    assert!(
        no_match.nothing_matches && no_match.reason.contains("100 % of the query's words"),
        "{}",
        no_match.reason
    );
    let next = Query { cursor: results.next_cursor, ..query_for("one 1") };
    assert_eq!(engine.search(&next).unwrap().no_match_verdict, None, "later pages have no verdict");
    for other in [
        Query { weight: Some(0.1), ..query_for("one 1") },
        query_for(QueryInput::Vector(vec![1.0; DIMENSION])),
        query_for(QueryInput::ImageId("i0001".into())),
    ] {
        assert_eq!(engine.search(&other).unwrap().no_match_verdict, None);
        let calibrated = Some(MinScore::Calibrated(CalibratedThreshold::Calibrated));
        let error = engine.search(&Query { min_score: calibrated, ..other }).unwrap_err();
        assert!(error.to_string().starts_with("min_score: no threshold"), "{error}");
    }
    let all = engine.search(&Query { k: Some(90), ..query_for("one 1") }).unwrap();
    let min_score = Some(MinScore::Score(all.hits[20].score));
    let limited = Query { min_score, k: Some(50), ..query_for("one 1") };
    let limited = engine.search(&limited).unwrap();
    assert_eq!((limited.hits.len(), limited.raw_hits.len(), limited.next_cursor), (21, 50, None));
    let calibrated = serde_json::from_value(json!("calibrated")).unwrap();
    let results =
        engine.search(&Query { min_score: Some(calibrated), ..query_for("one 1") }).unwrap();
    assert_eq!(results.min_score, Some(0.5));
    assert!(
        serde_json::from_value::<MinScore>(json!("best"))
            .unwrap_err()
            .to_string()
            .contains("calibrated")
    );
}

#[tokio::test]
async fn facets_count_live_images_per_attribute_value() {
    let engine = engine_with_images(SearchOptions::default(), 200).await;
    let snapshot = engine.snapshots().newest();
    let all = engine.facets(&snapshot);
    assert_eq!(
        all.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(),
        ["colour", "new", "price", "shot", "stock"]
    );
    for attribute in all {
        let has_attribute =
            |(image, _): &(ImageMetadata, _)| image.attributes.contains_key(&attribute.name);
        assert_eq!(
            attribute.image_count,
            snapshot.images_with_embeddings().filter(has_attribute).count()
        );
        let lists_values =
            matches!(attribute.attribute_type, AttributeType::Text | AttributeType::Boolean);
        assert_eq!(attribute.value_counts.is_some(), lists_values);
        for (value, count) in attribute.value_counts.iter().flatten() {
            let filter = match attribute.attribute_type {
                AttributeType::Boolean => json!({"eq": {&attribute.name: value == "true"}}),
                _ => json!({"eq": {&attribute.name: value}}),
            };
            let filter = Some(serde_json::from_value(filter).unwrap());
            assert_eq!(
                engine.search(&Query { filter, ..query_for("a") }).unwrap().matched_image_count,
                *count
            );
        }
    }
}
