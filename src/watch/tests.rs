//! Listing real folders and lists, and what the tracker makes of changes.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::ingest::source::ImageEvent;
use crate::record::{AttributeType, AttributeTypes, Operation, SequenceKey};

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

fn open(targets: &[&Path]) -> Result<Vec<WatchedSource>, WatchError> {
    let targets: Vec<String> = targets.iter().map(|t| t.display().to_string()).collect();
    open_sources(&targets, &BTreeMap::new())
}

async fn list(source: &WatchedSource, excluded: &[PathBuf]) -> Vec<FoundItem> {
    let types = source.attribute_types().unwrap();
    let roots = source.local_roots().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    source.list(&roots, excluded, &types, move |item| sender.send(item).is_ok()).await.unwrap();
    receiver.into_iter().collect()
}

fn ids_and_reasons(items: &[FoundItem]) -> Vec<String> {
    let describe = |item: &FoundItem| match &item.content {
        Ok(picture) => picture.image_id.clone(),
        Err(reason) => {
            format!("{}{}", if reason.is_failure { "FAILED " } else { "" }, reason.group)
        }
    };
    items.iter().map(describe).collect()
}

#[tokio::test]
async fn pictures_of_a_folder_are_found_by_name_and_by_content_and_everything_else_has_a_reason() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("x.png"), PNG).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("photos");
    fs::create_dir_all(root.join("a b")).unwrap();
    fs::create_dir_all(root.join("state")).unwrap();
    for (name, content) in [
        ("01.JPG", b"x".as_slice()),
        ("02-no-extension", PNG),
        ("03.txt", b"notes"),
        ("04.psd", b"x"),
        ("05.list.csv", b"uri\nx.png\n"),
        ("a b/ü\u{1b}.png", PNG),
        ("state/y.png", PNG),
    ] {
        fs::write(root.join(name), content).unwrap();
    }
    std::os::unix::fs::symlink(root.join("01.JPG"), root.join("06.jpg")).unwrap();
    std::os::unix::fs::symlink(&root, root.join("07")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("x.png"), root.join("08.png")).unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("09.png")).unwrap();
    let sources = open(&[&root]).unwrap();
    let excluded = [root.canonicalize().unwrap().join("state")];
    let items = list(&sources[0], &excluded).await;
    let expected = [
        "photos/01.JPG",
        "photos/02-no-extension",
        "no picture",
        "PSD, a format that is not read",
        "no picture",
        "photos/06.jpg",
        "a link to a folder, which is not followed",
        "FAILED a link to a file outside of the folders that were named",
        "a link that leads nowhere",
        "photos/a b/%C3%BC%1B.png",
    ];
    assert_eq!(ids_and_reasons(&items), expected);
    let picture = items[0].content.as_ref().unwrap();
    assert_eq!(picture.version.size_bytes, Some(1));
    assert!(picture.version.modified_at.is_some());
    for item in items.iter().filter_map(|item| item.content.as_ref().ok()) {
        assert!(url::Url::parse(&item.uri).unwrap().to_file_path().unwrap().is_file());
    }
}

#[test]
fn folders_of_the_same_name_get_different_prefixes() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a/photos", "b/photos", "c/other"].map(|name| folder.path().join(name));
    for path in [&a, &b, &c] {
        fs::create_dir_all(path).unwrap();
    }
    let sources = open(&[&a, &b, &c, &a]).unwrap();
    let prefixes: Vec<&str> = sources.iter().map(|s| s.id_prefix.as_str()).collect();
    assert_eq!(prefixes, ["a/photos/", "b/photos/", "other/"]);
    let nested = open(&[&a, folder.path()]).unwrap_err().to_string();
    assert!(nested.contains("lies inside") && nested.contains("leave one"), "{nested}");
    let missing = open(&[&folder.path().join("none")]).unwrap_err().to_string();
    assert!(missing.contains("no such folder"), "{missing}");
    fs::write(folder.path().join("thesis.doc"), "x").unwrap();
    let other = open(&[&folder.path().join("thesis.doc")]).unwrap_err().to_string();
    assert!(other.contains("neither a folder") && other.contains(".csv"), "{other}");
}

