//! Every loop that retries on a failing store ends with its cancellation token, and stores nothing
//! twice and nothing half.

use chrono::Utc;

use super::faulty::stops_soon;
use crate::table::tests::*;

/// Without cancellation, this many attempts would take hours.
pub(crate) const MANY_ATTEMPTS: u32 = 10_000;

fn is_cancelled<T>(result: &Result<T, TableError>) -> bool {
    matches!(result, Err(TableError::Cancelled { .. }))
}

/// A store on which calls of `kind` always fail once it is armed, and its table with the rows of the
/// first five messages in five files.
pub(crate) async fn store_with_rows(kind: FaultKind) -> (Arc<FaultyStore>, Store, TableWriter) {
    let faulty = Arc::new(FaultyStore::new(kind));
    let store = Store::from_object_store(faulty.clone());
    let mut writer = TableWriter::open(&store, &generation(), MANY_ATTEMPTS).await.unwrap();
    for i in 0..5 {
        let batch = partition_batch(0, (i > 0).then_some(i), i..i + 1);
        writer.append(vec![batch], &CancellationToken::new()).await.unwrap();
    }
    (faulty, store, writer)
}

#[tokio::test]
async fn reading_a_position_ends_with_its_token() {
    let (faulty, store, _) = store_with_rows(FaultKind::Reads(1)).await;
    let mut writer = TableWriter::open(&store, &generation(), MANY_ATTEMPTS).await.unwrap();
    let cancel = faulty.arm_and_cancel();
    let result = stops_soon(writer.read_position(&partition(0), &cancel)).await;
    assert!(is_cancelled(&result), "{result:?}");
    faulty.is_armed.store(false, AtomicOrdering::SeqCst);
    let position = writer.read_position(&partition(0), &CancellationToken::new()).await.unwrap();
    assert_eq!(position, Some(5));
}

#[tokio::test]
async fn appending_ends_with_its_token_and_can_be_repeated() {
    for kind in [FaultKind::BeforeWrites(1), FaultKind::LogWrites, FaultKind::AfterWrites(1)] {
        let (faulty, store, mut writer) = store_with_rows(kind).await;
        let cancel = faulty.arm_and_cancel();
        let batch = partition_batch(0, Some(5), 5..8);
        let result = stops_soon(writer.append(vec![batch.clone()], &cancel)).await;
        assert!(is_cancelled(&result), "{kind:?} {result:?}");
        faulty.is_armed.store(false, AtomicOrdering::SeqCst);
        writer.append(vec![batch], &CancellationToken::new()).await.unwrap();
        assert_eq!(all_image_ids(&store).await.len(), 8, "{kind:?}");
    }
}

#[tokio::test]
async fn staging_and_committing_statistics_end_with_their_tokens() {
    let key =
        StatisticsKey::new("late", 1, "feedfeedfeed", 100.0, StatisticsSettings::with_top_k(8));
    let measure = |values: &[f32]| ScoreStatistics::from_scores(&[values[3], -1.0], 100.0, 1);
    let never = CancellationToken::new();

    let (faulty, store, _) = store_with_rows(FaultKind::BeforeWrites(1)).await;
    let table = StatisticsTable::open_or_create(&store, &generation(), MANY_ATTEMPTS).await;
    let table = table.unwrap();
    let cancel = faulty.arm_and_cancel();
    let result = stops_soon(table.stage_file(&key, "file", &[], &cancel)).await;
    assert!(is_cancelled(&result), "{result:?}");

    let (faulty, store, _) = store_with_rows(FaultKind::LogWrites).await;
    let mut source = BackfillSource::open(&store, &generation()).await.unwrap();
    let table = StatisticsTable::open_or_create(&store, &generation(), MANY_ATTEMPTS).await;
    let mut table = table.unwrap();
    let mut staged = Vec::new();
    for file in source.list_pending_files_and_coverage(&key).await.unwrap().0 {
        let rows = source.compute_file_statistics(&file, &key, &measure).await.unwrap().unwrap();
        staged.push(table.stage_file(&key, file.path.as_ref(), &rows, &never).await.unwrap());
    }
    let cancel = faulty.arm_and_cancel();
    let result = stops_soon(table.commit_staged(staged.clone(), &cancel)).await;
    assert!(is_cancelled(&result), "{result:?}");
    faulty.is_armed.store(false, AtomicOrdering::SeqCst);
    assert!(table.files_by_unit().await.unwrap().is_empty());
    table.commit_staged(staged, &never).await.unwrap();
    assert_eq!(table.files_by_unit().await.unwrap().len(), 5);

    faulty.injected_faults.store(0, AtomicOrdering::SeqCst);
    let cancel = faulty.arm_and_cancel();
    let result = stops_soon(table.remove_prompt_set(&key, &cancel)).await;
    assert!(is_cancelled(&result), "{result:?}");
    faulty.is_armed.store(false, AtomicOrdering::SeqCst);
    assert_eq!(table.files_by_unit().await.unwrap().len(), 5);
}

#[tokio::test]
async fn compaction_ends_with_its_token_and_returns_what_was_done() {
    let (faulty, store, _) = store_with_rows(FaultKind::LogWrites).await;
    let options = MaintenanceOptions { files_per_merge: 2, ..MaintenanceOptions::default() };
    let compactor = Compactor::open(&store, &generation(), &options, MANY_ATTEMPTS).await;
    let mut compactor = compactor.unwrap();
    for mode in [CompactionMode::Merge, CompactionMode::Deep] {
        faulty.injected_faults.store(0, AtomicOrdering::SeqCst);
        let cancel = faulty.arm_and_cancel();
        let run = compactor.run(mode, Utc::now(), &|_, _| {}, &cancel);
        assert_eq!(stops_soon(run).await.unwrap(), CompactionSummary::default(), "{mode:?}");
    }
    faulty.injected_faults.store(0, AtomicOrdering::SeqCst);
    let cancel = faulty.arm_and_cancel();
    let result = stops_soon(compactor.record_vacuum_time(Utc::now(), &cancel)).await;
    assert!(is_cancelled(&result), "{result:?}");
    faulty.is_armed.store(false, AtomicOrdering::SeqCst);
    assert_eq!(all_image_ids(&store).await.len(), 5);
}
