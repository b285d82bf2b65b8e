//! One suite for every kind of store: the guarantees that the table needs, and the table itself.
//!
//!     tests/run stores
//!
//! Memory and a local folder are always tested; S3 (MinIO) and Azure (Azurite) if `tests/run` could
//! start a server: BSAP_S3 and BSAP_AZURE are the URLs of empty folders. Google Cloud Storage is not
//! tested: its emulator, fake-gcs-server, lacks uploads by the XML interface, which `object_store` uses
//! (400 "invalid uploadType"), and creates objects that exist (`uploadType=media`, `ifGenerationMatch=0`).

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bsap::balance::normalise::Normaliser;
use bsap::balance::statistics::{ScoreStatistics, StatisticsKey, StatisticsSettings};
use bsap::catalogue::{PromptSetRecord, ServingConfig, StateStore};
use bsap::publish::EventTemplate;
use bsap::reconcile::{CompareRules, ListingSource, compare_with_listing};
use bsap::record::{
    AttributeTypes, Attributes, Embedding, ImageId, ImageRow, SequenceKey, StoredImage,
    TopicPartition, VersionOrdering,
};
use bsap::store::{ImageStore, Store};
use bsap::table::maintenance::vacuum;
use bsap::table::{
    CompactionMode, Compactor, Follower, Generation, MaintenanceLease, MaintenanceOptions,
    PartitionBatch, TableOverview, TableWriter, VerificationRules, verify_table,
};
use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use tokio_util::sync::CancellationToken;

