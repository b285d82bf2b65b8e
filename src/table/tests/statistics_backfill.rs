//! Tests of backfilled statistics and of what a follower requests.

use chrono::Utc;

use crate::table::tests::*;

fn statistics_key(name: &str) -> StatisticsKey {
    StatisticsKey::new(name, 1, "feedfeedfeed", 100.0, StatisticsSettings::with_top_k(8))
}

/// Returns statistics that identify the embedding that they are of.
fn fake_statistics(values: &[f32]) -> Option<ScoreStatistics> {
    ScoreStatistics::from_scores(&[values[3], values[0] - 1.0], 100.0, 1)
}

/// Measures all pending files, as a reindex does. Returns how many files and rows that were.
async fn backfill_pending(store: &Store, key: &StatisticsKey) -> (usize, usize) {
    let mut source = BackfillSource::open(store, &generation()).await.unwrap();
    let mut table = StatisticsTable::open_or_create(store, &generation(), 50).await.unwrap();
    let (pending, _) = source.list_pending_files_and_coverage(key).await.unwrap();
    let (mut staged, mut rows) = (Vec::new(), 0);
    for file in &pending {
        let measured =
            source.compute_file_statistics(file, key, &fake_statistics).await.unwrap().unwrap();
        rows += measured.len();
        staged.push(
            table
                .stage_file(key, file.path.as_ref(), &measured, &CancellationToken::new())
                .await
                .unwrap(),
        );
    }
    table.commit_staged(staged, &CancellationToken::new()).await.unwrap();
    assert!(source.list_pending_files_and_coverage(key).await.unwrap().1.is_complete());
    (pending.len(), rows)
}

/// Asserts that every image that a new follower reads has exactly the statistics of its own embedding.
/// Returns the number of rows.
async fn assert_all_have_statistics(store: &Store, key: &StatisticsKey) -> usize {
    let mut follower = Follower::open(store, &generation()).await.unwrap();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    for image in changes.rows.iter().filter_map(|row| row.image.as_ref()) {
        assert_eq!(image.statistics.get(key).copied(), fake_statistics(image.embedding.values()));
    }
    changes.rows.len()
}

async fn write_sample_rows(store: &Store) -> TableWriter {
    let mut writer = TableWriter::open(store, &generation(), 50).await.unwrap();
    for i in 0..3 {
        let expected = (i > 0).then_some(i * 4);
        let mut one = partition_batch(0, expected, i * 4..i * 4 + 4);
        if i == 1 {
            // Another version of a stored image, and a delete.
            one.rows.push((7, row("p0-1", 99, false)));
            one.rows.push((7, row("p0-2", 99, true)));
        }
        writer.append(vec![one], &CancellationToken::new()).await.unwrap();
    }
    writer
}

#[tokio::test]
async fn backfilled_statistics_reach_every_row_and_a_file_is_measured_once() {
    let store = Store::in_memory();
    let mut writer = write_sample_rows(&store).await;
    assert_eq!(backfill_pending(&store, &statistics_key("a")).await, (3, 13));
    assert_eq!(backfill_pending(&store, &statistics_key("a")).await, (0, 0));
    assert_eq!(assert_all_have_statistics(&store, &statistics_key("a")).await, 14);
    // New rows without the set are measured; the older ones are not measured again.
    writer
        .append(vec![partition_batch(0, Some(12), 12..14)], &CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(backfill_pending(&store, &statistics_key("a")).await, (1, 2));
    assert_eq!(backfill_pending(&store, &statistics_key("b")).await, (4, 15));
    assert_eq!(assert_all_have_statistics(&store, &statistics_key("b")).await, 16);
}

#[tokio::test]
async fn rows_that_carry_a_set_need_no_backfill_and_the_log_says_so() {
    let store = Store::in_memory();
    write_sample_rows(&store).await;
    let carried =
        StatisticsKey::new("demo", 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8));
    let mut source = BackfillSource::open(&store, &generation()).await.unwrap();
    let (pending, coverage) = source.list_pending_files_and_coverage(&carried).await.unwrap();
    assert!(pending.is_empty() && coverage.is_complete());
    assert_eq!((coverage.rows, coverage.covered), (14, 14));
}