#[tokio::test]
async fn a_list_has_typed_attributes_and_each_line_a_picture_or_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("pics")).unwrap();
    fs::write(folder.path().join("pics/a.png"), PNG).unwrap();
    let csv = folder.path().join("list.csv");
    fs::write(
        &csv,
        "id;Path;price;title;sold\n1;pics/a.png;2.5;Mug;true\n2;https://x.example/b.png;3;7;false\n3;;1;x;true\n4;pics/none.png;1;x;true\n",
    )
    .unwrap();
    let source = &open(&[&csv]).unwrap()[0];
    let types = source.attribute_types().unwrap();
    let expected = [
        ("price", AttributeType::Number),
        ("sold", AttributeType::Boolean),
        ("title", AttributeType::Text),
    ];
    assert_eq!(types, expected.map(|(name, kind)| (name.to_owned(), kind)).into());
    let items = list(source, &[]).await;
    assert_eq!(
        ids_and_reasons(&items),
        ["1", "2", "FAILED a line without a picture", "FAILED not there when it was to be read"]
    );
    let first = items[0].content.as_ref().unwrap();
    assert!(first.uri.starts_with("file:///") && first.version.modified_at.is_some());
    assert_eq!(first.attributes["price"], 2.5);
    let second = items[1].content.as_ref().unwrap();
    assert_eq!(second.attributes["title"], "7");
    assert!(items[2].path.ends_with("list.csv:4"), "{}", items[2].path);

    let json = folder.path().join("list.jsonl");
    fs::write(
        &json,
        "{\"image_id\": \"a\", \"uri\": \"pics/a.png\", \"attributes\": {\"n\": 1, \"tags\": [1]}}\n\n{\"url\": \"s3://b/c.jpg\", \"n\": 2}\nnonsense\n",
    )
    .unwrap();
    let source = &open(&[&json]).unwrap()[0];
    assert_eq!(source.attribute_types().unwrap(), [("n".into(), AttributeType::Integer)].into());
    let items = list(source, &[]).await;
    assert_eq!(ids_and_reasons(&items), ["a", "s3://b/c.jpg", "FAILED a line without a picture"]);

    for (name, text, word) in [
        ("no-address.csv", "title,price\na,1\n", "uri"),
        ("empty.jsonl", "", "no line has an address"),
        ("other.json", "[1, 2]\n", "line 1"),
    ] {
        fs::write(folder.path().join(name), text).unwrap();
        let error = open(&[&folder.path().join(name)]).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(word), "{error}");
    }
}

/// A tracker with one source, and a table in memory.
struct TestTable {
    tracker: Tracker,
    rows: HashMap<String, SequenceKey>,
}

impl TestTable {
    fn new() -> Self {
        Self { tracker: Tracker::default(), rows: HashMap::new() }
    }

    /// Lists these names, each with a size; returns the sources that are suddenly empty.
    fn pass(&mut self, files: &[(&str, u64)]) -> Vec<usize> {
        self.tracker.begin_pass();
        for (name, size) in files {
            assert!(self.tracker.observe(0, found(name, *size)));
        }
        self.tracker.finish_pass(&[(true, "")]).unwrap()
    }

    /// Stores all events that may be sent.
    fn store(&mut self) -> Vec<SettledImage> {
        for event in self.tracker.take_events(usize::MAX) {
            self.apply(&event);
        }
        self.settle()
    }

    fn apply(&mut self, event: &ImageEvent) {
        let sequence = SequenceKey::from_number(event.sequence.unwrap());
        match event.operation {
            Operation::Upsert => self.rows.insert(event.image_id.clone(), sequence),
            Operation::Delete => self.rows.remove(&event.image_id),
        };
    }

