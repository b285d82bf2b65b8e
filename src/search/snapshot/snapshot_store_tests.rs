//! Tests of the snapshot store.

use std::sync::Mutex;

use super::{ServingSnapshot, SnapshotStore};
use crate::record::ImageRow;
use crate::search::testing::{
    clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
};
use crate::table::{SnapshotPart, TableChanges};

/// Applies one commit, and returns the live images as `id@sequence`.
async fn apply_rows(snapshots: &SnapshotStore, version: u64, rows: Vec<ImageRow>) -> Vec<String> {
    let changes = TableChanges {
        table_version: version,
        is_full_snapshot: version == 1,
        part: SnapshotPart::All,
        rows,
    };
    snapshots.apply_changes(changes).await.unwrap();
    let newest = snapshots.newest();
    let mut ids = Vec::new();
    for (image, embedding) in newest.images_with_embeddings() {
        let id = image.image_id.as_str();
        assert_eq!(newest.embedding(id).unwrap(), embedding);
        assert_eq!(newest.metadata(id).unwrap().version, image.version);
        let sequence: u64 = image.version.sequence.as_str().parse().unwrap();
        ids.push(format!("{id}@{sequence}"));
    }
    assert_eq!(newest.len(), ids.len());
    ids.sort();
    ids
}

fn upsert(id: &str, sequence: u64) -> ImageRow {
    sample_row(id, sequence, Some(clip_like_embedding(sequence, 8)))
}

#[tokio::test]
async fn the_newest_version_of_each_image_is_live_for_any_order_of_rows() {
    let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
    assert!(!snapshots.is_ready());
    let first = vec![upsert("a", 2), upsert("b", 1), upsert("a", 1)];
    assert_eq!(apply_rows(&snapshots, 1, first).await, ["a@2", "b@1"]);
    assert!(snapshots.is_ready());
    let second = vec![upsert("c", 1), sample_row("a", 3, None)];
    assert_eq!(apply_rows(&snapshots, 2, second).await, ["b@1", "c@1"]);
    // An upsert that is older than the delete does not bring the image back.
    assert_eq!(apply_rows(&snapshots, 3, vec![upsert("a", 2)]).await, ["b@1", "c@1"]);
    assert!(snapshots.newest().tombstone_bytes > 100);
    assert_eq!(apply_rows(&snapshots, 4, vec![upsert("a", 4)]).await, ["a@4", "b@1", "c@1"]);
    assert_eq!(snapshots.newest().tombstone_bytes, 0);
}