#[tokio::test]
async fn backfilled_statistics_name_their_row_and_its_embedding() {
    let store = Store::in_memory();
    write_sample_rows(&store).await;
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    let whole = follower.next(&|_, _| {}).await.unwrap().unwrap();
    backfill_pending(&store, &statistics_key("a")).await;
    let mut table =
        StatisticsTable::open_if_exists(&store, &generation(), 5).await.unwrap().unwrap();
    let mut backfilled = Vec::new();
    for file in table.files_by_unit().await.unwrap().into_values() {
        assert_eq!(file.prompt_set_key, statistics_key("a"));
        backfilled.extend(table.read_file_or_empty(&file.path).await.unwrap());
    }
    assert_eq!(backfilled.len(), 13);
    for one in backfilled {
        let row = whole.rows.iter().find(|row| {
            row.image_id.as_str() == one.image_id
                && row.sequence == one.sequence
                && row.embedded_at == one.embedded_at
        });
        let image = row.unwrap().image.as_ref().unwrap();
        assert_eq!(one.embedding_hash, embedding_hash(image.embedding.values()));
        assert_eq!(Some(one.statistics), fake_statistics(image.embedding.values()));
    }
}

/// Requests to object storage cost money, and every query worker polls twice per second.
#[tokio::test]
async fn an_idle_follower_requests_the_next_log_entry_and_nothing_else() {
    let recorder = Arc::new(FaultyStore::new(FaultKind::LogWrites));
    let store = Store::from_object_store(recorder.clone());
    let mut writer = write_sample_rows(&store).await;
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    let whole = follower.next(&|_, _| {}).await.unwrap().unwrap();
    let images = format!("GET generations/{}/images", generation().id);
    let entry_after = |version: u64| format!("{images}/_delta_log/{:020}.json", version + 1);
    recorder.take_requests();
    for _ in 0..5 {
        assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
        assert_eq!(recorder.take_requests(), [entry_after(whole.table_version)]);
    }

    // A backfill commits to another table, and brings a follower nothing.
    backfill_pending(&store, &statistics_key("a")).await;
    recorder.take_requests();
    assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
    assert_eq!(recorder.take_requests(), [entry_after(whole.table_version)]);

    // A commit costs its log entry and its data file.
    writer
        .append(vec![partition_batch(0, Some(12), 12..13)], &CancellationToken::new())
        .await
        .unwrap();
    recorder.take_requests();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    assert_eq!((changes.rows.len(), changes.table_version), (1, whole.table_version + 1));
    let requests = recorder.take_requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert_eq!(requests[0], entry_after(whole.table_version));
    assert!(requests[1].starts_with(&images) && requests[1].ends_with(".parquet"), "{requests:?}");

    // Once per minute the log is listed as well: it may have been cleaned up.
    follower.expire_resync_timeout();
    assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
    let requests = recorder.take_requests();
    assert_eq!(requests[0], entry_after(changes.table_version));
    assert!(requests.iter().all(|request| !request.contains("/statistics/")), "{requests:?}");
    assert!(follower.next(&|_, _| {}).await.unwrap().is_none());
    assert_eq!(recorder.take_requests(), [entry_after(changes.table_version)]);
}

#[tokio::test]
async fn statistics_of_another_version_or_embedding_are_never_used() {
    let store = Store::in_memory();
    write_sample_rows(&store).await;
    let mut source = BackfillSource::open(&store, &generation()).await.unwrap();
    let (pending, _) = source.list_pending_files_and_coverage(&statistics_key("a")).await.unwrap();
    let mut table = StatisticsTable::open_or_create(&store, &generation(), 50).await.unwrap();
    for (i, file) in pending.iter().enumerate() {
        let mut measured = source
            .compute_file_statistics(file, &statistics_key("a"), &fake_statistics)
            .await
            .unwrap()
            .unwrap();
        for one in &mut measured {
            match i {
                0 => one.sequence = SequenceKey::from_number(12_345),
                1 => one.embedded_at = Utc::now(),
                _ => one.embedding_hash = "00".repeat(8),
            }
        }
        let staged = table
            .stage_file(
                &statistics_key("a"),
                file.path.as_ref(),
                &measured,
                &CancellationToken::new(),
            )
            .await
            .unwrap();
        table.commit_staged(vec![staged], &CancellationToken::new()).await.unwrap();
    }
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    assert!(
        changes
            .rows
            .iter()
            .filter_map(|row| row.image.as_ref())
            .all(|i| !i.statistics.contains_key(&statistics_key("a")))
    );
}

