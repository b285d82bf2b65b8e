//! Tests of what the tables promise, on stores in memory that fail on purpose.

pub(crate) mod cancellation;
mod compaction_and_vacuum;
pub(crate) mod faulty;
mod partition_logs;
mod random_histories;
mod statistics_backfill;
mod verification;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering as AtomicOrdering;

use chrono::DateTime;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio_util::sync::CancellationToken;

use crate::balance::normalise::Normaliser;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey, StatisticsSettings};
use crate::catalogue::*;
use crate::record::{
    Attributes, Decoding, Embedding, ImageId, ImageRow, SequenceKey, StoredImage, TopicPartition,
    VersionOrdering,
};
use crate::store::Store;
use crate::table::*;
use faulty::{FaultKind, FaultyStore};

/// The rule by which the images of the rows below were decoded.
const DECODE_RULE: &str = "1 refuse";

pub(crate) fn generation() -> Generation {
    Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, VersionOrdering::Sequence)
}

fn partition(number: i32) -> TopicPartition {
    TopicPartition { topic: "images".into(), number }
}

fn row(id: &str, sequence: u64, deleted: bool) -> ImageRow {
    let vector = [0.1, 0.2, 0.3, sequence as f32];
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    let embedding = Embedding::from_unit_vector(&vector.map(|v| v / length));
    let statistics = ScoreStatistics::from_scores(&[0.1, 0.2], 100.0, 1).unwrap();
    ImageRow {
        image_id: ImageId::new(id).unwrap(),
        sequence: SequenceKey::from_number(sequence),
        event_time: DateTime::from_timestamp(1_700_000_000, 123_000),
        embedded_at: DateTime::from_timestamp(1_700_000_001, 0).unwrap(),
        image: (!deleted).then(|| StoredImage {
            uri: Some(format!("s3://bucket/{id}.jpg")),
            content_hash: "00ff".into(),
            byte_size: 1234,
            width: 640,
            height: 480,
            attributes: Attributes::from([("colour".into(), "red".into())]),
            embedding,
            statistics: [(
                StatisticsKey::new(
                    "demo",
                    1,
                    "0123456789ab",
                    100.0,
                    StatisticsSettings::with_top_k(8),
                ),
                statistics,
            )]
            .into(),
            decoding: Some(Decoding { rule: DECODE_RULE.into(), share: 1.0 }),
        }),
    }
}

fn partition_batch(number: i32, expected: Option<i64>, ids: Range<i64>) -> PartitionBatch {
    PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: partition(number),
        expected_position: expected,
        next_offset: ids.end,
        rows: ids.map(|o| (o, row(&format!("p{number}-{o}"), o as u64, false))).collect(),
    }
}

async fn all_image_ids(store: &Store) -> Vec<String> {
    let mut follower = Follower::open(store, &generation()).await.unwrap();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    assert!(changes.is_full_snapshot);
    let mut ids: Vec<String> = changes.rows.iter().map(|r| r.image_id.to_string()).collect();
    ids.sort();
    ids
}

#[tokio::test]
async fn rows_come_back_as_they_were() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let rows = vec![(0, row("a", 1, false)), (1, row("b", 2, true)), (2, row("ü/c", 3, false))];
    let sent: Vec<ImageRow> = rows.iter().map(|(_, r)| r.clone()).collect();
    let one = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: partition(0),
        expected_position: None,
        next_offset: 3,
        rows,
    };
    let summary = writer.append(vec![one], &CancellationToken::new()).await.unwrap();
    assert_eq!((summary.written_row_count, summary.fenced_partitions.len()), (3, 0));
    assert!(summary.written_bytes > 0);

    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    assert_eq!(changes.rows, sent);
    assert_eq!(changes.table_version, summary.table_version);
}

