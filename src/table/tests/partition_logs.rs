//! Positions in the logs of a partition whose topic is created again.

use tokio_util::sync::CancellationToken;

use super::{all_image_ids, generation, partition, partition_batch};
use crate::record::{LogAnchor, StoredPosition};
use crate::store::Store;
use crate::table::{
    MaintenanceOptions, PartitionBatch, TableWriter, VerificationRules, verify_table,
};

fn anchor(offset: i64) -> LogAnchor {
    LogAnchor { offset, fingerprint: offset * 1_000 }
}

fn batch(log_number: u64, expected: Option<i64>, ids: std::ops::Range<i64>) -> PartitionBatch {
    let (first, last) = (Some(anchor(ids.start)), Some(anchor(ids.end - 1)));
    PartitionBatch {
        log_number,
        anchor: first,
        last_message: last,
        ..partition_batch(0, expected, ids)
    }
}

/// Returns what is stored after [`batch`].
fn stored_position(log_number: u64, ids: std::ops::Range<i64>) -> StoredPosition {
    StoredPosition {
        log_number,
        next_offset: Some(ids.end),
        anchor: Some(anchor(ids.start)),
        last_message: Some(anchor(ids.end - 1)),
    }
}

async fn read(store: &Store) -> StoredPosition {
    let mut writer = TableWriter::open(store, &generation(), 5).await.unwrap();
    writer.read_stored_position(&partition(0), &CancellationToken::new()).await.unwrap()
}

#[tokio::test]
async fn a_new_log_is_consumed_from_its_beginning_and_no_position_goes_back() {
    let (store, cancel) = (Store::in_memory(), CancellationToken::new());
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    assert_eq!(read(&store).await, StoredPosition::default());
    writer.append(vec![batch(0, None, 0..5)], &cancel).await.unwrap();
    let stored = stored_position(0, 0..5);
    assert_eq!(read(&store).await, stored);

    let new = writer.start_new_log(&partition(0), 0, &cancel).await.unwrap();
    assert_eq!(new, StoredPosition { log_number: 1, ..StoredPosition::default() });
    assert_eq!(read(&store).await, new);
    // Another worker that has found the same thing changes nothing.
    let mut other = TableWriter::open(&store, &generation(), 5).await.unwrap();
    assert_eq!(other.start_new_log(&partition(0), 0, &cancel).await.unwrap(), new);
    let summary = writer.append(vec![batch(1, None, 0..3)], &cancel).await.unwrap();
    assert_eq!(summary.written_row_count, 3, "the offsets of the old log do not fence them");
    let stored = stored_position(1, 0..3);
    assert_eq!(read(&store).await, stored);
    // It gets the position to which the first worker has come.
    assert_eq!(other.start_new_log(&partition(0), 0, &cancel).await.unwrap(), stored);

    let options = MaintenanceOptions::default();
    let rules = VerificationRules {
        prompt_sets: &[],
        decode_rule: "1 refuse",
        options: &options,
        now: chrono::Utc::now(),
    };
    let report = verify_table(&store, &generation(), &rules, &|_, _| {}, &cancel).await;
    let findings = report.unwrap().unwrap().findings;
    assert!(findings.iter().all(|one| one.code != "position_regressed"), "{findings:?}");
}

/// A worker that does not know of the new log still commits what it has read of the old one.
#[tokio::test]
async fn a_late_commit_of_the_old_log_changes_nothing_of_the_new_one() {
    let (store, cancel) = (Store::in_memory(), CancellationToken::new());
    let mut late = TableWriter::open(&store, &generation(), 5).await.unwrap();
    late.append(vec![batch(0, None, 0..5)], &cancel).await.unwrap();
    let mut owner = TableWriter::open(&store, &generation(), 5).await.unwrap();
    owner.start_new_log(&partition(0), 0, &cancel).await.unwrap();
    owner.append(vec![batch(1, None, 0..5)], &cancel).await.unwrap();
    let summary = late.append(vec![batch(0, Some(5), 5..8)], &cancel).await.unwrap();
    assert_eq!((summary.written_row_count, summary.fenced_partitions.len()), (3, 0));
    let stored = stored_position(1, 0..5);
    assert_eq!(read(&store).await, stored);
    assert_eq!(all_image_ids(&store).await.len(), 13);
}

#[tokio::test]
async fn a_table_without_anchors_is_read_as_before() {
    let (store, cancel) = (Store::in_memory(), CancellationToken::new());
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![partition_batch(0, None, 0..5)], &cancel).await.unwrap();
    let stored = StoredPosition { next_offset: Some(5), ..StoredPosition::default() };
    assert_eq!(read(&store).await, stored);
    // Found in the log even if the partition has had no messages for many commits.
    for i in 0..45 {
        let one = partition_batch(1, (i > 0).then_some(i), i..i + 1);
        writer.append(vec![one], &cancel).await.unwrap();
    }
    assert_eq!(read(&store).await, stored);
}

/// A worker of an earlier version does not store the last message: then the one that is stored says nothing.
#[tokio::test]
async fn a_last_message_that_is_not_the_last_one_is_ignored() {
    let (store, cancel) = (Store::in_memory(), CancellationToken::new());
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![batch(0, None, 0..5)], &cancel).await.unwrap();
    let earlier = PartitionBatch { last_message: None, ..batch(0, Some(5), 5..8) };
    writer.append(vec![earlier], &cancel).await.unwrap();
    let stored =
        StoredPosition { anchor: Some(anchor(5)), last_message: None, ..stored_position(0, 0..8) };
    assert_eq!(read(&store).await, stored);
}