    fn settle(&mut self) -> Vec<SettledImage> {
        let rows = self.rows.clone();
        let mut settled = self.tracker.settle(|id| rows.get(id).cloned());
        settled.sort_by(|a, b| a.image_id.cmp(&b.image_id));
        settled
    }

    /// Returns found, stored, skipped, failed.
    fn counts(&self) -> [usize; 4] {
        let counts = self.tracker.counts();
        assert_eq!(counts.found, counts.stored + counts.skipped + counts.pending);
        [counts.found, counts.stored, counts.skipped, counts.failed]
    }
}

fn found(name: &str, size: u64) -> FoundItem {
    FoundItem {
        path: format!("/p/{name}"),
        content: Ok(FoundPicture {
            image_id: name.to_owned(),
            uri: format!("file:///p/{name}"),
            version: ItemVersion::new(None, size),
            attributes: BTreeMap::new(),
        }),
    }
}

fn actions(settled: &[SettledImage]) -> Vec<(&str, ImageAction)> {
    settled.iter().map(|image| (image.image_id.as_str(), image.action)).collect()
}

#[test]
fn only_what_is_new_changed_or_removed_is_sent() {
    use ImageAction::{Added, Changed, Removed};
    let mut table = TestTable::new();
    table.pass(&[("a", 1), ("b", 1)]);
    assert_eq!(actions(&table.store()), [("a", Added), ("b", Added)]);
    table.pass(&[("a", 1), ("b", 1)]);
    assert!(table.tracker.is_settled() && table.store().is_empty());
    table.pass(&[("a", 2), ("c", 1)]);
    assert_eq!(actions(&table.store()), [("a", Changed), ("b", Removed), ("c", Added)]);
    assert_eq!(table.counts(), [2, 2, 0, 0]);
    // It comes back before its delete is stored.
    table.pass(&[("a", 2)]);
    table.pass(&[("a", 2), ("c", 1)]);
    assert_eq!(actions(&table.store()), [("c", Changed)]);
    // A disk that is not mounted.
    assert_eq!(table.pass(&[]), [0]);
    assert!(table.tracker.is_settled());
    assert_eq!(table.rows.len(), 2);
}

#[test]
fn what_an_earlier_process_stored_is_not_sent_again() {
    let stored = |uri: &str, size_bytes| StoredImageVersion {
        sequence: SequenceKey::from_number(1),
        event_time: None,
        size_bytes,
        uri: Some(uri.to_owned()),
        attributes: BTreeMap::new(),
    };
    let rows = [
        ("same".to_owned(), stored("file:///p/same", 1)),
        ("size".to_owned(), stored("file:///p/size", 9)),
        ("moved".to_owned(), stored("file:///q/moved", 1)),
        ("gone".to_owned(), stored("file:///p/gone", 1)),
    ];
    let mut tracker = Tracker::new(AttributeTypes::new(), rows.clone());
    tracker.begin_pass();
    for name in ["same", "size", "moved", "new"] {
        tracker.observe(0, found(name, 1));
    }
    tracker.finish_pass(&[(true, "")]).unwrap();
    let counts = tracker.counts();
    assert_eq!((counts.found, counts.stored, counts.unchanged), (4, 1, 1));
    let mut sent: Vec<(String, Operation)> =
        tracker.take_events(9).into_iter().map(|e| (e.image_id, e.operation)).collect();
    sent.sort_by(|a, b| a.0.cmp(&b.0));
    let upsert = |name: &str| (name.to_owned(), Operation::Upsert);
    assert_eq!(
        sent,
        [("gone".to_owned(), Operation::Delete), upsert("moved"), upsert("new"), upsert("size")]
    );
    // Nothing is removed while its source cannot be listed.
    let mut tracker = Tracker::new(AttributeTypes::new(), rows);
    tracker.begin_pass();
    tracker.finish_pass(&[(false, "")]).unwrap();
    assert!(tracker.is_settled());
}