#[tokio::test]
async fn a_reader_follows_commit_by_commit() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    assert!(follower.next(&|_, _| {}).await.unwrap().unwrap().rows.is_empty());
    assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
    for i in 0..3 {
        let expected = (i > 0).then_some(i * 10);
        writer
            .append(
                vec![partition_batch(0, expected, i * 10..i * 10 + 10)],
                &CancellationToken::new(),
            )
            .await
            .unwrap();
        let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
        assert_eq!((changes.rows.len(), changes.is_full_snapshot), (10, false));
    }
    assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
}

/// A folder lists its files in no order, unlike the store in memory of the other tests.
#[tokio::test]
async fn writers_and_readers_share_a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    let mut writers = Vec::new();
    for _ in 0..2 {
        writers.push(TableWriter::open(&store, &generation(), 5).await.unwrap());
    }
    for i in 0..8 {
        for (number, writer) in writers.iter_mut().enumerate() {
            let expected = (i > 0).then_some(i * 2);
            writer
                .append(
                    vec![partition_batch(number as i32, expected, i * 2..i * 2 + 2)],
                    &CancellationToken::new(),
                )
                .await
                .unwrap();
        }
    }
    assert_eq!(all_image_ids(&store).await.len(), 32);
}

#[tokio::test]
async fn positions_are_stored_with_the_rows_and_survive_the_writer() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    assert_eq!(writer.read_position(&partition(0), &CancellationToken::new()).await.unwrap(), None);
    writer
        .append(
            vec![partition_batch(0, None, 0..5), partition_batch(1, None, 7..9)],
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    drop(writer);
    let mut other = TableWriter::open(&store, &generation(), 5).await.unwrap();
    assert_eq!(
        other.read_position(&partition(0), &CancellationToken::new()).await.unwrap(),
        Some(5)
    );
    assert_eq!(
        other.read_position(&partition(1), &CancellationToken::new()).await.unwrap(),
        Some(9)
    );
}

#[tokio::test]
async fn messages_without_rows_move_the_position() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let empty = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: partition(0),
        expected_position: None,
        next_offset: 4,
        rows: vec![],
    };
    writer.append(vec![empty], &CancellationToken::new()).await.unwrap();
    assert_eq!(
        writer.read_position(&partition(0), &CancellationToken::new()).await.unwrap(),
        Some(4)
    );
    assert!(all_image_ids(&store).await.is_empty());
}

#[tokio::test]
async fn a_worker_that_lost_its_partition_writes_nothing_twice() {
    let store = Store::in_memory();
    let mut old = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let mut new = TableWriter::open(&store, &generation(), 5).await.unwrap();
    new.append(vec![partition_batch(0, None, 0..10)], &CancellationToken::new()).await.unwrap();
    // The old owner resumes with the same messages, and with a partition that it still owns.
    let summary = old
        .append(
            vec![partition_batch(0, None, 0..10), partition_batch(1, None, 0..3)],
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    assert_eq!(summary.fenced_partitions, [(partition(0), 10)]);
    assert_eq!(summary.written_row_count, 3);
    assert_eq!(all_image_ids(&store).await.len(), 13);
}

/// A fenced commit tells a worker that another one has come further than the rows that it still holds.
#[tokio::test]
async fn rows_before_the_expected_position_are_not_stored_again() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![partition_batch(0, None, 0..5)], &CancellationToken::new()).await.unwrap();
    let behind = PartitionBatch { expected_position: Some(5), ..partition_batch(0, None, 2..8) };
    let summary = writer.append(vec![behind], &CancellationToken::new()).await.unwrap();
    assert_eq!((summary.written_row_count, summary.fenced_partitions.len()), (3, 0));
    assert_eq!(all_image_ids(&store).await.len(), 8);
    assert_eq!(
        writer.read_position(&partition(0), &CancellationToken::new()).await.unwrap(),
        Some(8)
    );
}

