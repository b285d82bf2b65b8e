//! Tests of compaction, vacuum and the maintenance lease.

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use object_store::path::Path;

use crate::table::maintenance::vacuum;
use crate::table::tests::*;

pub(super) fn options() -> MaintenanceOptions {
    MaintenanceOptions { files_per_merge: 4, ..MaintenanceOptions::default() }
}

async fn compact(
    store: &Store,
    options: &MaintenanceOptions,
    mode: CompactionMode,
    days: i64,
) -> CompactionSummary {
    let mut compactor = Compactor::open(store, &generation(), options, 50).await.unwrap();
    let now = Utc::now() + TimeDelta::days(days);
    compactor.run(mode, now, &|_, _| {}, &CancellationToken::new()).await.unwrap()
}

/// Returns the newest row of each image, and the number of rows.
async fn newest_rows(store: &Store) -> (BTreeMap<String, ImageRow>, usize) {
    let mut follower = Follower::open(store, &generation()).await.unwrap();
    let rows = follower.next(&|_, _| {}).await.unwrap().unwrap().rows;
    let (count, mut newest) = (rows.len(), BTreeMap::<String, ImageRow>::new());
    for row in rows {
        match newest.get(row.image_id.as_str()) {
            Some(known) if !row.supersedes(known) => {}
            _ => {
                newest.insert(row.image_id.to_string(), row);
            }
        }
    }
    (newest, count)
}

/// Returns a row that is created now.
fn row_made_now(id: &str, sequence: u64, deleted: bool) -> ImageRow {
    let now = DateTime::from_timestamp_micros(Utc::now().timestamp_micros()).unwrap();
    ImageRow { embedded_at: now, ..row(id, sequence, deleted) }
}

/// Writes `versions` versions of each of `images` images, in commits of two rows. The newest version of
/// the first image is a delete.
pub(super) async fn write_versions(store: &Store, images: i64, versions: u64) {
    let mut writer = TableWriter::open(store, &generation(), 50).await.unwrap();
    let mut rows = Vec::new();
    for version in 1..=versions {
        for image in 0..images {
            rows.push(row_made_now(
                &format!("i{image}"),
                version,
                image == 0 && version == versions,
            ));
        }
    }
    let mut offset = 0;
    for pair in rows.chunks(2) {
        let rows: Vec<_> = (offset..).zip(pair.iter().cloned()).collect();
        let next = offset + pair.len() as i64;
        let expected = (offset > 0).then_some(offset);
        let one = PartitionBatch {
            log_number: 0,
            anchor: None,
            last_message: None,
            partition: partition(0),
            expected_position: expected,
            next_offset: next,
            rows,
        };
        writer.append(vec![one], &CancellationToken::new()).await.unwrap();
        offset = next;
    }
}

pub(super) async fn data_files(store: &Store) -> Vec<ObjectMeta> {
    let files: Vec<ObjectMeta> = store.object_store().list(None).try_collect().await.unwrap();
    files.into_iter().filter(|f| f.location.as_ref().ends_with(".parquet")).collect()
}

#[tokio::test]
async fn small_files_are_merged_and_every_image_stays_as_it_was() {
    let store = Store::in_memory();
    write_versions(&store, 20, 1).await;
    let mut follower = Follower::open(&store, &generation()).await.unwrap();
    follower.next(&|_, _| {}).await.unwrap();
    let before = newest_rows(&store).await;
    let summary = compact(&store, &options(), CompactionMode::Merge, 0).await;
    assert_eq!(
        (
            summary.removed_file_count,
            summary.written_file_count,
            summary.dropped_superseded_row_count
        ),
        (10, 1, 0)
    );
    assert_eq!(newest_rows(&store).await, before);
    // A follower gets a new version without any rows.
    let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
    assert_eq!((changes.rows.len(), changes.is_full_snapshot), (0, false));
    assert_eq!(
        compact(&store, &options(), CompactionMode::Merge, 0).await,
        CompactionSummary::default()
    );
}

