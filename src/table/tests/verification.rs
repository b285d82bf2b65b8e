//! Tests of the verification of tables.

use chrono::{TimeDelta, Utc};

use super::compaction_and_vacuum::{data_files, options, write_versions};
use crate::table::tests::*;

async fn verify_after_days(store: &Store, state: &CatalogueState, days: i64) -> VerificationReport {
    verify_with_rule(store, state, days, DECODE_RULE).await
}

async fn verify_with_rule(
    store: &Store,
    state: &CatalogueState,
    days: i64,
    decode_rule: &str,
) -> VerificationReport {
    let now = Utc::now() + TimeDelta::days(days);
    let token = CancellationToken::new();
    let sets: Vec<_> = state.prompt_sets.iter().map(|set| set.key.clone()).collect();
    let rules = VerificationRules { prompt_sets: &sets, decode_rule, options: &options(), now };
    let verified = verify_table(store, &state.live, &rules, &|_, _| {}, &token).await;
    verified.unwrap().unwrap()
}

fn finding_codes(report: &VerificationReport) -> Vec<&'static str> {
    report.findings.iter().map(|finding| finding.code).collect()
}

#[tokio::test]
async fn verify_finds_what_is_wrong_and_only_that() {
    let memory = Arc::new(InMemory::new());
    let store = Store::from_object_store(memory.clone());
    let states = StateStore::new(&store);
    let state = states
        .initialise_or_extend(&generation(), &[prompt_set("demo")], &serving(), "t")
        .await
        .unwrap();
    write_versions(&store, 6, 2).await;
    let sound = verify_after_days(&store, &state, 0).await;
    assert_eq!((finding_codes(&sound), sound.is_sound()), (vec![], true));
    assert_eq!((sound.images, sound.deleted, sound.rows, sound.superseded), (5, 1, 12, 6));
    assert_eq!(finding_codes(&verify_after_days(&store, &state, 9).await), ["erasure_overdue"]);
    assert_eq!(sound.decoded_otherwise, []);
    // Only the newest row of each image counts, and deleted images do not.
    let differing = verify_with_rule(&store, &state, 0, "2 refuse").await;
    assert_eq!(
        (finding_codes(&differing), differing.is_sound()),
        (vec!["decode_rule_differs"], true)
    );
    assert_eq!((differing.findings[0].count, differing.decoded_otherwise.len()), (5, 5));
    assert_eq!(differing.decoded_otherwise[0].decode_rule.as_deref(), Some(DECODE_RULE));

    // Rows lack a set that came later, and have one that the state does not know.
    let other = states
        .initialise_or_extend(&generation(), &[prompt_set("new")], &serving(), "t")
        .await
        .unwrap();
    let later = CatalogueState { prompt_sets: vec![prompt_set("new")], ..other };
    let report = verify_after_days(&store, &later, 0).await;
    assert_eq!(finding_codes(&report), ["statistics_missing", "statistics_unknown"]);
    assert!(report.is_sound(), "warnings alone");

    // One embedding has another length than 1, and one is of another model.
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let mut rows = [row("long", 1, false), row("short", 1, false)];
    rows[0].image.as_mut().unwrap().embedding = Embedding::from_unit_vector(&[1.0, 1.0, 0.0, 0.0]);
    rows[1].image.as_mut().unwrap().embedding = Embedding::from_unit_vector(&[1.0, 0.0]);
    let rows = (12..).zip(rows).collect();
    let one = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: partition(0),
        expected_position: Some(12),
        next_offset: 14,
        rows,
    };
    writer.append(vec![one], &CancellationToken::new()).await.unwrap();
    let report = verify_after_days(&store, &state, 0).await;
    assert_eq!(
        finding_codes(&report),
        ["embedding_dimension_mismatch", "embedding_not_normalised"]
    );
    assert!(!report.is_sound());

    // One bit of the file is flipped, probably in an embedding.
    let files = data_files(&store).await;
    let file = files.iter().find(|f| !f.location.as_ref().contains("_delta_log")).unwrap();
    let bytes = memory.get(&file.location).await.unwrap().bytes().await.unwrap();
    let mut damaged = bytes.to_vec();
    damaged[bytes.len() / 3] ^= 1;
    memory.put(&file.location, damaged.into()).await.unwrap();
    let report = verify_after_days(&store, &state, 0).await;
    assert!(finding_codes(&report).contains(&"file_corrupt"), "{report:?}");
    let error = Follower::open(&store, &generation()).await.unwrap().next(&|_, _| {}).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("checksum") && error.contains(file.location.filename().unwrap()));
    memory.delete(&file.location).await.unwrap();
    assert!(finding_codes(&verify_after_days(&store, &state, 0).await).contains(&"file_missing"));

    // A deep compaction fails until the file is dropped.
    let mut compactor = Compactor::open(&store, &generation(), &options(), 5).await.unwrap();
    let token = CancellationToken::new();
    assert!(compactor.run(CompactionMode::Deep, Utc::now(), &|_, _| {}, &token).await.is_err());
    let dropped = compactor.drop_damaged_files(&|_, _| {}, &token).await.unwrap().unwrap();
    assert_eq!(dropped.len(), 1);
    assert!(file.location.as_ref().ends_with(&dropped[0]));
    let again = compactor.drop_damaged_files(&|_, _| {}, &token).await.unwrap();
    assert_eq!(again, Some(Vec::new()));
    assert!(!finding_codes(&verify_after_days(&store, &state, 0).await).contains(&"file_missing"));
    compactor.run(CompactionMode::Deep, Utc::now(), &|_, _| {}, &token).await.unwrap();
}