#[test]
fn a_rejected_picture_is_skipped_with_its_reason_until_it_changes() {
    let mut table = TestTable::new();
    table.pass(&[("a", 1), ("b", 1), ("c", 1)]);
    let events = table.tracker.take_events(9);
    let sequence = |id: &str| events.iter().find(|e| e.image_id == id).unwrap().sequence.unwrap();
    let (a, b) = (sequence("a"), sequence("b"));
    table.tracker.record_rejection("a", a, "unknown_image_format", "is not an image");
    table.tracker.record_rejection("b", b + 7, "fetch_refused", "of another event");
    table.tracker.record_rejection("b", b, "fetch_refused", "Permission denied");
    table.apply(events.iter().find(|e| e.image_id == "c").unwrap());
    table.settle();
    assert_eq!(table.counts(), [3, 1, 2, 1]);
    let skipped = table.tracker.skipped();
    assert_eq!(skipped[1].1.reason, "Permission denied");
    assert_eq!(skipped[0].0, "/p/a");
    table.pass(&[("a", 1), ("b", 1), ("c", 1)]);
    assert!(table.tracker.is_settled());
    table.pass(&[("a", 2), ("b", 1), ("c", 1)]);
    table.store();
    assert_eq!(table.counts(), [3, 2, 1, 1]);
    // What is stored is a version that no longer exists.
    table.pass(&[("a", 3), ("b", 1), ("c", 1)]);
    let event = table.tracker.take_events(9).remove(0);
    table.tracker.record_rejection("a", event.sequence.unwrap(), "image_damaged", "broken");
    assert!(!table.tracker.is_settled());
    assert!(table.store().is_empty());
    assert_eq!((table.counts(), table.rows.len()), ([3, 1, 2, 1], 1));
    assert!(table.tracker.is_settled());
}

#[test]
fn no_more_events_are_on_their_way_than_a_small_topic_keeps() {
    let mut table = TestTable::new();
    let names: Vec<String> = (0..3 * MAX_EVENTS_IN_TRANSIT).map(|n| format!("{n:06}")).collect();
    let files: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    table.pass(&files);
    let first = table.tracker.take_events(usize::MAX);
    assert_eq!(first.len(), MAX_EVENTS_IN_TRANSIT);
    assert!(table.tracker.take_events(usize::MAX).is_empty());
    // All change while their first events are on their way.
    let changed: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 2)).collect();
    table.pass(&changed);
    for event in &first {
        table.apply(event);
    }
    table.settle();
    while !table.tracker.is_settled() {
        table.store();
    }
    assert_eq!(table.counts(), [names.len(), names.len(), 0, 0]);
}

#[test]
fn pictures_are_named_by_id_path_or_end_of_it() {
    let mut table = TestTable::new();
    table.pass(&[("photos/2024/a.jpg", 1), ("photos/2025/a.jpg", 1), ("photos/b.jpg", 1)]);
    for (name, ids) in [
        ("photos/b.jpg", vec!["photos/b.jpg"]),
        ("b.jpg", vec!["photos/b.jpg"]),
        ("./2024/a.jpg", vec!["photos/2024/a.jpg"]),
        ("/p/photos/b.jpg", vec!["photos/b.jpg"]),
        ("jpg", vec![]),
    ] {
        assert_eq!(table.tracker.ids_named(name), ids, "{name}");
    }
    assert_eq!(table.tracker.ids_named("a.jpg").len(), 2);
}

#[test]
fn two_pictures_of_one_id_are_one_picture_and_one_failure() {
    let mut table = TestTable::new();
    let other = FoundItem { path: "/p/other".into(), ..found("a", 5) };
    table.tracker.begin_pass();
    table.tracker.observe(0, found("a", 1));
    table.tracker.observe(0, other);
    table.tracker.finish_pass(&[(true, "")]).unwrap();
    table.store();
    assert_eq!(table.counts(), [2, 1, 1, 1]);
}