#[tokio::test]
async fn compaction_folds_statistics_into_rows() {
    let store = Store::in_memory();
    let mut writer = write_sample_rows(&store).await;
    backfill_pending(&store, &statistics_key("a")).await;
    writer
        .append(vec![partition_batch(0, Some(12), 12..14)], &CancellationToken::new())
        .await
        .unwrap();
    backfill_pending(&store, &statistics_key("a")).await;
    let options = MaintenanceOptions { files_per_merge: 2, ..MaintenanceOptions::default() };
    let mut compactor = Compactor::open(&store, &generation(), &options, 20).await.unwrap();
    let token = CancellationToken::new();
    let summary =
        compactor.run(CompactionMode::Deep, Utc::now(), &|_, _| {}, &token).await.unwrap();
    assert!(summary.folded_statistics_count > 0);
    assert!(assert_all_have_statistics(&store, &statistics_key("a")).await > 0);
    let mut table =
        StatisticsTable::open_if_exists(&store, &generation(), 20).await.unwrap().unwrap();
    assert!(table.files_by_unit().await.unwrap().is_empty(), "they are in the rows now");
    let (pending, _) = BackfillSource::open(&store, &generation())
        .await
        .unwrap()
        .list_pending_files_and_coverage(&statistics_key("a"))
        .await
        .unwrap();
    assert!(pending.is_empty());
}

#[tokio::test]
async fn a_retired_set_is_dropped_and_can_come_back() {
    let store = Store::in_memory();
    write_sample_rows(&store).await;
    backfill_pending(&store, &statistics_key("a")).await;
    backfill_pending(&store, &statistics_key("b")).await;
    let mut table =
        StatisticsTable::open_if_exists(&store, &generation(), 20).await.unwrap().unwrap();
    assert_eq!(
        table.remove_prompt_set(&statistics_key("a"), &CancellationToken::new()).await.unwrap(),
        3
    );
    assert_eq!(assert_all_have_statistics(&store, &statistics_key("b")).await, 14);
    assert_eq!(backfill_pending(&store, &statistics_key("a")).await, (3, 13));
    assert_eq!(assert_all_have_statistics(&store, &statistics_key("a")).await, 14);
}

#[tokio::test]
async fn transient_errors_lost_answers_and_rivals_leave_every_unit_once() {
    for kind in [FaultKind::BeforeWrites(3), FaultKind::AfterWrites(3)] {
        let faulty = Arc::new(FaultyStore::new(kind));
        let store = Store::from_object_store(faulty.clone());
        write_sample_rows(&store).await;
        StatisticsTable::open_or_create(&store, &generation(), 50).await.unwrap();
        faulty.is_armed.store(true, AtomicOrdering::SeqCst);
        let rivals = [(), ()].map(|()| {
            let store = store.clone();
            tokio::spawn(async move { backfill_pending(&store, &statistics_key("a")).await })
        });
        for rival in rivals {
            rival.await.unwrap();
        }
        faulty.is_armed.store(false, AtomicOrdering::SeqCst);
        assert!(faulty.injected_faults.load(AtomicOrdering::SeqCst) > 0, "{kind:?}");
        let mut table =
            StatisticsTable::open_if_exists(&store, &generation(), 20).await.unwrap().unwrap();
        let units = table.files_by_unit().await.unwrap();
        assert_eq!(units.len(), 3, "{kind:?}");
        assert_eq!(units.values().map(|unit| unit.row_count).sum::<usize>(), 13, "{kind:?}");
        assert_eq!(assert_all_have_statistics(&store, &statistics_key("a")).await, 14, "{kind:?}");
    }
}
