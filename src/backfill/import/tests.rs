//! Plans that join and check rows, and imports into tables in memory that fail on purpose.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::plan::PlannedImage;
use super::*;
use crate::prompts::ActivePromptSets;
use crate::record::arrays::{EmbeddingArray, Values};
use crate::record::{
    AttributeType, AttributeTypes, ImageRow, SequenceKey, TopicPartition, VersionOrdering,
};
use crate::search::testing::{sample_prompt_set, sample_row};
use crate::store::Store;
use crate::table::{Follower, Generation, PartitionBatch, TableWriter};

const DIMENSION: usize = 4;

fn array(rows: usize) -> EmbeddingArray {
    let values = (0..rows * DIMENSION).map(|i| 1.0 + (i * 7 % 11) as f32).collect();
    EmbeddingArray::new("a.npy", Values::F32(values), [rows, DIMENSION]).unwrap()
}

fn ids(values: Vec<Value>) -> IdColumn {
    IdColumn { name: "ids.txt".into(), values }
}

fn numbered_ids(count: usize) -> IdColumn {
    ids((0..count).map(|i| json!(format!("i{i}"))).collect())
}

fn rules(ordering: VersionOrdering, types: &AttributeTypes) -> ImportRules<'_> {
    ImportRules {
        dimension: DIMENSION,
        ordering,
        attribute_types: types,
        max_clock_skew: TimeDelta::seconds(60),
        now: DateTime::from_timestamp(1_700_000_000, 0).unwrap(),
    }
}

fn plan(rows: usize) -> ImportPlan {
    let types = AttributeTypes::new();
    let rules = rules(VersionOrdering::EventTime, &types);
    ImportPlan::new(array(rows), &numbered_ids(rows), None, &ImportColumns::default(), &rules)
        .unwrap()
}

fn generation() -> Generation {
    let ordering = VersionOrdering::EventTime;
    Generation::new("tiny", &"ab12".repeat(16), DIMENSION, 100.0, ordering)
}

async fn import(
    plan: &ImportPlan,
    store: &Store,
    rows_per_commit: usize,
    cancel: &CancellationToken,
    progress: &(dyn Fn(usize) + Sync),
) -> ImportSummary {
    let mut writer = TableWriter::open(store, &generation(), 5).await.unwrap();
    let import = Import {
        plan,
        ordering: VersionOrdering::EventTime,
        prompt_sets: ActivePromptSets::new(vec![sample_prompt_set("one", DIMENSION)]),
        rows_per_commit,
    };
    import.run(&mut writer, progress, cancel).await.unwrap()
}

/// Returns the newest row of each image, by id.
async fn newest_rows(store: &Store) -> BTreeMap<String, ImageRow> {
    let mut follower = Follower::open(store, &generation()).await.unwrap();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    let mut newest: BTreeMap<String, ImageRow> = BTreeMap::new();
    for row in changes.rows {
        let id = row.image_id.to_string();
        if newest.get(&id).is_none_or(|known| row.supersedes(known)) {
            newest.insert(id, row);
        }
    }
    newest
}

#[test]
fn ids_addresses_versions_and_attributes_are_joined_by_row() {
    let types: AttributeTypes = [
        ("price".into(), AttributeType::Number),
        ("sku".into(), AttributeType::Text),
        ("new".into(), AttributeType::Boolean),
    ]
    .into();
    let csv = "image_id,link,changed,price,sku,new,other\n\
               a,s3://b/a.jpg,2023-01-02T03:04:05Z,7.50,12,true,x\n\
               b,,2023-01-02T03:04:06+01:00,,x,,\n";
    let metadata = Columns::from_csv("m.csv", csv).unwrap();
    let columns = ImportColumns { uri: Some("link".into()), sequence: Some("changed".into()) };
    let rules = rules(VersionOrdering::EventTime, &types);
    let ids = metadata.ids("image_id").unwrap();
    let plan = ImportPlan::new(array(2), &ids, Some(&metadata), &columns, &rules).unwrap();
    assert_eq!((plan.faults.len(), &plan.unused_columns[..]), (0, &["other".to_owned()][..]));
    let PlannedImage { image_id, uri, version, attributes } = plan.rows[0].clone().unwrap();
    assert_eq!((image_id.as_str(), uri.as_deref()), ("a", Some("s3://b/a.jpg")));
    assert_eq!(version.unwrap().0, SequenceKey::from_number(1_672_628_645_000_000));
    let texts: Vec<&str> = attributes.values().map(String::as_str).collect();
    assert_eq!(texts, ["true", "7.5", "12"]);
    let second = plan.rows[1].as_ref().unwrap();
    assert_eq!((second.uri.as_ref(), second.attributes.len()), (None, 1));
    let other = ImportPlan::new(array(2), &ids, None, &ImportColumns::default(), &rules).unwrap();
    assert_ne!(plan.fingerprint(), other.fingerprint());
}