/// A worker is behind another one, and its store fails now and then: attempts that read further do not
/// count.
#[tokio::test]
async fn a_commit_lands_however_far_behind_its_writer_is() {
    let memory = Arc::new(InMemory::new());
    let faulty = Arc::new(FaultyStore::wrap(memory.clone(), FaultKind::Reads(5)));
    let mut late = TableWriter::open(&Store::from_object_store(faulty.clone()), &generation(), 10)
        .await
        .unwrap();
    let mut other =
        TableWriter::open(&Store::from_object_store(memory), &generation(), 3).await.unwrap();
    for i in 0..60 {
        other
            .append(
                vec![partition_batch(1, (i > 0).then_some(i), i..i + 1)],
                &CancellationToken::new(),
            )
            .await
            .unwrap();
    }
    faulty.is_armed.store(true, AtomicOrdering::SeqCst);
    let summary =
        late.append(vec![partition_batch(0, None, 0..3)], &CancellationToken::new()).await.unwrap();
    assert_eq!((summary.table_version, summary.written_row_count), (61, 3));
}

#[tokio::test]
async fn a_full_read_is_complete_though_reads_of_its_parts_fail() {
    let memory = Arc::new(InMemory::new());
    let mut writer = TableWriter::open(&Store::from_object_store(memory.clone()), &generation(), 3)
        .await
        .unwrap();
    for i in 0..6 {
        writer
            .append(
                vec![partition_batch(1, (i > 0).then_some(i), i..i + 1)],
                &CancellationToken::new(),
            )
            .await
            .unwrap();
    }
    let faulty = Arc::new(FaultyStore::wrap(memory, FaultKind::Reads(12)));
    let follower =
        Follower::open(&Store::from_object_store(faulty.clone()), &generation()).await.unwrap();
    let mut follower = follower.with_max_part_bytes(1);
    faulty.is_armed.store(true, AtomicOrdering::SeqCst);
    let mut errors = 0;
    let snapshot = loop {
        match follower.next(&|_, _| {}).await {
            Ok(changes) => break changes.unwrap(),
            Err(_) => errors += 1,
        }
    };
    assert!(errors > 0 && snapshot.is_full_snapshot);
    assert_eq!(snapshot.rows.len(), 6);
}

#[tokio::test]
async fn only_the_prefix_that_is_stored_is_dropped() {
    let store = Store::in_memory();
    let mut old = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let mut new = TableWriter::open(&store, &generation(), 5).await.unwrap();
    new.append(vec![partition_batch(0, None, 0..4)], &CancellationToken::new()).await.unwrap();
    let summary =
        old.append(vec![partition_batch(0, None, 0..10)], &CancellationToken::new()).await.unwrap();
    assert_eq!((summary.written_row_count, summary.fenced_partitions.len()), (6, 1));
    let expected: Vec<String> = (0..10).map(|o| format!("p0-{o}")).collect();
    assert_eq!(all_image_ids(&store).await, expected);
}

