//! One suite for every kind of store: what the table relies on, and the table on it.
//!
//!     tests/run stores
//!
//! Memory and a local folder are always tried; S3 (MinIO) and Azure (Azurite) where `tests/run` could
//! start a server: BSAP_S3 and BSAP_AZURE hold the URL of an empty place. Google's store cannot be
//! run outside of Google, and its emulators do not check generations: it is not proved here.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bsap::balance::normalise::Normaliser;
use bsap::publish::{self, Naming};
use bsap::reconcile::{Rules, Side, reconcile};
use bsap::record::{AttributeTypes, Attributes, Embedding, Image, ImageId, Ordering, Partition, Row, Sequence};
use bsap::balance::statistics::{Statistics, StatisticsKey};
use bsap::store::Store;
use bsap::table::{Compactor, Depth, Follower, Lease, Overview, PartitionBatch, Writer};
use bsap::catalogue::{Generation, PromptSetRecord, Serving, StateStore};
use bsap::table::maintenance::{upkeep, verify};
use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use tokio_util::sync::CancellationToken;

/// Workers that race.
const RACERS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    suite(&Store::memory()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn folder() {
    let folder = tempfile::tempdir().unwrap();
    suite(&Store::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server, which `tests/run stores` starts"]
async fn s3() {
    server("BSAP_S3").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server, which `tests/run stores` starts"]
async fn azure() {
    server("BSAP_AZURE").await;
}

async fn server(variable: &str) {
    let url = std::env::var(variable);
    let url = url.unwrap_or_else(|_| panic!("{variable} names a bucket; run `tests/run stores`"));
    let place = format!("{}/{:016x}", url.trim_end_matches('/'), rand::random::<u64>());
    suite(&Store::open(&place, &BTreeMap::new()).unwrap()).await;
}

async fn suite(store: &Store) {
    store.check().await.unwrap();
    one_creator_wins(store).await;
    one_state_of_many(store).await;
    one_lease_holder(store).await;
    rows_and_positions(store).await;
    writers_and_compactor_race(store).await;
    a_bucket_is_reconciled(store).await;
}

fn generation(name: char) -> Generation {
    Generation::new("tiny", &name.to_string().repeat(64), 4, 100.0, Ordering::Sequence)
}

/// The ground that everything stands on: of many that create an object, exactly one does.
async fn one_creator_wins(store: &Store) {
    for round in 0..10 {
        let path = Path::from(format!("race/{round}"));
        let racers = (0..RACERS).map(|i| {
            let (objects, path) = (store.objects().clone(), path.clone());
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
        let stored = store.objects().get(&path).await.unwrap().bytes().await.unwrap();
        assert_eq!(stored, winners[0].to_string());
    }
}

fn key() -> StatisticsKey {
    StatisticsKey::new("demo", 1, "0123456789ab", 100.0, 8)
}

async fn one_state_of_many(store: &Store) {
    let serving = Serving::new(key(), Normaliser::Softmax, 0.25);
    let set = |name: &str| PromptSetRecord {
        key: StatisticsKey::new(name, 1, "0123456789ab", 100.0, 8),
        name: name.into(),
        version: 1,
        language: "en".into(),
        top_k: 8,
        texts: vec!["a photo".into()],
        since: Utc::now(),
    };
    let racers = (0..RACERS).map(|i| {
        let (state, serving) = (StateStore::new(store), serving.clone());
        tokio::spawn(async move {
            let sets = [set("demo"), set(&format!("own-{i}"))];
            state.ensure(&generation('a'), &sets, &serving, "test").await.unwrap();
        })
    });
    for racer in racers.collect::<Vec<_>>() {
        racer.await.unwrap();
    }
    let newest = StateStore::new(store).newest().await.unwrap().unwrap();
    assert_eq!(newest.prompt_sets.len(), RACERS + 1, "nobody's set was lost");
}

async fn one_lease_holder(store: &Store) {
    let hour = Duration::from_secs(3_600);
    let racers = (0..RACERS).map(|i| {
        let store = store.clone();
        tokio::spawn(async move { Lease::take(&store, &format!("w{i}"), hour).await.unwrap() })
    });
    let mut held = Vec::new();
    for racer in racers.collect::<Vec<_>>() {
        held.extend(racer.await.unwrap());
    }
    assert_eq!(held.len(), 1);
    held.remove(0).give_back().await.unwrap();
    assert!(Lease::take(store, "next", hour).await.unwrap().is_some());
}

fn row(id: &str, sequence: u64, deleted: bool) -> Row {
    let statistics = Statistics::of(&[0.1, 0.2], 100.0, 1).unwrap();
    Row {
        image_id: ImageId::new(id).unwrap(),
        sequence: Sequence::from_number(sequence),
        event_time: None,
        embedded_at: DateTime::from_timestamp_micros(Utc::now().timestamp_micros()).unwrap(),
        image: (!deleted).then(|| Image {
            uri: None,
            content_hash: "00ff".into(),
            bytes: 1,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::round(&[0.6, 0.8, 0.0, 0.0]),
            statistics: [(key(), statistics)].into(),
        }),
    }
}

fn batch(number: i32, from: i64, rows: Vec<Row>) -> PartitionBatch {
    PartitionBatch {
        partition: Partition { topic: "images".into(), number },
        expected: (from > 0).then_some(from),
        next_offset: from + rows.len() as i64,
        rows: (from..).zip(rows).collect(),
    }
}

async fn ids(store: &Store, generation: &Generation) -> Vec<String> {
    let mut follower = Follower::open(store, generation).await.unwrap();
    let rows = follower.next(&|_, _| {}).await.unwrap().unwrap().rows;
    rows.into_iter().map(|row| row.image_id.to_string()).collect()
}

async fn compact(store: &Store, generation: &Generation, days: i64) -> bsap::table::Compacted {
    let options =
        upkeep::Options { merge_files: 3, tombstone_days: 2, ..upkeep::Options::default() };
    let mut compactor = Compactor::open(store, generation, &options, 100).await.unwrap();
    let now = Utc::now() + TimeDelta::days(days);
    compactor.run(Depth::Deep, now, &|_, _| {}, &CancellationToken::new()).await.unwrap()
}

async fn rows_and_positions(store: &Store) {
    let generation = generation('a');
    let mut writer = Writer::open(store, &generation, 100).await.unwrap();
    let mut follower = Follower::open(store, &generation).await.unwrap();
    follower.next(&|_, _| {}).await.unwrap();
    for i in 0..4_i64 {
        let rows = vec![row(&format!("ü {i}/x"), 1, false), row("often", i as u64, i == 3)];
        writer.append(vec![batch(0, i * 2, rows)]).await.unwrap();
        let changes = follower.next(&|_, _| {}).await.unwrap().unwrap();
        assert_eq!((changes.rows.len(), changes.whole), (2, false));
    }
    let partition = Partition { topic: "images".into(), number: 0 };
    assert_eq!(writer.position(&partition).await.unwrap(), Some(8));
    // A writer that lost its partition writes nothing.
    let mut late = Writer::open(store, &generation, 100).await.unwrap();
    let fenced = late.append(vec![batch(0, 0, vec![row("late", 1, false)])]).await.unwrap();
    assert_eq!((fenced.rows, fenced.fenced.len()), (0, 1));

    let done = compact(store, &generation, 5).await;
    assert_eq!((done.files_in, done.superseded), (3, 3));
    assert_eq!(compact(store, &generation, 5).await.tombstones, 1);
    assert_eq!(ids(store, &generation).await.len(), 4);
    let state = StateStore::new(store).newest().await.unwrap().unwrap();
    let options = upkeep::Options::default();
    let token = CancellationToken::new();
    let verified =
        verify(store, &state, &state.live, &options, Utc::now(), &|_, _| {}, &token).await.unwrap();
    let verified = verified.unwrap();
    assert!(verified.is_sound() && verified.images == 4, "{verified:?}");
    let later = Utc::now() + TimeDelta::days(5);
    let removed = upkeep::vacuum(store, &generation, &options, later, false).await.unwrap();
    // Four were merged away, one the late writer left behind.
    assert_eq!(removed.files.len(), 5, "{removed:?}");
    assert_eq!(Overview::of(store, &generation, &options).await.unwrap().files, 2);
    assert_eq!(ids(store, &generation).await.len(), 4);
    // The log was cleaned up behind this one.
    late.append(vec![batch(1, 0, vec![row("new", 1, false)])]).await.unwrap();
    assert_eq!(ids(store, &generation).await.len(), 5);
}

/// Listings of every store name objects as events do, and date them so that they can be compared.
async fn a_bucket_is_reconciled(store: &Store) {
    let generation = Generation::new("tiny", &"c".repeat(64), 4, 100.0, Ordering::EventTime);
    let pictures = store.child("pictures");
    for name in ["a.jpg", "ü b/100%.png", "resized.jpg", "new.jpg"] {
        let body = name.to_owned().into_bytes();
        pictures.objects().put(&Path::from(name), body.into()).await.unwrap();
    }
    let objects: Vec<_> = publish::objects(pictures.clone()).try_collect().await.unwrap();
    assert_eq!(objects.len(), 4);
    let stored = objects.iter().filter(|object| object.key != "new.jpg").map(|object| {
        let time = object.changed.trunc_subsecs(6);
        let mut row = row(&object.key, 0, false);
        (row.sequence, row.event_time) = (Sequence::from_time(time).unwrap(), Some(time));
        if let Some(image) = &mut row.image {
            image.uri = Some(object.uri.to_string());
            image.bytes = if object.key == "resized.jpg" { 1 } else { object.bytes };
        }
        row
    });
    let mut rows: Vec<Row> = stored.collect();
    let mut gone = rows[0].clone();
    gone.image_id = ImageId::new("gone.jpg").unwrap();
    gone.image.as_mut().unwrap().uri = Some(format!("{}/gone.jpg", pictures.url()));
    rows.push(gone);
    let mut writer = Writer::open(store, &generation, 100).await.unwrap();
    writer.append(vec![batch(0, 0, rows)]).await.unwrap();
    let rules = Rules {
        // The clocks of the servers may be ahead.
        started: Utc::now() + TimeDelta::hours(1),
        grace: TimeDelta::seconds(1),
        tolerance: TimeDelta::zero(),
        remembered: None,
        sequence_is_time: false,
        naming: Naming::default(),
        attributes: AttributeTypes::new(),
    };
    let (folder, token) = (tempfile::tempdir().unwrap(), CancellationToken::new());
    let (side, here) = (Side::Place(pictures), folder.path());
    let done = reconcile(store, &generation, side, rules, here, |_| {}, &token).await.unwrap();
    let report = done.report;
    let counts = (report.same, report.new, report.changed, report.gone);
    assert_eq!(counts, (2, 1, 1, 1), "{report:?}");
}

async fn writers_and_compactor_race(store: &Store) {
    const COMMITS: i64 = 12;
    let generation = Arc::new(generation('b'));
    Writer::open(store, &generation, 100).await.unwrap();
    let writers = (0..4).map(|number| {
        let (store, generation) = (store.clone(), generation.clone());
        tokio::spawn(async move {
            let mut writer = Writer::open(&store, &generation, 200).await.unwrap();
            for i in 0..COMMITS {
                let rows = vec![row(&format!("p{number}-{i}"), 1, false)];
                writer.append(vec![batch(number, i, rows)]).await.unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut merged = 0;
    for _ in 0..4 {
        merged += compact(store, &generation, 0).await.files_in;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    merged += compact(store, &generation, 0).await.files_in;
    assert!(merged > 0, "nothing was compacted");
    let ids = ids(store, &generation).await;
    let unique: BTreeSet<&String> = ids.iter().collect();
    assert_eq!((ids.len(), unique.len()), (4 * COMMITS as usize, 4 * COMMITS as usize));
}