#[tokio::test]
async fn an_erased_image_leaves_no_embedding_behind() {
    let store = Store::in_memory();
    write_versions(&store, 6, 3).await;
    let options = MaintenanceOptions { tombstone_retention_days: 30, ..options() };
    // The result is one file, which no merge rewrites and in which nothing is due for erasure.
    let summary = compact(&store, &options, CompactionMode::Merge, 0).await;
    assert_eq!((summary.dropped_superseded_row_count, summary.dropped_tombstone_count), (12, 0));
    let (rows, count) = newest_rows(&store).await;
    assert_eq!((rows.len(), count), (6, 6));
    assert!(rows["i0"].image.is_none(), "the tombstone stays");

    // Two more images are deleted. Only their erasure is a reason to rewrite the file.
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let rows: Vec<_> =
        (18..).zip([row_made_now("i1", 9, true), row_made_now("i2", 9, true)]).collect();
    let one = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: partition(0),
        expected_position: Some(18),
        next_offset: 20,
        rows,
    };
    writer.append(vec![one], &CancellationToken::new()).await.unwrap();
    let erasure_only = MaintenanceOptions { max_superseded_percent: 100, ..options.clone() };
    assert_eq!(
        compact(&store, &erasure_only, CompactionMode::Deep, 2).await.dropped_superseded_row_count,
        2
    );
    let (rows, count) = newest_rows(&store).await;
    assert_eq!((rows.len(), count), (6, 6));

    // After their retention the tombstones are dropped too, and vacuum removes the old files.
    assert_eq!(
        compact(&store, &options, CompactionMode::Deep, 40).await.dropped_tombstone_count,
        3
    );
    let now = Utc::now() + TimeDelta::days(40);
    let removed = vacuum::vacuum(&store, &generation(), &options, now, false).await.unwrap();
    assert!(removed.removed_file_paths.len() > 9, "{removed:?}");
    let (rows, count) = newest_rows(&store).await;
    assert_eq!((rows.len(), count), (3, 3));
    for file in data_files(&store).await {
        if file.location.as_ref().contains("_delta_log") {
            continue;
        }
        let bytes = store.object_store().get(&file.location).await.unwrap().bytes().await.unwrap();
        let ids: Vec<_> =
            file::rows_from_parquet(bytes).unwrap().into_iter().map(|r| r.image_id).collect();
        assert!(ids.iter().all(|id| ["i3", "i4", "i5"].contains(&id.as_str())), "{ids:?}");
    }
}

/// If a tombstone were dropped before every older row of its image, the image would come back.
#[tokio::test]
async fn a_tombstone_outlives_every_older_row() {
    let store = Store::in_memory();
    write_versions(&store, 2, 2).await;
    let options =
        MaintenanceOptions { tombstone_retention_days: 1, max_superseded_percent: 1, ..options() };
    let first = compact(&store, &options, CompactionMode::Deep, 9).await;
    assert_eq!((first.dropped_superseded_row_count, first.dropped_tombstone_count), (2, 0));
    assert!(newest_rows(&store).await.0["i0"].image.is_none());
    assert_eq!(compact(&store, &options, CompactionMode::Deep, 9).await.dropped_tombstone_count, 1);
    assert_eq!(newest_rows(&store).await.0.into_keys().collect::<Vec<_>>(), ["i1"]);
}

/// Two hazards of Delta's own commits: two compactions of the same files both succeed, and an append that
/// conflicts with one fails.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_compactors_and_writers_neither_lose_nor_double_rows() {
    let store = Store::in_memory();
    write_versions(&store, 40, 1).await;
    let writers = (1..3).map(|number| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut writer = TableWriter::open(&store, &generation(), 200).await.unwrap();
            for i in 0..12 {
                let expected = (i > 0).then_some(i * 2);
                writer
                    .append(
                        vec![partition_batch(number, expected, i * 2..i * 2 + 2)],
                        &CancellationToken::new(),
                    )
                    .await
                    .unwrap();
            }
        })
    });
    let compactors = (0..3).map(|_| {
        let store = store.clone();
        tokio::task::spawn_blocking(move || {
            tokio::runtime::Handle::current().block_on(async {
                for mode in [CompactionMode::Merge, CompactionMode::Deep, CompactionMode::Merge] {
                    compact(&store, &options(), mode, 0).await;
                }
            });
        })
    });
    let (writers, compactors): (Vec<_>, Vec<_>) = (writers.collect(), compactors.collect());
    for writer in writers {
        writer.await.unwrap();
    }
    for compactor in compactors {
        compactor.await.unwrap();
    }
    let (rows, count) = newest_rows(&store).await;
    assert_eq!((rows.len(), count), (40 + 48, 40 + 48));
}

