//! Compares whole tables with folders and lists.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufWriter, Write};
use std::time::Instant;

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use futures::TryStreamExt;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::scope::key_below_url;
use super::{CompareRules, ListingSource, ReconcileReport, compare_with_listing};
use crate::ingest::source::{self, Decoder, ImageEvent};
use crate::publish::EventTemplate;
use crate::record::{
    AttributeTypes, Attributes, Embedding, ImageId, ImageRow, Operation, SequenceKey, StoredImage,
    TopicPartition, VersionOrdering,
};
use crate::store::{ImageStore, Store};
use crate::table::{Generation, PartitionBatch, TableWriter};

fn generation() -> Generation {
    Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, VersionOrdering::EventTime)
}

fn stored_row(id: &str, uri: Option<String>, time: DateTime<Utc>, bytes: u64) -> ImageRow {
    let time = time.trunc_subsecs(6);
    ImageRow {
        image_id: ImageId::new(id).unwrap(),
        sequence: SequenceKey::from_time(time).unwrap(),
        event_time: Some(time),
        embedded_at: Utc::now().trunc_subsecs(6),
        image: uri.map(|uri| StoredImage {
            uri: Some(uri),
            content_hash: "00ff".into(),
            byte_size: bytes,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::from_unit_vector(&[1.0, 0.0, 0.0, 0.0]),
            statistics: BTreeMap::new(),
            decoding: None,
        }),
    }
}

async fn store_with_rows(rows: Vec<ImageRow>) -> Store {
    let store = Store::in_memory();
    append(&store, rows).await;
    store
}

async fn append(store: &Store, rows: Vec<ImageRow>) {
    let mut writer = TableWriter::open(store, &generation(), 5).await.unwrap();
    let partition = TopicPartition { topic: "images".into(), number: 0 };
    let expected = writer.read_position(&partition, &CancellationToken::new()).await.unwrap();
    let from = expected.unwrap_or_default();
    let next_offset = from + rows.len() as i64;
    let rows = (from..).zip(rows).collect();
    writer
        .append(
            vec![PartitionBatch {
                log_number: 0,
                anchor: None,
                last_message: None,
                partition,
                expected_position: expected,
                next_offset,
                rows,
            }],
            &CancellationToken::new(),
        )
        .await
        .unwrap();
}

fn compare_rules() -> CompareRules {
    CompareRules {
        listing_started_at: Utc::now(),
        grace_period: TimeDelta::zero(),
        time_tolerance: TimeDelta::zero(),
        tombstone_retention: None,
        sequence_is_time: false,
        event_template: EventTemplate::default(),
        attribute_types: AttributeTypes::new(),
    }
}

async fn run_comparison(
    catalogue: &Store,
    listing: ListingSource,
    rules: CompareRules,
) -> (ReconcileReport, Vec<ImageEvent>) {
    let folder = tempfile::tempdir().unwrap();
    let token = CancellationToken::new();
    let comparison = compare_with_listing(
        catalogue,
        &generation(),
        listing,
        rules,
        folder.path(),
        |_| {},
        &token,
    )
    .await
    .unwrap();
    let event = |line: io::Result<String>| {
        let (_, event): (String, ImageEvent) = serde_json::from_str(&line.unwrap()).unwrap();
        event
    };
    let events = comparison.repair_event_lines.lines().map(event).collect();
    (comparison.report, events)
}

fn list_source(text: &'static str) -> ListingSource {
    let decoder = Decoder::new(&source::SourceOptions::default(), &AttributeTypes::new());
    ListingSource::List {
        name: "ids.txt".into(),
        lines: Box::new(text.as_bytes()),
        decoder: Box::new(decoder),
    }
}

