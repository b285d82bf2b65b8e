//! A table of which one file has arbitrary bytes, under a name with the right checksum, as a faulty
//! writer would leave it: readers accept it or return an error, and never panic.
//!
//! The first byte chooses the file: a data file, or the commit that adds it. With
//! BSAP_SEEDS=<folder>, the files of a small table are written there as seeds of the corpus.

#![no_main]

#[path = "../panic_filter.rs"]
mod panic_filter;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bsap::record::{
    Embedding, ImageId, ImageRow, SequenceKey, StoredImage, TopicPartition, VersionOrdering,
};
use bsap::store::Store;
use bsap::table::{Follower, Generation, PartitionBatch, TableWriter};
use futures::TryStreamExt;
use libfuzzer_sys::fuzz_target;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
});
/// The files of a small table: path and content.
static TABLE_FILES: LazyLock<Vec<(Path, Vec<u8>)>> =
    LazyLock::new(|| RUNTIME.block_on(write_small_table()));

fn test_generation() -> Generation {
    Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, VersionOrdering::Sequence)
}

/// Writes a table of three rows, one of them a tombstone, and returns its files.
async fn write_small_table() -> Vec<(Path, Vec<u8>)> {
    let store = Store::in_memory();
    let mut writer = TableWriter::open(&store, &test_generation(), 1).await.expect("a table");
    let row = |offset: i64| ImageRow {
        image_id: ImageId::new(format!("image-{offset}")).expect("an id"),
        sequence: SequenceKey::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: (offset != 1).then(|| StoredImage {
            uri: Some("s3://bucket/a.jpg".into()),
            content_hash: "00".repeat(32),
            byte_size: 9,
            width: 1,
            height: 1,
            attributes: BTreeMap::from([("colour".into(), "red".into())]),
            embedding: Embedding::from_unit_vector(&[0.5; 4]),
            statistics: BTreeMap::new(),
            decoding: None,
        }),
    };
    let partition = TopicPartition { topic: "images".into(), number: 0 };
    let rows = (0..3).map(|offset| (offset, row(offset))).collect();
    let batch = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition,
        expected_position: None,
        next_offset: 3,
        rows,
    };
    writer.append(vec![batch], &CancellationToken::new()).await.expect("appended");
    let objects = store.object_store();
    let listed: Vec<_> = objects.list(None).try_collect().await.expect("listed");
    let mut files = Vec::new();
    for file in listed {
        let bytes = objects.get(&file.location).await.expect("a listed file").bytes().await;
        files.push((file.location, bytes.expect("read").to_vec()));
    }
    files
}

/// Reads the table with `content` instead of its data file, or of the commit that adds it.
async fn read_table_with(is_commit: bool, content: &[u8]) {
    let store = Store::in_memory();
    let checksum = Sha256::digest(content);
    let digits: String = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("0000000000000000-{digits}.parquet");
    for (path, bytes) in TABLE_FILES.iter() {
        let is_commit_file = path.as_ref().ends_with("00000000000000000001.json");
        let (path, bytes) = match path.extension() {
            Some("parquet") if !is_commit => {
                let (folder, _) = path.as_ref().rsplit_once('/').expect("in a folder");
                (Path::from(format!("{folder}/{name}")), content.to_vec())
            }
            _ if is_commit_file && is_commit => (path.clone(), content.to_vec()),
            _ if is_commit_file => {
                (path.clone(), rename_file_in_commit(bytes, &name, content.len()))
            }
            _ => (path.clone(), bytes.clone()),
        };
        store.object_store().put(&path, bytes.into()).await.expect("put");
    }
    let mut follower = match Follower::open(&store, &test_generation()).await {
        Ok(follower) => follower,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    if let Err(error) = follower.next(&|_, _| {}).await {
        assert!(!error.to_string().is_empty());
    }
}

/// Returns the commit with the name and the size in bytes of its data file replaced.
fn rename_file_in_commit(commit: &[u8], name: &str, size: usize) -> Vec<u8> {
    let text = std::str::from_utf8(commit).expect("JSON lines");
    let lines = text.lines().map(|line| {
        let mut action: serde_json::Value = serde_json::from_str(line).expect("JSON");
        if let Some(add) = action.get_mut("add") {
            add["path"] = name.into();
            add["size"] = size.into();
        }
        format!("{action}\n")
    });
    lines.collect::<String>().into_bytes()
}

fn write_seeds(folder: &std::ffi::OsStr) {
    for (path, bytes) in TABLE_FILES.iter() {
        let name = path.filename().expect("a name");
        let is_commit = name == "00000000000000000001.json";
        if is_commit || path.extension() == Some("parquet") {
            let name = if is_commit { "commit" } else { "rows" };
            let seed = [&[u8::from(is_commit)], bytes.as_slice()].concat();
            std::fs::write(std::path::Path::new(folder).join(name), seed).expect("written");
        }
    }
}

fuzz_target!(init: {
    // The library panics at some invalid schemas; bsap catches these panics.
    panic_filter::ignore_panics_of("arrow-ipc");
    // Initialised here because it must not run within another `block_on` of the runtime.
    LazyLock::force(&TABLE_FILES);
    if let Some(folder) = std::env::var_os("BSAP_SEEDS") {
        write_seeds(&folder);
    }
}, |data: &[u8]| {
    let Some((selector, content)) = data.split_first() else { return };
    RUNTIME.block_on(read_table_with(selector & 1 == 1, content));
});