#[tokio::test]
async fn writers_of_different_partitions_never_lose_or_double_a_row() {
    let store = Store::in_memory();
    let writers = (0..4).map(|number| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut writer = TableWriter::open(&store, &generation(), 50).await.unwrap();
            for i in 0..10 {
                let expected = (i > 0).then_some(i * 3);
                let summary = writer
                    .append(
                        vec![partition_batch(number, expected, i * 3..i * 3 + 3)],
                        &CancellationToken::new(),
                    )
                    .await
                    .unwrap();
                assert!(summary.fenced_partitions.is_empty());
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let ids = all_image_ids(&store).await;
    let mut unique = ids.clone();
    unique.dedup();
    assert_eq!((ids.len(), unique.len()), (120, 120));
}

#[tokio::test]
async fn transient_errors_and_lost_answers_leave_every_row_once() {
    for kind in [FaultKind::BeforeWrites(3), FaultKind::AfterWrites(3)] {
        let faulty = Arc::new(FaultyStore::new(kind));
        let store = Store::from_object_store(faulty.clone());
        let mut writer = TableWriter::open(&store, &generation(), 50).await.unwrap();
        faulty.is_armed.store(true, AtomicOrdering::SeqCst);
        for i in 0..12 {
            let expected = (i > 0).then_some(i * 2);
            let summary = writer
                .append(
                    vec![partition_batch(0, expected, i * 2..i * 2 + 2)],
                    &CancellationToken::new(),
                )
                .await
                .unwrap();
            assert!(summary.fenced_partitions.is_empty(), "{kind:?}");
        }
        faulty.is_armed.store(false, AtomicOrdering::SeqCst);
        assert!(faulty.injected_faults.load(AtomicOrdering::SeqCst) > 5, "{kind:?}");
        assert_eq!(all_image_ids(&store).await.len(), 24, "{kind:?}");
        assert_eq!(
            writer.read_position(&partition(0), &CancellationToken::new()).await.unwrap(),
            Some(24)
        );
    }
}

#[tokio::test]
async fn a_damaged_file_is_named_and_not_read() {
    let memory = Arc::new(InMemory::new());
    let store = Store::from_object_store(memory.clone());
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![partition_batch(0, None, 0..5)], &CancellationToken::new()).await.unwrap();
    let files: Vec<ObjectMeta> = memory.list(None).try_collect().await.unwrap();
    let data = files.iter().find(|f| f.location.as_ref().ends_with(".parquet")).unwrap();
    let bytes = memory.get(&data.location).await.unwrap().bytes().await.unwrap();
    let half = bytes.slice(..bytes.len() / 2);
    memory.put(&data.location, half.into()).await.unwrap();
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    let error = follower.next(&|_, _| {}).await.unwrap_err();
    let name = data.location.filename().unwrap();
    assert!(matches!(&error, TableError::Corrupt { file, .. } if file.contains(name)), "{error}");
}

fn serving() -> ServingConfig {
    ServingConfig::new(
        StatisticsKey::new("demo", 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8)),
        Normaliser::Softmax,
        0.25,
    )
}

fn prompt_set(name: &str) -> PromptSetRecord {
    PromptSetRecord {
        key: StatisticsKey::new(name, 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8)),
        name: name.into(),
        version: 1,
        language: "en".into(),
        top_k: 8,
        temperature: 1.0,
        texts: vec!["a photo".into()],
        since: DateTime::from_timestamp(1_700_000_000, 0).unwrap(),
    }
}

#[tokio::test]
async fn many_workers_that_start_at_once_agree_on_one_state() {
    let store = Store::in_memory();
    let starts = (0..8).map(|i| {
        let state = StateStore::new(&store);
        tokio::spawn(async move {
            let sets = [prompt_set("demo"), prompt_set(&format!("own-{}", i % 2))];
            state.initialise_or_extend(&generation(), &sets, &serving(), "test").await.unwrap();
        })
    });
    for start in starts.collect::<Vec<_>>() {
        start.await.unwrap();
    }
    let newest = StateStore::new(&store).read_newest().await.unwrap().unwrap();
    assert_eq!(newest.prompt_sets.len(), 3);
    assert!(newest.revision <= 3);
}

#[tokio::test]
async fn another_model_or_ordering_is_rejected_with_both_names() {
    let store = Store::in_memory();
    let state = StateStore::new(&store);
    state
        .initialise_or_extend(&generation(), &[prompt_set("demo")], &serving(), "test")
        .await
        .unwrap();
    let other = Generation::new("other", &"ffff".repeat(16), 4, 100.0, VersionOrdering::Sequence);
    let error =
        state.initialise_or_extend(&other, &[], &serving(), "test").await.unwrap_err().to_string();
    assert!(error.contains("ab12") && error.contains("ffff"), "{error}");
    let other = Generation { ordering: VersionOrdering::EventTime, ..generation() };
    let error =
        state.initialise_or_extend(&other, &[], &serving(), "test").await.unwrap_err().to_string();
    assert!(error.contains("event_time") && error.contains("sequence"), "{error}");
}