#[tokio::test]
async fn transient_errors_and_lost_answers_double_no_row_in_a_merge() {
    for kind in [FaultKind::BeforeWrites(2), FaultKind::AfterWrites(2)] {
        let faulty = Arc::new(FaultyStore::new(kind));
        let store = Store::from_object_store(faulty.clone());
        write_versions(&store, 40, 1).await;
        faulty.is_armed.store(true, AtomicOrdering::SeqCst);
        // An error of the upload, which is not retried, ends a run; another run follows.
        let mut compactor = Compactor::open(&store, &generation(), &options(), 50).await.unwrap();
        for _ in 0..4 {
            let token = CancellationToken::new();
            let _ = compactor.run(CompactionMode::Merge, Utc::now(), &|_, _| {}, &token).await;
        }
        faulty.is_armed.store(false, AtomicOrdering::SeqCst);
        assert!(faulty.injected_faults.load(AtomicOrdering::SeqCst) > 0, "{kind:?}");
        let (rows, count) = newest_rows(&store).await;
        assert_eq!((rows.len(), count), (40, 40), "{kind:?}");
    }
}

#[tokio::test]
async fn followers_reread_the_whole_table_after_the_retention() {
    let store = Store::in_memory();
    write_versions(&store, 20, 1).await;
    let mut slow = Follower::open(&store, &generation()).await.unwrap();
    slow.next(&|_, _| {}).await.unwrap();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![partition_batch(1, None, 0..3)], &CancellationToken::new()).await.unwrap();
    compact(&store, &options(), CompactionMode::Deep, 0).await;
    compact(
        &store,
        &MaintenanceOptions { files_per_merge: 2, ..options() },
        CompactionMode::Merge,
        0,
    )
    .await;

    // Within the retention no file is removed that a reader may need.
    let kept = vacuum::vacuum(&store, &generation(), &options(), Utc::now(), false).await.unwrap();
    assert_eq!(kept.removed_file_paths, Vec::<String>::new());
    // After it, the commit that the slow follower reads next names a file that was removed.
    let later = Utc::now() + TimeDelta::hours(25);
    let dry = vacuum::vacuum(&store, &generation(), &options(), later, true).await.unwrap();
    let removed = vacuum::vacuum(&store, &generation(), &options(), later, false).await.unwrap();
    assert_eq!(dry.removed_file_paths.len(), removed.removed_file_paths.len());
    assert!(removed.removed_file_paths.len() > 10);
    let changes = slow.next(&|_, _| {}).await.unwrap().unwrap();
    assert!(changes.is_full_snapshot);
    assert_eq!(changes.rows.len(), 23);

    // A file that a writer has left behind without a commit is removed as well.
    let orphan = Path::from(format!("generations/{}/images/left.parquet", generation().id));
    store.object_store().put(&orphan, "x".into()).await.unwrap();
    let removed = vacuum::vacuum(&store, &generation(), &options(), later, false).await.unwrap();
    assert_eq!(removed.removed_file_paths, ["left.parquet"]);
}

