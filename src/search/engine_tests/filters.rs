//! Filters, compared with an evaluation of their own, and filters that are rejected.

use chrono::DateTime;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{apply_rows, empty_engine, engine_with_images, hit_ids, query_for, sample_image_row};
use crate::record::ImageRow;
use crate::search::testing::sample_row;
use crate::search::*;

/// Evaluates a filter on one row, independently of the implementation.
fn filter_matches(filter: &Value, row: &ImageRow) -> bool {
    let (operator, operand) = filter.as_object().unwrap().iter().next().unwrap();
    let value = |name: &str| -> Option<Value> {
        let attributes = &row.image.as_ref().unwrap().attributes;
        match name {
            "event_time" => row.event_time.map(|t| t.timestamp_micros().into()),
            "embedded_at" => Some(row.embedded_at.timestamp_micros().into()),
            "stock" | "price" | "new" => serde_json::from_str(attributes.get(name)?).ok(),
            "shot" => Some(parse_micros(attributes.get(name)?)),
            _ => attributes.get(name).map(|text| text.as_str().into()),
        }
    };
    let literal = |name: &str, given: &Value| match name {
        "event_time" | "embedded_at" | "shot" => parse_micros(given.as_str().unwrap()),
        _ => given.clone(),
    };
    let compare = |name: &str, given: &Value| {
        let (stored, given) = (value(name)?, literal(name, given));
        match (stored.as_f64(), given.as_f64()) {
            (Some(a), Some(b)) => a.partial_cmp(&b),
            _ => Some(
                stored
                    .as_str()
                    .map(str::to_owned)
                    .unwrap_or(stored.to_string())
                    .cmp(&given.as_str().map(str::to_owned).unwrap_or(given.to_string())),
            ),
        }
    };
    let all = |test: &dyn Fn(&str, &Value) -> bool| {
        operand.as_object().unwrap().iter().all(|(n, v)| test(n, v))
    };
    match operator.as_str() {
        "and" => operand.as_array().unwrap().iter().all(|node| filter_matches(node, row)),
        "or" => operand.as_array().unwrap().iter().any(|node| filter_matches(node, row)),
        "not" => !filter_matches(operand, row),
        "eq" => all(&|n, v| compare(n, v).is_some_and(|o| o.is_eq())),
        "ne" => all(&|n, v| !compare(n, v).is_some_and(|o| o.is_eq())),
        "lt" => all(&|n, v| compare(n, v).is_some_and(|o| o.is_lt())),
        "lte" => all(&|n, v| compare(n, v).is_some_and(|o| o.is_le())),
        "gt" => all(&|n, v| compare(n, v).is_some_and(|o| o.is_gt())),
        "gte" => all(&|n, v| compare(n, v).is_some_and(|o| o.is_ge())),
        "in" => all(&|n, v| {
            v.as_array().unwrap().iter().any(|v| compare(n, v).is_some_and(|o| o.is_eq()))
        }),
        "prefix" => all(&|n, v| {
            value(n).is_some_and(|t| t.as_str().unwrap().starts_with(v.as_str().unwrap()))
        }),
        "has_item" => all(&|n, v| {
            value(n).is_some_and(|t| t.as_str().unwrap().split("; ").any(|one| *v == *one))
        }),
        "exists" => value(operand.as_str().unwrap()).is_some(),
        other => panic!("{other}"),
    }
}

fn parse_micros(text: &str) -> Value {
    DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros().into()
}

fn random_filter(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    let name = *["colour", "stock", "price", "new", "shot", "event_time", "embedded_at"]
        .choose(rng)
        .unwrap();
    let mut value = || match name {
        "colour" => json!(["red", "dark red; red", "blue", "grün", "c"].choose(rng).unwrap()),
        "stock" => json!(rng.random_range(-5..6)),
        "price" => json!(f64::from(rng.random_range(0..300)) / 10.0),
        "new" => json!(rng.random_bool(0.5)),
        "shot" => json!(format!("2026-01-{:02}T01:00:00+01:00", rng.random_range(1..29))),
        _ => json!(DateTime::from_timestamp(rng.random_range(0..300), 0).unwrap().to_rfc3339()),
    };
    let (one, two) = (value(), value());
    match rng.random_range(0..if depth > 0 { 10 } else { 7 }) {
        0 | 1 => json!({*["eq", "ne", "lt", "lte", "gt", "gte"].choose(rng).unwrap(): {name: one}}),
        2 => json!({"eq": {name: one, "new": true}}),
        3 => json!({"in": {name: [one, two]}}),
        4 => json!({"prefix": {"colour": (*["r", "dark", "", "gr", "x"].choose(rng).unwrap())}}),
        5 => json!({"exists": name}),
        6 => json!({"has_item": {"colour": (*["red", "dark red", "c", "a"].choose(rng).unwrap())}}),
        7 => json!({"not": random_filter(rng, depth - 1)}),
        n => {
            json!({*["and", "or"].get(n - 8).unwrap(): [random_filter(rng, depth - 1), random_filter(rng, depth - 1)]})
        }
    }
}