#[tokio::test]
async fn a_folder_is_compared_and_after_the_repair_nothing_differs() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("ü b")).unwrap();
    for name in ["same.jpg", "ü b/100%.png", "resized.jpg", "custom-id.jpg", "notes.txt", "new.jpg"]
    {
        std::fs::write(folder.path().join(name), b"1234567").unwrap();
    }
    let target = || ImageStore::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    let objects: Vec<_> = target().list().try_collect().await.unwrap();
    let object = |key: &str| objects.iter().find(|o| o.key == key.as_bytes()).unwrap();
    let uri_of = |key: &str| object(key).uri.clone().unwrap().to_string();
    let row_of_object = |id: &str, key: &str, bytes| {
        stored_row(id, Some(uri_of(key)), object(key).last_modified, bytes)
    };
    let from_elsewhere = stored_row("far.jpg", Some("s3://far/far.jpg".into()), Utc::now(), 7);
    let missing_uri =
        object("same.jpg").uri.clone().unwrap().join("missing.jpg").unwrap().to_string();
    let yesterday = Utc::now() - TimeDelta::days(1);
    let rows = vec![
        row_of_object("same.jpg", "same.jpg", 7),
        row_of_object("ü b/100%.png", "ü b/100%.png", 7),
        row_of_object("resized.jpg", "resized.jpg", 8),
        // The producer chose an id that is not the key.
        row_of_object("sku-1", "custom-id.jpg", 7),
        from_elsewhere,
        stored_row("missing.jpg", Some(missing_uri), yesterday, 7),
    ];
    let catalogue = store_with_rows(rows).await;
    let (report, events) =
        run_comparison(&catalogue, ListingSource::Store(target()), compare_rules()).await;
    let counts = (report.unchanged, report.new, report.changed, report.removed, report.ignored);
    assert_eq!(counts, (3, 1, 1, 1, 1), "{report:?}");
    assert_eq!((report.listed, report.stored), (6, 5));
    let mut operations: Vec<_> =
        events.iter().map(|e| (e.image_id.as_str(), e.operation)).collect();
    operations.sort_unstable_by_key(|(id, _)| *id);
    let upsert = Operation::Upsert;
    let deleted = ("missing.jpg", Operation::Delete);
    assert_eq!(operations, [deleted, ("new.jpg", upsert), ("resized.jpg", upsert)]);
    let events = events
        .into_iter()
        .map(|event| stored_row(&event.image_id, event.uri, event.event_time.unwrap(), 7));
    append(&catalogue, events.collect()).await;
    let (report, _) =
        run_comparison(&catalogue, ListingSource::Store(target()), compare_rules()).await;
    assert_eq!((report.difference_count(), report.unchanged), (0, 5), "{report:?}");
}

#[tokio::test]
async fn new_objects_are_only_reported_when_most_ids_are_custom() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["custom-id.jpg", "deleted.jpg"] {
        std::fs::write(folder.path().join(name), b"1234567").unwrap();
    }
    let target = || ImageStore::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    let objects: Vec<_> = target().list().try_collect().await.unwrap();
    let object = |key: &str| objects.iter().find(|o| o.key == key.as_bytes()).unwrap();
    // `sku-2` was fetched from deleted.jpg, but its tombstone has no address.
    let rows = vec![
        stored_row(
            "sku-1",
            Some(object("custom-id.jpg").uri.clone().unwrap().to_string()),
            object("custom-id.jpg").last_modified,
            7,
        ),
        stored_row("sku-2", None, Utc::now(), 0),
    ];
    let catalogue = store_with_rows(rows).await;
    let (report, events) =
        run_comparison(&catalogue, ListingSource::Store(target()), compare_rules()).await;
    assert_eq!(
        (report.unchanged, report.new, report.unrepairable, events.len()),
        (1, 1, 1, 0),
        "{report:?}"
    );
}

#[tokio::test]
async fn objects_missing_from_a_listing_are_checked_before_deletion() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempfile::tempdir().unwrap();
    for name in [&b"1.jpg"[..], b"a\nb.jpg", b"caf\xe9.jpg"] {
        std::fs::write(folder.path().join(std::ffi::OsStr::from_bytes(name)), b"1").unwrap();
    }
    let store = ImageStore::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    for existing in [&b"1.jpg"[..], b"a\nb.jpg", b"caf\xe9.jpg"] {
        assert!(store.may_contain(existing).await.unwrap());
    }
    assert!(!store.may_contain(b"2.jpg").await.unwrap());
}