/// Each checkpoint is written as a whole, during a commit.
#[tokio::test]
async fn large_checkpoints_are_written_less_often() {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    let log = format!("generations/{}/images/_delta_log", generation().id);
    let hint = Path::from(format!("{log}/_last_checkpoint"));
    for offset in 0..79 {
        let expected = (offset > 0).then_some(offset);
        let summary = writer
            .append(
                vec![partition_batch(1, expected, offset..offset + 1)],
                &CancellationToken::new(),
            )
            .await
            .unwrap();
        if summary.table_version == 39 {
            let hinted = store.object_store().get(&hint).await.unwrap().bytes().await.unwrap();
            let mut hinted: serde_json::Value = serde_json::from_slice(&hinted).unwrap();
            hinted["size"] = 25_000.into();
            store.object_store().put(&hint, hinted.to_string().into()).await.unwrap();
        }
    }
    let listed: Vec<ObjectMeta> = store.object_store().list(None).try_collect().await.unwrap();
    let names = listed.iter().filter_map(|o| o.location.filename());
    let mut versions: Vec<u64> =
        names.filter_map(|name| name.strip_suffix(".checkpoint.parquet")?.parse().ok()).collect();
    versions.sort_unstable();
    // Every 20 commits, then every 40 as the hint says: not at 59.
    assert_eq!(versions, [19, 39, 79]);
}

/// Otherwise checkpoints, which repeat all of them, would grow with every commit.
#[tokio::test]
async fn the_log_forgets_removed_files() {
    use deltalake_core::arrow::array::Array;
    use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    let store = Store::in_memory();
    write_versions(&store, 20, 1).await;
    let mut reader = Follower::open(&store, &generation()).await.unwrap();
    reader.next(&|_, _| {}).await.unwrap();
    compact(&store, &options(), CompactionMode::Merge, 0).await;
    for (retention_hours, is_forgotten) in [(24, false), (0, true), (0, true)] {
        let options =
            MaintenanceOptions { deleted_file_retention_hours: retention_hours, ..options() };
        vacuum::vacuum(&store, &generation(), &options, Utc::now(), false).await.unwrap();
        let listed: Vec<ObjectMeta> = store.object_store().list(None).try_collect().await.unwrap();
        let checkpoints =
            listed.iter().filter(|o| o.location.as_ref().ends_with(".checkpoint.parquet"));
        let newest = checkpoints.max_by(|a, b| a.location.cmp(&b.location)).unwrap();
        let bytes =
            store.object_store().get(&newest.location).await.unwrap().bytes().await.unwrap();
        let batches = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
        let removed: usize = batches
            .map(|batch| {
                batch.unwrap().column_by_name("remove").map_or(0, |c| c.len() - c.null_count())
            })
            .sum();
        assert_eq!(removed == 0, is_forgotten, "{removed} with {retention_hours} hours");
    }
    // Writers and followers continue.
    let mut writer = TableWriter::open(&store, &generation(), 5).await.unwrap();
    writer.append(vec![partition_batch(1, None, 0..3)], &CancellationToken::new()).await.unwrap();
    let mut rows = 0;
    while let Some(changes) = reader.next(&|_, _| {}).await.unwrap() {
        rows += if changes.is_full_snapshot { changes.rows.len() - 20 } else { changes.rows.len() };
    }
    assert_eq!(rows, 3);
}