/// Number of workers that race for the same object.
const CONCURRENT_WORKERS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    run_suite(&Store::in_memory()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn folder() {
    let folder = tempfile::tempdir().unwrap();
    run_suite(&Store::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server, which `tests/run stores` starts"]
async fn s3() {
    run_suite_on_server("BSAP_S3").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server, which `tests/run stores` starts"]
async fn azure() {
    run_suite_on_server("BSAP_AZURE").await;
}

async fn run_suite_on_server(variable: &str) {
    let url = std::env::var(variable);
    let url = url.unwrap_or_else(|_| panic!("{variable} names a bucket; run `tests/run stores`"));
    let folder = format!("{}/{:016x}", url.trim_end_matches('/'), rand::random::<u64>());
    run_suite(&Store::open(&folder, &BTreeMap::new()).unwrap()).await;
    if variable == "BSAP_S3" {
        objects_with_odd_keys_are_listed_and_fetched(&format!("{folder}-odd")).await;
    }
}

/// Requests for keys that `object_store` cannot express as paths are signed by this program itself.
async fn objects_with_odd_keys_are_listed_and_fetched(url: &str) {
    let store = Store::open(url, &BTreeMap::new()).unwrap();
    for name in [" space.jpg", "space.jpg ", "plain+\u{fc} &.jpg"] {
        let path = Path::parse(name).unwrap();
        store.object_store().put(&path, name.to_owned().into()).await.unwrap();
    }
    let images = ImageStore::open(url, &BTreeMap::new()).unwrap();
    let listed: Vec<_> = images.list().try_collect().await.unwrap();
    assert_eq!(listed.len(), 3);
    for object in listed {
        let key = object.key_text();
        let content = images.get(&key, None).await.unwrap().bytes().await.unwrap();
        assert_eq!(content, key.as_bytes());
        assert!(images.may_contain(key.as_bytes()).await.unwrap());
    }
    assert!(!images.may_contain(b" absent.jpg").await.unwrap());
}

async fn run_suite(store: &Store) {
    store.check_capabilities().await.unwrap();
    exactly_one_creator_wins(store).await;
    concurrent_state_changes_are_all_kept(store).await;
    exactly_one_worker_holds_the_lease(store).await;
    rows_and_positions_survive_compaction_and_vacuum(store).await;
    racing_writers_and_compactor_lose_nothing(store).await;
    a_listing_of_the_store_can_be_reconciled(store).await;
}

fn test_generation(name: char) -> Generation {
    Generation::new("tiny", &name.to_string().repeat(64), 4, 100.0, VersionOrdering::Sequence)
}

/// The guarantee that everything else needs: if many create the same object, exactly one succeeds.
async fn exactly_one_creator_wins(store: &Store) {
    for round in 0..10 {
        let path = Path::from(format!("race/{round}"));
        let racers = (0..CONCURRENT_WORKERS).map(|i| {
            let (objects, path) = (store.object_store().clone(), path.clone());
            tokio::spawn(async move {
                let create = PutOptions::from(PutMode::Create);
                match objects.put_opts(&path, format!("{i}").into(), create).await {
                    Ok(_) => Some(i),
                    Err(object_store::Error::AlreadyExists { .. }) => None,
                    Err(error) => panic!("{error}"),
                }
            })
        });
        let mut winners = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            winners.extend(racer.await.unwrap());
        }
        assert_eq!(winners.len(), 1, "round {round}");
        let stored = store.object_store().get(&path).await.unwrap().bytes().await.unwrap();
        assert_eq!(stored, winners[0].to_string());
    }
}

fn statistics_key() -> StatisticsKey {
    StatisticsKey::new("demo", 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8))
}

async fn concurrent_state_changes_are_all_kept(store: &Store) {
    let serving = ServingConfig::new(statistics_key(), Normaliser::Softmax, 0.25);
    let set = |name: &str| PromptSetRecord {
        key: StatisticsKey::new(name, 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8)),
        name: name.into(),
        version: 1,
        language: "en".into(),
        top_k: 8,
        temperature: 1.0,
        texts: vec!["a photo".into()],
        since: Utc::now(),
    };
    let racers = (0..CONCURRENT_WORKERS).map(|i| {
        let (state, serving) = (StateStore::new(store), serving.clone());
        tokio::spawn(async move {
            let sets = [set("demo"), set(&format!("set-{i}"))];
            state
                .initialise_or_extend(&test_generation('a'), &sets, &serving, "test")
                .await
                .unwrap();
        })
    });
    for racer in racers.collect::<Vec<_>>() {
        racer.await.unwrap();
    }
    let newest = StateStore::new(store).read_newest().await.unwrap().unwrap();
    assert_eq!(newest.prompt_sets.len(), CONCURRENT_WORKERS + 1, "no set was lost");
}

async fn exactly_one_worker_holds_the_lease(store: &Store) {
    let hour = Duration::from_secs(3_600);
    let racers = (0..CONCURRENT_WORKERS).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            MaintenanceLease::acquire(&store, &format!("w{i}"), hour).await.unwrap()
        })
    });
    let mut leases = Vec::new();
    for racer in racers.collect::<Vec<_>>() {
        leases.extend(racer.await.unwrap());
    }
    assert_eq!(leases.len(), 1);
    leases.remove(0).release().await.unwrap();
    assert!(MaintenanceLease::acquire(store, "next", hour).await.unwrap().is_some());
}

fn test_row(id: &str, sequence: u64, deleted: bool) -> ImageRow {
    let statistics = ScoreStatistics::from_scores(&[0.1, 0.2], 100.0, 1).unwrap();
    ImageRow {
        image_id: ImageId::new(id).unwrap(),
        sequence: SequenceKey::from_number(sequence),
        event_time: None,
        embedded_at: DateTime::from_timestamp_micros(Utc::now().timestamp_micros()).unwrap(),
        image: (!deleted).then(|| StoredImage {
            uri: None,
            content_hash: "00ff".into(),
            byte_size: 1,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::from_unit_vector(&[0.6, 0.8, 0.0, 0.0]),
            statistics: [(statistics_key(), statistics)].into(),
            decoding: None,
        }),
    }
}

fn partition_batch(number: i32, from: i64, rows: Vec<ImageRow>) -> PartitionBatch {
    PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: TopicPartition { topic: "images".into(), number },
        expected_position: (from > 0).then_some(from),
        next_offset: from + rows.len() as i64,
        rows: (from..).zip(rows).collect(),
    }
}