#[tokio::test]
async fn an_image_that_cannot_be_announced_is_listed_and_counted_and_nothing_stops() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempfile::tempdir().unwrap();
    for name in [&b"a.jpg"[..], b"line\nbreak.jpg", b"caf\xe9.jpg", b"caf\xe8.jpg", b"stored\n.jpg"]
    {
        std::fs::write(folder.path().join(std::ffi::OsStr::from_bytes(name)), b"1234567").unwrap();
    }
    let target = || ImageStore::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    // An event with an id of its own announced a file that a listing cannot announce.
    let uri = Url::from_file_path(folder.path().join("stored\n.jpg")).unwrap();
    let row = stored_row("sku-1", Some(uri.to_string()), Utc::now(), 7);
    let other = stored_row("sku-2", Some("s3://b/x.jpg".into()), Utc::now(), 7);
    let catalogue = store_with_rows(vec![row, other]).await;
    let rules = compare_rules();
    let (report, events) = run_comparison(&catalogue, ListingSource::Store(target()), rules).await;
    let counts = (report.listed, report.new, report.unaddressable, report.unchanged);
    assert_eq!((counts, report.removed), ((5, 4, 3, 1), 0), "{report:?}");
    assert!(events.iter().all(|event| event.operation == Operation::Upsert));
}

#[tokio::test]
async fn a_list_of_ids_and_events_is_compared() {
    let time = Utc::now() - TimeDelta::days(1);
    let image = |id: &str| stored_row(id, Some("s3://b/x.jpg".into()), time, 7);
    let catalogue =
        store_with_rows(vec![image("a"), image("b"), image("c"), stored_row("d", None, time, 0)])
            .await;
    let text = "a\n\n{\"image_id\":\"b\",\"uri\":\"u\",\"event_time\":\"2100-01-01T00:00:00Z\"}\n";
    let mut rules = compare_rules();
    rules.listing_started_at = DateTime::from_timestamp(4_200_000_000, 0).unwrap();
    // A worker rejects an event that is dated so far in the future, and so does a comparison.
    let token = CancellationToken::new();
    let folder = tempfile::tempdir().unwrap();
    let result = compare_with_listing(
        &catalogue,
        &generation(),
        list_source(text),
        rules,
        folder.path(),
        |_| {},
        &token,
    )
    .await;
    let error = result.err().unwrap().to_string();
    assert!(error.starts_with("ids.txt:3: event_time"), "{error}");

    let text = "a\nd\n{\"image_id\":\"b\",\"uri\":\"u\",\"event_time\":\"2020-01-01T00:00:00Z\"}\n\
                {\"image_id\":\"e\",\"uri\":\"u\",\"event_time\":\"2020-01-01T00:00:00Z\"}\nf";
    let (report, events) = run_comparison(&catalogue, list_source(text), compare_rules()).await;
    let counts = (report.unchanged, report.new, report.changed, report.removed, report.deleted);
    assert_eq!(counts, (2, 2, 0, 1, 1), "{report:?}");
    assert_eq!(report.unrepairable, 1, "the list has no address of f");
    let ids: Vec<_> = events.iter().map(|e| e.image_id.as_str()).collect();
    assert_eq!(ids, ["c", "e"]);

    let prefix_rules = CompareRules {
        event_template: EventTemplate { id_prefix: "b".into(), ..EventTemplate::default() },
        ..compare_rules()
    };
    let (report, _) = run_comparison(&catalogue, list_source(text), prefix_rules).await;
    let counts = (report.listed, report.stored, report.difference_count());
    assert_eq!(counts, (1, 1, 0), "only ids with the prefix are compared: {report:?}");
}