#[tokio::test]
async fn a_retired_generation_is_removed_when_nothing_writes_to_it() {
    let store = Store::in_memory();
    let states = StateStore::new(&store);
    states
        .initialise_or_extend(&generation(), &[prompt_set("demo")], &serving(), "test")
        .await
        .unwrap();
    write_versions(&store, 3, 2).await;
    let old = Generation::new("other", &"ffff".repeat(16), 4, 100.0, VersionOrdering::Sequence);
    let mut writer = TableWriter::open(&store, &old, 5).await.unwrap();
    writer.append(vec![partition_batch(1, None, 0..3)], &CancellationToken::new()).await.unwrap();
    let objects = async || -> Vec<String> {
        let listed: Vec<_> = store.object_store().list(None).try_collect().await.unwrap();
        listed.into_iter().map(|object| object.location.to_string()).collect()
    };

    // A standby generation is kept, however old it is.
    let later = Utc::now() + TimeDelta::hours(25);
    let with_standby = |generation: Option<&Generation>| {
        let standby = generation.map(|generation| StandbyGeneration {
            generation: generation.clone(),
            checkpoint: "c".into(),
            prompt_sets: Vec::new(),
            since: Utc::now(),
        });
        move |state| Ok::<_, TableError>(Some(CatalogueState { standby: standby.clone(), ..state }))
    };
    states.update("test", with_standby(Some(&old))).await.unwrap();
    assert_eq!(
        list_retired_and_remove_expired(&store, &options(), later, false).await.unwrap(),
        []
    );
    states.update("test", with_standby(None)).await.unwrap();
    let before = objects().await;

    // Before the retention is over, a worker may still fill it.
    let retired =
        list_retired_and_remove_expired(&store, &options(), Utc::now(), false).await.unwrap();
    assert_eq!((retired.len(), &retired[0].id, retired[0].is_expired), (1, &old.id, false));
    let retired = list_retired_and_remove_expired(&store, &options(), later, true).await.unwrap();
    assert!(retired[0].is_expired && retired[0].object_count > 1 && retired[0].byte_size > 0);
    assert_eq!(objects().await, before);

    let removed = list_retired_and_remove_expired(&store, &options(), later, false).await.unwrap();
    assert_eq!(removed, retired);
    let folder = format!("generations/{}/", old.id);
    let kept: Vec<_> = before.into_iter().filter(|path| !path.starts_with(&folder)).collect();
    assert_eq!(objects().await, kept);
    assert_eq!(
        list_retired_and_remove_expired(&store, &options(), later, false).await.unwrap(),
        []
    );
    let gone = Follower::open(&store, &old).await.err();
    assert!(matches!(gone, Some(TableError::NotFound { .. })), "{gone:?}");
}

#[tokio::test]
async fn one_worker_at_a_time_holds_the_lease() {
    let store = Store::in_memory();
    let hour = Duration::from_secs(3_600);
    let lease = MaintenanceLease::acquire(&store, "a", hour).await.unwrap().unwrap();
    assert!(MaintenanceLease::acquire(&store, "b", hour).await.unwrap().is_none());
    lease.release().await.unwrap();
    let short = MaintenanceLease::acquire(&store, "b", Duration::ZERO).await.unwrap();
    let mut short = short.expect("it was released");
    // A holder can renew its lease, but not after another worker has acquired it.
    assert!(short.renew(hour).await.unwrap());
    assert!(MaintenanceLease::acquire(&store, "a", hour).await.unwrap().is_none());
    assert!(short.renew(Duration::ZERO).await.unwrap());
    let acquired = MaintenanceLease::acquire(&store, "a", Duration::ZERO).await.unwrap();
    assert!(acquired.is_some() && !short.renew(hour).await.unwrap());
    // That one has expired: of many workers that try at the same time, one acquires it.
    let attempts = (0..8).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            MaintenanceLease::acquire(&store, &format!("c{i}"), hour).await.unwrap()
        })
    });
    let mut holders = 0;
    for attempt in attempts.collect::<Vec<_>>() {
        holders += usize::from(attempt.await.unwrap().is_some());
    }
    assert_eq!(holders, 1);
}

#[tokio::test]
async fn an_overview_reads_only_the_log() {
    let store = Store::in_memory();
    write_versions(&store, 20, 1).await;
    let before = TableOverview::from_log(&store, &generation(), &options()).await.unwrap();
    assert_eq!((before.files, before.rows, before.files_to_merge), (10, Some(20), 10));
    assert_eq!(before.compacted_at, None);
    assert!(before.newest_row_at.unwrap() > Utc::now() - TimeDelta::minutes(1));
    compact(&store, &options(), CompactionMode::Deep, 0).await;
    let after = TableOverview::from_log(&store, &generation(), &options()).await.unwrap();
    assert_eq!((after.files, after.rows, after.files_to_merge), (1, Some(20), 0));
    assert!(after.compacted_at.is_some() && after.fully_compacted_at.is_some());
    assert_eq!(after.oldest_version, 0);
}