#[test]
fn everything_that_is_wrong_with_files_is_said_at_once() {
    let types = AttributeTypes::new();
    let rules = ImportRules { dimension: 8, ..rules(VersionOrdering::Sequence, &types) };
    let metadata = Columns::from_csv("m.csv", "a\n1\n").unwrap();
    let columns = ImportColumns { uri: Some("uri".into()), sequence: Some("v".into()) };
    let errors = ImportPlan::new(array(2), &numbered_ids(3), Some(&metadata), &columns, &rules);
    let errors: Vec<String> = errors.unwrap_err().iter().map(ToString::to_string).collect();
    let expected = [
        "a.npy: its embeddings have 4 values, those of the model 8",
        "ids.txt: has 3 ids, but there are 2 embeddings",
        "m.csv: has 1 rows, but there are 2 embeddings",
        "m.csv: has no column \"uri\"",
        "m.csv: has no column \"v\"",
    ];
    assert_eq!(errors.len(), expected.len(), "{errors:?}");
    for (error, start) in errors.iter().zip(expected) {
        assert!(error.starts_with(start), "{error}");
    }
}

#[test]
fn everything_that_is_wrong_with_rows_is_said_by_row_and_field() {
    let types: AttributeTypes = [("price".into(), AttributeType::Number)].into();
    let lines = r#"{"image_id":"a","v":1,"price":"x","uri":7}
        {"image_id":"b","v":-1}
        {"image_id":"c","v":"3"}
        {"image_id":"c","v":4}
        {"image_id":"a\nb","v":5}
        {"v":6}"#;
    let metadata = Columns::from_json_lines("m.jsonl", lines).unwrap();
    let columns = ImportColumns { uri: Some("uri".into()), sequence: Some("v".into()) };
    let rules = rules(VersionOrdering::Sequence, &types);
    let ids = metadata.ids("image_id").unwrap();
    let plan = ImportPlan::new(array(6), &ids, Some(&metadata), &columns, &rules).unwrap();
    assert_eq!(plan.storable_rows(), 1);
    assert_eq!(plan.rows[2].as_ref().unwrap().image_id.as_str(), "c");
    let faults: Vec<(usize, &str)> =
        plan.faults.iter().map(|fault| (fault.row, fault.reason.as_str())).collect();
    let expected = [
        (0, "uri: 7 is not a text; price: \"x\" is not a number, as the attribute is declared"),
        (1, "sequence: -1 is not a whole number below 2^64"),
        (3, "image_id: \"c\" is that of row 2, too; an image has one embedding"),
        (4, "image_id: contains the control character \\u{a}"),
        (5, "image_id: is missing"),
    ];
    assert_eq!(faults, expected);
    let future = [json!("2024-01-01T00:00:00Z"), json!("yesterday")];
    let types = AttributeTypes::new();
    for (ordering, value, reason) in [
        (VersionOrdering::EventTime, &future[0], "lies in the future"),
        (VersionOrdering::EventTime, &future[1], "is not a time as RFC 3339 writes it"),
        (VersionOrdering::Sequencer, &json!("xyz"), "hexadecimal"),
    ] {
        let line = json!({ "image_id": "a", "v": value }).to_string();
        let metadata = Columns::from_json_lines("m", &line).unwrap();
        let ids = metadata.ids("image_id").unwrap();
        let columns = ImportColumns { uri: None, sequence: Some("v".into()) };
        let rules = super::tests::rules(ordering, &types);
        let plan = ImportPlan::new(array(1), &ids, Some(&metadata), &columns, &rules).unwrap();
        assert!(plan.faults[0].reason.contains(reason), "{:?}", plan.faults);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_stored_once_at_unit_length_with_statistics() {
    let (store, plan) = (Store::in_memory(), plan(10));
    let never = CancellationToken::new();
    let summary = import(&plan, &store, 3, &never, &|_| {}).await;
    assert_eq!(summary, ImportSummary { stored: 10, already_stored: 0, is_complete: true });
    let rows = newest_rows(&store).await;
    assert_eq!(rows.len(), 10);
    let set = sample_prompt_set("one", DIMENSION);
    for (row, planned) in plan.rows.iter().enumerate() {
        let id = planned.as_ref().unwrap().image_id.as_str();
        let image = rows[id].image.as_ref().unwrap();
        let expected = plan.images.unit_row(row);
        for (stored, expected) in image.embedding.values().iter().zip(expected) {
            assert!((f64::from(*stored) - expected).abs() < 5e-4);
        }
        let statistics = set.compute_statistics(&image.embedding).unwrap();
        assert_eq!(image.statistics[&set.statistics_key], statistics);
        assert!(image.decoding.as_ref().unwrap().is_embedded_elsewhere());
    }
    let again = import(&plan, &store, 100, &never, &|_| {}).await;
    assert_eq!(again, ImportSummary { stored: 0, already_stored: 10, is_complete: true });
    assert_eq!(newest_rows(&store).await, rows);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_import_continues_with_the_version_of_its_start() {
    let (store, plan) = (Store::in_memory(), plan(10));
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let summary = import(&plan, &store, 4, &cancel, &|done| {
        if done >= 4 {
            stop.cancel();
        }
    })
    .await;
    assert_eq!(summary, ImportSummary { stored: 4, already_stored: 0, is_complete: false });
    let summary = import(&plan, &store, 4, &CancellationToken::new(), &|_| {}).await;
    assert_eq!(summary, ImportSummary { stored: 6, already_stored: 4, is_complete: true });
    let rows = newest_rows(&store).await;
    let versions: Vec<&SequenceKey> = rows.values().map(|row| &row.sequence).collect();
    assert_eq!(versions.len(), 10);
    assert!(versions.iter().all(|version| *version == versions[0]), "{versions:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_after_an_import_is_newer_also_than_the_same_import_again() {
    let (store, plan) = (Store::in_memory(), plan(3));
    let never = CancellationToken::new();
    import(&plan, &store, 10, &never, &|_| {}).await;
    let later = chrono::Utc::now().timestamp_micros() as u64;
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let event = PartitionBatch {
        partition: TopicPartition { topic: Arc::from("images"), number: 0 },
        log_number: 0,
        anchor: None,
        last_message: None,
        expected_position: None,
        next_offset: 2,
        rows: vec![
            (0, sample_row("i0", later, Some(vec![0.0, 0.0, 0.0, 1.0]))),
            (1, sample_row("i1", later, None)),
        ],
    };
    writer.append(vec![event], &never).await.unwrap();
    import(&plan, &store, 10, &never, &|_| {}).await;
    let rows = newest_rows(&store).await;
    let values = rows["i0"].image.as_ref().unwrap().embedding.values().to_vec();
    assert_eq!((values, rows["i1"].image.is_none()), (vec![0.0, 0.0, 0.0, 1.0], true));
    assert!(rows["i2"].image.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_that_import_the_same_store_each_row_once() {
    let (store, plan) = (Store::in_memory(), plan(40));
    let never = CancellationToken::new();
    let (first, second) = tokio::join!(
        import(&plan, &store, 3, &never, &|_| {}),
        import(&plan, &store, 5, &never, &|_| {})
    );
    assert_eq!(first.stored + second.stored, 40, "{first:?} {second:?}");
    assert!(first.is_complete && second.is_complete);
    assert_eq!(newest_rows(&store).await.len(), 40);
}