#[tokio::test]
async fn a_filter_keeps_exactly_the_matching_images() {
    let engine = empty_engine(SearchOptions::default());
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut rows: Vec<ImageRow> = (0..300).map(|i| sample_image_row(i, &mut rng)).collect();
    apply_rows(&engine, 1, rows.clone()).await;
    let mut selective_filters = 0;
    for round in 0..600u64 {
        if round % 50 == 0 {
            // A commit changes a row, deletes one and adds one.
            let mut commit =
                vec![sample_image_row(round, &mut rng), sample_image_row(1000 + round, &mut rng)];
            commit[0].sequence = crate::record::SequenceKey::from_number(2 + round);
            commit.push(sample_row(&format!("i{:04}", 201 + round / 50), 10_000, None));
            rows.retain(|r| commit.iter().all(|c| c.image_id != r.image_id));
            rows.extend(commit.iter().filter(|r| r.image.is_some()).cloned());
            apply_rows(&engine, 2 + round, commit).await;
        }
        let filter = random_filter(&mut rng, 3);
        let query = Query {
            filter: Some(serde_json::from_value(filter.clone()).unwrap()),
            k: Some(1000),
            ..query_for("a mug")
        };
        // The second time, the bitmaps are cached.
        for _ in 0..2 {
            let results = engine.search(&query).unwrap();
            let mut ids = hit_ids(&results.hits);
            ids.sort();
            let expected = rows.iter().filter(|row| filter_matches(&filter, row));
            let mut expected: Vec<String> = expected.map(|row| row.image_id.to_string()).collect();
            expected.sort();
            assert_eq!(ids, expected, "{filter}");
            assert_eq!(results.matched_image_count, expected.len());
            selective_filters += usize::from(!expected.is_empty() && expected.len() < rows.len());
        }
    }
    assert!(selective_filters > 400, "{selective_filters}");
}

#[tokio::test]
async fn invalid_filters_are_rejected_with_a_reason() {
    let engine = engine_with_images(SearchOptions::default(), 3).await;
    let mut deep = json!({"exists": "colour"});
    for _ in 0..9 {
        deep = json!({"not": deep});
    }
    let many: Vec<u32> = (0..300).collect();
    for (filter, expected) in [
        (
            json!({"eq": {"size": 1}}),
            "\"size\" is not a declared attribute; there are colour (text), new (boolean)",
        ),
        (json!({"eq": {"colour": 1}}), "colour is a text, but 1 is not"),
        (json!({"lt": {"stock": 1.5}}), "stock is a whole number, but 1.5 is not"),
        (json!({"gt": {"price": "1"}}), "price is a number, but \"1\" is not"),
        (json!({"in": {"new": ["true"]}}), "new is true or false, but \"true\" is not"),
        (json!({"lt": {"event_time": "yesterday"}}), "event_time is a time as RFC 3339 writes it"),
        (json!({"prefix": {"price": "1"}}), "`prefix` needs a text, but price is a number"),
        (json!({"has_item": {"price": "1"}}), "`has_item` needs a text, but price is a number"),
        (json!({"has_item": {"colour": "a; b"}}), "`has_item` needs one item of colour"),
        (json!({"in": {"colour": []}}), "`in` has no values for colour"),
        (json!({"and": []}), "`and` is empty"),
        (json!({"eq": {}}), "`eq` is empty"),
        (json!({"in": {"stock": many}}), "compares with more than 256 values"),
        (deep, "nested deeper than 8"),
    ] {
        let filter = Some(serde_json::from_value(filter).unwrap());
        let error = engine.search(&Query { filter, ..query_for("a") }).unwrap_err().to_string();
        assert!(error.starts_with("filter: ") && error.contains(expected), "{error}");
    }
}

#[test]
fn a_filter_implies_a_value_only_if_every_branch_requires_it() {
    let implies_mug =
        |filter: Value| serde_json::from_value::<Filter>(filter).unwrap().implies("kind", "mug");
    assert!(implies_mug(json!({"eq": {"kind": "mug", "colour": "red"}})));
    assert!(implies_mug(json!({"in": {"kind": ["mug"]}})));
    assert!(implies_mug(json!({"and": [{"eq": {"colour": "red"}}, {"eq": {"kind": "mug"}}]})));
    assert!(implies_mug(json!({"or": [{"eq": {"kind": "mug"}}, {"in": {"kind": ["mug"]}}]})));
    for other in [
        json!({"eq": {"kind": "cup"}}),
        json!({"in": {"kind": ["mug", "cup"]}}),
        json!({"or": [{"eq": {"kind": "mug"}}, {"eq": {"colour": "red"}}]}),
        json!({"not": {"eq": {"kind": "mug"}}}),
        json!({"exists": "kind"}),
    ] {
        assert!(!implies_mug(other.clone()), "{other}");
    }
}