#[tokio::test]
async fn the_newest_images_are_those_that_were_embedded_last_and_are_live() {
    let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
    let embedded_at = |id: &str, sequence: u64, seconds: i64| ImageRow {
        embedded_at: chrono::DateTime::from_timestamp(seconds, 0).unwrap(),
        ..upsert(id, sequence)
    };
    let first = vec![embedded_at("a", 1, 40), embedded_at("b", 1, 10), embedded_at("c", 1, 30)];
    apply_rows(&snapshots, 1, first).await;
    // In other chunks: an image embedded again, and the newest image deleted.
    apply_rows(&snapshots, 2, vec![embedded_at("b", 2, 50), embedded_at("d", 1, 20)]).await;
    apply_rows(&snapshots, 3, vec![sample_row("a", 2, None)]).await;
    let newest = |limit| {
        let images = snapshots.newest().newest_images(limit);
        images.iter().map(|image| image.image_id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(newest(2), ["b", "c"]);
    assert_eq!(newest(9), ["b", "c", "d"]);
    assert_eq!(snapshots.newest().images().count(), 3);
}

#[tokio::test]
async fn a_reader_keeps_its_snapshot() {
    let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
    apply_rows(&snapshots, 1, vec![upsert("a", 1)]).await;
    let held = snapshots.newest();
    apply_rows(&snapshots, 2, vec![sample_row("a", 2, None)]).await;
    assert_eq!((held.table_version, held.len(), held.images_with_embeddings().count()), (1, 1, 1));
    assert_eq!(snapshots.newest().len(), 0);
}

/// Metadata and statistics survive the merging of chunks, and small chunks stay few.
#[tokio::test]
async fn many_small_commits_leave_few_chunks() {
    let snapshots =
        SnapshotStore::new(sample_serving_snapshot(vec![sample_prompt_set("one", 8)]), u64::MAX);
    apply_rows(&snapshots, 1, Vec::new()).await;
    for version in 2..200 {
        let mut row = upsert(&format!("i{:03}", version % 150), version);
        if let Some(image) = &mut row.image {
            image.uri = version.is_multiple_of(2).then(|| format!("file:///{version}"));
            image.content_hash = padded_hex(version);
            image.attributes = [("n".to_owned(), version.to_string())].into();
        }
        apply_rows(&snapshots, version, vec![row]).await;
    }
    let newest = snapshots.newest();
    assert_eq!(newest.len(), 150);
    assert!(newest.chunks.len() <= 9, "{} chunks", newest.chunks.len());
    for (image, embedding) in newest.images_with_embeddings() {
        let version: u64 = image.version.sequence.as_str().parse().unwrap();
        assert_eq!(image.uri, version.is_multiple_of(2).then(|| format!("file:///{version}")));
        assert_eq!(image.content_hash, padded_hex(version));
        assert_eq!(image.attributes["n"], version.to_string());
        let set = &newest.serving_snapshot.prompt_sets[0];
        let statistics = newest.statistics(image.image_id.as_str(), &set.statistics_key);
        assert_eq!(statistics, set.compute_statistics(&embedding), "to the bit");
    }
}

fn padded_hex(n: u64) -> String {
    format!("{n:064x}")
}

#[tokio::test]
async fn a_new_configuration_replaces_the_old_one_atomically() {
    let snapshots =
        SnapshotStore::new(sample_serving_snapshot(vec![sample_prompt_set("one", 8)]), u64::MAX);
    let rows = (0..300).map(|i| upsert(&format!("i{i}"), i + 1)).collect();
    apply_rows(&snapshots, 1, rows).await;
    let held = snapshots.newest();
    let other = sample_prompt_set("two", 8);
    let next =
        ServingSnapshot { state_revision: 7, ..sample_serving_snapshot(vec![other.clone()]) };
    let reported = Mutex::new(0);
    snapshots.switch_serving(next, &|completed, _| *reported.lock().unwrap() = completed).unwrap();
    let newest = snapshots.newest();
    assert_eq!((newest.serving_snapshot.state_revision, *reported.lock().unwrap()), (7, 300));
    for (image, embedding) in newest.images_with_embeddings() {
        let id = image.image_id.as_str();
        assert_eq!(
            newest.statistics(id, &other.statistics_key),
            other.compute_statistics(&embedding)
        );
        let old = &held.serving_snapshot.prompt_sets[0].statistics_key;
        assert!(
            held.statistics(id, old).is_some()
                && held.statistics(id, &other.statistics_key).is_none()
        );
        assert!(
            newest.statistics(id, old).is_none(),
            "statistics of a set that is not served take no memory"
        );
    }
    // Commits that are applied during the switch, and the chunks that they merge, have both sets.
    let third = sample_prompt_set("three", 8);
    let next = ServingSnapshot {
        state_revision: 8,
        ..sample_serving_snapshot(vec![other.clone(), third.clone()])
    };
    let runtime = tokio::runtime::Handle::current();
    let store = snapshots.clone();
    let switch = move || {
        let apply_commit = |_, _| {
            let newest = store.newest().table_version;
            let rows = (0..200).map(|i| upsert(&format!("m{newest}-{i}"), i + 1)).collect();
            runtime.block_on(apply_rows(&store, newest + 1, rows));
        };
        store.switch_serving(next, &apply_commit).unwrap();
    };
    tokio::task::spawn_blocking(switch).await.unwrap();
    let newest = snapshots.newest();
    assert!(newest.len() > 300);
    for (image, embedding) in newest.images_with_embeddings() {
        let statistics = newest.statistics(image.image_id.as_str(), &third.statistics_key);
        assert_eq!(statistics, third.compute_statistics(&embedding), "{}", image.image_id.as_str());
    }
    // Later rows get the statistics of the served sets.
    apply_rows(&snapshots, newest.table_version + 1, vec![upsert("late", 1)]).await;
    assert!(snapshots.newest().statistics("late", &other.statistics_key).is_some());
}

#[tokio::test]
async fn a_whole_table_loaded_in_parts_is_served_after_the_last_part() {
    let (one, two) = (sample_prompt_set("one", 8), sample_prompt_set("two", 8));
    let snapshots = SnapshotStore::new(sample_serving_snapshot(vec![one.clone()]), u64::MAX);
    apply_rows(&snapshots, 1, vec![upsert("gone", 1), upsert("i1", 1)]).await;
    let part = async |part, ids: std::ops::Range<u64>| {
        let mut rows: Vec<ImageRow> = ids.clone().map(|i| upsert(&format!("i{i}"), 9)).collect();
        rows.push(sample_row(&format!("deleted-{}", ids.start), 9, None));
        let changes = TableChanges { table_version: 5, is_full_snapshot: true, part, rows };
        snapshots.apply_changes(changes).await.unwrap();
        (snapshots.newest().table_version, snapshots.newest().len())
    };
    assert_eq!(part(SnapshotPart::First, 0..50).await, (1, 2), "a load that is abandoned");
    assert_eq!(part(SnapshotPart::First, 0..100).await, (1, 2));
    // The configuration changes during the load.
    let next = ServingSnapshot { state_revision: 7, ..sample_serving_snapshot(vec![two.clone()]) };
    snapshots.switch_serving(next, &|_, _| {}).unwrap();
    let serial = snapshots.newest().serial;
    assert_eq!(part(SnapshotPart::Middle, 100..200).await, (1, 2));
    assert_eq!(part(SnapshotPart::Last, 200..300).await, (5, 300));
    let newest = snapshots.newest();
    assert_eq!((newest.serving_snapshot.state_revision, newest.serial), (7, serial + 1));
    for (image, embedding) in newest.images_with_embeddings() {
        let id = image.image_id.as_str();
        assert_eq!(
            newest.statistics(id, &two.statistics_key),
            two.compute_statistics(&embedding),
            "{id}"
        );
        assert!(newest.statistics(id, &one.statistics_key).is_none());
    }
    // There are tombstones of the deletes of every part.
    let late = (0..300).step_by(100).map(|i| upsert(&format!("deleted-{i}"), 8)).collect();
    assert_eq!(apply_rows(&snapshots, 6, late).await.len(), 300);
}

#[tokio::test]
async fn changes_over_the_memory_limit_are_rejected_with_figures_and_the_old_snapshot_stays() {
    let snapshots = SnapshotStore::new(sample_serving_snapshot(Vec::new()), 4 << 20);
    apply_rows(&snapshots, 1, vec![upsert("a", 1)]).await;
    let rows_over_limit = (0..2000)
        .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, 1024))))
        .collect();
    let error = snapshots
        .apply_changes(TableChanges {
            table_version: 2,
            is_full_snapshot: false,
            part: SnapshotPart::All,
            rows: rows_over_limit,
        })
        .await;
    let error = error.unwrap_err();
    assert_eq!((error.image_count, error.limit_mib), (2001, 4));
    assert!(error.to_string().contains("search.memory_mib"), "{error}");
    assert_eq!((snapshots.newest().table_version, snapshots.newest().len()), (1, 1));

    // Prompt sets over the limit are rejected before anything is computed.
    let rows = || (0..1000).map(|i| upsert(&format!("i{i}"), 1)).collect::<Vec<_>>();
    let large = SnapshotStore::new(sample_serving_snapshot(Vec::new()), u64::MAX);
    apply_rows(&large, 1, rows()).await;
    let limit = large.newest().memory_usage().total_bytes() + 50_000;
    let small = SnapshotStore::new(sample_serving_snapshot(Vec::new()), limit);
    apply_rows(&small, 1, rows()).await;
    let sets = (0..4).map(|i| sample_prompt_set(&format!("set{i}"), 8)).collect();
    let error = small
        .switch_serving(sample_serving_snapshot(sets), &|_, _| panic!("statistics were computed"))
        .unwrap_err();
    assert_eq!(error.image_count, 1000);
    apply_rows(&small, 2, vec![upsert("late", 1)]).await;
    assert_eq!(small.newest().chunks.iter().map(|c| c.statistics.len()).sum::<usize>(), 0);
}

/// The documented memory per row, at 512 dimensions with one prompt set.
#[tokio::test]
async fn a_row_takes_no_more_memory_than_documented() {
    let snapshots =
        SnapshotStore::new(sample_serving_snapshot(vec![sample_prompt_set("one", 512)]), u64::MAX);
    let rows = 5000;
    let upserts = (0..rows)
        .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, 512))))
        .collect();
    apply_rows(&snapshots, 1, upserts).await;
    let memory = snapshots.newest().memory_usage();
    let bytes_per_row = memory.other_bytes as f64 / rows as f64;
    assert!(bytes_per_row <= 3.5 * 512.0 + 150.0, "{bytes_per_row} bytes per row");
    let estimated = crate::search::snapshot::memory_required_bytes(rows, 512, 1) as f64;
    assert!(
        (estimated / memory.other_bytes as f64 - 1.0).abs() < 0.05,
        "{estimated} {}",
        memory.other_bytes
    );
}