#[tokio::test]
async fn a_repair_with_too_many_deletes_is_rejected() {
    let time = Utc::now() - TimeDelta::days(1);
    let rows = (0..10).map(|i| stored_row(&i.to_string(), Some("s3://b/x.jpg".into()), time, 7));
    let catalogue = store_with_rows(rows.collect()).await;
    let folder = tempfile::tempdir().unwrap();
    let token = CancellationToken::new();
    let listing = list_source("0\n1\n2\n3\n4\n5\n6\n7\n");
    let comparison = compare_with_listing(
        &catalogue,
        &generation(),
        listing,
        compare_rules(),
        folder.path(),
        |_| {},
        &token,
    )
    .await;
    let comparison = comparison.unwrap();
    assert!(
        comparison.check_repair_is_safe(0.1).unwrap_err().to_string().contains("2 of 10 images")
    );
    assert!(comparison.check_repair_is_safe(0.2).is_ok());
}

#[test]
fn keys_are_found_below_a_url_whatever_the_encoding() {
    let base = Url::parse("s3://bucket/a%20b").unwrap();
    for (uri, key) in [
        ("s3://bucket/a b/c d.jpg", Some("c d.jpg")),
        ("s3://bucket/a%20b/c%20d.jpg", Some("c d.jpg")),
        ("s3a://bucket/a%20b/c/100%25.jpg", Some("c/100%.jpg")),
        ("s3://bucket/a%20bc/d.jpg", None),
        ("s3://other/a%20b/d.jpg", None),
        ("gs://bucket/a%20b/d.jpg", None),
        ("s3://bucket/a%20b", None),
        ("s3://bucket/a%20b//c.jpg", Some("/c.jpg")),
        ("s3://bucket/a%20b/c//d%0A.jpg", Some("c//d\n.jpg")),
        ("s3://bucket/a%20b/folder/", None),
        ("nonsense", None),
    ] {
        assert_eq!(key_below_url(&base, uri).as_deref(), key, "{uri}");
    }
}

/// Run it with `cargo test --release --lib reconcile::tests::memory -- --ignored --nocapture`. The
/// environment variable `BSAP_RECONCILE_KEYS` sets the number of images.
#[tokio::test]
#[ignore = "stores a million images"]
async fn memory_does_not_grow_with_the_number_of_images() {
    const BATCH: usize = 50_000;
    let count = std::env::var("BSAP_RECONCILE_KEYS").ok().and_then(|n| n.parse().ok());
    let count: usize = count.unwrap_or(1_000_000);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let catalogue = Store::open(path("catalogue").to_str().unwrap(), &BTreeMap::new()).unwrap();
    let time = Utc::now() - TimeDelta::days(1);
    let id = |i: usize| format!("shop/photographs/{:08}.jpg", i.wrapping_mul(7_919) % count);
    for from in (0..count).step_by(BATCH) {
        let rows = (from..(from + BATCH).min(count))
            .map(|i| stored_row(&id(i), Some(format!("s3://bucket/{}", id(i))), time, 7));
        append(&catalogue, rows.collect()).await;
    }
    // One id in a thousand is missing from the list.
    let mut list = BufWriter::new(File::create(path("ids.txt")).unwrap());
    for i in (0..count).filter(|i| i % 1_000 != 0) {
        writeln!(list, "{}", id(i)).unwrap();
    }
    list.flush().unwrap();
    let lines = tokio::io::BufReader::new(tokio::fs::File::open(path("ids.txt")).await.unwrap());
    let decoder = Decoder::new(&source::SourceOptions::default(), &AttributeTypes::new());
    let listing = ListingSource::List {
        name: "ids.txt".into(),
        lines: Box::new(lines),
        decoder: Box::new(decoder),
    };
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, started) = (process_memory_mib("VmRSS"), Instant::now());
    let (report, events) = run_comparison(&catalogue, listing, compare_rules()).await;
    println!(
        "{count} images in {:.1} s; memory {before} MiB before, {} MiB at most",
        started.elapsed().as_secs_f64(),
        process_memory_mib("VmHWM")
    );
    assert_eq!(
        (report.removed as usize, events.len()),
        (count.div_ceil(1_000), report.removed as usize)
    );
    assert!(process_memory_mib("VmHWM") - before < 512);
}

/// Reads a field of /proc/self/status that is in kB, and returns it in MiB.
fn process_memory_mib(name: &str) -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap() / 1_024
}