async fn read_image_ids(store: &Store, generation: &Generation) -> Vec<String> {
    let mut follower = Follower::open(store, generation).await.unwrap();
    let rows = follower.next(&|_, _| {}).await.unwrap().unwrap().rows;
    rows.into_iter().map(|row| row.image_id.to_string()).collect()
}

async fn run_compaction(
    store: &Store,
    generation: &Generation,
    days: i64,
) -> bsap::table::CompactionSummary {
    let options = MaintenanceOptions {
        files_per_merge: 3,
        tombstone_retention_days: 2,
        ..MaintenanceOptions::default()
    };
    let mut compactor = Compactor::open(store, generation, &options, 100).await.unwrap();
    let now = Utc::now() + TimeDelta::days(days);
    compactor.run(CompactionMode::Deep, now, &|_, _| {}, &CancellationToken::new()).await.unwrap()
}

async fn rows_and_positions_survive_compaction_and_vacuum(store: &Store) {
    let generation = test_generation('a');
    let mut writer = TableWriter::open(store, &generation, 100).await.unwrap();
    let mut follower = Follower::open(store, &generation).await.unwrap();
    follower.next(&|_, _| {}).await.unwrap();
    for i in 0..4_i64 {
        let rows =
            vec![test_row(&format!("ü {i}/x"), 1, false), test_row("often", i as u64, i == 3)];
        writer
            .append(vec![partition_batch(0, i * 2, rows)], &CancellationToken::new())
            .await
            .unwrap();
        let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
        assert_eq!((changes.rows.len(), changes.is_full_snapshot), (2, false));
    }
    let partition = TopicPartition { topic: "images".into(), number: 0 };
    assert_eq!(writer.read_position(&partition, &CancellationToken::new()).await.unwrap(), Some(8));
    // A writer that has lost its partition is fenced and adds no rows.
    let mut late_writer = TableWriter::open(store, &generation, 100).await.unwrap();
    let late_batch = partition_batch(0, 0, vec![test_row("late", 1, false)]);
    let fenced = late_writer.append(vec![late_batch], &CancellationToken::new()).await.unwrap();
    assert_eq!((fenced.written_row_count, fenced.fenced_partitions.len()), (0, 1));

    let summary = run_compaction(store, &generation, 5).await;
    assert_eq!((summary.removed_file_count, summary.dropped_superseded_row_count), (3, 3));
    assert_eq!(run_compaction(store, &generation, 5).await.dropped_tombstone_count, 1);
    assert_eq!(read_image_ids(store, &generation).await.len(), 4);
    let state = StateStore::new(store).read_newest().await.unwrap().unwrap();
    let sets: Vec<_> = state.prompt_sets.iter().map(|set| set.key.clone()).collect();
    let options = MaintenanceOptions::default();
    let token = CancellationToken::new();
    let rules = VerificationRules {
        prompt_sets: &sets,
        decode_rule: "1 refuse",
        options: &options,
        now: Utc::now(),
    };
    let report = verify_table(store, &state.live, &rules, &|_, _| {}, &token).await.unwrap();
    let report = report.unwrap();
    assert!(report.is_sound() && report.images == 4, "{report:?}");
    let later = Utc::now() + TimeDelta::days(5);
    let removed = vacuum::vacuum(store, &generation, &options, later, false).await.unwrap();
    // Four files were merged, and one was left by the fenced writer.
    assert_eq!(removed.removed_file_paths.len(), 5, "{removed:?}");
    assert_eq!(TableOverview::from_log(store, &generation, &options).await.unwrap().files, 2);
    assert_eq!(read_image_ids(store, &generation).await.len(), 4);
    // The late writer has an older version of the log, whose first entries were removed by now.
    late_writer
        .append(
            vec![partition_batch(1, 0, vec![test_row("new", 1, false)])],
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    assert_eq!(read_image_ids(store, &generation).await.len(), 5);
}

/// Listings of every store have the same object names as events, and modification times with which
/// stored versions can be compared.
async fn a_listing_of_the_store_can_be_reconciled(store: &Store) {
    let generation = Generation::new("tiny", &"c".repeat(64), 4, 100.0, VersionOrdering::EventTime);
    let pictures = store.subfolder("pictures");
    for name in ["a.jpg", "ü b/100%.png", "resized.jpg", "new.jpg"] {
        let body = name.to_owned().into_bytes();
        pictures.object_store().put(&Path::from(name), body.into()).await.unwrap();
    }
    let listed = ImageStore::from_store(&pictures);
    let objects: Vec<_> = listed.list().try_collect().await.unwrap();
    assert_eq!(objects.len(), 4);
    let stored = objects.iter().filter(|object| object.key != b"new.jpg").map(|object| {
        let time = object.last_modified.trunc_subsecs(6);
        let mut row = test_row(&object.key_text(), 0, false);
        (row.sequence, row.event_time) = (SequenceKey::from_time(time).unwrap(), Some(time));
        if let Some(image) = &mut row.image {
            image.uri = Some(object.uri.clone().unwrap().to_string());
            image.byte_size = if object.key == b"resized.jpg" { 1 } else { object.size_bytes };
        }
        row
    });
    let mut rows: Vec<ImageRow> = stored.collect();
    let mut removed = rows[0].clone();
    removed.image_id = ImageId::new("removed.jpg").unwrap();
    removed.image.as_mut().unwrap().uri = Some(format!("{}/removed.jpg", pictures.url()));
    rows.push(removed);
    let mut writer = TableWriter::open(store, &generation, 100).await.unwrap();
    writer.append(vec![partition_batch(0, 0, rows)], &CancellationToken::new()).await.unwrap();
    let rules = CompareRules {
        // The clock of the server may be ahead.
        listing_started_at: Utc::now() + TimeDelta::hours(1),
        grace_period: TimeDelta::seconds(1),
        time_tolerance: TimeDelta::zero(),
        tombstone_retention: None,
        sequence_is_time: false,
        event_template: EventTemplate::default(),
        attribute_types: AttributeTypes::new(),
    };
    let (temp, token) = (tempfile::tempdir().unwrap(), CancellationToken::new());
    let listing = ListingSource::Store(listed);
    let comparison =
        compare_with_listing(store, &generation, listing, rules, temp.path(), |_| {}, &token)
            .await
            .unwrap();
    let report = comparison.report;
    let counts = (report.unchanged, report.new, report.changed, report.removed);
    assert_eq!(counts, (2, 1, 1, 1), "{report:?}");
}

async fn racing_writers_and_compactor_lose_nothing(store: &Store) {
    const COMMITS: i64 = 12;
    let generation = Arc::new(test_generation('b'));
    TableWriter::open(store, &generation, 100).await.unwrap();
    let writers = (0..4).map(|number| {
        let (store, generation) = (store.clone(), generation.clone());
        tokio::spawn(async move {
            let mut writer = TableWriter::open(&store, &generation, 200).await.unwrap();
            for i in 0..COMMITS {
                let rows = vec![test_row(&format!("p{number}-{i}"), 1, false)];
                writer
                    .append(vec![partition_batch(number, i, rows)], &CancellationToken::new())
                    .await
                    .unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut merged = 0;
    for _ in 0..4 {
        merged += run_compaction(store, &generation, 0).await.removed_file_count;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    merged += run_compaction(store, &generation, 0).await.removed_file_count;
    assert!(merged > 0, "nothing was compacted");
    let ids = read_image_ids(store, &generation).await;
    let unique: BTreeSet<&String> = ids.iter().collect();
    assert_eq!((ids.len(), unique.len()), (4 * COMMITS as usize, 4 * COMMITS as usize));
}
